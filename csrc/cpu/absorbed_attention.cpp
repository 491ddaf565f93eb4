#include <torch/csrc/stable/library.h>

#include "attention.h"

namespace tokenexit {
namespace {

struct Problem {
  const float *q, *h;
  float* out;
  const int64_t *cu_q, *cu_k;
  const CheckedBias* bias;
  int64_t heads, dim;
  float scale;
};

// Up to PAIRS pairs of a query and a head of sentence b.
struct Block {
  template <class S>
  static INLINE void run(const Problem* p, int64_t b, int64_t block) {
    static thread_local Scratch scratch;
    const int64_t keys = p->cu_k[b + 1] - p->cu_k[b];
    const int64_t first = p->cu_q[b] * p->heads + block * PAIRS;
    const int64_t pairs = std::min(PAIRS, p->cu_q[b + 1] * p->heads - first);
    float* q = scratch.get(p->dim * (PAIRS + LANES) + keys * PAIRS);
    for (int64_t i = 0; i < pairs * p->dim; ++i) q[i] = p->q[first * p->dim + i] * p->scale;
    const auto relate = [&](RelativeBias& bias, int64_t lane, int64_t i) {
      bias.set(lane, *p->bias, (first + i) % p->heads, (first + i) / p->heads);
    };
    attend_absorbed<S>(
        [&](int64_t i) { return q + i * p->dim; }, p->h + p->cu_k[b] * p->dim, keys, p->dim, pairs,
        relate, [&](int64_t i) { return p->out + (first + i) * p->dim; }, q + p->dim * PAIRS);
  }
};

Tensor absorbed_attention(
    const Tensor& q_, const Tensor& h_, const Tensor& cu_q_, const Tensor& cu_k_, double scale,
    const std::optional<Tensor>& bias_, const std::optional<Tensor>& positions_,
    int64_t max_length) {
  check_cpu(q_, h_, cu_q_, cu_k_, bias_, positions_);
  STD_TORCH_CHECK(
      q_.dim() == 3 && h_.dim() == 2 && q_.size(2) == h_.size(1) && cu_q_.numel() > 0 &&
          q_.scalar_type() == ScalarType::Float && h_.scalar_type() == ScalarType::Float,
      "got q of ", q_.dim(), " and h of ", h_.dim(),
      " dimensions; expected [A, H, d] and [K, d] of Float, and offsets");
  const Tensor q = torch::stable::contiguous(q_), h = torch::stable::contiguous(h_);
  const int64_t num_sentences = cu_q_.numel() - 1;
  const Tensor cu_q = checked_vector(cu_q_, "cu_q", num_sentences + 1);
  const Tensor cu_k = checked_vector(cu_k_, "cu_k", num_sentences + 1);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Problem p = {q.const_data_ptr<float>(), h.const_data_ptr<float>()};
  p.out = out.mutable_data_ptr<float>();
  p.cu_q = cu_q.const_data_ptr<int64_t>();
  p.cu_k = cu_k.const_data_ptr<int64_t>();
  p.heads = q.size(1);
  p.dim = q.size(2);
  p.scale = static_cast<float>(scale);
  check_offsets(p.cu_q, num_sentences, "cu_q");
  check_offsets(p.cu_k, num_sentences, "cu_k");
  STD_TORCH_CHECK(
      p.cu_q[num_sentences] == q.size(0) && p.cu_k[num_sentences] <= h.size(0),
      "got offsets up to ", p.cu_q[num_sentences], " and ", p.cu_k[num_sentences], " of ",
      q.size(0), " queries and ", h.size(0), " states");
  const CheckedBias bias(bias_, positions_, p.heads, q.size(0));
  p.bias = &bias;

  std::vector<int64_t> start = {0};
  std::vector<std::pair<int64_t, int64_t>> blocks;
  for (int64_t b = 0; b < num_sentences; ++b) {
    const int64_t pairs = (p.cu_q[b + 1] - p.cu_q[b]) * p.heads;
    for (int64_t i = 0; i * PAIRS < pairs; ++i) {
      blocks.emplace_back(b, i);
      const int64_t mine = std::min(PAIRS, pairs - i * PAIRS);
      start.push_back(start.back() + (p.cu_k[b + 1] - p.cu_k[b] + 1) * p.dim * mine);
    }
  }
  parallel_items(start, 4096, [&p, &blocks](int64_t i) {
    dispatch<Block>(static_cast<const Problem*>(&p), blocks[i].first, blocks[i].second);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) {
  m.impl("absorbed_attention", TORCH_BOX(&absorbed_attention));
}

}  // namespace tokenexit
