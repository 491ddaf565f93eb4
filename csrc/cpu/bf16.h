#pragma once
// Words of two bf16: the numbers of products in that dtype, and of a bf16 model's states.
#include "../checks.h"
#include "panels.h"
#include "tiles.h"

namespace tokenexit {

// A vector of 16-bit numbers in words, and the lower halves of words. Of 512 bits, the compiler makes
// two halves of __builtin_convertvector.
template <class S>
INLINE typename S::UInt widened(typename S::UShort x) {
#ifdef __x86_64__
  if constexpr (S::WIDTH == LANES) {
    typename S::UInt wide;
    asm("vpmovzxwd %1, %0" : "=v"(wide) : "vm"(x));
    return wide;
  }
#endif
  return __builtin_convertvector(x, typename S::UInt);
}
template <class S>
INLINE typename S::UShort narrowed(typename S::UInt x) {
#ifdef __x86_64__
  if constexpr (S::WIDTH == LANES) {
    typename S::UShort few;
    asm("vpmovdw %1, %0" : "=v"(few) : "v"(x));
    return few;
  }
#endif
  return __builtin_convertvector(x, typename S::UShort);
}

// x in bf16, to the nearest, ties to even; NaN stays NaN. In the upper half of a word, by integers.
template <class S>
INLINE typename S::UInt rounded(typename S::Vec x) {
  using U = typename S::UInt;
  const U bits = (U)x;
  const U nearest = bits + 0x7FFF + (bits >> 16 & 1);
  return x == x ? nearest : bits | 0x400000;
}
template <class S>
INLINE typename S::UShort to_bf16(typename S::Vec x) {
#ifdef __x86_64__
  if constexpr (S::WIDTH == LANES) {
    if (ROUNDS_TO_BF16) {
      typename S::UShort result;
      asm("vcvtneps2bf16 %1, %0" : "=v"(result) : "v"(x));
      return result;
    }
  }
#endif
  return narrowed<S>(rounded<S>(x) >> 16);
}

// A word of x, then y.
template <class S>
INLINE void store_bf16(Word* to, typename S::Vec x, typename S::Vec y) {
  typename S::UInt words;
#ifdef __x86_64__
  if constexpr (S::WIDTH == LANES) {
    if (ROUNDS_TO_BF16) {  // all of x, then all of y; then one of each
      typename S::UInt order;
#pragma GCC unroll 16
      for (uint32_t i = 0; i < LANES; ++i) order[i] = i | (i + LANES) << 16;
      asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(words) : "v"(x), "v"(y));
      asm("vpermw %1, %2, %0" : "=v"(words) : "v"(words), "v"(order));
      std::memcpy(to, &words, sizeof(words));
      return;
    }
  }
#endif
  words = rounded<S>(x) >> 16 | (rounded<S>(y) & 0xFFFF0000);
  std::memcpy(to, &words, sizeof(words));
}

// A panel [width][16], times `scale`, to words, [width / 2][16].
template <class S>
INLINE void to_words(const float* panel, int64_t width, Word* words, float scale = 1) {
  for (int64_t k = 0; k < width; k += 2) {
    for (int64_t i = 0; i < LANES; i += S::WIDTH) {
      const float* x = panel + k * LANES + i;
      store_bf16<S>(words + k / 2 * LANES + i, S::load(x) * scale, S::load(x + LANES) * scale);
    }
  }
}

// The reverse.
template <class S>
INLINE void from_words(const Word* words, int64_t width, float* panel) {
  for (int64_t k = 0; k < width; k += 2) {
    for (int64_t i = 0; i < LANES; i += S::WIDTH) {
      typename S::UInt both;
      std::memcpy(&both, words + k / 2 * LANES + i, sizeof(both));
      float* x = panel + k * LANES + i;
      S::store(x, (typename S::Vec)(both << 16));
      S::store(x + LANES, (typename S::Vec)(both & 0xFFFF0000));
    }
  }
}

// Numbers beside each other, as many as a vector has or `count` less.
template <class S, class Number>
INLINE auto load_some(const Number* from, int64_t count) {
  typedef Number Few __attribute__((vector_size(S::WIDTH * sizeof(Number))));
  Few x = {};
  if (count >= S::WIDTH) {
    std::memcpy(&x, from, sizeof(x));
  } else {
    for (int64_t i = 0; i < count; ++i) x[i] = from[i];
  }
  return x;
}

template <class S, class Some, class Number>
INLINE void store_some(Number* to, Some x, int64_t count) {
  if (count >= S::WIDTH) {
    std::memcpy(to, &x, S::WIDTH * sizeof(Number));
  } else {
    std::memcpy(to, &x, count * sizeof(Number));
  }
}

template <class S>
INLINE void floats_of(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += S::WIDTH) {
    store_some<S>(to + i, widened<S>(load_some<S>(from + i, count - i)) << 16, count - i);
  }
}
template <class S>
INLINE void bf16_of(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += S::WIDTH) {
    store_some<S>(to + i, to_bf16<S>(load_some<S>(from + i, count - i)), count - i);
  }
}

// To what bf16 holds, in place.
template <class S>
INLINE void round_to_bf16(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += S::WIDTH) {
    const auto few = to_bf16<S>(load_some<S>(x + i, count - i));
    store_some<S>(x + i, widened<S>(few) << 16, count - i);
  }
}

// The same for callers of no instruction set.
struct Widen {
  template <class S>
  static INLINE void run(const uint16_t* from, int64_t count, float* to) {
    floats_of<S>(from, count, to);
  }
};
struct Narrow {
  template <class S>
  static INLINE void run(const float* from, int64_t count, uint16_t* to) {
    bf16_of<S>(from, count, to);
  }
};
struct Round {
  template <class S>
  static INLINE void run(float* x, int64_t count) {
    round_to_bf16<S>(x, count);
  }
};

// The values of a contiguous tensor of bf16.
inline std::vector<float> floats_of(const Tensor& x) {
  std::vector<float> result(x.numel());
  const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
  dispatch<Widen>(from, x.numel(), result.data());
  return result;
}

// Words of two rows' numbers, neighbors in a column: what a product over rows reads.
template <class S>
INLINE void pair_up(const uint16_t* a, const uint16_t* b, int64_t count, Word* to) {
  using U = typename S::UInt;
  for (int64_t i = 0; i < count; i += S::WIDTH) {
    const U words = widened<S>(load_some<S>(a + i, count - i)) |
        widened<S>(load_some<S>(b + i, count - i)) << 16;
    std::memcpy(to + i, &words, sizeof(words));
  }
}
// As product() in panels.h, of words: weights [*][depth], x [panels][depth][16]. If `words` is given,
// the result goes there in bf16 in place of y, [panels][out / 2][16].
struct Product16 {
  template <class S>
  static INLINE void run(
      const Word* weight, int64_t depth, const Word* x, int64_t rows, float* y, int64_t out,
      int64_t n0, int64_t n1, const Epilogue* epilogue, Word* words) {
    const auto take = [&](const Word* sums, int64_t n, int64_t count, int64_t p)
                          __attribute__((always_inline)) {
      const auto value = [&](int64_t r, int64_t i) __attribute__((always_inline)) {
        typename S::Vec sum;
        std::memcpy(&sum, sums + r * LANES + i, sizeof(sum));
        if (epilogue->bias) sum += epilogue->bias[n + r];
        if (epilogue->residual) sum += S::load(epilogue->residual + (p * out + n + r) * LANES + i);
        return epilogue->gelu == Gelu::none ? sum : gelu<S>(epilogue->gelu, sum);
      };
      for (int64_t i = 0; i < LANES; i += S::WIDTH) {
        for (int64_t r = 0; r < count && !words; ++r) {
          S::store(y + (p * out + n + r) * LANES + i, value(r, i));
        }
        for (int64_t r = 0; r < count && words; r += 2) {
          store_bf16<S>(words + (p * out + n + r) / 2 * LANES + i, value(r, i), value(r + 1, i));
        }
      }
    };
    multiply_words(Kind::bf16, weight, depth, x, rows, n0, n1, take);
  }
};

}  // namespace tokenexit
