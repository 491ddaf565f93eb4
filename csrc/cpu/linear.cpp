#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "ops.h"
#include "panels.h"

namespace tokenexit {
namespace {

struct Problem {
  const float* x;
  const int64_t* index;
  const float *weight, *bias;
  float* out;
  int64_t rows, in, features;

  INLINE const float* row(int64_t i) const { return x + (index ? index[i] : i) * in; }
};

// 16 rows at a time: they are few, or the features are.
struct Panel {
  template <class S>
  static INLINE void run(const Problem* p, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* x = scratch.get((p->in + p->features) * LANES);
    float* y = x + p->in * LANES;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * LANES, lanes = std::min(LANES, p->rows - first);
      pack_panel([&](int64_t i) { return p->row(first + i); }, lanes, p->in, x);
      product<S>(p->weight, p->in, x, lanes, y, p->features, 0, p->features, {p->bias});
      unpack_panel(
          y, p->features, [&](int64_t i) { return p->out + (first + i) * p->features; }, 0, lanes);
    }
  }
};

Tensor linear_op(const Tensor& x_, const Tensor& weight_, const Tensor& bias_) {
  check_cpu(x_, weight_, bias_);
  STD_TORCH_CHECK(
      x_.dim() == 2 && weight_.dim() == 2 && x_.size(1) == weight_.size(1) &&
          x_.scalar_type() == ScalarType::Float && weight_.scalar_type() == ScalarType::Float,
      "got x of ", x_.dim(), " and weight of ", weight_.dim(),
      " dimensions; expected [A, K] and [N, K] of Float");
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  const int64_t rows = x.size(0), features = weight.size(0);
  const Tensor bias = checked_vector(bias_, "bias", features, ScalarType::Float);
  Tensor out = torch::stable::new_empty(x, {rows, features});
  linear(x.const_data_ptr<float>(), nullptr, weight.const_data_ptr<float>(),
         bias.const_data_ptr<float>(), out.mutable_data_ptr<float>(), rows, x.size(1), features);
  return out;
}

}  // namespace

void linear(
    const float* x, const int64_t* index, const float* weight, const float* bias, float* out,
    int64_t rows, int64_t in, int64_t features) {
  const Problem p = {x, index, weight, bias, out, rows, in, features};
  const int64_t grain = std::max<int64_t>(1, 30000 / std::max<int64_t>(1, in * features));
  torch::stable::parallel_for(0, panels_of(rows), grain, [&p](int64_t begin, int64_t end) {
    dispatch<Panel>(&p, begin, end);
  });
}

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) { m.impl("linear", TORCH_BOX(&linear_op)); }

}  // namespace tokenexit
