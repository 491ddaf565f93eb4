#pragma once
// Vectors in the compiler's own notation: one source for every instruction set, chosen at run time.
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace tokenexit {

// Rows that are computed beside each other. A panel holds 16 rows of a matrix feature by feature,
// [features][16]: whatever is done to a feature is done to 16 rows at once, and a product's result
// is the next one's operand as it is.
constexpr int64_t LANES = 16;

// What differs between instruction sets: how wide a vector is, and how many rows of the left
// operand a tile of a product has, so that its sums just fill the registers.
template <int BYTES, int ROWS_>
struct Isa {
  typedef float Vec __attribute__((vector_size(BYTES)));
  typedef float Unaligned __attribute__((vector_size(BYTES), aligned(4)));
  typedef int32_t Int __attribute__((vector_size(BYTES)));
  typedef int32_t UnalignedInt __attribute__((vector_size(BYTES), aligned(4)));
  typedef uint32_t UInt __attribute__((vector_size(BYTES)));
  typedef uint16_t UShort __attribute__((vector_size(BYTES / 2)));  // as many
  static constexpr int WIDTH = BYTES / sizeof(float);
  static constexpr int VECS = LANES / WIDTH;  // of a panel's row
  static constexpr int ROWS = ROWS_;

  static INLINE Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static INLINE void store(float* p, Vec x) { *reinterpret_cast<Unaligned*>(p) = x; }
  static INLINE Vec splat(float x) { return x - Vec{}; }
};
using Portable = Isa<16, 3>;
using Avx2 = Isa<32, 6>;
using Avx512 = Isa<64, 12>;

// e^x to about 1 ulp; 0 below e^-87, NaN stays NaN. Source: e^x = 2^n e^r, |r| <= ln 2 / 2.
template <class S>
INLINE typename S::Vec exp(typename S::Vec x) {
  using V = typename S::Vec;
  using I = typename S::Int;
  const V low = S::splat(-87.0f), high = S::splat(88.0f);
  const V given = x;
  const I under = x < low;
  x = under ? low : x;
  x = x > high ? high : x;
  // Added to a float, 1.5 * 2^23 leaves the nearest integer in its last bits.
  const V shift = S::splat(12582912.0f);
  const V shifted = x * 1.44269504f + shift;
  const V n = shifted - shift;
  const V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  using U = typename S::UInt;
  const U power = (U)shifted << 23;  // n in the exponent
  const V result = under ? V{} : (V)((U)y + power);
  return given == given ? result : given;
}

// x * Phi(x). Phi by a rational fit of erf(x / sqrt 2) / x in x^2 on |x| <= 5.5, off by 1.5e-8
// before rounding.
template <class S>
INLINE typename S::Vec gelu(typename S::Vec x) {
  using V = typename S::Vec;
  const V top = S::splat(5.5f);
  V c = x > top ? top : x;
  c = c < -top ? -top : c;
  const V t = c * c;
  V p = t * 4.549861642999531e-08f + 1.2704243090411182e-05f;
  p = p * t + 3.3765341504476964e-04f;
  p = p * t + 9.354534558951855e-03f;
  p = p * t + 6.770550459623337e-02f;
  p = p * t + 7.97884464263916e-01f;
  V q = t * 1.1975024563071202e-06f + 7.364781049545854e-05f;
  q = q * t + 1.8844507867470384e-03f;
  q = q * t + 2.864593081176281e-02f;
  q = q * t + 2.515221834182739e-01f;
  q = q * t + 1.0f;
  return x * 0.5f * (1.0f + c * p / q);
}

// What stands between the products of the feed-forward part: GELU, or its approximation by tanh.
enum class Gelu { none, exact, tanh };

// x / 2 (1 + tanh z), z = sqrt(2 / pi) (x + 0.044715 x^3), by 1 + tanh z = 2 / (1 + e^(-2 z)).
template <class S>
INLINE typename S::Vec gelu_tanh(typename S::Vec x) {
  return x / (1.0f + exp<S>(x * (x * x * -0.0713548163f - 1.5957691216f)));
}

template <class S>
INLINE typename S::Vec gelu(Gelu kind, typename S::Vec x) {
  return kind == Gelu::tanh ? gelu_tanh<S>(x) : gelu<S>(x);
}

// What a machine can have, each with what comes before it but for avx_vnni, which only some have.
enum class Cpu { portable, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16, amx };
constexpr const char* CPU_NAMES[] = {"portable",    "avx2",        "avx_vnni", "avx512",
                                     "avx512_vnni", "avx512_bf16", "amx"};
constexpr int NUM_CPUS = sizeof(CPU_NAMES) / sizeof(*CPU_NAMES);

// Whether this machine has it, and its system lets us use it.
bool has(Cpu cpu);

// The best that this machine has; TOKENEXIT_CPU asks for a lesser one.
Cpu cpu();

// Whether that has an instruction that rounds to bf16. It takes what is smaller than 2^-126 for 0, as
// products of bf16 do.
extern const bool ROUNDS_TO_BF16;

// Calls Body::run<Isa>(args...), compiled once for each instruction set. Only what is always inlined
// takes over the instruction set of its caller: every helper is INLINE.
#ifdef __x86_64__
template <class Body, class... Args>
__attribute__((target("avx2,fma"))) void run_avx2(Args... args) {
  Body::template run<Avx2>(args...);
}
template <class Body, class... Args>
__attribute__((target("avx512f,avx2,fma"))) void run_avx512(Args... args) {
  Body::template run<Avx512>(args...);
}
#endif
template <class Body, class... Args>
void run_portable(Args... args) {
  Body::template run<Portable>(args...);
}
// The same by a caller that was compiled for S.
template <class S, class Body, class... Args>
INLINE void call(Args... args) {
#ifdef __x86_64__
  if constexpr (S::WIDTH == Avx512::WIDTH) return run_avx512<Body, Args...>(args...);
  if constexpr (S::WIDTH == Avx2::WIDTH) return run_avx2<Body, Args...>(args...);
#endif
  run_portable<Body, Args...>(args...);
}
template <class Body, class... Args>
void dispatch(Args... args) {
#ifdef __x86_64__
  if (cpu() >= Cpu::avx512) return run_avx512<Body, Args...>(args...);
  if (cpu() >= Cpu::avx2) return run_avx2<Body, Args...>(args...);
#endif
  run_portable<Body, Args...>(args...);
}

}  // namespace tokenexit
