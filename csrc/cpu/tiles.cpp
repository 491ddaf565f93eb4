// See tiles.h.
#include "tiles.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace tokenexit {
namespace {

// Sums are integers, and so is the order in which they come.
struct Bytes {
  template <class S>
  using Sum = typename S::Int;
};

// vpdpbusd, as AVX-VNNI has it and as AVX-512 has it. Written out: an intrinsic can't be inlined into
// what is itself yet to be inlined into code for its instruction set.
struct Vnni256 : Bytes {
  template <class S>
  static INLINE void add(typename S::Int& sum, typename S::Int x, typename S::Int w) {
#ifdef __x86_64__
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
#endif
  }
};
struct Vnni512 : Bytes {
  template <class S>
  static INLINE void add(typename S::Int& sum, typename S::Int x, typename S::Int w) {
#ifdef __x86_64__
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#endif
  }
};

// AVX2: pairs of products in 16 bits, then pairs of those.
struct Maddubs : Bytes {
  template <class S>
  static INLINE void add(typename S::Int& sum, typename S::Int x, typename S::Int w) {
#ifdef __x86_64__
    typename S::Int pairs;
    asm("vpmaddubsw %2, %1, %0" : "=x"(pairs) : "x"(x), "x"(w));
    asm("vpmaddwd %1, %0, %0" : "+x"(pairs) : "x"((typename S::Int{} + 1) | 1 << 16));
    sum += pairs;
#endif
  }
};

// Two bf16 a word, as floats: what the instruction would do, in two roundings where it has its own.
struct Halves {
  template <class S>
  using Sum = typename S::Vec;
  template <class S>
  static INLINE void add(typename S::Vec& sum, typename S::Int x, typename S::Int w) {
    using V = typename S::Vec;
    sum += (V)(x << 16) * (V)(w << 16);
    sum += (V)(x & -65536) * (V)(w & -65536);
  }
};
struct Bf16 : Halves {
  template <class S>
  static INLINE void add(typename S::Vec& sum, typename S::Int x, typename S::Int w) {
#ifdef __x86_64__
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#endif
  }
};

template <class S>
INLINE typename S::Int load(const Word* p) {
  return *reinterpret_cast<const typename S::UnalignedInt*>(p);
}

// R rows of weights against the first VECS vectors of panels beside each other, and with a Half against
// the first half of the panel behind them, half of a vector. What is next is asked for into the
// first-level cache, or for a tile that is alone into the second, where more lines can be waited for.
template <class S, class Dot, int R, int VECS, class Half = void>
INLINE void tile(const Tile& t) {
  constexpr bool HALF = !std::is_void_v<Half>;
  using H = std::conditional_t<HALF, Half, S>;
  constexpr int BEHIND = VECS / S::VECS;
  typename Dot::template Sum<S> sums[R][VECS] = {};
  typename Dot::template Sum<H> halves[R] = {};
  const Word* next = t.next;
  for (int64_t k = 0; k < t.depth; ++k) {
    if (k % 16 == 0) {
      for (int64_t i = 0; i < t.lines; ++i, next += 16) {
        t.alone ? __builtin_prefetch(next, 0, 2) : __builtin_prefetch(next, 0, 3);
      }
    }
    typename S::Int x[VECS];
    typename H::Int y;
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      x[v] = load<S>(t.x + v / S::VECS * t.depth * LANES + k * LANES + v % S::VECS * S::WIDTH);
    }
    if constexpr (HALF) y = load<H>(t.x + (BEHIND * t.depth + k) * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename S::Int w = t.w[r * t.depth + k] - typename S::Int{};
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) Dot::template add<S>(sums[r][v], x[v], w);
      if constexpr (HALF) {
        Dot::template add<H>(halves[r], y, __builtin_shufflevector(w, w, 0, 1, 2, 3, 4, 5, 6, 7));
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      Word* to = t.sums + (v / S::VECS * R + r) * LANES + v % S::VECS * S::WIDTH;
      std::memcpy(to, &sums[r][v], sizeof(sums[r][v]));
    }
    if constexpr (HALF) std::memcpy(t.sums + (BEHIND * R + r) * LANES, &halves[r], sizeof(halves[r]));
  }
}

typedef int32_t Eight __attribute__((vector_size(32)));

INLINE Eight eight(Eight x) { return x; }
template <class Int>
INLINE Eight eight(Int x) {
  return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
      __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Of 4 rows of weights, AT_ONCE beside each other, and ROWS rows of bytes. What is at `later` is asked for
// into that CACHE, in the order in which it lies in memory.
template <class S, class Dot, int ROWS, int AT_ONCE, int CACHE>
INLINE void sum_up(const Tile& t, const Word* later, Eight (*total)[ROWS]) {
  constexpr int TURNS = AT_ONCE > 1 ? 1 : 2;  // sums that take turns, as one would wait for itself
  constexpr int64_t STEP = TURNS * S::WIDTH;
  const int64_t whole = t.depth / S::WIDTH * S::WIDTH;
#pragma GCC unroll 4
  for (int first = 0; first < 4; first += AT_ONCE) {
    const Word* w = t.w + first * t.depth;
    typename S::Int sums[TURNS][AT_ONCE][ROWS] = {};
    const auto add = [&](int64_t k, int turn) __attribute__((always_inline)) {
      typename S::Int x[ROWS];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) x[i] = load<S>(t.x + i * t.depth + k);
#pragma GCC unroll 4
      for (int r = 0; r < AT_ONCE; ++r) {
        const auto part = load<S>(w + r * t.depth + k);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) Dot::template add<S>(sums[turn][r][i], x[i], part);
      }
    };
    int64_t k = 0;
    for (; k + STEP <= whole; k += STEP) {
      const Word* at = later + first * t.depth + k * AT_ONCE;
      for (int i = 0; i < STEP * AT_ONCE && t.lines; i += 16) __builtin_prefetch(at + i, 0, CACHE);
#pragma GCC unroll 2
      for (int turn = 0; turn < TURNS; ++turn) add(k + turn * S::WIDTH, turn);
    }
    if (k < whole) add(k, 0);
#pragma GCC unroll 4
    for (int r = 0; r < AT_ONCE; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        total[first + r][i] = eight(TURNS > 1 ? sums[0][r][i] + sums[TURNS - 1][r][i] : sums[0][r][i]);
      }
    }
  }
}

// 4 rows of weights against ROWS rows of bytes, which t.x has one after the other. Weights are read as they
// lie, so that the processor sees what comes next, and what comes later is asked for into the second-level
// cache, where more lines can be waited for. Where there is work enough to hide what the first-level cache
// waits for, of narrow vectors, rows go side by side, unless they are too long.
template <class S, class Dot, int ROWS>
INLINE void few(const Tile& t) {
  constexpr int64_t LATER = ROWS > 1 ? 2048 : 512, MOST_NEAR = 384;
  constexpr int MOST_AT_ONCE = S::WIDTH < 16 && ROWS > 2 ? 2 : 4;  // as the registers allow
  const int64_t whole = t.depth / S::WIDTH * S::WIDTH;
  Eight total[4][ROWS];
  constexpr bool BUSY = S::WIDTH < 16 && ROWS > 1;
  if (BUSY && t.depth <= MOST_NEAR) {
    sum_up<S, Dot, ROWS, MOST_AT_ONCE, 3>(t, t.next, total);
  } else {
    sum_up<S, Dot, ROWS, (ROWS > 3 ? 2 : 1), 2>(t, t.w + LATER, total);
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    const auto both = [](Eight a, Eight b) __attribute__((always_inline)) {
      return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
          __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    };
    const Eight low = both(total[0][i], total[1][i]), high = both(total[2][i], total[3][i]);
    const Eight halves = __builtin_shufflevector(low, high, 0, 1, 8, 9, 4, 5, 12, 13) +
        __builtin_shufflevector(low, high, 2, 3, 10, 11, 6, 7, 14, 15);
    for (int r = 0; r < 4; ++r) {
      Word sum = halves[r] + halves[r + 4];
      const auto* w = reinterpret_cast<const int8_t*>(t.w + r * t.depth);
      const auto* x = reinterpret_cast<const uint8_t*>(t.x + i * t.depth);
      for (int64_t j = whole * 4; j < t.depth * 4; ++j) sum += w[j] * x[j];
      t.sums[r * LANES + i] = sum;
    }
  }
}

template <class Dot, int R, int VECS>
void portable(const Tile& t) {
  tile<Portable, Dot, R, VECS>(t);
}

// Of 16-bit vectors the compiler makes more than of words.
template <int R>
void portable_bytes(const Tile& t) {
  std::fill(t.sums, t.sums + R * LANES, 0);
  for (int64_t k = 0; k < t.depth; ++k) {
    const auto* b = reinterpret_cast<const uint8_t*>(t.x + k * LANES);
    for (int r = 0; r < R; ++r) {
      const auto* a = reinterpret_cast<const int8_t*>(t.w + r * t.depth + k);
      for (int64_t i = 0; i < LANES; ++i) {
        t.sums[r * LANES + i] += a[0] * b[i * 4] + a[1] * b[i * 4 + 1] + a[2] * b[i * 4 + 2] +
            a[3] * b[i * 4 + 3];
      }
    }
  }
}

#ifdef __x86_64__
template <class Dot, int R, int VECS>
__attribute__((target("avx2,fma"))) void avx2(const Tile& t) {
  tile<Avx2, Dot, R, VECS>(t);
}
template <class Dot, int ROWS>
__attribute__((target("avx2,fma"))) void few_avx2(const Tile& t) {
  few<Avx2, Dot, ROWS>(t);
}
template <class Dot, int R, int VECS>
__attribute__((target("avx512f,avx2,fma"))) void avx512(const Tile& t) {
  tile<Avx512, Dot, R, VECS>(t);
}
// Half a panel is half a vector: of instructions that take two of those at once, half the time.
template <class Dot, int R>
__attribute__((target("avx512f,avx512vl,avx2,fma"))) void half_avx512(const Tile& t) {
  tile<Avx2, Dot, R, 1>(t);
}
template <class Dot, int R>
__attribute__((target("avx512f,avx512vl,avx2,fma"))) void and_half_avx512(const Tile& t) {
  tile<Avx512, Dot, R, 1, Avx2>(t);
}
template <class Dot, int ROWS>
__attribute__((target("avx512f,avx2,fma"))) void few_avx512(const Tile& t) {
  few<Avx512, Dot, ROWS>(t);
}

// Registers of 16 rows of 64 bytes.
void take_registers() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } all;
  asm volatile("ldtilecfg %0" : : "m"(all));
}

// Those in use would make the system's switches between threads longer.
void give_registers() { asm volatile("tilerelease"); }

#define LOAD(NUMBER, FROM, STRIDE) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #NUMBER : : "r"(FROM), "r"(STRIDE) : "memory")
// Past the first-level cache, where rows of weights are to stay.
#define LOAD_PAST(NUMBER, FROM, STRIDE) \
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm" #NUMBER : : "r"(FROM), "r"(STRIDE) : "memory")
#define STORE(NUMBER, TO) \
  asm volatile("tilestored %%tmm" #NUMBER ", (%0,%1,1)" : : "r"(TO), "r"(int64_t(64)) : "memory")
#define MULTIPLY(SUM, W, X)                                              \
  if constexpr (KIND == Kind::int8) {                                    \
    asm volatile("tdpbsud %tmm" #X ", %tmm" #W ", %tmm" #SUM);           \
  } else {                                                               \
    asm volatile("tdpbf16ps %tmm" #X ", %tmm" #W ", %tmm" #SUM);         \
  }

// 32 rows of weights against PANELS panels; sums are tiles 0 to 3, rows 4 and 5, panels 6 and 7.
template <Kind KIND, int PANELS>
void amx(const Tile& t) {
  constexpr int64_t SIDE = 16, ROW = SIDE * 4;
  asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
  const Word* next = t.next;
  const auto ask = [&]() __attribute__((always_inline)) {
    for (int64_t i = 0; i < t.lines; ++i, next += SIDE) __builtin_prefetch(next, 0, 2);
  };
  // 16 words of depth of operands whose rows, and panels, are so far apart.
  const auto load = [](const Word* w, int64_t row, const Word* x, int64_t panel)
                        __attribute__((always_inline)) {
    LOAD(4, w, row * 4);
    LOAD_PAST(6, x, ROW);
    LOAD(5, w + SIDE * row, row * 4);
    if constexpr (PANELS > 1) LOAD_PAST(7, x + panel, ROW);
  };
  const auto multiply = []() __attribute__((always_inline)) {
    MULTIPLY(0, 4, 6);
    MULTIPLY(2, 5, 6);
    if constexpr (PANELS > 1) {
      MULTIPLY(1, 4, 7);
      MULTIPLY(3, 5, 7);
    }
  };
  const int64_t row = t.depth * 4, whole = t.depth / SIDE * SIDE;
  if (whole) {
    ask();
    load(t.w, t.depth, t.x, t.depth * LANES);
    // A register is loaded anew as soon as it is free, while products of others go on.
    for (int64_t k = SIDE; k < whole; k += SIDE) {
      const Word *w = t.w + k, *x = t.x + k * LANES;
      ask();
      MULTIPLY(0, 4, 6);
      MULTIPLY(2, 5, 6);
      LOAD_PAST(6, x, ROW);
      if constexpr (PANELS > 1) {
        MULTIPLY(1, 4, 7);
      }
      LOAD(4, w, row);
      if constexpr (PANELS > 1) {
        MULTIPLY(3, 5, 7);
        LOAD_PAST(7, x + t.depth * LANES, ROW);
      }
      LOAD(5, w + SIDE * t.depth, row);
    }
    multiply();
  }
  const int64_t k = whole;
  if (k < t.depth) {  // what is left, filled up with zeros
    alignas(64) Word w[2 * SIDE * SIDE] = {}, x[PANELS * SIDE * LANES] = {};
    for (int64_t r = 0; r < 2 * SIDE; ++r) {
      std::copy_n(t.w + r * t.depth + k, t.depth - k, w + r * SIDE);
    }
    for (int64_t p = 0; p < PANELS; ++p) {
      std::copy_n(t.x + (p * t.depth + k) * LANES, (t.depth - k) * LANES, x + p * SIDE * LANES);
    }
    load(w, SIDE, x, SIDE * LANES);
    multiply();
  }
  STORE(0, t.sums);
  STORE(2, t.sums + SIDE * LANES);
  if constexpr (PANELS > 1) {
    STORE(1, t.sums + 2 * SIDE * LANES);
    STORE(3, t.sums + 3 * SIDE * LANES);
  }
}
#undef LOAD
#undef LOAD_PAST
#undef STORE
#undef MULTIPLY

template <class Dot>
constexpr Engine avx2_bytes(bool narrow) {
  return {6, {avx2<Dot, 6, 2>}, {avx2<Dot, 6, 1>}, narrow ? 12 : 8,
          {few_avx2<Dot, 1>, few_avx2<Dot, 2>, few_avx2<Dot, 3>, few_avx2<Dot, 4>}, 4, narrow};
}
constexpr Engine AVX512_BYTES = {
    12, {avx512<Vnni512, 12, 1>, avx512<Vnni512, 12, 2>},
    {half_avx512<Vnni512, 12>, and_half_avx512<Vnni512, 12>}, 6,
    {few_avx512<Vnni512, 1>, few_avx512<Vnni512, 2>, few_avx512<Vnni512, 3>, few_avx512<Vnni512, 4>,
     few_avx512<Vnni512, 5>, few_avx512<Vnni512, 6>}, 6, false, 2};
#endif

Engine best(Kind kind) {
  const bool int8 = kind == Kind::int8;
#ifdef __x86_64__
  if (cpu() >= Cpu::amx) {
    Engine result = {32, {amx<Kind::bf16, 1>, amx<Kind::bf16, 2>}};
    if (int8) {
      result = AVX512_BYTES;
      result.rows = 32;
      result.tile[0] = amx<Kind::int8, 1>;
      result.tile[1] = amx<Kind::int8, 2>;
      result.half[0] = result.half[1] = nullptr;
      result.most_few = 4;
      result.ahead = 1;
    }
    result.begin = take_registers;
    result.end = give_registers;
    return result;
  }
  if (int8) {
    if (cpu() >= Cpu::avx512_vnni) return AVX512_BYTES;
    if (cpu() == Cpu::avx_vnni) return avx2_bytes<Vnni256>(false);
    if (cpu() >= Cpu::avx2) return avx2_bytes<Maddubs>(true);
  } else {
    if (cpu() >= Cpu::avx512_bf16) {
      return {12, {avx512<Bf16, 12, 1>, avx512<Bf16, 12, 2>},
              {half_avx512<Bf16, 12>, and_half_avx512<Bf16, 12>}, 0, {}, 0, false, 2};
    }
    if (cpu() >= Cpu::avx512) return {12, {avx512<Halves, 12, 1>, avx512<Halves, 12, 2>}};
    if (cpu() >= Cpu::avx2) return {4, {avx2<Halves, 4, 2>}};
  }
#endif
  if (int8) return {6, {portable_bytes<6>}};
  return {2, {portable<Halves, 2, 4>}};
}

}  // namespace

const Engine& engine(Kind kind) {
  static const Engine engines[] = {best(Kind::int8), best(Kind::bf16)};
  return engines[static_cast<int>(kind)];
}

Engaged::Engaged(const Engine& engine) : engine_(engine) {
  if (engine_.begin && !count_++) engine_.begin();
}
Engaged::~Engaged() {
  if (engine_.end && !--count_) engine_.end();
}
thread_local int Engaged::count_ = 0;

const Word* filled_up(const Word* weight, int64_t n, int64_t last, int64_t count, int64_t depth) {
  static thread_local std::vector<Word> copy;
  copy.assign(count * depth, 0);
  std::copy(weight + n * depth, weight + last * depth, copy.begin());
  return copy.data();
}

const Word* low_part(const Word*& w, int64_t size) {
  static thread_local std::vector<int8_t> parts;
  parts.resize(size * 8);
  const auto* bytes = reinterpret_cast<const int8_t*>(w);
  for (int64_t i = 0; i < size * 4; ++i) {
    parts[i] = bytes[i] >> 1;
    parts[size * 4 + i] = bytes[i] & 1;
  }
  w = reinterpret_cast<const Word*>(parts.data());
  return w + size;
}

}  // namespace tokenexit
