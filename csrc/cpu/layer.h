#pragma once
// What the phases of a layer work on, see exit_layer.cpp.
#include <atomic>

#include "attention.h"
#include "bf16.h"
#include "int8.h"
#include "ops.h"

namespace tokenexit {

// Weights as torch.nn.Linear and LayerNorm hold them, in the order of the op's list.
enum Weight { QUERY, KEY_VALUE, OUTPUT, NORM, UP, DOWN, LAST_NORM, NUM_WEIGHTS };
static_assert(LAYER_TENSORS == 2 * NUM_WEIGHTS && LAYER_PRODUCTS == NUM_WEIGHTS - 2);

// Times that the choice between projected and absorbed attention weighs, in one unit.
enum Cost { KEY_ROW, PROJECTED_BLOCK, ACTIVE_ROW, ABSORBED_BLOCK, NUM_COSTS };

// What weights are, and with them the other operand of products; bf16 of all states, too.
enum class Numbers { fp32, int8, bf16 };

struct Linear {
  const float *weight = nullptr, *bias = nullptr;
  Matrix8 bits;                  // in place of weight
  const Word* words = nullptr;  // likewise, of bf16
  const float* turned = nullptr;  // beside weight, see Factors; may be null
};

// Panels of fp32, and the same in what products read: bytes, [panels][depth / 4][16][4] or, by rows,
// [rows][depth], with a scale a lane, or bf16, [panels][depth / 2][16][2].
struct Panels {
  float* x = nullptr;
  Word* words = nullptr;
  float* scale = nullptr;
};

struct Sentence {
  int64_t first_active, active;  // rows of this group
  const float* states;           // of its tokens; words of bf16
  int64_t tokens;
  int64_t first;  // row of its keys if projected, of its queries among the absorbed if not
};

struct Work {
  Linear w[NUM_WEIGHTS];
  Numbers numbers = Numbers::fp32;
  std::vector<float> small;  // biases and LayerNorms of bf16
  const float* h;            // words of bf16 are moved as floats, too
  int64_t state;             // words of one token's
  const int64_t* active;     // of this group
  const CheckedBias* bias;   // of all active tokens
  int64_t first_active = 0;  // of this group
  float* out;
  bool in_place;  // out is h, else the rows of this group
  int64_t d, heads, dim, inner;
  int64_t unit;  // features a thread takes at least: whole tiles
  float eps, scale;
  bool pre_norm;
  Gelu gelu;

  std::vector<Sentence> projected, absorbed;
  std::vector<const float*> keys;  // projected rows
  std::vector<int64_t> lanes;      // group row of each absorbed query
  int64_t rows;                    // active ones

  Panels x, xk, ctx, y, u;       // [panels][features][16]
  std::atomic<Word>* u_tops;     // [panels][16] in 8 bits: u's largest sizes, as bits
  float *q, *kv_panels, *kv;     // likewise, and kv [2][heads][rows][dim]; in bf16 keys only
  // Absorbed rows: [rows][d], [heads][rows][wide], [heads][rows][d]; the last are what products read,
  // bytes with a scale each row, [heads][panels][16], or bf16.
  float *q_rows, *carried, *mixed, *mixed_scale;
  bool attends_in_bf16;  // then carried is that, of q_narrow [heads][rows][dim]: that as well or, in
  float *q_narrow, *q_scale;  // 8 bits, signed bytes with a scale, [heads][rows],
  Word* q_offset;             // and 128 times their sum
  int64_t wide;   // d, rounded up to whole lanes
  int64_t block;  // pairs of a query and a head that attend together

  int64_t panels() const { return panels_of(rows); }
  bool int8() const { return numbers == Numbers::int8; }
  bool bf16() const { return numbers == Numbers::bf16; }
  // How many of them a word of 4 bytes holds.
  int64_t a_word() const { return int8() ? 4 : bf16() ? 2 : 1; }

  INLINE void relate(RelativeBias& to, int64_t lane, int64_t head, int64_t row) const {
    to.set(lane, *bias, head, first_active + row);
  }
};

// y[n0 .. n1 - 1] of W x + bias; what any kind of weights does. Of bf16, to `words` if given; of int8,
// with the largest sizes, see Epilogue.
template <class S>
INLINE void linear(
    const Linear& w, int64_t depth, const Panels& x, int64_t rows, float* y, int64_t out,
    int64_t n0, int64_t n1, const float* residual = nullptr, Gelu gelu = Gelu::none,
    Word* words = nullptr, Word* tops = nullptr) {
  const Epilogue epilogue = {w.bias, residual, gelu, tops};
  const Word* from = x.words;
  if (w.bits.weight) {
    const float* scale = x.scale;
    call<S, Product8>(&w.bits, depth, from, scale, rows, y, out, n0, n1, &epilogue);
  } else if (w.words) {
    call<S, Product16>(w.words, depth / 2, from, rows, y, out, n0, n1, &epilogue, words);
  } else {
    const float* panels = x.x;
    call<S, Product>(w.weight, w.turned, depth, panels, rows, y, out, n0, n1, &epilogue);
  }
}

inline bool by_rows(int64_t rows) { return engine(Kind::int8).by_rows(rows); }

// Panel p of those of `rows` rows as products read it, if not in fp32.
template <class S>
INLINE void narrow(const Panels& to, int64_t p, int64_t rows, int64_t depth) {
  if (!to.words) return;
  const float* panel = to.x + p * depth * LANES;
  if (!to.scale) return to_words<S>(panel, depth, to.words + p * depth / 2 * LANES);
  quantize_panel<S>(
      panel, std::min(LANES, rows - p * LANES), by_rows(rows), depth,
      reinterpret_cast<uint8_t*>(to.words + p * depth / 4 * LANES), to.scale + p * LANES);
}

}  // namespace tokenexit
