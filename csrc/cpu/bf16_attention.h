#pragma once
// The phases of attention by products of bf16, for where an instruction multiplies them: of bf16 models
// and, whose activations are rounded more, of int8 ones, but for queries that are carried.
#include <type_traits>

#include "layer.h"

namespace tokenexit {

// Keys are filled up to whole words, or to whole tiles of AMX.
constexpr int64_t TILE = 32;
inline int64_t filled(int64_t keys) {
  const int64_t whole = cpu() >= Cpu::amx ? TILE : 2;
  return (keys + whole - 1) / whole * whole;
}

INLINE Word* words_of(float* x) { return reinterpret_cast<Word*>(x); }
INLINE const Word* words_of(const float* x) { return reinterpret_cast<const Word*>(x); }
INLINE uint16_t* halves_of(float* x) { return reinterpret_cast<uint16_t*>(x); }

// Lanes from .. to - 1 of a panel's row; the others are another's to write.
template <class S>
INLINE void store_lanes(float* row, const float* x, int64_t from, int64_t to) {
#ifdef __x86_64__
  if constexpr (S::WIDTH == LANES) {
    const uint16_t lanes = (1 << to) - (1 << from);
    asm volatile("vmovups %1, (%0)%{%2%}" : : "r"(row), "v"(S::load(x)), "Yk"(lanes) : "memory");
    return;
  }
#endif
  for (int64_t i = from; i < to; ++i) row[i] = x[i];
}

// As UnpackKeys: keys [heads][rows][dim]. Values stay where they are.
struct UnpackKeysInBf16 {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const int64_t rows = w->keys.size(), half = w->dim / 2;
    float* words = scratch.get(w->d / 2 * LANES);
    for (int64_t p = begin; p < end; ++p) {
      to_words<S>(w->kv_panels + p * 2 * w->d * LANES, w->d, words_of(words));
      for (int64_t head = 0; head < w->heads; ++head) {
        unpack_panel<S>(words + head * half * LANES, half,
                     [&](int64_t i) { return w->kv + (head * rows + p * LANES + i) * half; }, 0,
                     std::min(LANES, rows - p * LANES));
      }
    }
  }
};

// As AttendProjected.
struct AttendInBf16 {
  template <class S>
  static INLINE void run(const Work* w, int64_t item) {
    static thread_local Scratch scratch;
    const Engaged engaged(engine(Kind::bf16));
    const Sentence& s = w->projected[item / w->heads];
    const int64_t head = item % w->heads, dim = w->dim, half = dim / 2, keys = filled(s.tokens);
    // Values feature by feature, [dim][keys]; then of two panels queries, scores, weights, results.
    float* values = scratch.get(dim * keys / 2 + 2 * LANES * (half + keys + keys / 2 + dim));
    float *q = values + dim * keys / 2, *scores = q + 2 * half * LANES;
    float *weights = scores + 2 * keys * LANES, *out = weights + keys * LANES;
    const int64_t last = s.first + s.tokens;
    // Whole vectors, the end of which the next one, or zeros, are written over.
    for (int64_t c = 0; c < dim; ++c) {
      uint16_t* to = halves_of(values) + c * keys;
      for (int64_t p = s.first / LANES; p * LANES < last; ++p) {
        const float* from = w->kv_panels + ((p * 2 + 1) * w->d + head * dim + c) * LANES;
        const int64_t first = std::max(s.first, p * LANES);
        bf16_of<S>(from + first - p * LANES, LANES, to + first - s.first);
      }
      std::memset(to + s.tokens, 0, TILE * sizeof(*to));
    }
    const Word* k = words_of(w->kv) + (head * w->keys.size() + s.first) * half;
    const int64_t end = s.first_active + s.active;
    for (int64_t p = s.first_active / LANES, panels; p * LANES < end; p += panels) {
      panels = (p + 1) * LANES < end ? 2 : 1;
      for (int64_t i = 0; i < panels; ++i) {
        const float* from = w->q + ((p + i) * w->d + head * dim) * LANES;
        to_words<S>(from, dim, words_of(q) + i * half * LANES, w->scale);
      }
      multiply_words(
          Kind::bf16, k, half, words_of(q), panels * LANES, 0, keys,
          [&](const Word* sums, int64_t n, int64_t count, int64_t i) {
            std::memcpy(scores + (i * keys + n) * LANES, sums, count * LANES * sizeof(float));
          });
      for (int64_t i = 0; i < panels; ++i) {
        RelativeBias bias;
        for (int64_t j = 0; j < LANES; ++j) {
          w->relate(bias, j, head, std::clamp((p + i) * LANES + j, s.first_active, end - 1));
        }
        float* mine = scores + i * keys * LANES;
        bias.add(mine, LANES, s.tokens);
        softmax<S>(mine, LANES, s.tokens, nullptr);
        std::fill(mine + s.tokens * LANES, mine + keys * LANES, 0.0f);
        to_words<S>(mine, keys, words_of(weights) + i * keys / 2 * LANES);
      }
      multiply_words(
          Kind::bf16, words_of(values), keys / 2, words_of(weights), panels * LANES, 0, dim,
          [&](const Word* sums, int64_t n, int64_t count, int64_t i) {
            std::memcpy(out + (i * dim + n) * LANES, sums, count * LANES * sizeof(float));
          });
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t from = std::max<int64_t>(0, s.first_active - (p + i) * LANES);
        const int64_t to = std::min(LANES, end - (p + i) * LANES);
        float* ctx = w->ctx.x + ((p + i) * w->d + head * dim) * LANES;
        const float* mine = out + i * dim * LANES;
        for (int64_t c = 0; c < dim; ++c) store_lanes<S>(ctx + c * LANES, mine + c * LANES, from, to);
      }
    }
  }
};

// Queries of one head and row as CarryNarrow reads them.
template <class S>
INLINE void bytes_to_carry(const float* query, const Work& w, int64_t at) {
  auto* bytes = reinterpret_cast<uint8_t*>(w.q_narrow) + at * w.dim;
  w.q_scale[at] = quantize_row<S>(query, w.dim, bytes);
  Word sum = 0;
  for (int64_t c = 0; c < w.dim; ++c) {
    bytes[c] ^= 128;
    sum += static_cast<int8_t>(bytes[c]);
  }
  w.q_offset[at] = 128 * sum;
}

// Words of four rows' bytes, neighbors in a column, with 128 added to each: [count / 16][16], `panel` apart.
INLINE void four_up(const int8_t* rows, int64_t row, int64_t count, Word* to, int64_t panel) {
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  typedef uint16_t Pairs __attribute__((vector_size(32)));
  typedef Word Words __attribute__((vector_size(32)));
  int64_t i = 0;
  for (; i + 32 <= count; i += 32, to += 2 * panel) {
    Bytes x[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      std::memcpy(&x[j], rows + j * row + i, sizeof(x[j]));
      x[j] ^= 128;
    }
    Words y[4];  // of each, features 4 j .. 4 j + 3 of one panel and of the next
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const auto both = [j](Bytes a, Bytes b) __attribute__((always_inline)) {
        return (Pairs)(j ? __builtin_shufflevector(
                               a, b, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 24,
                               56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63)
                         : __builtin_shufflevector(
                               a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 16, 48,
                               17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55));
      };
      const Pairs a = both(x[0], x[1]), b = both(x[2], x[3]);
      y[2 * j] = (Words)__builtin_shufflevector(
          a, b, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27);
      y[2 * j + 1] = (Words)__builtin_shufflevector(
          a, b, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 4; j += 2) {
      const Words low = __builtin_shufflevector(y[j], y[j + 1], 0, 1, 2, 3, 8, 9, 10, 11);
      const Words high = __builtin_shufflevector(y[j], y[j + 1], 4, 5, 6, 7, 12, 13, 14, 15);
      std::memcpy(to + j * 4, &low, sizeof(low));
      std::memcpy(to + panel + j * 4, &high, sizeof(high));
    }
  }
  for (; i < count; to += panel) {
    for (int64_t lane = 0; lane < LANES; ++lane, ++i) {
      uint32_t word = 0;
      for (int64_t j = 0; j < 4 && i < count; ++j) {
        word |= (static_cast<uint8_t>(rows[j * row + i]) ^ 128u) << 8 * j;
      }
      to[lane] = word;
    }
  }
}

// As CarryQueries, of narrow numbers: bf16, or bytes, of queries with a scale each row and head.
template <Kind KIND>
struct CarryNarrow {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    constexpr bool BYTES = KIND == Kind::int8;
    using Number = std::conditional_t<BYTES, int8_t, uint16_t>;
    constexpr int64_t STRIP = 64;  // features, as there
    constexpr int64_t A_WORD = sizeof(Word) / sizeof(Number), A_LINE = 64 / sizeof(Number);
    const int64_t d = w->d, dim = w->dim, depth = dim / A_WORD, strips = (d + STRIP - 1) / STRIP;
    const int64_t rows = w->lanes.size();
    const Linear& kv = w->w[KEY_VALUE];
    const auto* weight = static_cast<const Number*>(
        BYTES ? static_cast<const void*>(kv.bits.weight) : kv.words);
    static thread_local Scratch scratch;
    Word* strip = words_of(scratch.get(STRIP * depth));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / strips, first = item % strips * STRIP;
      const int64_t width = std::min(STRIP, d - first);
      const int64_t ahead = item + 2, beyond = ahead / strips * dim * d + ahead % strips * STRIP;
      for (int64_t c = 0; c < dim; c += A_WORD) {
        for (int64_t j = c; j < c + A_WORD; ++j) {
          for (int64_t i = 0; i < STRIP; i += A_LINE) __builtin_prefetch(weight + beyond + j * d + i);
        }
        const Number* from = weight + (head * dim + c) * d + first;
        Word* to = strip + c / A_WORD * LANES;
        if constexpr (BYTES) {
          four_up(from, d, width, to, depth * LANES);
        } else {
          for (int64_t i = 0; i < width; i += LANES) {
            pair_up<S>(from + i, from + d + i, std::min(LANES, width - i), to + i * depth);
          }
        }
      }
      multiply_words(
          KIND, words_of(w->q_narrow) + head * rows * depth, depth, strip, panels_of(width) * LANES, 0,
          rows,
          [&](const Word* sums, int64_t n, int64_t count, int64_t p) __attribute__((always_inline)) {
            for (int64_t r = 0; r < count; ++r) {
              const int64_t at = head * rows + n + r;
              uint16_t* to = halves_of(w->carried) + at * w->wide + first + p * LANES;
              for (int64_t i = 0; i < LANES; i += S::WIDTH) {
                std::conditional_t<BYTES, typename S::Int, typename S::Vec> sum;
                std::memcpy(&sum, sums + r * LANES + i, sizeof(sum));
                typename S::Vec value;
                if constexpr (BYTES) {
                  value = __builtin_convertvector(sum - w->q_offset[at], typename S::Vec) *
                      w->q_scale[at];
                } else {
                  value = sum;
                }
                store_some<S>(to + i, to_bf16<S>(value), S::WIDTH);
              }
            }
          });
    }
  }
};

// As attend_absorbed, pair by pair of w->carried at q(i), over states [keys][dim]; results, `wide` apart.
template <class S, class Query, class Relate>
INLINE void attend_absorbed_in_bf16(
    const Query& q, const float* states, bool floats, int64_t tokens, int64_t dim, int64_t pairs,
    const Relate& relate, float* out, int64_t wide) {
  static thread_local Scratch scratch;
  const Engaged engaged(engine(Kind::bf16));
  const int64_t keys = filled(tokens), half = dim / 2, panels = panels_of(pairs);
  // Queries' panels, scores' panels, weights' panels and rows, states as rows and in pairs.
  float* queries = scratch.get(
      panels * LANES * (half + 2 * keys) + tokens * half + keys / 2 * wide);
  float *scores = queries + panels * half * LANES, *words = scores + panels * keys * LANES;
  float *weights = words + panels * keys / 2 * LANES, *paired = weights + panels * keys / 2 * LANES;
  const Word* rows = words_of(states);
  if (floats) {
    float* copy = paired + keys / 2 * wide;
    bf16_of<S>(states, tokens * dim, halves_of(copy));
    rows = words_of(copy);
  }
  for (int64_t p = 0; p < panels; ++p) {
    pack_panel<S>([&](int64_t i) { return q(p * LANES + i); }, std::min(LANES, pairs - p * LANES), half,
               queries + p * half * LANES);
  }
  multiply_words(
      Kind::bf16, rows, half, words_of(queries), panels * LANES, 0, tokens,
      [&](const Word* sums, int64_t n, int64_t count, int64_t p) {
        std::memcpy(scores + (p * keys + n) * LANES, sums, count * LANES * sizeof(float));
      });
  for (int64_t p = 0; p < panels; ++p) {
    float* mine = scores + p * keys * LANES;
    RelativeBias bias;
    const int64_t lanes = std::min(LANES, pairs - p * LANES);
    for (int64_t i = 0; i < lanes; ++i) relate(bias, i, p * LANES + i);
    bias.add(mine, LANES, tokens);
    softmax<S>(mine, LANES, tokens, nullptr);
    std::fill(mine + tokens * LANES, mine + keys * LANES, 0.0f);
    to_words<S>(mine, keys, words_of(words) + p * keys / 2 * LANES);
    unpack_panel<S>(words + p * keys / 2 * LANES, keys / 2,
                 [&](int64_t i) { return weights + (p * LANES + i) * keys / 2; }, 0, LANES);
  }
  const auto* numbers = reinterpret_cast<const uint16_t*>(rows);
  const int64_t pairs_of_keys = (tokens + 1) / 2;
  for (int64_t c = 0; c < wide; c += LANES) {
    const int64_t first = dim - c < LANES ? 0 : pairs_of_keys;  // what is written below is whole
    float* column = paired + c * (keys / 2);
    std::fill(column + first * LANES, column + keys / 2 * LANES, 0.0f);
  }
  for (int64_t j = 0; j < tokens; j += 2) {
    const uint16_t* one = numbers + j * dim;
    for (int64_t c = 0; c < dim; c += LANES) {
      Word* to = words_of(paired) + (c * keys / 2) + j / 2 * LANES;
      // A last key has none beside it: its weight is 0.
      pair_up<S>(one + c, (j + 1 < tokens ? one + dim : one) + c, std::min(LANES, dim - c), to);
    }
  }
  multiply_words(
      Kind::bf16, words_of(weights), keys / 2, words_of(paired), wide, 0, pairs,
      [&](const Word* sums, int64_t n, int64_t count, int64_t p) {
        for (int64_t r = 0; r < count; ++r) {
          std::memcpy(out + (n + r) * wide + p * LANES, sums + r * LANES, LANES * sizeof(float));
        }
      });
}

}  // namespace tokenexit
