// A whole layer of inference, for the active tokens of a packed batch, panel by panel: what a product
// leaves is what the next one reads. See tokenexit/ops/exit_layer.py.
#include <atomic>

#include <torch/csrc/stable/library.h>

#include "attention.h"
#include "int8.h"
#include "ops.h"

namespace tokenexit {
namespace {

// Computed beside each other, of a batch of any size: what keeps the workspace small.
constexpr int64_t MOST_ROWS = 512, MOST_TOKENS = 2048;
constexpr int64_t UNIT = 12;        // features a thread takes at least: whole tiles of any Isa

// Weights as torch.nn.Linear and LayerNorm hold them, in the order of the op's list.
enum Weight { QUERY, KEY_VALUE, OUTPUT, NORM, UP, DOWN, LAST_NORM, NUM_WEIGHTS };
static_assert(LAYER_TENSORS == 2 * NUM_WEIGHTS);

// Times that the choice between projected and absorbed attention weighs, in one unit.
enum Cost { KEY_ROW, PROJECTED_BLOCK, ACTIVE_ROW, ABSORBED_BLOCK, NUM_COSTS };

struct Linear {
  const float *weight = nullptr, *bias = nullptr;
  Matrix8 bits;  // in place of weight
};

// Panels of fp32 and, for 8-bit weights, the same as bytes.
struct Panels {
  float* x = nullptr;
  Panels8 bits;
};

struct Sentence {
  int64_t first_active, active;  // rows of this group
  const float* states;           // of its tokens
  int64_t tokens;
  int64_t first;  // row of its keys if projected, of its queries among the absorbed if not
};

struct Work {
  Linear w[NUM_WEIGHTS];
  bool int8 = false;
  const float* h;
  const int64_t* active;     // of this group
  const CheckedBias* bias;   // of all active tokens
  int64_t first_active = 0;  // of this group
  float* out;
  bool in_place;  // out is h, else the rows of this group
  int64_t d, heads, dim, inner;
  float eps, scale;
  bool pre_norm;

  std::vector<Sentence> projected, absorbed;
  std::vector<const float*> keys;  // projected rows
  std::vector<int64_t> lanes;      // group row of each absorbed query
  int64_t rows;                    // active ones

  Panels x, xk, ctx, y, u;       // [panels][features][16]
  float *q, *kv_panels, *kv;     // likewise, and kv [2][heads][rows][dim]
  // Absorbed rows: [rows][d], [heads][rows][wide], [heads][rows][d]; for 8-bit weights the last are
  // bytes, each row with a scale, [heads][panels][16].
  float *q_rows, *carried, *mixed, *mixed_scale;
  int64_t wide;   // d, rounded up to whole lanes
  int64_t block;  // pairs of a query and a head that attend together

  int64_t panels() const { return panels_of(rows); }

  INLINE void relate(RelativeBias& to, int64_t lane, int64_t head, int64_t row) const {
    to.set(lane, *bias, head, first_active + row);
  }
};

// y[n0 .. n1 - 1] of W x + bias; what either kind of weights does.
template <class S>
INLINE void linear(
    const Linear& w, int64_t depth, const Panels& x, int64_t rows, float* y, int64_t out,
    int64_t n0, int64_t n1, const float* residual = nullptr, bool gelu = false) {
  const Epilogue epilogue = {w.bias, residual, gelu};
  if (w.bits.weight) {
    product8<S>(w.bits, depth, x.bits, rows, y, out, n0, n1, epilogue);
  } else {
    product<S>(w.weight, depth, x.x, rows, y, out, n0, n1, epilogue);
  }
}

// The bytes of panel p of those of `rows` rows, if they are read.
template <class S>
INLINE void quantize(const Panels& to, int64_t p, int64_t rows, int64_t depth) {
  if (!to.bits.bytes) return;
  quantize_panel<S>(
      to.x + p * depth * LANES, std::min(LANES, rows - p * LANES), by_rows<S>(rows), depth,
      to.bits.bytes + p * depth * LANES, to.bits.scale + p * LANES);
}

// Each phase of the layer runs over a range of its items: panels, units of features, heads, ...

struct PackActive {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_panel([&](int64_t i) { return w->h + w->active[p * LANES + i] * w->d; },
                 std::min(LANES, w->rows - p * LANES), w->d, w->x.x + p * w->d * LANES);
      quantize<S>(w->x, p, w->rows, w->d);
    }
  }
};

struct PackKeys {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    const int64_t rows = w->keys.size();
    for (int64_t p = begin; p < end; ++p) {
      pack_panel([&](int64_t i) { return w->keys[p * LANES + i]; },
                 std::min(LANES, rows - p * LANES), w->d, w->xk.x + p * w->d * LANES);
      quantize<S>(w->xk, p, rows, w->d);
    }
  }
};

// Units of the query's features, then of the keys' and values'.
struct Project {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    const int64_t d = w->d, units = (d + UNIT - 1) / UNIT;
    if (begin < units) {
      linear<S>(w->w[QUERY], d, w->x, w->rows, w->q, d, begin * UNIT, std::min(d, end * UNIT));
    }
    if (end > units) {
      linear<S>(w->w[KEY_VALUE], d, w->xk, w->keys.size(), w->kv_panels, 2 * d,
                (std::max(begin, units) - units) * UNIT, std::min(2 * d, (end - units) * UNIT));
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
        unpack_panel(w->kv_panels + (p * width + at) * LANES, w->dim,
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
    for (int64_t r = begin; r < end; ++r) {
      const float* from = w->q + w->lanes[r] / LANES * w->d * LANES + w->lanes[r] % LANES;
      float* to = w->q_rows + r * w->d;
      for (int64_t c = 0; c < w->d; ++c) {
        to[c] = from[c * LANES] * (scale ? w->scale * scale[c] : w->scale);
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
    float* space = scratch.get(d * (LANES + PAIRS) + s->tokens * PAIRS);
    attend_absorbed<S>(
        [&](int64_t i) { return w->carried + pair(i) * w->wide; }, s->states, s->tokens, d, pairs,
        relate, [&](int64_t i) { return w->int8 ? space + i * d : w->mixed + pair(i) * d; },
        space + PAIRS * d);
    if (!w->int8) return;
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t head = pair(i) / rows, row = pair(i) % rows;
      w->mixed_scale[head * panels_of(rows) * LANES + row] =
          quantize_row<S>(space + i * d, d, reinterpret_cast<uint8_t*>(w->mixed) + pair(i) * d);
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
    const int64_t words = w->int8 ? d / 4 : d;  // of a row
    for (int64_t head = begin; head < end; ++head) {
      const float* mixed = w->mixed + head * rows * words;
      const bool as_it_is = w->int8 && by_rows<S>(rows);
      for (int64_t p = 0; p < panels && !as_it_is; ++p) {
        pack_panel([&](int64_t i) { return mixed + (p * LANES + i) * words; },
                   std::min(LANES, rows - p * LANES), words, packed + p * words * LANES);
      }
      const int64_t feature = d + head * dim;
      Linear value = w->w[KEY_VALUE];
      Panels x;
      value.bias += feature;
      if (w->int8) {
        value.bits.weight += feature * d;
        value.bits.scale += feature;
        value.bits.offset += feature;
        x.bits.bytes = reinterpret_cast<uint8_t*>(as_it_is ? const_cast<float*>(mixed) : packed);
        x.bits.scale = w->mixed_scale + head * panels * LANES;
      } else {
        value.weight += feature * d;
        x.x = packed;
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

struct QuantizeContext {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) quantize<S>(w->ctx, p, w->rows, w->d);
  }
};

struct Output {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    linear<S>(w->w[OUTPUT], w->d, w->ctx, w->rows, w->y.x, w->d, begin * UNIT,
              std::min(w->d, end * UNIT), w->x.x);
  }
};

struct Normalize {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      normalize<S>(w->y.x + p * w->d * LANES, w->d, w->w[NORM].weight, w->w[NORM].bias, w->eps);
      quantize<S>(w->y, p, w->rows, w->d);
    }
  }
};

struct Up {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    linear<S>(w->w[UP], w->d, w->y, w->rows, w->u.x, w->inner, begin * UNIT,
              std::min(w->inner, end * UNIT), nullptr, true);
  }
};

struct QuantizeInner {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) quantize<S>(w->u, p, w->rows, w->inner);
  }
};

struct Down {
  template <class S>
  static INLINE void run(const Work* w, int64_t begin, int64_t end) {
    linear<S>(w->w[DOWN], w->inner, w->u, w->rows, w->x.x, w->d, begin * UNIT,
              std::min(w->d, end * UNIT), w->y.x);
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
        return w->out + (w->in_place ? w->active[r] : r) * w->d;
      };
      unpack_panel(panel, w->d, row, 0, std::min(LANES, w->rows - p * LANES));
    }
  }
};

// Threads take part after part until none is left, ever smaller ones: they wait for each other after
// every phase, and equal shares would leave all waiting for the one that is held up. Few rows wait
// for weights from memory, and what a thread asks for ahead is to be its own: equal shares.
template <class Body>
void parallel(const Work& work, int64_t items, int64_t grain = 1) {
  const Work* w = &work;
  const int64_t most = torch::stable::get_num_threads();
  const int64_t threads = std::min(most, (items + grain - 1) / grain);
  if (threads <= 1) return dispatch<Body>(w, int64_t(0), items);
  const int64_t equal = (items + threads - 1) / threads, least = w->rows > LANES / 2 ? grain : equal;
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    int64_t begin = next;
    while (begin < items) {
      const int64_t part = std::max(least, (items - begin) / (2 * threads));
      const int64_t end = std::min(items, begin + part);
      if (!next.compare_exchange_weak(begin, end)) continue;
      dispatch<Body>(w, begin, end);
      begin = next;
    }
  });
}

// Units of features; a thread takes some hundred thousand multiply-adds at least.
template <class Body>
void parallel_units(const Work& work, int64_t features, int64_t depth, int64_t panels) {
  const int64_t cost = UNIT * depth * panels * LANES;
  parallel<Body>(work, (features + UNIT - 1) / UNIT, std::max<int64_t>(1, 500000 / cost));
}

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
      for (int64_t j = 0; j < s.tokens; ++j) w.keys.push_back(s.states + j * w.d);
      w.projected.push_back(s);
    }
  }
}

void run_group(Work& w, bool all_active) {
  static thread_local Scratch scratch;
  const int64_t d = w.d, row = d * LANES, panels = w.panels();
  const int64_t keys = w.keys.size(), key_panels = panels_of(keys);
  const int64_t absorbed = w.lanes.size();
  const bool shared = all_active && !absorbed;  // every key is a query: one packing does
  const auto size = [&](int64_t count, int64_t features) {
    // A byte for each float, and a scale for each lane.
    return count * LANES * (w.int8 ? features + features / 4 + 1 : features);
  };
  float* at = scratch.get(
      size(panels, d) * 3 + size(panels, w.inner) + panels * row +
      (shared ? 0 : size(key_panels, d)) + key_panels * 2 * row + keys * 2 * d +
      absorbed * (d + w.heads * (w.wide + d)) + w.heads * panels_of(absorbed) * LANES);
  const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
  const auto take_panels = [&](int64_t count, int64_t features) {
    Panels result;
    result.x = take(count * LANES * features);
    if (!w.int8) return result;
    result.bits.scale = take(count * LANES);
    result.bits.bytes = reinterpret_cast<uint8_t*>(take(count * LANES * features / 4));
    return result;
  };
  w.x = take_panels(panels, d);
  w.ctx = take_panels(panels, d);
  w.y = take_panels(panels, d);
  w.u = take_panels(panels, w.inner);
  w.xk = shared ? w.x : take_panels(key_panels, d);
  w.q = take(panels * row);
  w.kv_panels = take(key_panels * 2 * row);
  w.kv = take(keys * 2 * d);
  w.q_rows = take(absorbed * d);
  w.carried = take(absorbed * w.heads * w.wide);
  w.mixed = take(absorbed * w.heads * d);
  w.mixed_scale = take(w.heads * panels_of(absorbed) * LANES);

  parallel<PackActive>(w, panels);
  if (!shared && keys) parallel<PackKeys>(w, key_panels);
  parallel_units<Project>(w, keys ? (d + UNIT - 1) / UNIT * UNIT + 2 * d : d, d,
                          std::max(panels, key_panels));
  if (keys) {
    parallel<UnpackKeys>(w, key_panels);
    std::vector<int64_t> start = {0};
    for (const Sentence& s : w.projected) {
      for (int64_t i = 0; i < w.heads; ++i) {
        start.push_back(start.back() + (panels_of(s.active) + 1) * s.tokens * w.dim);
      }
    }
    const Work* work = &w;
    parallel_items(start, 4096, [work](int64_t i) { dispatch<AttendProjected>(work, i); });
  }
  if (absorbed) {
    parallel<UnpackQueries>(w, absorbed, LANES);
    parallel<CarryQueries>(w, w.heads * ((d + 63) / 64));
    std::vector<int64_t> start = {0};
    std::vector<std::pair<const Sentence*, int64_t>> blocks;
    // Smaller blocks are slower, but each thread is to have one.
    const int64_t threads = torch::stable::get_num_threads(), half = LANES / 2;
    const int64_t share = (absorbed * w.heads + threads - 1) / threads;
    w.block = std::min(PAIRS, (share + half - 1) / half * half);
    for (const Sentence& s : w.absorbed) {
      const int64_t pairs = s.active * w.heads;
      for (int64_t i = 0; i * w.block < pairs; ++i) {
        blocks.emplace_back(&s, i);
        start.push_back(start.back() + (s.tokens + 1) * d * std::min(w.block, pairs - i * w.block));
      }
    }
    const Work* work = &w;
    const auto* block = blocks.data();
    parallel_items(start, 4096, [work, block](int64_t i) {
      dispatch<AttendAbsorbed>(work, block[i].first, block[i].second);
    });
    parallel<BringBack>(w, w.heads);
  }
  if (w.int8) parallel<QuantizeContext>(w, panels);
  parallel_units<Output>(w, d, d, panels);
  parallel<Normalize>(w, panels);
  parallel_units<Up>(w, w.inner, d, panels);
  if (w.int8) parallel<QuantizeInner>(w, panels);
  parallel_units<Down>(w, d, w.inner, panels);
  parallel<Finish>(w, panels);
}

Tensor exit_layer_op(
    const Tensor& h_, const Tensor& active_, const Tensor& cu_active_, const Tensor& cu_tokens_,
    std::vector<Tensor> weights, std::vector<Tensor> scales, std::vector<double> costs,
    int64_t heads, double scale, double eps, bool pre_norm, const std::optional<Tensor>& bias_,
    const std::optional<Tensor>& positions_) {
  check_cpu(h_, active_, cu_active_, cu_tokens_, weights, scales, bias_, positions_);
  STD_TORCH_CHECK(
      h_.dim() == 2 && h_.scalar_type() == ScalarType::Float && cu_active_.numel() > 0,
      "got h of ", h_.dim(), " dimensions; expected [T, d] of Float, and offsets");
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
  const LayerCall call = {h.size(1), heads, num_sentences, start, costs, scale, pre_norm, &bias};
  Tensor out = torch::stable::new_empty(h, {active.numel(), h.size(1)});
  exit_layer(call, weights.data(), scales.empty() ? nullptr : scales.data(), eps,
             h.const_data_ptr<float>(), token, first, out.mutable_data_ptr<float>());
  return out;
}

}  // namespace

void exit_layer(
    const LayerCall& call, const Tensor* weights, const Tensor* scales, double eps, const float* h,
    const int64_t* active, const int64_t* cu_active, float* out) {
  Work w;
  w.d = call.d;
  w.heads = call.heads;
  w.dim = call.heads > 0 ? call.d / call.heads : 0;
  w.wide = panels_of(w.d) * LANES;
  w.inner = weights[2 * UP + 1].numel();
  w.int8 = scales != nullptr;
  const int64_t d = w.d;
  STD_TORCH_CHECK(
      d > 0 && w.inner > 0 && d == w.dim * w.heads && !(w.int8 && (d % 4 || w.inner % 4)),
      "got widths ", d, " and ", w.inner, " for ", w.heads,
      " heads; expected whole heads and, in int8, multiples of 4");
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
  for (int i = 0; i < NUM_WEIGHTS; ++i) {
    const auto [rows, columns] = out_in[i];
    Linear& to = w.w[i];
    const bool bits = w.int8 && columns > 1;
    const void* weight = values(
        weights[2 * i], rows, columns, bits ? ScalarType::Char : ScalarType::Float);
    to.bias = static_cast<const float*>(values(weights[2 * i + 1], rows));
    if (!bits) {
      to.weight = static_cast<const float*>(weight);
      continue;
    }
    to.bits.weight = static_cast<const int8_t*>(weight);
    to.bits.scale = static_cast<const float*>(values(scales[2 * i], rows));
    to.bits.offset = static_cast<const float*>(values(scales[2 * i + 1], rows));
  }
  w.h = h;
  w.scale = static_cast<float>(call.scale);
  w.eps = static_cast<float>(eps);
  w.pre_norm = call.pre_norm;
  w.bias = call.bias;
  w.in_place = out == h;

  std::vector<Sentence> group;
  int64_t from = 0, tokens = 0;  // of the group: its first active row, all its tokens
  const auto flush = [&] {
    if (group.empty()) return;
    w.active = active + from;
    w.first_active = from;
    w.out = w.in_place ? out : out + from * d;
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
    if (cu_active[b + 1] - from > MOST_ROWS || tokens + length > MOST_TOKENS) flush();
    group.push_back({cu_active[b] - from, count, h + start * d, length, 0});
    tokens += length;
  }
  flush();
}

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) { m.impl("exit_layer", TORCH_BOX(&exit_layer_op)); }

}  // namespace tokenexit
