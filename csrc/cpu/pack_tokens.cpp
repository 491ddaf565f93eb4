#include <algorithm>
#include <functional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace tokenexit {
namespace {

using Layout = std::tuple<Tensor, Tensor, Tensor>;
enum Kind { STARTS_WORD, CONTINUES_WORD, SPECIAL };  // of tokenexit/packing.py

// A padded batch [rows, columns] without its padding; what it has `more` of each cell is packed behind
// the layout. On one thread, as compact_active.
Layout lay_out(
    const Tensor& like, const uint8_t* real, const int64_t* id, int64_t rows, int64_t columns,
    const std::vector<const int64_t*>& more = {}) {
  const int64_t cells = rows * columns, tokens = std::count_if(real, real + cells, std::identity());
  const int64_t lists = 5 + more.size();
  Tensor by_token = torch::stable::new_empty(like, {lists, tokens});
  Tensor offsets = torch::stable::new_empty(like, {2, rows + 1});
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
  auto* to = word_at + tokens;
  for (const int64_t* values : more) {
    for (int64_t i = 0; i < tokens; ++i) *to++ = values[slot[i]];
  }
  const int64_t words = first_token.size();
  Tensor first = torch::stable::new_empty(like, {words});
  std::copy_n(first_token.data(), words, first.mutable_data_ptr<int64_t>());
  return {by_token, offsets, first};
}

// See tokenexit/ops/pack_tokens.py.
Layout pack_tokens(const Tensor& mask_, const Tensor& word_ids_) {
  check_cpu(mask_, word_ids_);
  STD_TORCH_CHECK(
      mask_.dim() == 2 && word_ids_.dim() == 2 && mask_.size(0) == word_ids_.size(0) &&
          mask_.size(1) == word_ids_.size(1) && mask_.scalar_type() == ScalarType::Bool &&
          word_ids_.scalar_type() == ScalarType::Long,
      "got a mask of ", mask_.dim(), " and word_ids of ", word_ids_.dim(),
      " dimensions; expected [B, N] of Bool and of Long");
  const Tensor mask = torch::stable::contiguous(mask_);
  const Tensor word_ids = torch::stable::contiguous(word_ids_);
  return lay_out(word_ids, static_cast<const uint8_t*>(mask.const_data_ptr()),
                 word_ids.const_data_ptr<int64_t>(), mask.size(0), mask.size(1));
}

// The word of each token by what its vocabulary entry is; see `word_ids_from_kinds` in
// tokenexit/packing.py.
std::vector<int64_t> words_of(
    const uint8_t* real, const int64_t* id, const uint8_t* kinds, int64_t rows, int64_t columns) {
  std::vector<int64_t> words(rows * columns, -1);
  for (int64_t b = 0; b < rows; ++b) {
    int64_t word = -1;
    bool after_word = false;
    for (int64_t i = b * columns; i < (b + 1) * columns; ++i) {
      const bool inside = real[i] && kinds[id[i]] != SPECIAL;
      if (inside && !(kinds[id[i]] == CONTINUES_WORD && after_word)) ++word;
      if (inside) words[i] = word;
      after_word = inside;
    }
  }
  return words;
}

// See tokenexit/ops/pack_rows.py.
Layout pack_rows(
    const Tensor& mask_, const Tensor& ids_, const std::optional<Tensor>& word_ids_,
    const Tensor& kinds_, const std::optional<Tensor>& types_,
    const std::optional<Tensor>& positions_, int64_t num_ids, int64_t num_types,
    int64_t num_positions, int64_t most) {
  check_cpu(mask_, ids_, word_ids_, kinds_, types_, positions_);
  const bool marked = mask_.scalar_type() == ScalarType::Bool;
  STD_TORCH_CHECK(
      mask_.dim() == 2 && (marked || mask_.scalar_type() == ScalarType::Long),
      "got a mask of ", mask_.dim(), " dimensions; expected [B, N] of Bool or Long");
  const int64_t rows = mask_.size(0), columns = mask_.size(1), cells = rows * columns;
  const auto checked = [&](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(
        x.dim() == 2 && x.size(0) == rows && x.size(1) == columns &&
            x.scalar_type() == ScalarType::Long,
        "got ", name, " of ", x.dim(), " dimensions and ", x.numel(), " elements; expected [", rows,
        ", ", columns, "] of Long");
    return torch::stable::contiguous(x);
  };
  const Tensor mask = torch::stable::contiguous(mask_), ids = checked(ids_, "ids");
  const Tensor kinds = checked_vector(kinds_, "kinds", kinds_.numel(), ScalarType::Byte);
  STD_TORCH_CHECK(
      num_ids <= kinds.numel(), "got ", kinds.numel(), " kinds for ", num_ids, " ids; expected one of each");
  std::vector<uint8_t> copy;
  const auto* real = static_cast<const uint8_t*>(mask.const_data_ptr());
  if (!marked) {
    const auto* from = mask.const_data_ptr<int64_t>();
    copy.resize(cells);
    std::transform(from, from + cells, copy.begin(), [](int64_t x) { return x != 0; });
    real = copy.data();
  }
  const auto* id = ids.const_data_ptr<int64_t>();
  const auto within = [&](const int64_t* values, int64_t least, int64_t end) {
    bool good = true;
    for (int64_t i = 0; i < cells; ++i) good &= (real[i] == 0) | ((values[i] >= least) & (values[i] < end));
    return good;
  };
  bool sound = within(id, 0, num_ids), some = false;
  for (int64_t b = 0; b < rows; ++b) {
    const auto* row = real + b * columns;
    const int64_t tokens = std::count_if(row, row + columns, std::identity());
    some |= tokens > 0;
    sound &= tokens <= most;
  }
  std::vector<Tensor> held = {ids};
  std::vector<const int64_t*> more = {id};
  const auto take = [&](const std::optional<Tensor>& x, const char* name, int64_t end) {
    if (!x) return;
    held.push_back(checked(*x, name));
    more.push_back(held.back().const_data_ptr<int64_t>());
    sound &= within(more.back(), 0, end);
  };
  take(types_, "types", num_types);
  take(positions_, "positions", num_positions);
  Tensor word_ids;
  const int64_t* word = nullptr;
  if (word_ids_) {
    word_ids = checked(*word_ids_, "word_ids");
    word = word_ids.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < cells; ++i) sound &= (real[i] == 0) | (word[i] >= -1);
  }
  if (!sound || !some) {
    const int64_t lists = 5 + more.size();
    return {torch::stable::new_empty(ids, {lists, int64_t(0)}),
            torch::stable::new_zeros(ids, {int64_t(2), rows + 1}),
            torch::stable::new_empty(ids, {int64_t(0)})};
  }
  std::vector<int64_t> words;
  if (!word) {
    words = words_of(real, id, kinds.const_data_ptr<uint8_t>(), rows, columns);
    word = words.data();
  }
  return lay_out(ids, real, word, rows, columns, more);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) {
  m.impl("pack_tokens", TORCH_BOX(&pack_tokens));
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
}

}  // namespace tokenexit
