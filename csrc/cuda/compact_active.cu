#include <tuple>

#include <cub/block/block_scan.cuh>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../active.h"
#include "../checks.h"

namespace tokenexit {
namespace {

constexpr int kThreads = 512;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kAllLanes = 0xffffffff;

// One block. A warp takes a sentence, first to count, then to copy, with a scan of the counts in
// between: places come from prefix sums alone, so the result is the same in every run.
__global__ void __launch_bounds__(kThreads) compact_active_kernel(
    const int64_t* __restrict__ active, const int64_t* __restrict__ cu_active,
    const int64_t* __restrict__ word_of_token, const int64_t* __restrict__ exit_layer,
    int64_t* __restrict__ active_out, int64_t* cu_out, int64_t num_active, int64_t num_sentences) {
  using Scan = cub::BlockScan<int64_t, kThreads>;
  __shared__ typename Scan::TempStorage scratch;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;

  for (int64_t b = warp; b < num_sentences; b += kWarps) {
    const int64_t last = cu_active[b + 1];
    int64_t words = 0, specials = 0;
    for (int64_t tile = cu_active[b]; tile < last; tile += kWarpSize) {
      const bool listed = tile + lane < last;
      const int64_t word = listed ? word_of_token[active[tile + lane]] : -1;
      words += __popc(__ballot_sync(kAllLanes, listed && stays(word, exit_layer, false)));
      specials += __popc(__ballot_sync(kAllLanes, listed && word < 0));
    }
    if (lane == 0) cu_out[b + 1] = words > 0 ? words + specials : 0;
  }
  if (threadIdx.x == 0) cu_out[0] = 0;
  __syncthreads();

  int64_t num_kept = 0;
  for (int64_t tile = 0; tile < num_sentences; tile += kThreads) {
    const int64_t b = tile + threadIdx.x;
    const int64_t count = b < num_sentences ? cu_out[b + 1] : 0;
    int64_t sum, total;
    Scan(scratch).InclusiveSum(count, sum, total);
    if (b < num_sentences) cu_out[b + 1] = num_kept + sum;
    num_kept += total;
    __syncthreads();  // scratch is used again, cu_out is read below
  }

  for (int64_t b = warp; b < num_sentences; b += kWarps) {
    const int64_t last = cu_active[b + 1];
    int64_t to = cu_out[b];
    const bool open = cu_out[b + 1] > to;
    for (int64_t tile = cu_active[b]; tile < last; tile += kWarpSize) {
      const bool listed = tile + lane < last;
      const int64_t token = listed ? active[tile + lane] : 0;
      const bool stay = listed && stays(word_of_token[token], exit_layer, open);
      const unsigned staying = __ballot_sync(kAllLanes, stay);
      if (stay) active_out[to + __popc(staying & ((1u << lane) - 1))] = token;
      to += __popc(staying);
    }
  }
  for (int64_t i = num_kept + threadIdx.x; i < num_active; i += kThreads) active_out[i] = 0;
}

std::tuple<Tensor, Tensor> compact_active(
    const Tensor& active_, const Tensor& cu_active_, const Tensor& word_of_token_,
    const Tensor& exit_layer_) {
  const int64_t num_active = active_.numel(), num_sentences = cu_active_.numel() - 1;
  STD_TORCH_CHECK(num_sentences >= 0, "got an empty cu_active; expected [B+1]");
  for (const Tensor* other : {&active_, &cu_active_, &word_of_token_, &exit_layer_}) {
    STD_TORCH_CHECK(other->device() == active_.device(), "expected all tensors on one device");
  }
  const torch::stable::accelerator::DeviceGuard guard(active_.get_device_index());
  const Tensor active = checked_vector(active_, "active", num_active);
  const Tensor cu_active = checked_vector(cu_active_, "cu_active", num_sentences + 1);
  const Tensor word_of_token =
      checked_vector(word_of_token_, "word_of_token", word_of_token_.numel());
  const Tensor exit_layer = checked_vector(exit_layer_, "exit_layer", exit_layer_.numel());
  Tensor active_out = torch::stable::empty_like(active);
  Tensor cu_out = torch::stable::empty_like(cu_active);

  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(active.get_device_index(), &stream));
  compact_active_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      active.const_data_ptr<int64_t>(), cu_active.const_data_ptr<int64_t>(),
      word_of_token.const_data_ptr<int64_t>(), exit_layer.const_data_ptr<int64_t>(),
      active_out.mutable_data_ptr<int64_t>(), cu_out.mutable_data_ptr<int64_t>(), num_active,
      num_sentences);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {active_out, cu_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CUDA, m) {
  m.impl("compact_active", TORCH_BOX(&compact_active));
}

}  // namespace tokenexit
