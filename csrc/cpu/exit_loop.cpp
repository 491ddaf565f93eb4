// The layers of inference one after the other, without a return to Python between them.
// See tokenexit/loops/cpu.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "bf16.h"
#include "ops.h"

namespace tokenexit {
namespace {

// Of heads that tell neighbours: what they said, [rows][3 C], becomes logits [rows][C] in its place.
// told: [T][2 C], by each token to the one after it and to the one before it.
void hear(
    const int64_t* active, const int64_t* first, const int64_t* start, int64_t num_sentences,
    int64_t num_labels, float* told, float* said) {
  const int64_t told_by_each = 2 * num_labels;
  for (int64_t i = 0; i < first[num_sentences]; ++i) {
    const float* tells = said + 3 * num_labels * i + num_labels;
    std::copy_n(tells, told_by_each, told + told_by_each * active[i]);
  }
  for (int64_t b = 0; b < num_sentences; ++b) {
    for (int64_t i = first[b]; i < first[b + 1]; ++i) {
      const int64_t t = active[i];
      const float* before = t > start[b] ? told + told_by_each * (t - 1) : nullptr;
      const float* after =
          t + 1 < start[b + 1] ? told + told_by_each * (t + 1) + num_labels : nullptr;
      for (int64_t c = 0; c < num_labels; ++c) {
        const float own = said[3 * num_labels * i + c];
        said[num_labels * i + c] = own + (before ? before[c] : 0) + (after ? after[c] : 0);
      }
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> exit_loop(
    const Tensor& h_, const Tensor& positions_, const Tensor& cu_tokens_, const Tensor& cu_words_,
    const Tensor& word_of_token_, const Tensor& word_at_, std::vector<Tensor> weights,
    std::vector<Tensor> scales, std::vector<Tensor> turned, std::vector<Tensor> classifiers,
    int64_t neighbor_heads, std::vector<double> costs, int64_t heads, double scale,
    std::vector<double> eps, const Tensor& window_,
    const Tensor& min_active_, const Tensor& threshold_, bool max_prob, bool tanh,
    const std::optional<Tensor>& bias_, const std::optional<Tensor>& exit_layer_) {
  check_cpu(
      h_, positions_, cu_tokens_, cu_words_, word_of_token_, word_at_, weights, scales, turned,
      classifiers, window_, min_active_, threshold_, bias_, exit_layer_);
  const int64_t num_layers = eps.size();
  const auto fits = [&](const std::vector<Tensor>& list, int64_t each) {
    return static_cast<int64_t>(list.size()) == num_layers * each;
  };
  STD_TORCH_CHECK(
      num_layers > 0 && fits(weights, LAYER_TENSORS) && fits(classifiers, 2) &&
          (scales.empty() || fits(scales, LAYER_TENSORS)) &&
          (turned.empty() || fits(turned, LAYER_PRODUCTS)),
      "got ", weights.size(), " weights, ", scales.size(), " scales, ", turned.size(),
      " turned weights and ", classifiers.size(), " of classifiers for ", num_layers,
      " layers; expected ", LAYER_TENSORS, " a layer, as many or none, ", LAYER_PRODUCTS,
      " or none, and 2");
  const int64_t num_labels = classifiers.back().numel() / (neighbor_heads < num_layers ? 1 : 3);
  STD_TORCH_CHECK(
      h_.dim() == 2 && (h_.scalar_type() == ScalarType::Float || is_bf16(h_)) &&
          cu_tokens_.numel() > 0 && num_labels > 0,
      "got h of ", h_.dim(), " dimensions; expected [T, d] of Float or BFloat16, offsets and labels");
  const bool bf16 = is_bf16(h_);
  const int64_t num_tokens = h_.size(0), d = h_.size(1);
  const int64_t num_sentences = cu_tokens_.numel() - 1;
  const auto outputs_of = [&](int64_t layer) {
    return layer <= neighbor_heads ? 3 * num_labels : num_labels;
  };
  for (size_t i = 0; i < classifiers.size(); ++i) {
    const Tensor& x = classifiers[i];
    const bool is_plain = x.scalar_type() == h_.scalar_type() && x.is_contiguous();
    const bool fits = i % 2 ? x.dim() == 1 && x.numel() == classifiers[i - 1].size(0)
                            : x.dim() == 2 && x.size(1) == d;
    STD_TORCH_CHECK(
        is_plain && fits && x.size(0) == outputs_of(i / 2 + 1), "got a classifier's tensor of ",
        x.dim(), " dimensions and ", x.numel(),
        " elements; expected [C, d] and [C] of h's dtype, contiguous, or [3C, d] and [3C] of the "
        "first ", neighbor_heads);
  }
  const Tensor cu_tokens = checked_vector(cu_tokens_, "cu_tokens", num_sentences + 1);
  const Tensor cu_words = checked_vector(cu_words_, "cu_words", num_sentences + 1);
  const Tensor word_of_token = checked_vector(word_of_token_, "word_of_token", num_tokens);
  const Tensor word_at = checked_vector(word_at_, "word_at", num_tokens);
  const Tensor window = checked_vector(window_, "window", num_sentences);
  const Tensor min_active = checked_vector(min_active_, "min_active", num_sentences);
  STD_TORCH_CHECK(
      threshold_.dim() == 2 && threshold_.size(0) == num_layers &&
          threshold_.size(1) == num_sentences && threshold_.scalar_type() == ScalarType::Float,
      "got a threshold of ", threshold_.dim(), " dimensions and ", threshold_.numel(),
      " elements; expected [L, B] of Float");
  const Tensor threshold = torch::stable::contiguous(threshold_);
  const auto* start = cu_tokens.const_data_ptr<int64_t>();
  const auto* first_word = cu_words.const_data_ptr<int64_t>();
  const auto* word = word_of_token.const_data_ptr<int64_t>();
  const auto* begins = word_at.const_data_ptr<int64_t>();
  const auto* reach = window.const_data_ptr<int64_t>();
  check_offsets(start, num_sentences, "cu_tokens");
  check_offsets(first_word, num_sentences, "cu_words");
  const int64_t num_words = first_word[num_sentences];
  STD_TORCH_CHECK(
      start[num_sentences] == num_tokens, "cu_tokens ends at ", start[num_sentences],
      "; expected ", num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) {
    STD_TORCH_CHECK(
        word[t] < num_words && begins[t] < num_words, "got word ", std::max(word[t], begins[t]),
        " of ", num_words);
  }
  for (int64_t b = 0; b < num_sentences; ++b) {
    STD_TORCH_CHECK(
        reach[b] >= 0, "got window ", reach[b], " at sentence ", b, "; expected 0 or more");
  }
  Tensor given;
  if (exit_layer_) given = checked_vector(*exit_layer_, "exit_layer", num_words);
  CheckedBias bias(bias_, positions_, heads, num_tokens);
  const int64_t* position_of = bias.position;

  Tensor h = torch::stable::clone(torch::stable::contiguous(h_));
  Tensor logits_out = torch::stable::new_empty(h, {num_tokens, num_labels});
  Tensor layers_out = torch::stable::empty_like(word_of_token);
  Tensor no_nan_out = torch::stable::new_empty(h, {}, ScalarType::Bool);
  bool& no_nan = *no_nan_out.mutable_data_ptr<bool>();
  no_nan = true;
  void* states = h.mutable_data_ptr();
  std::vector<float> wide(bf16 ? num_tokens * num_labels : 0);
  auto* logits_of = bf16 ? wide.data() : logits_out.mutable_data_ptr<float>();
  auto* layer_of = layers_out.mutable_data_ptr<int64_t>();
  std::vector<int64_t> active(num_tokens), kept(num_tokens), words(num_tokens), positions;
  std::vector<int64_t> first(start, start + num_sentences + 1), first_kept(first);
  std::vector<int64_t> left(num_words, 0);
  std::vector<float> uncertainty(num_words, 0.0f), logits(num_tokens * outputs_of(1));
  std::vector<float> told(neighbor_heads > 0 ? num_tokens * 2 * num_labels : 0);
  for (int64_t t = 0; t < num_tokens; ++t) active[t] = t;
  if (bias.entries) positions.resize(num_tokens);

  const LayerCall call = {d, heads, num_sentences, start, costs, scale, false, tanh, bf16, &bias};
  int64_t count = num_tokens;
  for (int64_t layer = 1; layer <= num_layers && count; ++layer) {
    const int64_t at = layer - 1;
    if (bias.entries) {
      for (int64_t i = 0; i < count; ++i) positions[i] = position_of[active[i]];
      bias.position = positions.data();
    }
    exit_layer(call, &weights[at * LAYER_TENSORS],
               scales.empty() ? nullptr : &scales[at * LAYER_TENSORS],
               turned.empty() ? nullptr : &turned[at * LAYER_PRODUCTS], eps[at], states,
               active.data(), first.data(), states);
    std::vector<float> head[2];
    const float* classifier[2];
    for (int i = 0; i < 2; ++i) {
      const Tensor& x = classifiers[2 * at + i];
      if (bf16) head[i] = floats_of(x);
      classifier[i] = bf16 ? head[i].data() : x.const_data_ptr<float>();
    }
    linear(
        states, bf16, active.data(), classifier[0], classifier[1], logits.data(), count, d,
        outputs_of(layer));
    if (layer <= neighbor_heads) {
      hear(active.data(), first.data(), start, num_sentences, num_labels, told.data(), logits.data());
      if (bf16) dispatch<Round>(logits.data(), count * num_labels);
    }
    const auto* end = logits.data() + count * num_labels;
    if (std::any_of<const float*>(logits.data(), end, [](float x) { return std::isnan(x); })) {
      std::fill_n(logits_of, num_tokens * num_labels, std::numeric_limits<float>::quiet_NaN());
      std::fill_n(layer_of, num_tokens, 0);
      no_nan = false;
      break;
    }
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(&logits[i * num_labels], num_labels, logits_of + active[i] * num_labels);
      layer_of[active[i]] = layer;
      words[i] = begins[active[i]];
    }
    if (layer == num_layers) break;
    if (exit_layer_) {
      const auto* by = given.const_data_ptr<int64_t>();
      std::transform(by, by + num_words, left.begin(), [&](int64_t l) { return l <= layer ? l : 0; });
    } else {
      const auto* limit = threshold.const_data_ptr<float>() + at * num_sentences;
      // The next layer that decides asks all active words anew.
      if (std::none_of(limit, limit + num_sentences, [](float x) { return x > 0; })) continue;
      const Asked asked = {
          words.data(), count, num_labels, first_word, reach, min_active.const_data_ptr<int64_t>(),
          num_sentences, layer, max_prob};
      exit_decision(logits.data(), asked, limit, uncertainty.data(), left.data());
    }
    count = compact_active(
        active.data(), first.data(), num_sentences, word, left.data(), kept.data(),
        first_kept.data());
    active.swap(kept);
    first.swap(first_kept);
  }
  if (bf16) {
    auto* to = static_cast<uint16_t*>(logits_out.mutable_data_ptr());
    dispatch<Narrow>(static_cast<const float*>(logits_of), num_tokens * num_labels, to);
  }
  return {logits_out, layers_out, no_nan_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) { m.impl("exit_loop", TORCH_BOX(&exit_loop)); }

}  // namespace tokenexit
