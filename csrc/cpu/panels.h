#pragma once
// Products over panels of 16 rows, see LANES.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "simd.h"

namespace tokenexit {

constexpr int64_t panels_of(int64_t rows) { return (rows + LANES - 1) / LANES; }

// A float array that only grows, kept from call to call; its content is not. It begins with a line of
// memory: vectors across two lines take twice as long to load. A large one asks for large pages, as
// each page costs a look into the tables of the system, and of the one below a virtual machine's.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { release(); }

  float* get(int64_t size) {
    if (size > size_) {
      release();
      const size_t bytes = size * sizeof(float), align = bytes < 2 * PAGE ? LINE : PAGE;
      data_ = static_cast<float*>(::operator new(bytes, std::align_val_t(align)));
      size_ = size;
      align_ = align;
#ifdef MADV_HUGEPAGE
      if (align == PAGE) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    return data_;
  }

 private:
  static constexpr size_t LINE = 64, PAGE = 2 << 20;

  void release() {
    if (data_) ::operator delete(data_, std::align_val_t(align_));
    data_ = nullptr;
    size_ = 0;
  }

  float* data_ = nullptr;
  int64_t size_ = 0;
  size_t align_ = LINE;
};

// The left operand of a product: element (r, k) is at data[r * row + k * col].
struct Strided {
  const float* data;
  int64_t row, col;
};

// sums[r][v] += sum over k of a(r, k) * b[k * ldb + v * ldv], a vector; a few rows against up to 16
// lanes, or as many of two panels. `next` is what the following tile reads, rows of `depth`, `next_row`
// apart: it is asked for from memory meanwhile, LINES with each line of depth, into the first-level cache
// (3) or the second (2).
template <class S, int R, int VECS, int LINES = 0, int CACHE = 3>
INLINE void tile(
    typename S::Vec (&sums)[R][VECS], Strided a, const float* b, int64_t ldb, int64_t depth,
    int64_t ldv = S::WIDTH, const float* next = nullptr, int64_t next_row = 0) {
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    typename S::Vec lanes[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) lanes[v] = S::load(b + k * ldb + v * ldv);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename S::Vec x = a.data[r * a.row + k * a.col] - typename S::Vec{};
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) sums[r][v] += x * lanes[v];
    }
  };
  const int64_t lines = depth / 16;  // of memory, 16 floats each
  int64_t line = 0, k = 0;
  for (; k + 16 <= depth; k += 16) {
    if (LINES) {
#pragma GCC unroll 32
      for (int i = 0; i < LINES; ++i) {
        __builtin_prefetch(next + line * 16, 0, CACHE);
        if (++line == lines) {
          next += next_row;
          line = 0;
        }
      }
    }
#pragma GCC unroll 4
    for (int64_t j = k; j < k + 16; ++j) step(j);
  }
  for (; k < depth; ++k) step(k);
}

// row(r)[lane] (+)= sum over k of a(r, k) * b[k * ldb + lane], for `rows` <= R rows from r0 and VECS
// vectors; `next` as above.
template <class S, int R, int VECS, int LINES = 0, class Row>
INLINE void some_rows(
    Strided a, const float* b, int64_t ldb, const Row& row, int64_t r0, int64_t rows,
    int64_t depth, bool add, const float* next = nullptr, int64_t next_row = 0) {
  if constexpr (R > 1) {
    if (rows < R) {
      return some_rows<S, R - 1, VECS, LINES>(a, b, ldb, row, r0, rows, depth, add, next, next_row);
    }
  }
  typename S::Vec sums[R][VECS];
#pragma GCC unroll 24
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      sums[i][v] = add ? S::load(row(r0 + i) + v * S::WIDTH) : typename S::Vec{};
    }
  }
  const Strided from = {a.data + r0 * a.row, a.row, a.col};
  tile<S, R, VECS, LINES, 2>(sums, from, b, ldb, depth, S::WIDTH, next, next_row);
#pragma GCC unroll 24
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) S::store(row(r0 + i) + v * S::WIDTH, sums[i][v]);
  }
}

// The same for any number of rows, in tiles of about the same size: one of a row or two would take
// almost as long as a whole one.
template <class S, int R = S::ROWS, int VECS = S::VECS, class Row>
INLINE void multiply_rows(
    Strided a, const float* b, int64_t ldb, const Row& row, int64_t rows, int64_t depth,
    bool add = false) {
  int64_t tiles = (rows + R - 1) / R;
  for (int64_t r = 0, count; r < rows; r += count, --tiles) {
    count = (rows - r + tiles - 1) / tiles;
    some_rows<S, R, VECS>(a, b, ldb, row, r, count, depth, add);
  }
}

// The same to c[r * ldc + lane]; if `half`, of a row's first 8 lanes at least.
struct Multiply {
  template <class S>
  static INLINE void run(
      Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t depth,
      bool add, bool half) {
    const auto row = [&](int64_t r) { return c + r * ldc; };
    if constexpr (S::VECS > 1) {
      if (half) {
        return multiply_rows<S, 2 * S::ROWS, S::VECS / 2>(a, b, ldb, row, rows, depth, add);
      }
    }
    multiply_rows<S>(a, b, ldb, row, rows, depth, add);
  }
};
template <class S>
INLINE void multiply(
    Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t depth,
    bool add = false, bool half = false) {
  call<S, Multiply>(a, b, ldb, c, ldc, rows, depth, add, half);
}

typedef float Four __attribute__((vector_size(16), aligned(4)));

// Rows of four floats become columns.
INLINE void transpose4(const float* const (&from)[4], float* const (&to)[4]) {
  Four x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const Four*>(from[i]);
  const Four a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
  const Four b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
  const Four c = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
  const Four d = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  *reinterpret_cast<Four*>(to[0]) = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to[1]) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(to[2]) = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to[3]) = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// As transpose4, of eight: from[j] and from[j + 4] are the halves of a vector.
typedef float Eight __attribute__((vector_size(32), aligned(4)));
template <class S>
INLINE void transpose8(const float* const (&from)[8], Eight (&to)[4]) {
  Eight x[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Four& low = *reinterpret_cast<const Four*>(from[j]);  // any other type has its alignment
    const Four& high = *reinterpret_cast<const Four*>(from[j + 4]);
#ifdef __x86_64__
    // Of shuffles the compiler makes loads, and then inserts, which wait for the one port of shuffles.
    if constexpr (S::WIDTH > Portable::WIDTH) {
      asm("vmovups %1, %x0\n\tvinsertf128 $1, %2, %0, %0" : "=&x"(x[j]) : "m"(low), "m"(high));
      continue;
    }
#endif
    x[j] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
  }
  const Eight a = __builtin_shufflevector(x[0], x[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const Eight b = __builtin_shufflevector(x[2], x[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const Eight c = __builtin_shufflevector(x[0], x[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const Eight d = __builtin_shufflevector(x[2], x[3], 2, 10, 3, 11, 6, 14, 7, 15);
  to[0] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
  to[1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  to[2] = __builtin_shufflevector(c, d, 0, 1, 8, 9, 4, 5, 12, 13);
  to[3] = __builtin_shufflevector(c, d, 2, 3, 10, 11, 6, 7, 14, 15);
}

// 16 rows of `width` features to a panel; lanes beyond `lanes` become 0. Lane i is at row(i).
template <class S, class Row>
INLINE void pack_panel(const Row& row, int64_t lanes, int64_t width, float* panel) {
  constexpr int64_t STEP = S::WIDTH > Portable::WIDTH ? 8 : 4;
  for (int64_t i = 0; i < lanes; i += STEP) {
    const float* x[STEP];
    for (int64_t j = 0; j < STEP; ++j) x[j] = row(std::min(i + j, lanes - 1));
    int64_t k = 0;
    for (; k + 4 <= width; k += 4) {
      float* to = panel + k * LANES + i;
      if constexpr (STEP == 8) {
        Eight y[4];
        transpose8<S>({x[0] + k, x[1] + k, x[2] + k, x[3] + k, x[4] + k, x[5] + k, x[6] + k, x[7] + k}, y);
        for (int64_t j = 0; j < 4; ++j) *reinterpret_cast<Eight*>(to + j * LANES) = y[j];
        continue;
      }
      transpose4({x[0] + k, x[1] + k, x[2] + k, x[3] + k},
                 {to, to + LANES, to + 2 * LANES, to + 3 * LANES});
    }
    for (; k < width; ++k) {
      for (int64_t j = 0; j < STEP; ++j) panel[k * LANES + i + j] = x[j][k];
    }
  }
  if (lanes == LANES) return;
  for (int64_t k = 0; k < width; ++k) {
    std::fill(panel + k * LANES + lanes, panel + (k + 1) * LANES, 0.0f);
  }
}

// The reverse, for lanes first .. last - 1.
template <class S, class Row>
INLINE void unpack_panel(
    const float* panel, int64_t width, const Row& row, int64_t first, int64_t last) {
  int64_t i = first;
  for (; i + 4 <= last; i += 4) {
    float* const y[4] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
    int64_t k = 0;
    for (; S::WIDTH > Portable::WIDTH && k + 8 <= width; k += 8) {  // features k and k + 4 in halves
      const float* from = panel + k * LANES + i;
      Eight z[4];
      transpose8<S>({from, from + LANES, from + 2 * LANES, from + 3 * LANES, from + 4 * LANES,
                  from + 5 * LANES, from + 6 * LANES, from + 7 * LANES}, z);
      for (int64_t j = 0; j < 4; ++j) *reinterpret_cast<Eight*>(y[j] + k) = z[j];
    }
    for (; k + 4 <= width; k += 4) {
      const float* from = panel + k * LANES + i;
      transpose4({from, from + LANES, from + 2 * LANES, from + 3 * LANES},
                 {y[0] + k, y[1] + k, y[2] + k, y[3] + k});
    }
    for (; k < width; ++k) {
      for (int64_t j = 0; j < 4; ++j) y[j][k] = panel[k * LANES + i + j];
    }
  }
  for (; i < last; ++i) {
    float* y = row(i);
    for (int64_t k = 0; k < width; ++k) y[k] = panel[k * LANES + i];
  }
}

// What is done to a product's sums: + bias, + residual (a panel), then GELU. Of int8 products the
// largest sizes are kept, too, [panels][16] as bits.
struct Epilogue {
  const float* bias = nullptr;
  const float* residual = nullptr;
  Gelu gelu = Gelu::none;
  int32_t* tops = nullptr;
};

// Features that lie beside each other where weights are turned.
constexpr int64_t TURNED = 2 * LANES;

// A product's operands, and the part of its depth that is being summed.
struct Factors {
  const float* weight;  // [out][depth]
  const float* turned;  // the same as [out / TURNED][depth][TURNED], or null
  const float* x;       // [panels][depth][16]
  float* y;             // [panels][out][16]
  int64_t depth, out, from, to;
  Epilogue epilogue;
};

// A vector of whole sums of a feature, to where it belongs.
template <class S>
INLINE void finish(const Factors& f, int64_t feature, int64_t at, typename S::Vec sum) {
  if (f.epilogue.bias) sum += f.epilogue.bias[feature];
  if (f.epilogue.residual) sum += S::load(f.epilogue.residual + at);
  if (f.epilogue.gelu != Gelu::none) sum = gelu<S>(f.epilogue.gelu, sum);
  S::store(f.y + at, sum);
}

// R output features from n against the first VECS vectors of a panel, or those of two panels.
// `rows` has their weights.
template <class S, int R, int VECS, int LINES = 0, int CACHE = 3>
INLINE void product_tile(
    const Factors& f, Strided rows, int64_t n, int64_t panel, const float* next = nullptr) {
  constexpr bool PAIR = VECS > S::VECS;
  const int64_t at = (panel * f.out + n) * LANES;
  const auto lane = [&](int r, int v) __attribute__((always_inline)) {
    return at + r * LANES + v * (PAIR ? f.out * LANES : S::WIDTH);
  };
  typename S::Vec sums[R][VECS];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      sums[r][v] = f.from ? S::load(f.y + lane(r, v)) : typename S::Vec{};
    }
  }
  const float* x = f.x + (panel * f.depth + f.from) * LANES;
  const int64_t ldv = PAIR ? f.depth * LANES : S::WIDTH;
  tile<S, R, VECS, LINES, CACHE>(sums, rows, x, LANES, f.to - f.from, ldv, next, f.depth);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      if (f.to == f.depth) {
        finish<S>(f, n + r, lane(r, v), sums[r][v]);
      } else {
        S::store(f.y + lane(r, v), sums[r][v]);
      }
    }
  }
}


// ROWS rows against 8 output features, which lie beside each other: weights are transposed on their
// way from memory. The sums are those of product_tile, added in the same order.
template <class S, int ROWS>
INLINE void few_tile(const Factors& f, int64_t n, const float* next) {
  const int64_t ld = f.depth;
  const float* w = f.weight + n * ld;
  Eight sums[ROWS] = {};
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    Eight columns[4];
    const float* at = w + k;
    transpose8<S>({at, at + ld, at + 2 * ld, at + 3 * ld, at + 4 * ld, at + 5 * ld, at + 6 * ld,
                at + 7 * ld}, columns);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sums[r] += f.x[(k + i) * LANES + r] * columns[i];
    }
  };
  int64_t k = 0;
  for (; k + 16 <= f.depth; k += 16) {  // a line of memory
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) __builtin_prefetch(next + k * 8 + i * 16);
#pragma GCC unroll 4
    for (int64_t j = k; j < k + 16; j += 4) step(j);
  }
  for (; k + 4 <= f.depth; k += 4) step(k);
  for (; k < f.depth; ++k) {  // as above, or a sum might be rounded once more
    Eight column;
    for (int64_t j = 0; j < 8; ++j) column[j] = w[j * ld + k];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sums[r] += f.x[k * LANES + r] * column;
  }
  for (int64_t j = 0; j < 8; ++j) {
    alignas(64) float lanes[LANES] = {};
    for (int r = 0; r < ROWS; ++r) lanes[r] = sums[r][j];
    for (int64_t i = 0; i < LANES; i += S::WIDTH) {
      const int64_t at = (n + j) * LANES + i;
      i < ROWS ? finish<S>(f, n + j, at, S::load(lanes + i)) : S::store(f.y + at, typename S::Vec{});
    }
  }
}

// Features n0 .. n1 - 1 but a rest of less than 8; returns where it starts.
template <class S, int ROWS = LANES / 2>
INLINE int64_t few_rows(const Factors& f, int64_t rows, int64_t n0, int64_t n1) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return few_rows<S, ROWS - 1>(f, rows, n0, n1);
  }
  int64_t n = n0;
  for (; n + 8 <= n1; n += 8) {
    few_tile<S, ROWS>(f, n, f.weight + (n + 16 <= n1 ? n + 8 : n) * f.depth);
  }
  return n;
}

// Blocks of 4 rows by 4 neighbors, four in vectors of 16, are turned each by itself.
template <class V>
INLINE void turn_blocks(const V* x, V* y) {
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    // Of neighbors 0 and 1, then of 2 and 3.
    const auto of = [&](V a, V b) __attribute__((always_inline)) {
      return i ? __builtin_shufflevector(
                     a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
               : __builtin_shufflevector(
                     a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    };
    const V a = of(x[0], x[1]), b = of(x[2], x[3]);
    y[i] = __builtin_shufflevector(
        a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    y[i + 1] = __builtin_shufflevector(
        a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
}

// Four neighbors in each of 16 rows, `row` apart, become four rows of 16, `to_row` apart.
template <class S>
INLINE void turn(const float* from, int64_t row, float* to, int64_t to_row) {
  typename S::Vec x[4], y[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Eight half[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const float* at = from + (i + j * 8) * row;
      half[j] = __builtin_shufflevector(
          *reinterpret_cast<const Four*>(at), *reinterpret_cast<const Four*>(at + 4 * row), 0, 1, 2,
          3, 4, 5, 6, 7);
    }
    x[i] = __builtin_shufflevector(
        half[0], half[1], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  turn_blocks(x, y);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) S::store(to + i * to_row, y[i]);
}

// The same of 16 neighbors, whole lines of memory: where rows fall on few lines of the first-level cache,
// one is gone before it is read again.
template <class S>
INLINE void turn_lines(const float* from, int64_t row, float* to, int64_t to_row) {
  typedef typename S::Vec V;
  V x[LANES], y[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) x[i] = S::load(from + i * row);
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4) turn_blocks(x + i, y + i);
  // y[i + 4 j] has neighbors i, i + 4, i + 8 and i + 12 of rows 4 j .. 4 j + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto even = [](V a, V b) __attribute__((always_inline)) {
      return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    };
    const auto odd = [](V a, V b) __attribute__((always_inline)) {
      return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    };
    const V a = even(y[i], y[i + 4]), b = even(y[i + 8], y[i + 12]);
    const V c = odd(y[i], y[i + 4]), d = odd(y[i + 8], y[i + 12]);
    S::store(to + i * to_row, even(a, b));
    S::store(to + (i + 4) * to_row, even(c, d));
    S::store(to + (i + 8) * to_row, odd(a, b));
    S::store(to + (i + 12) * to_row, odd(c, d));
  }
}

// Whether a product of so many rows goes by turned_rows where a vector is 16 wide. Of weights that lie
// turned already also where a last panel would be far from full.
constexpr int64_t MOST_TURNED = 4 * LANES;
constexpr bool turns(int64_t rows, bool turned) {
  return rows <= LANES * 3 / 2 ||
      (turned && rows <= MOST_TURNED && panels_of(rows) * LANES - rows >= LANES / 4);
}

// Features n0 .. n1 - 1 but a rest of less than TURNED; returns where it starts. Weights are turned, a
// piece of depth at a time, so that features lie beside each other: that takes as long as some five
// rows do, but lanes of a panel that are not there take no time. The sums are those of product_tile,
// added in the same order.
template <class S>
INLINE int64_t turned_rows(const Factors& f, int64_t rows, int64_t n0, int64_t n1) {
  constexpr int64_t PIECE = 64, R = LANES / 2;
  alignas(64) float w[PIECE * TURNED], sums[MOST_TURNED * TURNED], four[4 * LANES];
  std::fill_n(sums, panels_of(rows) * LANES * TURNED, 0.0f);  // lanes that are not there stay so
  // Rows a multiple of 2 KiB apart fall on the same few lines of the cache.
  const bool few_lines = f.depth % 512 == 0;
  const auto turn_piece = [&](const float* at, int64_t size) __attribute__((always_inline)) {
    int64_t k = 0;
    for (; few_lines && k + LANES <= size; k += LANES) {
      turn_lines<S>(at + k, f.depth, w + k * TURNED, TURNED);
      turn_lines<S>(at + LANES * f.depth + k, f.depth, w + k * TURNED + LANES, TURNED);
    }
    for (; k + 4 <= size; k += 4) {
      turn<S>(at + k, f.depth, w + k * TURNED, TURNED);
      turn<S>(at + LANES * f.depth + k, f.depth, w + k * TURNED + LANES, TURNED);
    }
    for (; k < size; ++k) {
      for (int64_t j = 0; j < TURNED; ++j) w[k * TURNED + j] = at[j * f.depth + k];
    }
  };
  int64_t n = n0;
  for (; n + TURNED <= n1; n += TURNED) {
    for (int64_t from = 0, size; from < f.depth; from += size) {
      const float* at = f.weight + n * f.depth + from;
      size = std::min(f.turned && rows > 3 * R ? 2 * PIECE : PIECE, f.depth - from);
      const float* columns = f.turned ? f.turned + n * f.depth + from * TURNED : w;
      if (!f.turned) turn_piece(at, size);
      // What follows, rows of `apart`.
      const float* next = f.turned                  ? columns + size * TURNED
          : from + size < f.depth                   ? at + size
          : n + 2 * TURNED <= n1                    ? f.weight + (n + TURNED) * f.depth
                                                    : at;
      const int64_t apart = f.turned ? size : f.depth;
      const auto add = [&]<int LINES>(int64_t r) __attribute__((always_inline)) {
        some_rows<S, R, 2, LINES>(
            {f.x + (r / LANES * f.depth + from) * LANES + r % LANES, 1, LANES}, columns, TURNED,
            [&](int64_t i) { return sums + (r + i) * TURNED; }, 0, std::min(R, rows - r), size,
            from > 0, next + r / R * LINES * apart, apart);
      };
      rows > R ? add.template operator()<TURNED / 2>(0) : add.template operator()<TURNED>(0);
      if (rows > R) add.template operator()<TURNED / 2>(R);
      for (int64_t r = 2 * R; r < rows; r += R) add.template operator()<0>(r);
    }
    for (int64_t at = 0; at < panels_of(rows) * TURNED; at += 4) {
      const int64_t p = at / TURNED, j = at % TURNED;
      turn<S>(sums + p * LANES * TURNED + j, TURNED, four, LANES);
      for (int64_t i = 0; i < 4; ++i) {
        finish<S>(f, n + j + i, (p * f.out + n + j + i) * LANES, S::load(four + i * LANES));
      }
    }
  }
  return n;
}

// Output features n0 .. n1 - 1 of `weight` [*, depth] times `rows` rows, x [panels][depth][16], into
// y [panels][out][16]. Weights are read once and as they lie, a few features against all panels,
// while the next few come from memory. A last panel of at most 8 rows costs half of one where a vector
// is 8 wide.
template <class S, int R = S::ROWS>
INLINE void product(
    const float* weight, const float* turned, int64_t depth, const float* x, int64_t rows, float* y,
    int64_t out, int64_t n0, int64_t n1, const Epilogue& epilogue) {
  constexpr int HALF = R == S::ROWS ? S::VECS / 2 : 0;
  const int64_t rest = rows % LANES;
  const bool half = HALF && 0 < rest && rest <= LANES / 2;
  const int64_t panels = half ? rows / LANES : panels_of(rows);
  // A part of a panel's depth stays in the second-level cache.
  constexpr int64_t MOST = 768;
  const int64_t parts = (depth + MOST - 1) / MOST;
  const int64_t part = ((depth + parts - 1) / parts + 15) / 16 * 16;
  const bool far = part * 2 * LANES > 12288;  // two panels leave no room in the first-level cache
  Factors f = {weight, turned, x, y, depth, out, 0, 0, epilogue};
  if constexpr (R == S::ROWS && S::VECS == 1) {
    if (n0 % TURNED) f.turned = nullptr;  // not at one of its blocks
    if (turns(rows, f.turned)) n0 = turned_rows<S>(f, rows, n0, n1);
  }
  int64_t n = n0;
  if constexpr (R == S::ROWS && S::WIDTH >= 8) {
    if (rows <= LANES / 2) {
      n = few_rows<S>(f, rows, n0, n1);
      if (n < n1) product<S, 1>(weight, nullptr, depth, x, rows, y, out, n, n1, epilogue);
      return;
    }
  }
  for (f.from = 0; f.from < depth; f.from = f.to) {
    f.to = std::min(depth, f.from + part);
    for (n = n0; n + R <= n1; n += R) {
      const float* at = weight + n * depth + f.from;
      const float* next = n + 2 * R <= n1 ? at + R * depth
          : f.to == depth                 ? at
                                          : weight + n0 * depth + f.to;
      const auto tiles = [&]<int VECS>(int64_t p) __attribute__((always_inline)) {
        if constexpr (S::VECS == 1) {
          if (p == 0 && far) return product_tile<S, R, VECS, R, 2>(f, {at, depth, 1}, n, p, next);
        }
        if (p == 0) return product_tile<S, R, VECS, R>(f, {at, depth, 1}, n, p, next);
        product_tile<S, R, VECS>(f, {at, depth, 1}, n, p);
      };
      int64_t p = 0;
      if constexpr (S::VECS == 1) {  // panels of one vector share weights in twos
        for (; p + 2 <= panels; p += 2) tiles.template operator()<2>(p);
      }
      for (; p < panels; ++p) tiles.template operator()<S::VECS>(p);
      if constexpr (HALF > 0) {
        if (!half) continue;
        if (!panels) {  // the weights' way from memory is what takes time
          product_tile<S, R, HALF, R>(f, {at, depth, 1}, n, 0, next);
        } else if ((n - n0) / R % 2 == 1) {
          // Half as wide, so twice as many features fill the registers.
          const float* both = at - R * depth;
          alignas(64) float copy[2 * R * (MOST + 16)];
          int64_t row = depth;
          if (depth % 512 == 0) {
            // Rows a multiple of 2 KiB apart fall on the same few lines of the cache: read a copy
            // with another distance.
            row = MOST + 16;
            for (int64_t r = 0; r < 2 * R; ++r) {
              std::memcpy(copy + r * row, both + r * depth, (f.to - f.from) * sizeof(float));
            }
            both = copy;
          }
          product_tile<S, 2 * R, HALF>(f, {both, row, 1}, n - R, panels);
        } else if (n + 2 * R > n1) {
          product_tile<S, R, HALF>(f, {at, depth, 1}, n, panels);
        }
      }
    }
  }
  if constexpr (R > 1) {
    if (n < n1) product<S, R / 2>(weight, nullptr, depth, x, rows, y, out, n, n1, epilogue);
  }
}

struct Product {
  template <class S>
  static INLINE void run(
      const float* weight, const float* turned, int64_t depth, const float* x, int64_t rows, float* y,
      int64_t out, int64_t n0, int64_t n1, const Epilogue* epilogue) {
    product<S>(weight, turned, depth, x, rows, y, out, n0, n1, *epilogue);
  }
};

// LayerNorm of each lane of a panel [width][16], in place.
template <class S>
INLINE void normalize(
    float* panel, int64_t width, const float* weight, const float* bias, float eps) {
  using V = typename S::Vec;
  for (int64_t at = 0; at < LANES; at += S::WIDTH) {
    float* x = panel + at;
    // Four sums, so that an addition need not wait for the one before.
    V sums[4] = {};
    int64_t k = 0;
    for (; k + 4 <= width; k += 4) {
      for (int64_t j = 0; j < 4; ++j) sums[j] += S::load(x + (k + j) * LANES);
    }
    for (; k < width; ++k) sums[0] += S::load(x + k * LANES);
    V mean = (sums[0] + sums[1] + (sums[2] + sums[3])) * (1.0f / width);
    V squares[4] = {}, rests[4] = {};
    for (k = 0; k + 4 <= width; k += 4) {
      for (int64_t j = 0; j < 4; ++j) {
        const V d = S::load(x + (k + j) * LANES) - mean;
        rests[j] += d;
        squares[j] += d * d;
      }
    }
    for (; k < width; ++k) {
      const V d = S::load(x + k * LANES) - mean;
      rests[0] += d;
      squares[0] += d * d;
    }
    // What rounding took from the mean: it matters where rows hardly vary.
    const V off = (rests[0] + rests[1] + (rests[2] + rests[3])) * (1.0f / width);
    mean += off;
    V variance = (squares[0] + squares[1] + (squares[2] + squares[3])) * (1.0f / width) - off * off;
    variance = variance < 0 ? V{} : variance;
    V scale = {};
    for (int64_t i = 0; i < S::WIDTH; ++i) scale[i] = 1 / std::sqrt(variance[i] + eps);
    for (k = 0; k < width; ++k) {
      S::store(x + k * LANES, (S::load(x + k * LANES) - mean) * scale * weight[k] + bias[k]);
    }
  }
}

// f(i) for each item, `start` being the running sum of their costs ([items + 1]): threads get runs
// of neighboring items of about equal cost. A run costs at least `grain`.
template <class F>
void parallel_items(const std::vector<int64_t>& start, int64_t grain, const F& f) {
  const int64_t items = static_cast<int64_t>(start.size()) - 1;
  torch::stable::parallel_for(0, start.back(), grain, [&](int64_t begin, int64_t end) {
    int64_t i = std::lower_bound(start.begin(), start.end() - 1, begin) - start.begin();
    for (; i < items && start[i] < end; ++i) f(i);
  });
}

}  // namespace tokenexit
