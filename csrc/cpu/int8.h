#pragma once
// Products of 8-bit weights and 8-bit activations, whose sums are exact integers.
//
// Activations are scaled row by row: value = (byte - 128) * scale. A panel's bytes are
// [depth / 4][16 lanes][4], four features of a row beside each other; those of few rows [row][depth].
#include "panels.h"
#include "tiles.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace tokenexit {

// The larger of sizes as bits: of floats without their sign the order is that of integers, in which
// infinities and NaN come last.
template <class S>
INLINE typename S::Int larger(typename S::Int top, typename S::Vec x) {
  const typename S::Int size = (typename S::Int)x & 0x7FFFFFFF;
  return size > top ? size : top;
}

// What a row's values are multiplied by to become bytes, and back, by its largest size. NaN if that
// is none or infinite.
template <class S>
INLINE typename S::Vec inverse_of(typename S::Int top) {
  const typename S::Vec size = (typename S::Vec)top;
  return size > 0 ? 127.0f / size : typename S::Vec{};
}
template <class S>
INLINE typename S::Vec scale_of(typename S::Int top) {
  const typename S::Vec size = (typename S::Vec)top;
  return size * (1.0f / 127) + size * 0.0f;
}

// Features from .. to - 1 of the first lanes of a panel [depth][16] to bytes, by the largest size of
// each lane.
template <class S>
INLINE void to_bytes(
    const float* panel, const Word* tops, int64_t lanes, bool rows, int64_t depth, int64_t from,
    int64_t to, uint8_t* bytes) {
  using U = typename S::UInt;
  for (int64_t at = 0; at < lanes; at += S::WIDTH) {
    typename S::Int top;
    std::memcpy(&top, tops + at, sizeof(top));
    const typename S::Vec inverse = inverse_of<S>(top);
    // Added to a float, 1.5 * 2^23 leaves the nearest integer in its last bits.
    const auto byte = [&](int64_t k) __attribute__((always_inline)) {
      return (U)(S::load(panel + k * LANES + at) * inverse + (12582912.0f + 128)) & 0xFF;
    };
    for (int64_t k = from; k < to; k += 4) {
      const U four = byte(k) | byte(k + 1) << 8 | byte(k + 2) << 16 | byte(k + 3) << 24;
      if (!rows) {
        std::memcpy(bytes + (k * LANES + at * 4), &four, sizeof(four));
        continue;
      }
      for (int64_t i = at; i < std::min<int64_t>(lanes, at + S::WIDTH); ++i) {
        const uint32_t word = four[i - at];
        std::memcpy(bytes + i * depth + k, &word, sizeof(word));
      }
    }
  }
}

// Each lane's scale, of 16; 0 of those that are not there.
template <class S>
INLINE void to_scales(const Word* tops, int64_t lanes, float* scales) {
  for (int64_t at = 0; at < LANES; at += S::WIDTH) {
    typename S::Int top;
    std::memcpy(&top, tops + at, sizeof(top));
    S::store(scales + at, scale_of<S>(top));
  }
  std::fill(scales + lanes, scales + LANES, 0.0f);
}

// The first lanes of a panel to bytes, and their scales.
template <class S>
INLINE void quantize_panel(
    const float* panel, int64_t lanes, bool rows, int64_t depth, uint8_t* bytes, float* scales) {
  alignas(64) Word tops[LANES];
  for (int64_t at = 0; at < LANES; at += S::WIDTH) {
    typename S::Int top[4] = {};  // four, so that one need not wait for the one before
    for (int64_t k = 0; k < depth; k += 4) {
      for (int64_t j = 0; j < 4; ++j) top[j] = larger<S>(top[j], S::load(panel + (k + j) * LANES + at));
    }
    for (int64_t j = 1; j < 4; ++j) top[0] = larger<S>(top[0], (typename S::Vec)top[j]);
    std::memcpy(tops + at, top, sizeof(*top));
  }
  to_bytes<S>(panel, tops, lanes, rows, depth, 0, depth, bytes);
  to_scales<S>(tops, lanes, scales);
}

#ifdef __x86_64__
__attribute__((target("avx2"))) inline void bytes_avx2(
    const float* row, int64_t depth, float inverse, uint8_t* bytes) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t k = 0;
  for (; k + 32 <= depth; k += 32) {
    __m256i x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(row + k + i * 8), _mm256_set1_ps(inverse));
      x[i] = _mm256_add_epi32(_mm256_cvtps_epi32(scaled), _mm256_set1_epi32(128));
    }
    const __m256i four = _mm256_packus_epi16(
        _mm256_packus_epi32(x[0], x[1]), _mm256_packus_epi32(x[2], x[3]));
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(bytes + k), _mm256_permutevar8x32_epi32(four, order));
  }
  for (; k < depth; ++k) bytes[k] = _mm_cvtss_si32(_mm_set_ss(row[k] * inverse)) + 128;
}
#endif

// One row [depth] likewise, and its scale.
template <class S>
INLINE float quantize_row(const float* row, int64_t depth, uint8_t* bytes) {
  typename S::Int tops[4] = {};  // four, so that one need not wait for the one before
  int64_t k = 0;
  for (; k + 4 * S::WIDTH <= depth; k += 4 * S::WIDTH) {
    for (int64_t j = 0; j < 4; ++j) tops[j] = larger<S>(tops[j], S::load(row + k + j * S::WIDTH));
  }
  Word size = 0;
  for (int64_t j = 0; j < 4 * S::WIDTH; ++j) size = std::max<Word>(size, tops[j / S::WIDTH][j % S::WIDTH]);
  for (; k < depth; ++k) {
    Word bits;
    std::memcpy(&bits, row + k, sizeof(bits));
    size = std::max(size, bits & 0x7FFFFFFF);
  }
  const typename S::Int top = size - typename S::Int{};
  const float inverse = inverse_of<S>(top)[0], scale = scale_of<S>(top)[0];
#ifdef __x86_64__
  if constexpr (S::ROWS > Portable::ROWS) {
    bytes_avx2(row, depth, inverse, bytes);
    return scale;
  }
#endif
  for (k = 0; k < depth; ++k) {
    const float x = row[k] * inverse;
    bytes[k] = x == x ? std::nearbyint(x) + 128 : 0;
  }
  return scale;
}

#ifdef __x86_64__
__attribute__((target("avx2"))) inline __m256 eight_floats(const int8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

__attribute__((target("avx2"))) inline void to_floats_avx2(
    const int8_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, eight_floats(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

// c[r * ldc + i] = sum over k of a(r, k) * w[k * ldw + i], for R rows and 8 * VECS of i. `next` is
// what comes after, as far apart.
template <int R, int VECS>
__attribute__((target("avx2,fma"))) void few_floats_avx2(
    Strided a, const int8_t* w, int64_t ldw, const int8_t* next, float* c, int64_t ldc,
    int64_t depth) {
  __m256 sums[R][VECS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(next + k * ldw);
    __m256 x[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) x[v] = eight_floats(w + k * ldw + v * 8);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 y = _mm256_set1_ps(a.data[r * a.row + k * a.col]);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) sums[r][v] += y * x[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) _mm256_storeu_ps(c + r * ldc + v * 8, sums[r][v]);
  }
}

#endif

// Bytes of a weight's row as floats, not scaled.
template <class S>
INLINE void to_floats(const int8_t* from, int64_t count, float* to) {
#ifdef __x86_64__
  if constexpr (S::ROWS > Portable::ROWS) return to_floats_avx2(from, count, to);
#endif
  std::copy_n(from, count, to);
}

// A few fp32 rows times `width` columns of bytes, see few_floats_avx2; false if it is not for these.
template <class S>
INLINE bool few_floats(
    Strided a, const int8_t* w, int64_t ldw, const int8_t* next, float* c, int64_t ldc,
    int64_t rows, int64_t width, int64_t depth) {
#ifdef __x86_64__
  if constexpr (S::ROWS > Portable::ROWS) {
    if (rows > 6 || width % 32) return false;
    constexpr decltype(&few_floats_avx2<1, 4>) by_count[] = {
        few_floats_avx2<1, 4>, few_floats_avx2<2, 4>, few_floats_avx2<3, 2>,
        few_floats_avx2<4, 2>, few_floats_avx2<5, 2>, few_floats_avx2<6, 2>};
    const int64_t step = rows > 2 ? 16 : 32;
    for (int64_t i = 0; i < width; i += step) {
      by_count[rows - 1](a, w + i, ldw, next, c + i, ldc, depth);
    }
    return true;
  }
#endif
  return false;
}

// 8-bit weights [out][depth]: value = integer * scale; offset = 128 * scale * sum of the integers,
// which the bytes' zero point adds to a product. `wide` ones may be beyond +-64.
struct Matrix8 {
  const int8_t* weight = nullptr;
  const float *scale = nullptr, *offset = nullptr;
  bool wide = false;
};

// As product() in panels.h.
struct Product8 {
  template <class S>
  static INLINE void run(
      const Matrix8* m, int64_t depth, const Word* x, const float* scale, int64_t rows, float* y, int64_t out,
      int64_t n0, int64_t n1, const Epilogue* epilogue) {
    const float *offset = m->offset, *unit = m->scale, *bias = epilogue->bias;
    const float* residual = epilogue->residual;
    const Gelu kind = epilogue->gelu;
    Word* const tops = epilogue->tops;
    const auto take = [=](const Word* sums, int64_t n, int64_t count, int64_t p)
                          __attribute__((always_inline)) {
      const int64_t at = (p * out + n) * LANES, lanes = std::min(LANES, rows - p * LANES);
      for (int64_t i = 0; i < lanes; i += S::WIDTH) {
        const auto own = S::load(scale + p * LANES + i);
        typename S::Int top = {};
        for (int64_t r = 0; r < count; ++r) {
          typename S::Int exact;
          std::memcpy(&exact, sums + r * LANES + i, sizeof(exact));
          const auto sum = __builtin_convertvector(exact, typename S::Vec);
          typename S::Vec value = (sum * unit[n + r] - offset[n + r]) * own + (bias ? bias[n + r] : 0);
          if (residual) value += S::load(residual + at + r * LANES + i);
          if (kind != Gelu::none) value = gelu<S>(kind, value);
          S::store(y + at + r * LANES + i, value);
          top = larger<S>(top, value);
        }
        if (!tops) continue;
        typename S::Vec before;
        std::memcpy(&before, tops + p * LANES + i, sizeof(before));
        top = larger<S>(top, before);
        std::memcpy(tops + p * LANES + i, &top, sizeof(top));
      }
      for (int64_t r = 0; r < count && lanes < LANES; ++r) {
        std::fill(y + at + r * LANES + lanes, y + at + (r + 1) * LANES, 0.0f);
      }
    };
    multiply_words(
        Kind::int8, reinterpret_cast<const Word*>(m->weight), depth / 4, x, rows, n0, n1, take,
        m->wide);
  }
};

}  // namespace tokenexit
