#include <algorithm>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../active.h"
#include "../checks.h"
#include "ops.h"

namespace tokenexit {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> compact_active_op(
    const Tensor& active_, const Tensor& cu_active_, const Tensor& word_of_token_,
    const Tensor& exit_layer_, const std::optional<Tensor>& cu_tokens_,
    std::optional<Tensor> /* scratch of other devices */) {
  check_cpu(active_, cu_active_, word_of_token_, exit_layer_, cu_tokens_);
  const int64_t num_active = active_.numel(), num_sentences = cu_active_.numel() - 1;
  const int64_t num_tokens = word_of_token_.numel(), num_words = exit_layer_.numel();
  STD_TORCH_CHECK(num_sentences >= 0, "got an empty cu_active; expected [B+1]");
  const Tensor active = checked_vector(active_, "active", num_active);
  const Tensor cu_active = checked_vector(cu_active_, "cu_active", num_sentences + 1);
  const Tensor word_of_token = checked_vector(word_of_token_, "word_of_token", num_tokens);
  const Tensor exit_layer = checked_vector(exit_layer_, "exit_layer", num_words);
  Tensor active_out = torch::stable::empty_like(active);
  Tensor cu_out = torch::stable::empty_like(cu_active);

  const auto* token = active.const_data_ptr<int64_t>();
  const auto* first = cu_active.const_data_ptr<int64_t>();
  const auto* word = word_of_token.const_data_ptr<int64_t>();
  const auto* left = exit_layer.const_data_ptr<int64_t>();
  check_offsets(first, num_sentences, "cu_active");
  STD_TORCH_CHECK(
      first[num_sentences] <= num_active, "cu_active ends at ", first[num_sentences],
      "; expected at most ", num_active);
  for (int64_t i = 0; i < first[num_sentences]; ++i) {
    STD_TORCH_CHECK(
        0 <= token[i] && token[i] < num_tokens, "got token ", token[i], " of ", num_tokens);
    STD_TORCH_CHECK(
        word[token[i]] < num_words, "got word ", word[token[i]], " of ", num_words);
  }

  auto* kept = active_out.mutable_data_ptr<int64_t>();
  auto* first_kept = cu_out.mutable_data_ptr<int64_t>();
  const int64_t n = compact_active(token, first, num_sentences, word, left, kept, first_kept);
  std::fill(kept + n, kept + num_active, 0);

  const int64_t num_offsets = cu_tokens_ ? num_sentences + 1 : 0;
  Tensor seen_out = torch::stable::new_empty(active, {cu_tokens_ ? num_tokens : 0});
  Tensor cu_seen_out = torch::stable::new_empty(cu_active, {num_offsets});
  if (cu_tokens_) {
    const Tensor cu_tokens = checked_vector(*cu_tokens_, "cu_tokens", num_offsets);
    const auto* begin = cu_tokens.const_data_ptr<int64_t>();
    check_offsets(begin, num_sentences, "cu_tokens");
    STD_TORCH_CHECK(
        begin[num_sentences] <= num_tokens, "cu_tokens ends at ", begin[num_sentences],
        "; expected at most ", num_tokens);
    auto* seen = seen_out.mutable_data_ptr<int64_t>();
    auto* first_seen = cu_seen_out.mutable_data_ptr<int64_t>();
    int64_t m = first_seen[0] = 0;
    for (int64_t b = 0; b < num_sentences; ++b) {
      const bool open = first_kept[b + 1] > first_kept[b];
      for (int64_t t = begin[b]; open && t < begin[b + 1]; ++t) seen[m++] = t;
      first_seen[b + 1] = m;
    }
    std::fill(seen + m, seen + num_tokens, 0);
  }
  return {active_out, cu_out, seen_out, cu_seen_out};
}

}  // namespace

// On one thread: a pass over so few integers takes less time than waking others.
int64_t compact_active(
    const int64_t* token, const int64_t* first, int64_t num_sentences, const int64_t* word,
    const int64_t* left, int64_t* kept, int64_t* first_kept) {
  int64_t n = 0;
  first_kept[0] = 0;
  for (int64_t b = 0; b < num_sentences; ++b) {
    const auto *begin = token + first[b], *end = token + first[b + 1];
    // [CLS] comes before the words that decide about it.
    const bool open =
        std::any_of(begin, end, [&](int64_t t) { return stays(word[t], left, false); });
    for (const auto* t = begin; t < end; ++t) {
      if (stays(word[*t], left, open)) kept[n++] = *t;
    }
    first_kept[b + 1] = n;
  }
  return n;
}

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) {
  m.impl("compact_active", TORCH_BOX(&compact_active_op));
}

}  // namespace tokenexit
