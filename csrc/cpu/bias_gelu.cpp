#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "panels.h"

namespace tokenexit {
namespace {

struct Rows {
  template <class S>
  static INLINE void run(
      const float* x, const float* bias, float* out, int64_t width, Gelu kind, int64_t begin,
      int64_t end) {
    const int64_t whole = width / S::WIDTH * S::WIDTH;
    for (int64_t at = begin * width; at < end * width; at += width) {
      for (int64_t c = 0; c < whole; c += S::WIDTH) {
        S::store(out + at + c, gelu<S>(kind, S::load(x + at + c) + S::load(bias + c)));
      }
      for (int64_t c = whole; c < width; ++c) {
        out[at + c] = gelu<S>(kind, typename S::Vec{} + (x[at + c] + bias[c]))[0];
      }
    }
  }
};

Tensor bias_gelu(const Tensor& x_, const Tensor& bias_, bool tanh) {
  check_cpu(x_, bias_);
  STD_TORCH_CHECK(
      x_.dim() == 2 && x_.scalar_type() == ScalarType::Float, "got x of ", x_.dim(),
      " dimensions; expected [A, f] of Float");
  const Tensor x = torch::stable::contiguous(x_);
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor bias = checked_vector(bias_, "bias", width, ScalarType::Float);
  Tensor out = torch::stable::new_empty(x, {rows, width});
  const float *from = x.const_data_ptr<float>(), *add = bias.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const Gelu kind = tanh ? Gelu::tanh : Gelu::exact;
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, [=](int64_t begin, int64_t end) {
    dispatch<Rows>(from, add, to, width, kind, begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) { m.impl("bias_gelu", TORCH_BOX(&bias_gelu)); }

}  // namespace tokenexit
