#pragma once
// The kernel of compact_active; tests/ops/simt runs it on a CPU.
#include <cub/warp/warp_reduce.cuh>
#include <cub/warp/warp_scan.cuh>
#include <cuda/atomic>

#include "../active.h"

namespace tokenexit {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;  // and sentences of a tile
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kAhead = 4;  // steps of a warp whose loads wait together

using State = cuda::atomic_ref<uint64_t, cuda::thread_scope_device>;

// The sum of the counts of all tiles before this one, told to the tiles behind it; by one warp.
__device__ inline int64_t sum_before(uint64_t* states, int64_t tile, int64_t count, int lane) {
  using Reduce = cub::WarpReduce<int64_t>;
  __shared__ typename Reduce::TempStorage scratch;
  const auto relaxed = cuda::memory_order_relaxed;
  if (lane == 0 && tile > 0) State(states[tile]).store(kCounted | count, relaxed);
  int64_t sum = 0;
  uint32_t summed = 0;
  for (int64_t nearest = tile - 1; nearest >= 0 && summed == 0; nearest -= kWarpSize) {
    uint64_t state = kSummed;  // of what lies before the first tile
    do {
      if (nearest >= lane) state = State(states[nearest - lane]).load(relaxed);
    } while (__any_sync(kAllLanes, state == 0));
    summed = __ballot_sync(kAllLanes, is_summed(state));
    sum += Reduce(scratch).Sum(looked_back(state, lane, summed));  // right in lane 0
    __syncwarp();
  }
  if (lane == 0) State(states[tile]).store(kSummed | (sum + count), relaxed);
  return __shfl_sync(kAllLanes, sum, 0);
}

// A lane's tokens of kAhead steps of its warp.
struct Tokens {
  int64_t token[kAhead];
  bool special[kAhead], staying[kAhead];  // staying: of a word that stays

  __device__ inline Tokens(const int64_t* __restrict__ active, int64_t begin, int64_t end,
                           const int64_t* __restrict__ word_of_token,
                           const int64_t* __restrict__ exit_layer) {
    int64_t word[kAhead];
    bool listed[kAhead];
    for (int k = 0; k < kAhead; ++k) {
      listed[k] = begin + k * kWarpSize < end;
      token[k] = listed[k] ? active[begin + k * kWarpSize] : 0;
    }
    for (int k = 0; k < kAhead; ++k) word[k] = listed[k] ? word_of_token[token[k]] : -1;
    for (int k = 0; k < kAhead; ++k) {
      special[k] = listed[k] && word[k] < 0;
      staying[k] = stays(word[k], exit_layer, false);
    }
  }
};

// One pass. A block takes a tile of sentences, a warp one of them: it counts what stays, learns
// where that begins, and copies it. Places come from prefix sums alone, so the result is the same
// in every run. `states`, zeros: a ticket, how many blocks are done, then a word for each tile;
// the last block leaves zeros again. cu_tokens null: no list of seen tokens.
__global__ inline void __launch_bounds__(kThreads, 4) compact_active_kernel(
    const int64_t* __restrict__ active, const int64_t* __restrict__ cu_active,
    const int64_t* __restrict__ word_of_token, const int64_t* __restrict__ exit_layer,
    const int64_t* __restrict__ cu_tokens, int64_t* __restrict__ active_out,
    int64_t* __restrict__ cu_out, int64_t* __restrict__ seen_out, int64_t* __restrict__ cu_seen_out,
    uint64_t* states, int64_t num_active, int64_t num_seen, int64_t num_sentences) {
  using Scan = cub::WarpScan<int64_t>;
  __shared__ typename Scan::TempStorage scratch;
  __shared__ int64_t counts[kWarps], ends[kWarps], my_tile, done;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;

  // Not blockIdx: a tile waits for those before it, which must have begun.
  if (threadIdx.x == 0) my_tile = State(states[0]).fetch_add(1, cuda::memory_order_relaxed);
  __syncthreads();
  const int64_t b = my_tile * kWarps + warp;
  const int64_t first = b < num_sentences ? cu_active[b] : 0;
  const int64_t last = b < num_sentences ? cu_active[b + 1] : 0;
  int64_t of_words = 0, specials = 0;
  for (int64_t i = first; i < last; i += kAhead * kWarpSize) {
    const Tokens mine(active, i + lane, last, word_of_token, exit_layer);
    for (int k = 0; k < kAhead; ++k) {
      of_words += __popc(__ballot_sync(kAllLanes, mine.staying[k]));
      specials += __popc(__ballot_sync(kAllLanes, mine.special[k]));
    }
  }
  const bool shown = cu_tokens != nullptr && b < num_sentences && of_words > 0;
  const int64_t first_seen = shown ? cu_tokens[b] : 0;
  const int64_t seen = shown ? cu_tokens[b + 1] - first_seen : 0;
  if (lane == 0) counts[warp] = both(num_kept(of_words, specials), seen);
  __syncthreads();

  if (warp == 0) {
    int64_t sum, total;
    Scan(scratch).InclusiveSum(lane < kWarps ? counts[lane] : 0, sum, total);
    sum += sum_before(states + 2, my_tile, total, lane);
    if (lane < kWarps) ends[lane] = sum;
  }
  __syncthreads();

  const int64_t end = ends[warp], begin = end - counts[warp];
  if (lane == 0 && b < num_sentences) {
    cu_out[b + 1] = kept_of(end);
    if (cu_tokens != nullptr) cu_seen_out[b + 1] = seen_of(end);
  }
  for (int64_t i = lane; i < seen; i += kWarpSize) seen_out[seen_of(begin) + i] = first_seen + i;
  int64_t to = kept_of(begin);
  for (int64_t i = first; i < last; i += kAhead * kWarpSize) {
    const Tokens mine(active, i + lane, last, word_of_token, exit_layer);
    for (int k = 0; k < kAhead; ++k) {
      const bool stay = mine.staying[k] || (mine.special[k] && of_words > 0);
      const unsigned staying = __ballot_sync(kAllLanes, stay);
      if (stay) active_out[to + __popc(staying & ((1u << lane) - 1))] = mine.token[k];
      to += __popc(staying);
    }
  }
  if (threadIdx.x == 0 && my_tile == 0) {
    cu_out[0] = 0;
    if (cu_tokens != nullptr) cu_seen_out[0] = 0;
  }
  if (my_tile + 1 == gridDim.x) {
    const int64_t last_end = ends[kWarps - 1];
    int64_t i = kept_of(last_end) + threadIdx.x;
    for (; i < num_active; i += kThreads) active_out[i] = 0;
    for (i = seen_of(last_end) + threadIdx.x; i < num_seen; i += kThreads) seen_out[i] = 0;
  }
  // Whoever is last here has seen all others finish with the states.
  if (threadIdx.x == 0) done = State(states[1]).fetch_add(1, cuda::memory_order_acq_rel) + 1;
  __syncthreads();
  if (done < gridDim.x) return;
  for (int64_t i = threadIdx.x; i < gridDim.x + 2; i += kThreads) states[i] = 0;
}

}  // namespace tokenexit
