#pragma once
// Checks that keep the ops inside their tensors' memory. A user meets those of tokenexit.ops first.
#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace tokenexit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool on_cpu(const Tensor& tensor) { return tensor.is_cpu(); }
inline bool on_cpu(const std::optional<Tensor>& tensor) { return !tensor || tensor->is_cpu(); }
inline bool on_cpu(const std::vector<Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& x) { return x.is_cpu(); });
}

// Before a pointer is read: all of an op's tensors are where its code runs.
template <class... Tensors>
void check_cpu(const Tensors&... tensors) {
  STD_TORCH_CHECK(
      (on_cpu(tensors) && ...), "got a tensor on another device; expected all on the CPU");
}

inline bool is_bf16(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::BFloat16;
}

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

// A relative-position bias of attention, [heads, 2 reach + 1], and each query's position: checked,
// with the tensors it points into.
struct CheckedBias {
  Tensor table, positions;
  const float* entries = nullptr;  // null for none
  const int64_t* position = nullptr;
  int64_t reach = 0;

  CheckedBias(
      const std::optional<Tensor>& bias, const std::optional<Tensor>& positions_, int64_t heads,
      int64_t queries) {
    if (!bias) return;
    STD_TORCH_CHECK(
        bias->dim() == 2 && bias->size(0) == heads && bias->size(1) % 2 == 1 &&
            bias->scalar_type() == ScalarType::Float && positions_,
        "got a bias of ", bias->dim(), " dimensions and ", bias->numel(), " elements; expected [",
        heads, ", 2R+1] of Float, with positions");
    table = torch::stable::contiguous(*bias);
    positions = checked_vector(*positions_, "positions", queries);
    entries = table.const_data_ptr<float>();
    position = positions.const_data_ptr<int64_t>();
    reach = table.size(1) / 2;
  }
};

}  // namespace tokenexit
