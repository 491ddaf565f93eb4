#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "bf16.h"
#include "ops.h"
#include "panels.h"

namespace tokenexit {
namespace {

struct Problem {
  const void* x;
  bool bf16;
  const int64_t* index;
  const float *weight, *bias;
  float* out;
  int64_t rows, in, features;

  // Row i in fp32; `copy` has room for it.
  template <class S>
  INLINE const float* row(int64_t i, float* copy) const {
    const int64_t at = (index ? index[i] : i) * in;
    if (!bf16) return static_cast<const float*>(x) + at;
    floats_of<S>(static_cast<const uint16_t*>(x) + at, in, copy);
    return copy;
  }
};

// 16 rows at a time: they are few, or the features are.
struct Panel {
  template <class S>
  static INLINE void run(const Problem* p, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* x = scratch.get((2 * p->in + p->features) * LANES);
    float *y = x + p->in * LANES, *rows = y + p->features * LANES;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * LANES, lanes = std::min(LANES, p->rows - first);
      pack_panel<S>([&](int64_t i) { return p->row<S>(first + i, rows + i * p->in); }, lanes, p->in, x);
      product<S>(p->weight, nullptr, p->in, x, lanes, y, p->features, 0, p->features, {p->bias});
      unpack_panel<S>(
          y, p->features, [&](int64_t i) { return p->out + (first + i) * p->features; }, 0, lanes);
      float* out = p->out + first * p->features;
      if (p->bf16) round_to_bf16<S>(out, lanes * p->features);
    }
  }
};

Tensor linear_op(const Tensor& x_, const Tensor& weight_, const Tensor& bias_) {
  check_cpu(x_, weight_, bias_);
  STD_TORCH_CHECK(
      x_.dim() == 2 && weight_.dim() == 2 && x_.size(1) == weight_.size(1) &&
          (x_.scalar_type() == ScalarType::Float || is_bf16(x_)) &&
          weight_.scalar_type() == x_.scalar_type(),
      "got x of ", x_.dim(), " and weight of ", weight_.dim(),
      " dimensions; expected [A, K] and [N, K], both of Float or BFloat16");
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  const int64_t rows = x.size(0), features = weight.size(0);
  const Tensor bias = checked_vector(bias_, "bias", features, x.scalar_type());
  Tensor out = torch::stable::new_empty(x, {rows, features});
  if (!is_bf16(x)) {
    linear(x.const_data_ptr(), false, nullptr, weight.const_data_ptr<float>(),
           bias.const_data_ptr<float>(), out.mutable_data_ptr<float>(), rows, x.size(1), features);
    return out;
  }
  std::vector<float> result(rows * features);
  linear(x.const_data_ptr(), true, nullptr, floats_of(weight).data(), floats_of(bias).data(),
         result.data(), rows, x.size(1), features);
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  dispatch<Narrow>(static_cast<const float*>(result.data()), rows * features, to);
  return out;
}

}  // namespace

void linear(
    const void* x, bool bf16, const int64_t* index, const float* weight, const float* bias,
    float* out, int64_t rows, int64_t in, int64_t features) {
  const Problem p = {x, bf16, index, weight, bias, out, rows, in, features};
  const int64_t grain = std::max<int64_t>(1, 30000 / std::max<int64_t>(1, in * features));
  torch::stable::parallel_for(0, panels_of(rows), grain, [&p](int64_t begin, int64_t end) {
    dispatch<Panel>(&p, begin, end);
  });
}

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) { m.impl("linear", TORCH_BOX(&linear_op)); }

}  // namespace tokenexit
