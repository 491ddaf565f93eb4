#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace tokenexit {
namespace {

// See tokenexit/ops/pack_tokens.py. On one thread, as compact_active.
std::tuple<Tensor, Tensor, Tensor> pack_tokens(const Tensor& mask_, const Tensor& word_ids_) {
  check_cpu(mask_, word_ids_);
  STD_TORCH_CHECK(
      mask_.dim() == 2 && word_ids_.dim() == 2 && mask_.size(0) == word_ids_.size(0) &&
          mask_.size(1) == word_ids_.size(1) && mask_.scalar_type() == ScalarType::Bool &&
          word_ids_.scalar_type() == ScalarType::Long,
      "got a mask of ", mask_.dim(), " and word_ids of ", word_ids_.dim(),
      " dimensions; expected [B, N] of Bool and of Long");
  const Tensor mask = torch::stable::contiguous(mask_);
  const Tensor word_ids = torch::stable::contiguous(word_ids_);
  const int64_t rows = mask.size(0), columns = mask.size(1), cells = rows * columns;
  const auto* real = mask.const_data_ptr<bool>();
  const auto* id = word_ids.const_data_ptr<int64_t>();
  const int64_t tokens = std::count(real, real + cells, true);

  Tensor by_token = torch::stable::new_empty(word_ids, {5, tokens});
  Tensor offsets = torch::stable::new_empty(word_ids, {2, rows + 1});
  auto* slot = by_token.mutable_data_ptr<int64_t>();
  auto *position = slot + tokens, *sentence = position + tokens, *word_of_token = sentence + tokens;
  auto* word_at = word_of_token + tokens;
  auto *cu_tokens = offsets.mutable_data_ptr<int64_t>(), *cu_words = cu_tokens + rows + 1;
  std::vector<int64_t> first_token;
  int64_t t = 0;
  cu_tokens[0] = cu_words[0] = 0;
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t start = t;
    int64_t before = -1;  // the id of the token before
    for (int64_t i = b * columns; i < (b + 1) * columns; ++i) {
      if (!real[i]) continue;
      slot[t] = i;
      position[t] = t - start;
      sentence[t] = b;
      const bool starts = id[i] >= 0 && id[i] != before;
      if (starts) first_token.push_back(t);
      const int64_t word = first_token.size() - 1;
      word_of_token[t] = id[i] < 0 ? -1 : word;
      word_at[t] = starts ? word : -1;
      before = id[i];
      ++t;
    }
    const int64_t words = first_token.size();
    if (t > start && words == cu_words[b]) {  // the first token stands in as a word
      word_of_token[start] = word_at[start] = words;
      first_token.push_back(start);
    }
    cu_tokens[b + 1] = t;
    cu_words[b + 1] = first_token.size();
  }
  const int64_t words = first_token.size();
  Tensor first = torch::stable::new_empty(word_ids, {words});
  std::copy_n(first_token.data(), words, first.mutable_data_ptr<int64_t>());
  return {by_token, offsets, first};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) { m.impl("pack_tokens", TORCH_BOX(&pack_tokens)); }

}  // namespace tokenexit
