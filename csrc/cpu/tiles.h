#pragma once
// Products of narrow numbers, 8-bit integers or bf16, on what the machine has for them.
//
// They go by words of 4 bytes: 4 of int8, or 2 of bf16, neighbors in a row. An instruction multiplies
// the numbers of two words, pair by pair, and adds all that to a sum of 32 bits. So a panel of words,
// [words][16], and rows of weights as they lie in the model serve all of them: vpdpbusd and vdpbf16ps
// meet a broadcast word of weights with the panel's 16 lanes, and a tile of AMX takes 16 rows of 16
// words of weights and 16 rows of a panel.
#include <cstdint>

namespace tokenexit {

using Word = int32_t;

enum class Kind { int8, bf16 };

// Rows of weights times panels: sums [panels][rows][16] of int32 (int8) or float (bf16).
struct Tile {
  const Word *w, *next;  // rows, and what is read soon: asked for from memory meanwhile,
  int64_t lines;         // so many lines of 16 words with each line of depth
  const Word* x;         // panels [depth][16], or rows [depth]
  int64_t depth;         // in words; the distance of rows of weights, too
  Word* sums;
  bool alone;            // its rows are read by no other tile
};
using RunTile = void (*)(const Tile&);

constexpr int64_t MOST_ROWS_OF_TILE = 32, MOST_PANELS_OF_TILE = 2, MOST_FEW = 6;

// How products of a kind are done here.
struct Engine {
  int64_t rows;                       // of weights in a tile; even
  RunTile tile[MOST_PANELS_OF_TILE];  // against 1, 2 panels; null if not so many
  // Likewise, but of the last panel its first 8 lanes only, where that is faster; or null.
  RunTile half[MOST_PANELS_OF_TILE];
  int64_t most_few;       // rows of bytes that go row by row: faster than lane by lane
  RunTile few[MOST_FEW];  // 4 rows of weights against 1 or more rows of bytes, sums [4][16]
  int64_t few_at_once;    // so many of them
  bool narrow;            // whether weights beyond +-64 go in two parts: two of them overflow 16 bits
  int64_t ahead = 1;      // how many tiles ahead rows are asked for

  // Before its tiles are run by a thread, and after; or null.
  void (*begin)(), (*end)();

  bool by_rows(int64_t count) const { return count <= most_few; }
};

const Engine& engine(Kind kind);

// While one lives a thread may run tiles; more at once cost nothing.
class Engaged {
 public:
  explicit Engaged(const Engine& engine);
  ~Engaged();
  Engaged(const Engaged&) = delete;

 private:
  const Engine& engine_;
  static thread_local int count_;
};

// `count` rows of weights from row n of `last` ones, filled up with rows of zeros.
const Word* filled_up(const Word* weight, int64_t n, int64_t last, int64_t count, int64_t depth);

// Of `size` words of bytes their w & 1; w becomes their w >> 1.
const Word* low_part(const Word*& w, int64_t size);

// Calls take(sums [count][16], n, count, panel) for output features n0 .. n1 - 1, some at a time,
// against all panels of `rows` rows: x [panels][depth][16] or, by rows, [rows][depth]. Weights
// [*][depth] are read once and as they lie, while the next few come from memory. The last features
// may come twice. Bytes within +-64 that are not said to be `wide` take half as long on some machines.
template <class Take>
inline __attribute__((always_inline)) void multiply_words(
    Kind kind, const Word* weight, int64_t depth, const Word* x, int64_t rows, int64_t n0,
    int64_t n1, const Take& take, bool wide = false) {
  constexpr int64_t LANES = 16, MOST = MOST_PANELS_OF_TILE * MOST_ROWS_OF_TILE * LANES;
  const Engine& e = engine(kind);
  const Engaged engaged(e);
  const bool by_rows = e.by_rows(rows);
  const int64_t height = by_rows ? 4 : e.rows, panels = (rows + LANES - 1) / LANES;
  const int64_t few = e.few_at_once;
  const int64_t runs = by_rows ? (rows + few - 1) / few : e.tile[1] ? (panels + 1) / 2 : panels;
  const bool half = (rows - 1) % LANES < LANES / 2;  // are in the last panel
  alignas(64) Word sums[MOST], low_sums[MOST];
  if (by_rows || half) {  // which leave lanes alone
    const int64_t used = MOST_PANELS_OF_TILE * height * LANES;
    for (int64_t i = 0; i < used; ++i) sums[i] = low_sums[i] = 0;
  }
  int64_t asked = n1 - n0 < height ? n1 : n0 + height;
  for (int64_t n = n0, count; n < n1; n += count) {
    count = n1 - n0 < height ? n1 - n0 : height;
    n = n + count < n1 ? n : n1 - count;
    const Word* w = weight + n * depth;
    // Of rows that follow each of the tiles to come asks for its share.
    const int64_t last = n + (1 + e.ahead) * count, to = n1 < last ? n1 : last;
    const bool alone = runs == 1 && e.ahead > 1;
    Tile t = {w, weight + asked * depth, (to - asked + runs - 1) / runs, x, depth, sums, alone};
    asked = to;
    if (count < height) t.w = filled_up(weight, n, n1, height, depth);
    const Word* low = e.narrow && wide ? low_part(t.w, height * depth) : nullptr;
    const auto run = [&](RunTile tile, int64_t at = 0) __attribute__((always_inline)) {
      tile(t);
      t.next += t.lines * depth;
      if (by_rows) t.lines = 0;  // the first has asked for all
      if (!low) return;
      const Tile other = {low, low, 0, t.x, depth, low_sums + at, true};
      tile(other);
    };
    for (int64_t p = 0, at_once = 1; p < panels; p += at_once) {
      t.x = x + p * depth * LANES;
      if (by_rows) {
        int64_t left = runs;  // tiles of about the same size
        for (int64_t i = 0, some; i < rows; i += some, --left) {
          some = (rows - i + left - 1) / left;
          t.x = x + i * depth;
          t.sums = sums + i;
          run(e.few[some - 1], i);
        }
      } else {
        at_once = e.tile[1] && p + 2 <= panels ? 2 : 1;
        const bool last = p + at_once == panels;
        run(half && last && e.half[at_once - 1] ? e.half[at_once - 1] : e.tile[at_once - 1]);
      }
      for (int64_t i = 0; i < at_once; ++i) {
        Word* mine = sums + i * height * LANES;
        const Word* lower = low_sums + i * height * LANES;
        for (int64_t j = 0; low && j < height * LANES; ++j) mine[j] = 2 * mine[j] + lower[j];
        take(mine, n, count, p + i);
      }
    }
  }
}

}  // namespace tokenexit
