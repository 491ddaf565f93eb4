#include <algorithm>
#include <optional>
#include <tuple>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "../checks.h"
#include "compact_active.cuh"

namespace tokenexit {
namespace {

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
  TORCH_ERROR_CODE_CHECK(
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
