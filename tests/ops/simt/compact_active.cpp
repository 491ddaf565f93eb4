// The kernel of csrc/cuda/compact_active.cu, launched as there; all arrays as that gets them.
#include "cuda/compact_active.cuh"
#include "simt.h"

extern "C" bool run(
    const int64_t* active, const int64_t* cu_active, const int64_t* word_of_token,
    const int64_t* exit_layer, const int64_t* cu_tokens, int64_t* active_out, int64_t* cu_out,
    int64_t* seen_out, int64_t* cu_seen_out, uint64_t* states_left, int64_t num_active,
    int64_t num_seen, int64_t num_sentences, int64_t launches) {
  using namespace tokenexit;
  const int64_t tiles = std::max<int64_t>(1, (num_sentences + kWarps - 1) / kWarps);
  simt::Shared<int64_t> kept(num_active), cu(num_sentences + 1), seen(num_seen),
      cu_seen(num_sentences + 1);
  simt::Shared<uint64_t> states(tiles + 2);
  bool well = true;
  for (int64_t i = 0; i < launches; ++i) {
    well &= simt::launch(tiles, kThreads, [&] {
      compact_active_kernel(
          active, cu_active, word_of_token, exit_layer, cu_tokens, kept.data, cu.data, seen.data,
          cu_seen.data, states.data, num_active, num_seen, num_sentences);
    });
  }
  kept.give_back(active_out);
  cu.give_back(cu_out);
  if (cu_tokens != nullptr) {
    seen.give_back(seen_out);
    cu_seen.give_back(cu_seen_out);
  }
  states.give_back(states_left);
  return well;
}
