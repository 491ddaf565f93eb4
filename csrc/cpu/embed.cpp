#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "bf16.h"

namespace tokenexit {
namespace {

// Rows of a table [*, d], of each token the one by its number: the first if there are no numbers.
struct Table {
  Tensor rows, number_of;
  const char* data = nullptr;
  const int64_t* number = nullptr;

  Table(const Tensor& table, const std::optional<Tensor>& numbers, const char* name, int64_t tokens,
        int64_t d, ScalarType dtype) {
    STD_TORCH_CHECK(
        table.dim() == 2 && table.size(0) > 0 && table.size(1) == d && table.scalar_type() == dtype,
        "got a table of ", name, " of ", table.dim(), " dimensions, ", table.numel(),
        " elements and dtype ", torch::headeronly::toString(table.scalar_type()),
        "; expected rows of ", d, " of ", torch::headeronly::toString(dtype));
    rows = torch::stable::contiguous(table);
    data = static_cast<const char*>(rows.const_data_ptr());
    if (!numbers) return;
    number_of = checked_vector(*numbers, name, tokens);
    number = number_of.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < tokens; ++t) {
      STD_TORCH_CHECK(
          number[t] >= 0 && number[t] < rows.size(0), "got ", name, " of ", number[t],
          "; expected 0 to ", rows.size(0) - 1);
    }
  }

  const void* of(int64_t token, int64_t bytes) const {
    return data + (number ? number[token] : 0) * bytes;
  }
};

template <class S>
INLINE void add(const float* a, const float* b, int64_t d, float* to) {
  for (int64_t c = 0; c < d; ++c) to[c] = a[c] + b[c];
}

// Rounded after each sum, as a tensor between the two would be.
template <class S>
INLINE void add(const uint16_t* a, const uint16_t* b, int64_t d, uint16_t* to) {
  constexpr int64_t FEW = 64;
  float x[FEW], y[FEW];
  for (int64_t c = 0; c < d; c += FEW) {
    const int64_t count = std::min(FEW, d - c);
    floats_of<S>(a + c, count, x);
    floats_of<S>(b + c, count, y);
    add<S>(x, y, count, x);
    bf16_of<S>(x, count, to + c);
  }
}

struct Problem {
  std::vector<Table> tables;
  const float* scale = nullptr;
  void* out;
  int64_t width;
};

// Of tokens [begin, end), in numbers of T.
template <class T>
struct Sums {
  template <class S>
  static INLINE void run(const Problem* p, int64_t begin, int64_t end) {
    const int64_t d = p->width, bytes = d * sizeof(T);
    const auto& tables = p->tables;
    for (int64_t t = begin; t < end; ++t) {
      T* row = static_cast<T*>(p->out) + t * d;
      const T* first = row;
      if (p->scale) {
        const auto* rounded = static_cast<const int8_t*>(tables[0].of(t, d));
        const float scale = p->scale[tables[0].number[t]];
        for (int64_t c = 0; c < d; ++c) row[c] = rounded[c] * scale;
      } else {
        first = static_cast<const T*>(tables[0].of(t, bytes));
        if (tables.size() == 1) std::copy_n(first, d, row);
      }
      for (size_t i = 1; i < tables.size(); ++i) {
        add<S>(i == 1 ? first : row, static_cast<const T*>(tables[i].of(t, bytes)), d, row);
      }
    }
  }
};

// See tokenexit/ops/embed.py.
Tensor embed(
    const Tensor& ids, const Tensor& positions, const std::optional<Tensor>& types,
    const Tensor& word, const std::optional<Tensor>& position,
    const std::optional<Tensor>& token_type, const std::optional<Tensor>& scale) {
  check_cpu(ids, positions, types, word, position, token_type, scale);
  const ScalarType of_words = word.scalar_type(), dtype = scale ? ScalarType::Float : of_words;
  const bool fits =
      scale ? of_words == ScalarType::Char : of_words == ScalarType::Float || is_bf16(word);
  STD_TORCH_CHECK(
      word.dim() == 2 && fits, "got a table of words of ", word.dim(), " dimensions and dtype ",
      torch::headeronly::toString(of_words), "; expected [V, d] of ",
      scale ? "Char, with a scale" : "Float or BFloat16");
  const int64_t tokens = ids.numel(), d = word.size(1);
  Problem p;
  p.width = d;
  p.tables.emplace_back(word, ids, "ids", tokens, d, of_words);
  Tensor scales;
  if (scale) {
    STD_TORCH_CHECK(
        scale->dim() == 1 && scale->size(0) == word.size(0) && scale->scalar_type() == dtype,
        "got ", scale->numel(), " scales of ", scale->dim(), " dimensions; expected ",
        word.size(0), " of Float");
    scales = torch::stable::contiguous(*scale);
    p.scale = scales.const_data_ptr<float>();
  }
  if (position) p.tables.emplace_back(*position, positions, "positions", tokens, d, dtype);
  if (token_type) p.tables.emplace_back(*token_type, types, "types", tokens, d, dtype);
  Tensor out = torch::stable::new_empty(p.tables[0].rows, {tokens, d}, dtype);
  p.out = out.mutable_data_ptr();
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, d));
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    is_bf16(word) ? dispatch<Sums<uint16_t>>(&p, begin, end)
                  : dispatch<Sums<float>>(&p, begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) { m.impl("embed", TORCH_BOX(&embed)); }

}  // namespace tokenexit
