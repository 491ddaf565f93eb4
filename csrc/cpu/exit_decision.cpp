#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/Dispatch.h>

#include "../checks.h"
#include "ops.h"

namespace tokenexit {
namespace {

// Uncertainty of softmax(x) in [0, 1]: H(p) / ln C or (1 - max p) / (1 - 1/C); NaN if x holds NaN.
template <typename acc_t, typename scalar_t>
acc_t uncertainty_of(const scalar_t* x, int64_t num_labels, bool max_prob) {
  acc_t top = -std::numeric_limits<acc_t>::infinity();
  for (int64_t c = 0; c < num_labels; ++c) {
    top = std::max(top, static_cast<acc_t>(x[c]));
  }
  acc_t sum = 0;       // of e^(x - top)
  acc_t weighted = 0;  // of e^(x - top) (x - top)
  for (int64_t c = 0; c < num_labels; ++c) {
    const acc_t below = static_cast<acc_t>(x[c]) - top;
    const acc_t e = std::exp(below);
    sum += e;
    weighted += e > 0 ? e * below : 0;  // 0 * -inf, a label that is ruled out, adds nothing
  }
  // One label is always certain; the sum, 1, carries a NaN on.
  if (num_labels == 1) return sum - 1;
  const acc_t u = max_prob
      ? (1 - 1 / sum) / (1 - acc_t(1) / num_labels)
      : (std::log(sum) - weighted / sum) / std::log(static_cast<acc_t>(num_labels));
  // Rounding may step over either end. Not std::clamp: its result for NaN is not specified.
  return u < 0 ? 0 : u > 1 ? 1 : u;
}

// The largest u within k words is below the limit just where every such u is. So instead of a
// sliding maximum, one pass over the words that are not sure: what lies between two of them, more
// than k words from both, exits. A NaN is never sure; below an infinite limit everything is.
template <typename acc_t>
void exit_sentence(
    const acc_t* u, int64_t* exit_layer, int64_t num_words, int64_t k, acc_t limit,
    int64_t min_active, int64_t layer) {
  const bool always = limit == std::numeric_limits<acc_t>::infinity();
  k = std::min(k, num_words);  // before it is added to anything: k may be huge
  int64_t from = 0;            // beyond the reach of the last word that was not sure
  for (int64_t w = 0; w <= num_words; ++w) {
    if (w < num_words && (always || u[w] < limit)) continue;
    const int64_t to = w < num_words ? w - k : num_words;
    for (int64_t v = from; v < to; ++v) {
      if (exit_layer[v] == 0) exit_layer[v] = layer;
    }
    from = w + k + 1;
  }
  // Once some have left, too few are not worth another layer.
  const int64_t rest = std::count(exit_layer, exit_layer + num_words, 0);
  if (rest < std::min(min_active, num_words)) {
    std::replace(exit_layer, exit_layer + num_words, int64_t(0), layer);
  }
}

}  // namespace

template <class scalar_t, class acc_t>
void exit_decision(
    const scalar_t* logits, const Asked& a, const acc_t* threshold, acc_t* uncertainty,
    int64_t* exit_layer) {
  // The exponentials are the work; some 4,096 of them are worth waking a thread.
  const int64_t grain = std::max<int64_t>(1, 4096 / a.num_labels);
  torch::stable::parallel_for(0, a.num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (a.words[r] < 0) continue;
      uncertainty[a.words[r]] =
          uncertainty_of<acc_t>(logits + r * a.num_labels, a.num_labels, a.max_prob);
    }
  });
  for (int64_t b = 0; b < a.num_sentences; ++b) {
    const int64_t first = a.cu_words[b], num_words = a.cu_words[b + 1] - first;
    exit_sentence(
        uncertainty + first, exit_layer + first, num_words, a.window[b], threshold[b],
        a.min_active ? a.min_active[b] : 1, a.layer);
  }
}
template void exit_decision(const float*, const Asked&, const float*, float*, int64_t*);

namespace {

std::tuple<Tensor, Tensor> exit_decision_op(
    const Tensor& logits_, const Tensor& words_, const Tensor& uncertainty_,
    const Tensor& exit_layer_, const Tensor& cu_words_, const Tensor& window_,
    const Tensor& threshold_, int64_t layer, bool max_prob,
    const std::optional<Tensor>& min_active_) {
  check_cpu(
      logits_, words_, uncertainty_, exit_layer_, cu_words_, window_, threshold_, min_active_);
  const auto dtype = logits_.scalar_type();
  const auto acc_dtype = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  STD_TORCH_CHECK(
      logits_.dim() == 2 && logits_.size(1) > 0, "got logits of ", logits_.dim(),
      " dimensions and ", logits_.numel(), " elements; expected [R, C]");
  const int64_t num_rows = logits_.size(0), num_labels = logits_.size(1);
  const int64_t num_words = uncertainty_.numel(), num_sentences = window_.numel();
  const Tensor logits = logits_.is_contiguous() ? logits_ : torch::stable::contiguous(logits_);
  const Tensor words = checked_vector(words_, "words", num_rows);
  const Tensor cu_words = checked_vector(cu_words_, "cu_words", num_sentences + 1);
  const Tensor window = checked_vector(window_, "window", num_sentences);
  const Tensor threshold = checked_vector(threshold_, "threshold", num_sentences, acc_dtype);
  std::optional<Tensor> min_active;
  if (min_active_) min_active = checked_vector(*min_active_, "min_active", num_sentences);
  const auto* least = min_active ? min_active->const_data_ptr<int64_t>() : nullptr;
  Tensor uncertainty = torch::stable::clone(
      checked_vector(uncertainty_, "uncertainty", num_words, acc_dtype));
  Tensor exit_layer =
      torch::stable::clone(checked_vector(exit_layer_, "exit_layer", num_words));

  const auto* word = words.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < num_rows; ++r) {
    STD_TORCH_CHECK(word[r] < num_words, "got word ", word[r], " of ", num_words);
  }
  const auto* first = cu_words.const_data_ptr<int64_t>();
  check_offsets(first, num_sentences, "cu_words");
  STD_TORCH_CHECK(
      first[num_sentences] == num_words, "cu_words ends at ", first[num_sentences],
      "; expected ", num_words);
  const auto* k = window.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < num_sentences; ++b) {
    STD_TORCH_CHECK(k[b] >= 0, "got window ", k[b], " at sentence ", b, "; expected 0 or more");
  }

  const Asked asked = {word, num_rows, num_labels, first, k, least, num_sentences, layer, max_prob};
  const auto run = [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    exit_decision<scalar_t, acc_t>(
        logits.const_data_ptr<scalar_t>(), asked, threshold.const_data_ptr<acc_t>(),
        uncertainty.mutable_data_ptr<acc_t>(), exit_layer.mutable_data_ptr<int64_t>());
  };
  THO_DISPATCH_SWITCH(
      dtype, "exit_decision",
      THO_DISPATCH_CASE(ScalarType::Float, [&] { run(scalar_t()); })
      THO_DISPATCH_CASE(ScalarType::Double, [&] { run(scalar_t()); })
      THO_DISPATCH_CASE(ScalarType::Half, [&] { run(scalar_t()); })
      THO_DISPATCH_CASE(ScalarType::BFloat16, [&] { run(scalar_t()); }));
  return {uncertainty, exit_layer};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) {
  m.impl("exit_decision", TORCH_BOX(&exit_decision_op));
}

}  // namespace tokenexit
