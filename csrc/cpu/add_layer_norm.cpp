#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "panels.h"

namespace tokenexit {
namespace {

struct Problem {
  const float *x, *residual, *weight, *bias;
  float *out, *mean, *rstd;
  int64_t width;
  float eps;
};

template <class S>
INLINE float total(typename S::Vec x) {
  float sum = 0;
  for (int i = 0; i < S::WIDTH; ++i) sum += x[i];
  return sum;
}

struct Norm {
  template <class S>
  static INLINE void run(const Problem* p, int64_t begin, int64_t end) {
    using V = typename S::Vec;
    const int64_t whole = p->width / S::WIDTH * S::WIDTH;
    for (int64_t row = begin; row < end; ++row) {
      const float *x = p->x + row * p->width, *residual = p->residual + row * p->width;
      float* y = p->out + row * p->width;
      V sums = {};
      float sum = 0;
      for (int64_t c = 0; c < whole; c += S::WIDTH) {
        const V added = S::load(x + c) + S::load(residual + c);
        S::store(y + c, added);
        sums += added;
      }
      for (int64_t c = whole; c < p->width; ++c) sum += y[c] = x[c] + residual[c];
      float mean = (sum + total<S>(sums)) / p->width;
      V squares = {};
      float square = 0, rest = 0;
      sums = V{};
      for (int64_t c = 0; c < whole; c += S::WIDTH) {
        const V d = S::load(y + c) - mean;
        sums += d;
        squares += d * d;
      }
      for (int64_t c = whole; c < p->width; ++c) {
        const float d = y[c] - mean;
        rest += d;
        square += d * d;
      }
      // What rounding took from the mean: it matters where rows hardly vary.
      const float off = (rest + total<S>(sums)) / p->width;
      mean += off;
      const float variance = (square + total<S>(squares)) / p->width - off * off;
      const float rstd = 1 / std::sqrt(std::max(variance, 0.0f) + p->eps);
      for (int64_t c = 0; c < whole; c += S::WIDTH) {
        const V normal = (S::load(y + c) - mean) * rstd;
        S::store(y + c, normal * S::load(p->weight + c) + S::load(p->bias + c));
      }
      for (int64_t c = whole; c < p->width; ++c) {
        y[c] = (y[c] - mean) * rstd * p->weight[c] + p->bias[c];
      }
      p->mean[row] = mean;
      p->rstd[row] = rstd;
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(
    const Tensor& x_, const Tensor& residual_, const Tensor& weight_, const Tensor& bias_,
    double eps) {
  check_cpu(x_, residual_, weight_, bias_);
  STD_TORCH_CHECK(
      x_.dim() == 2 && residual_.dim() == 2 && x_.size(0) == residual_.size(0) &&
          x_.size(1) == residual_.size(1) && x_.scalar_type() == ScalarType::Float &&
          residual_.scalar_type() == ScalarType::Float,
      "got x of ", x_.dim(), " and residual of ", residual_.dim(),
      " dimensions; expected two [A, d] of Float");
  const Tensor x = torch::stable::contiguous(x_), residual = torch::stable::contiguous(residual_);
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor weight = checked_vector(weight_, "weight", width, ScalarType::Float);
  const Tensor bias = checked_vector(bias_, "bias", width, ScalarType::Float);
  Tensor out = torch::stable::new_empty(x, {rows, width});
  Tensor mean = torch::stable::new_empty(x, {rows}), rstd = torch::stable::new_empty(x, {rows});
  const Problem p = {
      x.const_data_ptr<float>(), residual.const_data_ptr<float>(), weight.const_data_ptr<float>(),
      bias.const_data_ptr<float>(), out.mutable_data_ptr<float>(), mean.mutable_data_ptr<float>(),
      rstd.mutable_data_ptr<float>(), width, static_cast<float>(eps)};
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, [&p](int64_t begin, int64_t end) {
    dispatch<Norm>(&p, begin, end);
  });
  return {out, mean, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
}

}  // namespace tokenexit
