#include <algorithm>
#include <optional>
#include <tuple>

#include <cub/warp/warp_reduce.cuh>
#include <cub/warp/warp_scan.cuh>
#include <cuda/atomic>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../active.h"
#include "../checks.h"

namespace tokenexit {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;  // and sentences of a tile
constexpr unsigned kAllLanes = 0xffffffff;

using State = cuda::atomic_ref<uint64_t, cuda::thread_scope_device>;

// The sum of the counts of all tiles before this one, told to the tiles behind it; by one warp.
__device__ int64_t sum_before(uint64_t* states, int64_t tile, int64_t count, int lane) {
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

// One pass. A block takes a tile of sentences, a warp one of them: it counts what stays, learns
// where that begins, and copies it. Places come from prefix sums alone, so the result is the same
// in every run. `states`, zeros: a ticket, how many blocks are done, then a word for each tile;
// the last block leaves zeros again. cu_tokens null: no list of seen tokens.
__global__ void __launch_bounds__(kThreads, 4) compact_active_kernel(
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
  for (int64_t i = first; i < last; i += kWarpSize) {
    const bool listed = i + lane < last;
    const int64_t word = listed ? word_of_token[active[i + lane]] : -1;
    of_words += __popc(__ballot_sync(kAllLanes, listed && stays(word, exit_layer, false)));
    specials += __popc(__ballot_sync(kAllLanes, listed && word < 0));
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
  for (int64_t i = first; i < last; i += kWarpSize) {
    const bool listed = i + lane < last;
    const int64_t token = listed ? active[i + lane] : 0;
    const bool stay = listed && stays(word_of_token[token], exit_layer, of_words > 0);
    const unsigned staying = __ballot_sync(kAllLanes, stay);
    if (stay) active_out[to + __popc(staying & ((1u << lane) - 1))] = token;
    to += __popc(staying);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> compact_active(
    const Tensor& active_, const Tensor& cu_active_, const Tensor& word_of_token_,
    const Tensor& exit_layer_, const std::optional<Tensor>& cu_tokens_,
    std::optional<Tensor> scratch_) {
  const int64_t num_active = active_.numel(), num_sentences = cu_active_.numel() - 1;
  STD_TORCH_CHECK(num_sentences >= 0, "got an empty cu_active; expected [B+1]");
  const Tensor* cu_tokens_given = cu_tokens_ ? &*cu_tokens_ : &active_;
  const Tensor* scratch_given = scratch_ ? &*scratch_ : &active_;
  for (const Tensor* other :
       {&cu_active_, &word_of_token_, &exit_layer_, cu_tokens_given, scratch_given}) {
    STD_TORCH_CHECK(other->device() == active_.device(), "expected all tensors on one device");
  }
  const int64_t num_tokens = word_of_token_.numel(), num_seen = cu_tokens_ ? num_tokens : 0;
  STD_TORCH_CHECK(
      std::max(num_active, num_tokens) < int64_t{1} << kBits, "got ", num_active, " of ",
      num_tokens, " tokens; expected fewer than 2^31");
  const torch::stable::accelerator::DeviceGuard guard(active_.get_device_index());
  const Tensor active = checked_vector(active_, "active", num_active);
  const Tensor cu_active = checked_vector(cu_active_, "cu_active", num_sentences + 1);
  const Tensor word_of_token =
      checked_vector(word_of_token_, "word_of_token", num_tokens);
  const Tensor exit_layer = checked_vector(exit_layer_, "exit_layer", exit_layer_.numel());
  Tensor active_out = torch::stable::empty_like(active);
  Tensor cu_out = torch::stable::empty_like(cu_active);

  const int64_t num_tiles = std::max<int64_t>(1, (num_sentences + kWarps - 1) / kWarps);
  const int64_t num_offsets = cu_tokens_ ? num_sentences + 1 : 0;
  Tensor seen_out = torch::stable::new_empty(active, {num_seen});
  Tensor cu_seen_out = torch::stable::new_empty(active, {num_offsets});
  Tensor cu_tokens;
  const int64_t* begins = nullptr;
  if (cu_tokens_) {
    cu_tokens = checked_vector(*cu_tokens_, "cu_tokens", num_offsets);
    begins = cu_tokens.const_data_ptr<int64_t>();
  }

  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(active.get_device_index(), &current));
  const auto stream = static_cast<cudaStream_t>(current);
  Tensor states = scratch_ ? *scratch_ : torch::stable::new_empty(active, {num_tiles + 2});
  STD_TORCH_CHECK(
      states.is_contiguous() && states.scalar_type() == active.scalar_type() &&
          states.numel() >= num_tiles + 2,
      "got a scratch of ", states.numel(), " elements; expected at least ", num_tiles + 2,
      " of Long, contiguous");
  auto* words = reinterpret_cast<uint64_t*>(states.mutable_data_ptr<int64_t>());
  if (!scratch_) {
    STD_CUDA_CHECK(cudaMemsetAsync(words, 0, (num_tiles + 2) * sizeof(uint64_t), stream));
  }
  compact_active_kernel<<<num_tiles, kThreads, 0, stream>>>(
      active.const_data_ptr<int64_t>(), cu_active.const_data_ptr<int64_t>(),
      word_of_token.const_data_ptr<int64_t>(), exit_layer.const_data_ptr<int64_t>(), begins,
      active_out.mutable_data_ptr<int64_t>(), cu_out.mutable_data_ptr<int64_t>(),
      seen_out.mutable_data_ptr<int64_t>(), cu_seen_out.mutable_data_ptr<int64_t>(), words,
      num_active, num_seen, num_sentences);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {active_out, cu_out, seen_out, cu_seen_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CUDA, m) {
  m.impl("compact_active", TORCH_BOX(&compact_active));
}

}  // namespace tokenexit
