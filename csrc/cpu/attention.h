#pragma once
// Attention of up to 16 queries, the lanes of a panel, over the keys of their sentence.
#include <cmath>
#include <limits>

#include "../checks.h"
#include "panels.h"

namespace tokenexit {

// What is added to the scores: table[clamp(j - position, -reach, reach) + reach] for key j.
struct RelativeBias {
  int64_t reach = 0;
  const float* table[LANES] = {};  // of each lane's head, [2 reach + 1]; null for none
  int64_t position[LANES] = {};

  INLINE void set(int64_t lane, const CheckedBias& bias, int64_t head, int64_t query) {
    if (!bias.entries) return;
    reach = bias.reach;
    table[lane] = bias.entries + head * (2 * reach + 1);
    position[lane] = bias.position[query];
  }
  INLINE int64_t entry(int64_t key, int64_t lane) const {
    return std::clamp(key - position[lane], -reach, reach) + reach;
  }
  INLINE void add(float* scores, int64_t row, int64_t keys) const {
    for (int64_t i = 0; i < LANES && table[i]; ++i) {
      for (int64_t j = 0; j < keys; ++j) scores[j * row + i] += table[i][entry(j, i)];
    }
  }
};

// Each lane's softmax over scores [keys][16], `row` apart, in place, and the logarithm of its sum.
template <class S>
INLINE void softmax(float* scores, int64_t row, int64_t keys, float* lse) {
  using V = typename S::Vec;
  for (int64_t at = 0; at < LANES; at += S::WIDTH) {
    V top = S::splat(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < keys; ++j) {
      const V x = S::load(scores + j * row + at);
      top = x > top ? x : top;
    }
    V sum = {};
    for (int64_t j = 0; j < keys; ++j) {
      const V e = exp<S>(S::load(scores + j * row + at) - top);
      S::store(scores + j * row + at, e);
      sum += e;
    }
    const V inverse = 1.0f / sum;
    for (int64_t j = 0; j < keys; ++j) {
      S::store(scores + j * row + at, S::load(scores + j * row + at) * inverse);
    }
    if (lse) {
      for (int64_t i = 0; i < S::WIDTH; ++i) lse[at + i] = top[i] + std::log(sum[i]);
    }
  }
}

// Attention weights [keys][16] of the queries in panel q [dim][16], scaled already.
template <class S>
INLINE void weights(
    const float* q, Strided k, int64_t keys, int64_t dim, const RelativeBias& bias, float* out,
    float* lse = nullptr) {
  multiply<S>(k, q, LANES, out, LANES, keys, dim);
  bias.add(out, LANES, keys);
  softmax<S>(out, LANES, keys, lse);
}

// Context [dim][16] of weights [keys][16]; value j's feature c is at v.data[c * v.row + j * v.col].
template <class S>
INLINE void context(const float* weights, Strided v, int64_t keys, int64_t dim, float* out) {
  multiply<S>(v, weights, LANES, out, LANES, dim, keys);
}

// Pairs of a query and a head that attend together: whole tiles of any Isa.
constexpr int64_t PAIRS = 48;

// Up to PAIRS pairs attend over hidden states [keys][dim], which are keys and values at once. Pair i
// is at q(i), scaled already; its result goes to out(i). `relate(bias, lane, i)` sets its bias.
// `space` is [dim][16], then [keys][PAIRS].
template <class S, class Query, class Relate, class Out>
INLINE void attend_absorbed(
    const Query& q, const float* states, int64_t keys, int64_t dim, int64_t pairs,
    const Relate& relate, const Out& out, float* space) {
  float* scores = space + dim * LANES;
  for (int64_t first = 0; first < pairs; first += LANES) {
    const int64_t lanes = std::min(LANES, pairs - first);
    pack_panel<S>([&](int64_t i) { return q(first + i); }, lanes, dim, space);
    float* mine = scores + first;
    multiply<S>(
        {states, dim, 1}, space, LANES, mine, PAIRS, keys, dim, false, lanes <= LANES / 2);
    RelativeBias bias;
    for (int64_t i = 0; i < lanes; ++i) relate(bias, i, first + i);
    bias.add(mine, PAIRS, keys);
    softmax<S>(mine, PAIRS, keys, nullptr);
  }
  int64_t c = 0;
  for (; c + LANES <= dim; c += LANES) {
    multiply_rows<S>(
        {scores, 1, PAIRS}, states + c, dim, [&](int64_t i) { return out(i) + c; }, pairs, keys);
  }
  for (; c < dim; ++c) {  // what is left of a width that is no multiple of 16
    for (int64_t i = 0; i < pairs; ++i) {
      float sum = 0;
      for (int64_t j = 0; j < keys; ++j) sum += scores[j * PAIRS + i] * states[j * dim + c];
      out(i)[c] = sum;
    }
  }
}

}  // namespace tokenexit
