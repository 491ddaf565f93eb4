#pragma once
// Checks that keep the ops inside their tensors' memory. A user meets those of tokenexit.ops first.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace tokenexit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `tensor`, contiguous, if it is a vector of that size and dtype.
inline Tensor checked_vector(
    const Tensor& tensor, const char* name, int64_t size, ScalarType dtype = ScalarType::Long) {
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == dtype,
      "got ", name, " of ", tensor.dim(), " dimensions, ", tensor.numel(), " elements and dtype ",
      torch::headeronly::toString(tensor.scalar_type()), "; expected [", size, "] of ",
      torch::headeronly::toString(dtype));
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_offsets(const int64_t* offsets, int64_t num_sentences, const char* name) {
  STD_TORCH_CHECK(offsets[0] == 0, name, " starts at ", offsets[0], "; expected 0");
  for (int64_t b = 0; b < num_sentences; ++b) {
    STD_TORCH_CHECK(
        offsets[b] <= offsets[b + 1], name, " falls from ", offsets[b], " to ", offsets[b + 1],
        " at sentence ", b, "; expected ascending offsets");
  }
}

}  // namespace tokenexit
