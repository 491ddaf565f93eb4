// A whole layer of inference, for the active tokens of a packed batch, panel by panel: what a product
// leaves is what the next one reads. See tokenexit/ops/exit_layer.py.
#include <torch/csrc/stable/library.h>

#include "bf16_attention.h"
#include "layer.h"
#include "threads.h"

namespace tokenexit {
namespace {

// Rows computed beside each other, of a batch of any size: what keeps the workspace small. Where there
// is AMX, the third-level cache lies far, and what phases hand on is to stay in the second.
int64_t most_rows() { return cpu() >= Cpu::amx ? 256 : 512; }
int64_t most_tokens() { return 4 * most_rows(); }

constexpr int64_t WHOLE_TILES = 12;  // features, of any Isa
constexpr int64_t LEAST = 500000;    // multiply-adds that a thread takes

// Each phase of the layer runs over a range of its items: panels, units of features, heads, ...

struct PackActive {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float* panel = w->x.x + p * w->d * LANES;
      Word* words = w->x.words + p * w->state * LANES;
      pack_panel<S>([&](int64_t i) { return w->h + w->active[p * LANES + i] * w->state; },
                 std::min(LANES, w->rows - p * LANES), w->state,
                 w->bf16() ? reinterpret_cast<float*>(words) : panel);
      w->bf16() ? from_words<S>(words, w->d, panel) : narrow<S>(w->x, p, w->rows, w->d);
    }
  }
};

struct PackKeys {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    const int64_t rows = w->keys.size();
    for (int64_t p = begin; p < end; ++p) {
      float* to = w->bf16() ? reinterpret_cast<float*>(w->xk.words) : w->xk.x;
      pack_panel<S>([&](int64_t i) { return w->keys[p * LANES + i]; },
                 std::min(LANES, rows - p * LANES), w->state, to + p * w->state * LANES);
      if (w->int8()) narrow<S>(w->xk, p, rows, w->d);
    }
  }
};

// Units of the query's features, then of the keys' and values'.
struct Project {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    const int64_t d = w->d, unit = w->unit, units = (d + unit - 1) / unit;
    if (begin < units) {
      linear<S>(w->w[QUERY], d, w->x, w->rows, w->q, d, begin * unit, std::min(d, end * unit));
    }
    if (end > units) {
      linear<S>(w->w[KEY_VALUE], d, w->xk, w->keys.size(), w->kv_panels, 2 * d,
                (std::max(begin, units) - units) * unit, std::min(2 * d, (end - units) * unit));
    }
  }
};

struct UnpackKeys {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    const int64_t rows = w->keys.size(), width = 2 * w->d;
    for (int64_t p = begin; p < end; ++p) {
      // Each head's rows beside each other: rows as far apart as a token's keys share few lines of
      // the caches.
      for (int64_t at = 0; at < width; at += w->dim) {
        unpack_panel<S>(w->kv_panels + (p * width + at) * LANES, w->dim,
                     [&](int64_t i) { return w->kv + at * rows + (p * LANES + i) * w->dim; }, 0,
                     std::min(LANES, rows - p * LANES));
      }
    }
  }
};

// One head of one sentence: its part of each panel that it has queries in.
struct AttendProjected {
  template <class S>
  static INLINE void run(const Work* w, int64_t item) {
    static thread_local Scratch scratch;
    const Sentence& s = w->projected[item / w->heads];
    const int64_t head = item % w->heads, dim = w->dim;
    float* q = scratch.get((2 * dim + s.tokens) * LANES);
    float *out = q + dim * LANES, *scores = out + dim * LANES;
    const int64_t rows = w->keys.size();
    const float* k = w->kv + (head * rows + s.first) * dim;
    const float* v = k + w->d * rows;
    const int64_t end = s.first_active + s.active;
    for (int64_t p = s.first_active / LANES; p * LANES < end; ++p) {
      const int64_t at = (p * w->d + head * dim) * LANES;
      const int64_t from = std::max<int64_t>(0, s.first_active - p * LANES);
      const int64_t to = std::min(LANES, end - p * LANES);
      for (int64_t i = 0; i < dim * LANES; ++i) q[i] = w->q[at + i] * w->scale;
      RelativeBias bias;
      for (int64_t i = 0; i < LANES; ++i) {
        w->relate(bias, i, head, std::clamp(p * LANES + i, s.first_active, end - 1));
      }
      weights<S>(q, {k, dim, 1}, s.tokens, dim, bias, scores);
      const bool whole = to - from == LANES;
      context<S>(scores, {v, 1, dim}, s.tokens, dim, whole ? w->ctx.x + at : out);
      if (whole) continue;
      for (int64_t c = 0; c < dim; ++c) {
        for (int64_t i = from; i < to; ++i) w->ctx.x[at + c * LANES + i] = out[c * LANES + i];
      }
    }
  }
};

// Queries of absorbed rows, scaled; times what a key's feature has as its scale in 8 bits.
struct UnpackQueries {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    const float* scale = w->w[KEY_VALUE].bits.scale;
    const int64_t rows = w->lanes.size(), d = w->d, dim = w->dim;
    for (int64_t r = begin, count; r < end; r += count) {  // neighbors in a panel
      const int64_t lane = w->lanes[r], panel = lane / LANES;
      for (count = 1; r + count < end && w->lanes[r + count] == lane + count; ++count) {
        if ((lane + count) / LANES > panel) break;
      }
      const int64_t first = lane % LANES;
      unpack_panel<S>(
          w->q + panel * d * LANES, d, [&](int64_t i) { return w->q_rows + (r + i - first) * d; },
          first, first + count);
    }
    for (int64_t r = begin; r < end; ++r) {
      float* row = w->q_rows + r * d;
      for (int64_t c = 0; c < d; ++c) row[c] *= scale ? w->scale * scale[c] : w->scale;
      for (int64_t head = 0; head < w->heads && w->attends_in_bf16; ++head) {
        const int64_t at = head * rows + r;
        w->int8()
            ? bytes_to_carry<S>(row + head * dim, *w, at)
            : bf16_of<S>(row + head * dim, dim, halves_of(w->q_narrow) + at * dim);
      }
    }
  }
};

// Queries of one head into the hidden space: W_K^T q, for all absorbed rows.
struct CarryQueries {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    constexpr int64_t STRIP = 64;  // of bytes: a line a row
    const int64_t d = w->d, dim = w->dim, strips = (d + STRIP - 1) / STRIP;
    const int64_t rows = w->lanes.size();
    static thread_local Scratch scratch;
    float* strip = scratch.get(dim * STRIP);
    const Linear& kv = w->w[KEY_VALUE];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / strips, first = item % strips * STRIP;
      const int64_t width = std::min(STRIP, d - first);
      const int64_t at = head * dim * d + first;
      const int64_t ahead = item + 2, beyond = ahead / strips * dim * d + ahead % strips * STRIP;
      const Strided q = {w->q_rows + head * dim, d, 1};
      float* to = w->carried + head * rows * w->wide + first;
      if (kv.bits.weight &&
          few_floats<S>(q, kv.bits.weight + at, d, kv.bits.weight + beyond, to, w->wide, rows,
                        width, dim)) {
        continue;
      }
      if (kv.weight && rows <= S::ROWS && width % LANES == 0) {  // a strip is read once
        for (int64_t i = 0; i < width; i += LANES) {
          for (int64_t c = 0; c < dim; ++c) __builtin_prefetch(kv.weight + beyond + c * d + i);
          multiply<S>(q, kv.weight + at + i, d, to + i, w->wide, rows, dim);
        }
        continue;
      }
      for (int64_t c = 0; c < dim; ++c) {
        float* copy = strip + c * STRIP;
        if (kv.bits.weight) {
          __builtin_prefetch(kv.bits.weight + beyond + c * d);
          to_floats<S>(kv.bits.weight + at + c * d, width, copy);
        } else if (kv.words) {
          floats_of<S>(reinterpret_cast<const uint16_t*>(kv.words) + at + c * d, width, copy);
        } else {
          const float* from = kv.weight + at + c * d;
          for (int64_t i = 0; i < width; i += LANES) __builtin_prefetch(from + STRIP + i);
          std::memcpy(copy, from, width * sizeof(float));
        }
        std::fill(copy + width, copy + STRIP, 0.0f);
      }
      for (int64_t i = 0; i < width; i += LANES) {
        multiply<S>(q, strip + i, STRIP, to + i, w->wide, rows, dim);
      }
    }
  }
};

// A block of pairs of a query and a head of one sentence attends over its hidden states.
struct AttendAbsorbed {
  template <class S>
  static INLINE void run(const Work* w, const Sentence* s, int64_t block) {
    static thread_local Scratch scratch;
    const int64_t d = w->d, first = block * w->block;
    const int64_t pairs = std::min(w->block, s->active * w->heads - first);
    const auto relate = [&](RelativeBias& bias, int64_t lane, int64_t i) {
      w->relate(bias, lane, (first + i) % w->heads, s->first_active + (first + i) / w->heads);
    };
    const int64_t rows = w->lanes.size();
    const auto pair = [&](int64_t i) {
      return (first + i) % w->heads * rows + s->first + (first + i) / w->heads;
    };
    const bool fp32 = w->numbers == Numbers::fp32;
    float* space = scratch.get(w->wide * (LANES + PAIRS) + s->tokens * (PAIRS + d));
    float* beyond = space + PAIRS * w->wide;
    const float* states = s->states;
    if (w->attends_in_bf16) {
      attend_absorbed_in_bf16<S>(
          [&](int64_t i) { return w->carried + pair(i) * w->wide / 2; }, states, w->int8(),
          s->tokens, d, pairs, relate, space, w->wide);
    } else {
      if (w->bf16()) {
        float* copy = beyond + d * LANES + s->tokens * PAIRS;
        floats_of<S>(reinterpret_cast<const uint16_t*>(states), s->tokens * d, copy);
        states = copy;
      }
      attend_absorbed<S>(
          [&](int64_t i) { return w->carried + pair(i) * w->wide; }, states, s->tokens, d, pairs,
          relate, [&](int64_t i) { return fp32 ? w->mixed + pair(i) * d : space + i * w->wide; },
          beyond);
    }
    for (int64_t i = 0; i < pairs && !fp32; ++i) {
      const int64_t head = pair(i) / rows, row = pair(i) % rows;
      const float* from = space + i * w->wide;
      float* to = w->mixed + pair(i) * (d / w->a_word());
      if (w->bf16()) {
        bf16_of<S>(from, d, halves_of(to));
      } else {
        w->mixed_scale[head * panels_of(rows) * LANES + row] =
            quantize_row<S>(from, d, reinterpret_cast<uint8_t*>(to));
      }
    }
  }
};

// Back from the hidden space: W_V c + b_V, for all absorbed rows of one head.
struct BringBack {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const int64_t d = w->d, dim = w->dim, rows = w->lanes.size(), panels = panels_of(rows);
    float* y = scratch.get(panels * (d + dim) * LANES);
    float* packed = y + panels * dim * LANES;
    const int64_t words = d / w->a_word();  // of a row
    for (int64_t head = begin; head < end; ++head) {
      const float* mixed = w->mixed + head * rows * words;
      const bool as_it_is = w->int8() && by_rows(rows);
      for (int64_t p = 0; p < panels && !as_it_is; ++p) {
        pack_panel<S>([&](int64_t i) { return mixed + (p * LANES + i) * words; },
                   std::min(LANES, rows - p * LANES), words, packed + p * words * LANES);
      }
      const int64_t feature = d + head * dim;
      Linear value = w->w[KEY_VALUE];
      Panels x;
      value.bias += feature;
      x.words = reinterpret_cast<Word*>(as_it_is ? const_cast<float*>(mixed) : packed);
      if (w->int8()) {
        value.bits.weight += feature * d;
        value.bits.scale += feature;
        value.bits.offset += feature;
        x.scale = w->mixed_scale + head * panels * LANES;
      } else if (w->bf16()) {
        value.words += feature * words;
      } else {
        value.weight += feature * d;
        const bool whole = value.turned && feature % TURNED == 0;
        value.turned = whole ? value.turned + feature * d : nullptr;
        x.x = packed;
      }
      if (rows == w->rows) {  // in the same lanes
        linear<S>(value, d, x, rows, w->ctx.x + head * dim * LANES, d, 0, dim);
        continue;
      }
      linear<S>(value, d, x, rows, y, dim, 0, dim);
      for (int64_t r = 0; r < rows; ++r) {
        const float* from = y + r / LANES * dim * LANES + r % LANES;
        const int64_t lane = w->lanes[r];
        float* to = w->ctx.x + (lane / LANES * d + head * dim) * LANES + lane % LANES;
        for (int64_t c = 0; c < dim; ++c) to[c * LANES] = from[c * LANES];
      }
    }
  }
};

struct NarrowContext {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) narrow<S>(w->ctx, p, w->rows, w->d);
  }
};

struct Output {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    linear<S>(w->w[OUTPUT], w->d, w->ctx, w->rows, w->y.x, w->d, begin * w->unit,
              std::min(w->d, end * w->unit), w->x.x);
  }
};

struct Normalize {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      normalize<S>(w->y.x + p * w->d * LANES, w->d, w->w[NORM].weight, w->w[NORM].bias, w->eps);
      narrow<S>(w->y, p, w->rows, w->d);
    }
  }
};

struct Up {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    Word* tops = nullptr;
    const int64_t rows = w->panels() * LANES;
    if (w->int8()) std::fill_n(tops = words_of(scratch.get(rows)), rows, 0);
    linear<S>(w->w[UP], w->d, w->y, w->rows, w->u.x, w->inner, begin * w->unit,
              std::min(w->inner, end * w->unit), nullptr, w->gelu, w->bf16() ? w->u.words : nullptr,
              tops);
    for (int64_t i = 0; i < rows && tops; ++i) {
      Word most = w->u_tops[i];
      while (most < tops[i] && !w->u_tops[i].compare_exchange_weak(most, tops[i])) {
      }
    }
  }
};

// What a thread has made it turns to bytes, too: it is near.
struct NarrowInner {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    const int64_t from = begin * w->unit, to = std::min(w->inner, end * w->unit);
    for (int64_t p = 0; p < w->panels(); ++p) {
      alignas(64) Word tops[LANES];
      for (int64_t i = 0; i < LANES; ++i) tops[i] = w->u_tops[p * LANES + i];
      const int64_t lanes = std::min(LANES, w->rows - p * LANES);
      to_bytes<S>(w->u.x + p * w->inner * LANES, tops, lanes, by_rows(w->rows), w->inner, from, to,
                  reinterpret_cast<uint8_t*>(w->u.words + p * w->inner / 4 * LANES));
      if (from == 0) to_scales<S>(tops, lanes, w->u.scale + p * LANES);
    }
  }
};

struct Down {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    linear<S>(w->w[DOWN], w->inner, w->u, w->rows, w->x.x, w->d, begin * w->unit,
              std::min(w->d, end * w->unit), w->y.x);
  }
};

struct Finish {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    const Linear& norm = w->w[LAST_NORM];
    for (int64_t p = begin; p < end; ++p) {
      float* panel = w->x.x + p * w->d * LANES;
      if (!w->pre_norm) normalize<S>(panel, w->d, norm.weight, norm.bias, w->eps);
      const auto row = [&](int64_t i) {
        const int64_t r = p * LANES + i;
        return w->out + (w->in_place ? w->active[r] : r) * w->state;
      };
      if (w->bf16()) {
        Word* words = w->x.words + p * w->state * LANES;
        to_words<S>(panel, w->d, words);
        panel = reinterpret_cast<float*>(words);
      }
      unpack_panel<S>(panel, w->state, row, 0, std::min(LANES, w->rows - p * LANES));
    }
  }
};

// The sentences of a group, those whose attention is cheaper absorbed apart from the others. Each is
// judged by itself, so that its result does not depend on its batch.
void choose(Work& w, const std::vector<Sentence>& sentences, const std::vector<double>& cost) {
  w.projected.clear();
  w.absorbed.clear();
  w.keys.clear();
  w.lanes.clear();
  for (Sentence s : sentences) {
    const double projected =
        s.tokens * (cost[KEY_ROW] + panels_of(s.active) * cost[PROJECTED_BLOCK]);
    const double absorbed = s.active * cost[ACTIVE_ROW] +
        s.tokens * (panels_of(s.active * w.heads) * cost[ABSORBED_BLOCK]);
    if (absorbed < projected) {
      s.first = w.lanes.size();
      for (int64_t r = 0; r < s.active; ++r) w.lanes.push_back(s.first_active + r);
      w.absorbed.push_back(s);
    } else {
      s.first = w.keys.size();
      for (int64_t j = 0; j < s.tokens; ++j) w.keys.push_back(s.states + j * w.state);
      w.projected.push_back(s);
    }
  }
}

void run_group(Work& w, bool all_active) {
  static thread_local Scratch scratch;
  const int64_t d = w.d, row = d * LANES, panels = w.panels();
  if (w.numbers == Numbers::fp32) {
    w.unit = cpu() >= Cpu::avx512 && turns(w.rows, w.w[UP].turned) ? TURNED : WHOLE_TILES;
  }
  const int64_t keys = w.keys.size(), key_panels = panels_of(keys);
  const int64_t absorbed = w.lanes.size();
  const bool shared = all_active && !absorbed;  // every key is a query: one packing does
  const auto size = [&](int64_t count, int64_t features) {  // at most
    return count * LANES * (features + features / 2 + 1);
  };
  float* at = scratch.get(
      size(panels, d) * 3 + size(panels, w.inner) + panels * row +
      (shared ? 0 : size(key_panels, d)) + key_panels * 2 * row + keys * 2 * d +
      filled(1) * w.dim + absorbed * (2 * d + w.heads * (w.wide + d + 2)) +
      w.heads * panels_of(absorbed) * LANES + 16 * 18);
  const auto take = [&](int64_t count) {  // whole lines of memory
    return std::exchange(at, at + (count + 15) / 16 * 16);
  };
  const auto take_panels = [&](int64_t count, int64_t features) {
    Panels result;
    result.x = take(count * LANES * features);
    if (w.numbers == Numbers::fp32) return result;
    if (w.int8()) result.scale = take(count * LANES);
    result.words = reinterpret_cast<Word*>(take(count * LANES * features / w.a_word()));
    return result;
  };
  w.x = take_panels(panels, d);
  w.ctx = take_panels(panels, d);
  w.y = take_panels(panels, d);
  w.u = take_panels(panels, w.inner);
  w.xk = shared ? w.x : take_panels(key_panels, d);
  w.q = take(panels * row);
  w.kv_panels = take(key_panels * 2 * row);
  w.kv = take(keys * 2 * d + filled(1) * w.dim);  // what fills up the last ones is read
  w.q_rows = take(absorbed * d);
  w.q_narrow = take(absorbed * d);
  w.q_scale = take(absorbed * w.heads);
  w.q_offset = words_of(take(absorbed * w.heads));
  w.carried = take(absorbed * w.heads * w.wide);
  w.mixed = take(absorbed * w.heads * d);
  w.mixed_scale = take(w.heads * panels_of(absorbed) * LANES);
  std::vector<std::atomic<Word>> tops(w.int8() ? panels * LANES : 0);
  w.u_tops = tops.data();

  struct Block {
    const Sentence* sentence;
    int64_t number;
  };
  std::vector<Block> blocks;
  const int64_t most = torch::stable::get_num_threads(), half = LANES / 2;
  // Smaller blocks are slower, but each thread is to have one.
  w.block = std::min(PAIRS, ((absorbed * w.heads + most - 1) / most + half - 1) / half * half);
  for (const Sentence& s : w.absorbed) {
    for (int64_t i = 0; i * w.block < s.active * w.heads; ++i) blocks.push_back({&s, i});
  }

  const int64_t work = std::max(2 * d * d * key_panels, w.inner * d * panels) * LANES;
  const int64_t threads = std::clamp<int64_t>(work / LEAST, 1, most);
  // Few rows wait for weights from memory, and what a thread asks for ahead is to be its own: equal
  // shares.
  const auto least = [&](int64_t items, int64_t cost) {
    const int64_t equal = (items + threads - 1) / threads, grain = std::max<int64_t>(1, LEAST / cost);
    return w.rows > LANES / 2 ? grain : std::max(grain, equal);
  };
  const Work* work_ = &w;
  const auto phases = [&](Team::Member team) {
    const auto each = [&]<class Body>(Body, int64_t items, int64_t cost = LEAST) {
      team.share(items, least(items, cost), [&](int64_t begin, int64_t end) {
        dispatch<Body>(work_, begin, end);
      });
    };
    // Units of features.
    const auto product = [&]<class Body>(Body body, int64_t features, int64_t depth, int64_t count) {
      each(body, (features + w.unit - 1) / w.unit, w.unit * depth * count * LANES);
    };
    each(PackActive(), panels);
    if (!shared && keys) each(PackKeys(), key_panels);
    product(Project(), keys ? (d + w.unit - 1) / w.unit * w.unit + 2 * d : d, d,
            std::max(panels, key_panels));
    if (keys) {
      w.attends_in_bf16 ? each(UnpackKeysInBf16(), key_panels) : each(UnpackKeys(), key_panels);
      const int64_t items = w.projected.size() * w.heads;
      team.share(items, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          w.attends_in_bf16 ? dispatch<AttendInBf16>(work_, i) : dispatch<AttendProjected>(work_, i);
        }
      });
    }
    if (absorbed) {
      each(UnpackQueries(), absorbed, LEAST / LANES);
      const int64_t strips = w.heads * ((d + 63) / 64);
      if (!w.attends_in_bf16) {
        each(CarryQueries(), strips);
      } else {
        w.int8() ? each(CarryNarrow<Kind::int8>(), strips) : each(CarryNarrow<Kind::bf16>(), strips);
      }
      team.share(blocks.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          dispatch<AttendAbsorbed>(work_, blocks[i].sentence, blocks[i].number);
        }
      });
      each(BringBack(), w.heads);
    }
    if (w.numbers != Numbers::fp32) each(NarrowContext(), panels);
    product(Output(), d, d, panels);
    each(Normalize(), panels);
    product(Up(), w.inner, d, panels);
    if (w.int8()) {
      team.again([&](int64_t begin, int64_t end) { dispatch<NarrowInner>(work_, begin, end); });
    }
    product(Down(), d, w.inner, panels);
    each(Finish(), panels);
  };
  Team(threads).run(phases, [](int64_t count, const auto& f) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { f(); });
  });
}

Tensor exit_layer_op(
    const Tensor& h_, const Tensor& active_, const Tensor& cu_active_, const Tensor& cu_tokens_,
    std::vector<Tensor> weights, std::vector<Tensor> scales, std::vector<double> costs,
    int64_t heads, double scale, double eps, bool pre_norm, bool tanh,
    const std::optional<Tensor>& bias_, const std::optional<Tensor>& positions_) {
  check_cpu(h_, active_, cu_active_, cu_tokens_, weights, scales, bias_, positions_);
  STD_TORCH_CHECK(
      h_.dim() == 2 && (h_.scalar_type() == ScalarType::Float || is_bf16(h_)) &&
          cu_active_.numel() > 0,
      "got h of ", h_.dim(), " dimensions; expected [T, d] of Float or BFloat16, and offsets");
  STD_TORCH_CHECK(
      weights.size() == LAYER_TENSORS && (scales.empty() || scales.size() == LAYER_TENSORS),
      "got ", weights.size(), " weights and ", scales.size(), " scales; expected ", LAYER_TENSORS,
      ", and as many or none");
  const int64_t num_sentences = cu_active_.numel() - 1;
  const Tensor h = torch::stable::contiguous(h_);
  const Tensor active = checked_vector(active_, "active", active_.numel());
  const Tensor cu_active = checked_vector(cu_active_, "cu_active", num_sentences + 1);
  const Tensor cu_tokens = checked_vector(cu_tokens_, "cu_tokens", num_sentences + 1);
  const auto* first = cu_active.const_data_ptr<int64_t>();
  const auto* start = cu_tokens.const_data_ptr<int64_t>();
  const auto* token = active.const_data_ptr<int64_t>();
  check_offsets(first, num_sentences, "cu_active");
  check_offsets(start, num_sentences, "cu_tokens");
  STD_TORCH_CHECK(
      first[num_sentences] == active.numel() && start[num_sentences] == h.size(0),
      "got offsets up to ", first[num_sentences], " and ", start[num_sentences], "; expected ",
      active.numel(), " active of ", h.size(0), " tokens");
  for (int64_t b = 0; b < num_sentences; ++b) {
    for (int64_t i = first[b]; i < first[b + 1]; ++i) {
      STD_TORCH_CHECK(
          start[b] <= token[i] && token[i] < start[b + 1] &&
              (i == first[b] || token[i - 1] < token[i]),
          "got token ", token[i], " of ", h.size(0), " in sentence ", b, "; expected its tokens, ",
          start[b], " to ", start[b + 1] - 1, ", ascending");
    }
  }
  const CheckedBias bias(bias_, positions_, heads, active.numel());
  const LayerCall call = {h.size(1), heads, num_sentences, start, costs, scale, pre_norm, tanh, is_bf16(h), &bias};
  Tensor out = torch::stable::new_empty(h, {active.numel(), h.size(1)});
  exit_layer(call, weights.data(), scales.empty() ? nullptr : scales.data(), nullptr, eps,
             h.const_data_ptr(), token, first, out.mutable_data_ptr());
  return out;
}

}  // namespace

void exit_layer(
    const LayerCall& call, const Tensor* weights, const Tensor* scales, const Tensor* turned,
    double eps, const void* h_, const int64_t* active, const int64_t* cu_active, void* out_) {
  const auto* h = static_cast<const float*>(h_);
  auto* out = static_cast<float*>(out_);
  Work w;
  w.d = call.d;
  w.heads = call.heads;
  w.dim = call.heads > 0 ? call.d / call.heads : 0;
  w.wide = panels_of(w.d) * LANES;
  w.inner = weights[2 * UP + 1].numel();
  if (scales || call.bf16) w.numbers = scales ? Numbers::int8 : Numbers::bf16;
  if (w.numbers != Numbers::fp32) {
    w.unit = std::max(WHOLE_TILES, engine(w.int8() ? Kind::int8 : Kind::bf16).rows);
  }
  w.state = w.bf16() ? w.d / 2 : w.d;
  w.attends_in_bf16 =
      w.numbers != Numbers::fp32 && cpu() >= Cpu::avx512_bf16 && w.dim % w.a_word() == 0;
  const int64_t d = w.d;
  STD_TORCH_CHECK(
      d > 0 && w.inner > 0 && d == w.dim * w.heads && d % w.a_word() == 0 &&
          w.inner % w.a_word() == 0 && !(w.bf16() && w.dim % 2),
      "got widths ", d, " and ", w.inner, " for ", w.heads,
      " heads; expected whole heads, and multiples of 4 in int8, of 2 in bf16");
  STD_TORCH_CHECK(!(scales && call.bf16), "got int8 weights and bf16 states; expected Float ones");
  STD_TORCH_CHECK(
      !turned || (w.numbers == Numbers::fp32 && d % TURNED == 0 && w.inner % TURNED == 0),
      "got turned weights for widths ", d, " and ", w.inner, "; expected fp32 and multiples of ", TURNED);
  STD_TORCH_CHECK(
      call.costs.size() == NUM_COSTS, "got ", call.costs.size(), " costs; expected ",
      int(NUM_COSTS));
  const auto values = [](const Tensor& x, int64_t rows, int64_t columns = 1,
                         ScalarType dtype = ScalarType::Float) {
    STD_TORCH_CHECK(
        x.scalar_type() == dtype && x.is_contiguous() && x.numel() == rows * columns &&
            x.size(0) == rows,
        "got a weight of ", x.numel(), " elements, ", x.dim() ? x.size(0) : 0, " rows and dtype ",
        torch::headeronly::toString(x.scalar_type()), "; expected ", rows, " rows of ", columns,
        ", contiguous, of ", torch::headeronly::toString(dtype));
    return x.const_data_ptr();
  };
  const int64_t out_in[][2] = {
      {d, d}, {2 * d, d}, {d, d}, {d, 1}, {w.inner, d}, {d, w.inner}, {d, 1}};
  if (w.bf16()) w.small.reserve(10 * d + w.inner);
  // A bias, or a LayerNorm's part, in fp32.
  const auto small = [&](const Tensor& x, int64_t size) {
    if (!w.bf16()) return static_cast<const float*>(values(x, size));
    const size_t first = w.small.size();
    w.small.resize(first + size);
    const void* from = values(x, size, 1, ScalarType::BFloat16);
    dispatch<Widen>(static_cast<const uint16_t*>(from), size, w.small.data() + first);
    return static_cast<const float*>(w.small.data() + first);
  };
  for (int i = 0; i < NUM_WEIGHTS; ++i) {
    const auto [rows, columns] = out_in[i];
    Linear& to = w.w[i];
    to.bias = small(weights[2 * i + 1], rows);
    if (columns == 1) {
      to.weight = small(weights[2 * i], rows);
      continue;
    }
    const ScalarType dtype = w.int8() ? ScalarType::Char : w.bf16() ? ScalarType::BFloat16 : ScalarType::Float;
    const void* weight = values(weights[2 * i], rows, columns, dtype);
    if (w.bf16()) to.words = static_cast<const Word*>(weight);
    if (w.numbers == Numbers::fp32) to.weight = static_cast<const float*>(weight);
    if (turned) {
      to.turned = static_cast<const float*>(values(*turned++, rows / TURNED, columns * TURNED));
    }
    if (!w.int8()) continue;
    to.bits.weight = static_cast<const int8_t*>(weight);
    to.bits.scale = static_cast<const float*>(values(scales[2 * i], rows));
    to.bits.offset = static_cast<const float*>(values(scales[2 * i + 1], rows + 1));
    to.bits.wide = !(to.bits.offset[rows] <= 64);  // after them, the largest weight
  }
  w.h = h;
  w.scale = static_cast<float>(call.scale);
  w.eps = static_cast<float>(eps);
  w.pre_norm = call.pre_norm;
  w.gelu = call.tanh ? Gelu::tanh : Gelu::exact;
  w.bias = call.bias;
  w.in_place = out == h;

  std::vector<Sentence> group;
  int64_t from = 0, tokens = 0;  // of the group: its first active row, all its tokens
  const auto flush = [&] {
    if (group.empty()) return;
    w.active = active + from;
    w.first_active = from;
    w.out = w.in_place ? out : out + from * w.state;
    w.rows = group.back().first_active + group.back().active;
    choose(w, group, call.costs);
    run_group(w, w.rows == tokens);
    from += w.rows;
    tokens = 0;
    group.clear();
  };
  for (int64_t b = 0; b < call.num_sentences; ++b) {
    const int64_t start = call.cu_tokens[b], length = call.cu_tokens[b + 1] - start;
    const int64_t count = cu_active[b + 1] - cu_active[b];
    if (!count) continue;
    if (cu_active[b + 1] - from > most_rows() || tokens + length > most_tokens()) flush();
    group.push_back({cu_active[b] - from, count, h + start * w.state, length, 0});
    tokens += length;
  }
  flush();
}

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) { m.impl("exit_layer", TORCH_BOX(&exit_layer_op)); }

}  // namespace tokenexit
