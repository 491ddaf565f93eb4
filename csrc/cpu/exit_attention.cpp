#include <tuple>

#include <torch/csrc/stable/library.h>

#include "attention.h"

namespace tokenexit {
namespace {

uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352D;
  x ^= x >> 15;
  x *= 0x846CA68B;
  return x ^ (x >> 16);
}

// A tensor of rows of heads, [rows, heads, dim], and where its elements are.
struct Rows {
  float* data = nullptr;
  int64_t row = 0, head = 0;

  explicit Rows(const Tensor& x)
      : data(static_cast<float*>(x.mutable_data_ptr())), row(x.stride(0)), head(x.stride(1)) {}
  Rows() = default;
  INLINE float* at(int64_t r, int64_t h) const { return data + r * row + h * head; }
};

struct Problem {
  Rows q, k, v, out, grad, dq, dk, dv;
  float *lse, *dbias = nullptr;  // [A, H]; [B, H, 2R+1]
  const int64_t *cu_q, *cu_k;
  const CheckedBias* bias;
  int64_t num_sentences, heads, dim;
  float scale;
  double dropout;
  uint32_t seed;

  INLINE RelativeBias relative_bias(int64_t head, int64_t first, int64_t lanes) const {
    RelativeBias result;
    for (int64_t i = 0; i < lanes; ++i) result.set(i, *bias, head, first + i);
    return result;
  }

  // Zero the weights [keys][16] that dropout takes, scale the others.
  template <class S>
  INLINE void drop(float* x, int64_t keys, int64_t head, int64_t first, int64_t first_key) const {
    using U = typename S::UInt;
    if (dropout <= 0) return;
    const uint32_t limit = static_cast<uint32_t>(dropout * 4294967296.0);
    alignas(64) uint32_t row[LANES];
    for (uint32_t i = 0; i < LANES; ++i) {
      row[i] = mix(mix(seed ^ static_cast<uint32_t>(first + i)) ^ static_cast<uint32_t>(head));
    }
    const float factor = static_cast<float>(1 / (1 - dropout));
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t at = 0; at < LANES; at += S::WIDTH) {
        U r;
        std::memcpy(&r, row + at, sizeof(r));
        r ^= static_cast<uint32_t>(first_key + j);
        r ^= r >> 16;
        r *= 0x7FEB352Du;
        r ^= r >> 15;
        r *= 0x846CA68Bu;
        r ^= r >> 16;
        float* p = x + j * LANES + at;
        S::store(p, r >= limit ? S::load(p) * factor : typename S::Vec{});
      }
    }
  }
};

// One head of one sentence, 16 queries at a time.
struct Forward {
  template <class S>
  static INLINE void run(const Problem* problem, int64_t b, int64_t h) {
    static thread_local Scratch scratch;
    const Problem& p = *problem;
    const int64_t first_key = p.cu_k[b], keys = p.cu_k[b + 1] - first_key;
    float* q = scratch.get((2 * p.dim + keys) * LANES);
    float *out = q + p.dim * LANES, *s = out + p.dim * LANES;
    for (int64_t first = p.cu_q[b]; first < p.cu_q[b + 1]; first += LANES) {
      const int64_t lanes = std::min(LANES, p.cu_q[b + 1] - first);
      pack_panel<S>([&](int64_t i) { return p.q.at(first + i, h); }, lanes, p.dim, q);
      for (int64_t c = 0; c < p.dim * LANES; ++c) q[c] *= p.scale;
      float lse[LANES];
      weights<S>(
          q, {p.k.at(first_key, h), p.k.row, 1}, keys, p.dim, p.relative_bias(h, first, lanes), s,
          lse);
      for (int64_t i = 0; i < lanes; ++i) p.lse[(first + i) * p.heads + h] = lse[i];
      p.drop<S>(s, keys, h, first, first_key);
      context<S>(s, {p.v.at(first_key, h), 1, p.v.row}, keys, p.dim, out);
      unpack_panel<S>(out, p.dim, [&](int64_t i) { return p.out.at(first + i, h); }, 0, lanes);
    }
  }
};

// With P the weights, M the dropout mask, dP = M * (dO V^T): dS = P * (dP - rowsum(P * dP)),
// dV = (M * P)^T dO, dQ = scale dS K, dK = scale dS^T Q.
struct Backward {
  template <class S>
  static INLINE void run(const Problem* problem, int64_t b, int64_t h) {
    static thread_local Scratch scratch;
    const Problem& p = *problem;
    const int64_t first_key = p.cu_k[b], keys = p.cu_k[b + 1] - first_key;
    const int64_t width = panels_of(p.dim) * LANES;  // rows padded to whole vectors
    float* q = scratch.get(LANES * (3 * p.dim + 2 * width + 3 * keys) + 2 * keys * width);
    float *grad = q + p.dim * LANES, *dq = grad + p.dim * LANES;
    float *q_rows = dq + p.dim * LANES, *grad_rows = q_rows + LANES * width;
    float *s = grad_rows + LANES * width, *dropped = s + keys * LANES, *ds = dropped + keys * LANES;
    float *dk = ds + keys * LANES, *dv = dk + keys * width;
    std::fill(q_rows, q_rows + 2 * LANES * width, 0.0f);
    std::fill(dk, dk + 2 * keys * width, 0.0f);
    for (int64_t first = p.cu_q[b]; first < p.cu_q[b + 1]; first += LANES) {
      const int64_t lanes = std::min(LANES, p.cu_q[b + 1] - first);
      pack_panel<S>([&](int64_t i) { return p.q.at(first + i, h); }, lanes, p.dim, q);
      for (int64_t c = 0; c < p.dim * LANES; ++c) q[c] *= p.scale;
      pack_panel<S>([&](int64_t i) { return p.grad.at(first + i, h); }, lanes, p.dim, grad);
      unpack_panel<S>(q, p.dim, [&](int64_t i) { return q_rows + i * width; }, 0, LANES);
      unpack_panel<S>(grad, p.dim, [&](int64_t i) { return grad_rows + i * width; }, 0, LANES);
      const RelativeBias bias = p.relative_bias(h, first, lanes);
      weights<S>(q, {p.k.at(first_key, h), p.k.row, 1}, keys, p.dim, bias, s);
      std::copy(s, s + keys * LANES, dropped);
      p.drop<S>(dropped, keys, h, first, first_key);
      multiply<S>(
          {p.v.at(first_key, h), p.v.row, 1}, grad, LANES, ds, LANES, keys, p.dim);
      p.drop<S>(ds, keys, h, first, first_key);
      for (int64_t at = 0; at < LANES; at += S::WIDTH) {
        typename S::Vec delta = {};
        for (int64_t j = at; j < keys * LANES; j += LANES) delta += S::load(s + j) * S::load(ds + j);
        for (int64_t j = at; j < keys * LANES; j += LANES) {
          S::store(ds + j, S::load(s + j) * (S::load(ds + j) - delta));
        }
      }
      if (p.dbias) {
        float* table = p.dbias + (b * p.heads + h) * (2 * p.bias->reach + 1);
        for (int64_t j = 0; j < keys; ++j) {
          for (int64_t i = 0; i < lanes; ++i) table[bias.entry(j, i)] += ds[j * LANES + i];
        }
      }
      for (int64_t at = 0; at < width; at += LANES) {
        const auto gather = [&](const float* left, const float* rows, float* to) __attribute__((always_inline)) {
          multiply<S>({left, LANES, 1}, rows + at, width, to + at, width, keys, lanes, true);
        };
        gather(dropped, grad_rows, dv);
        gather(ds, q_rows, dk);  // q is scaled already
      }
      multiply<S>({p.k.at(first_key, h), 1, p.k.row}, ds, LANES, dq, LANES, p.dim, keys);
      for (int64_t c = 0; c < p.dim * LANES; ++c) dq[c] *= p.scale;
      unpack_panel<S>(dq, p.dim, [&](int64_t i) { return p.dq.at(first + i, h); }, 0, lanes);
    }
    for (int64_t j = 0; j < keys; ++j) {
      std::copy(dk + j * width, dk + j * width + p.dim, p.dk.at(first_key + j, h));
      std::copy(dv + j * width, dv + j * width + p.dim, p.dv.at(first_key + j, h));
    }
  }
};

Tensor checked_rows(const Tensor& x, const char* name, int64_t heads, int64_t dim) {
  STD_TORCH_CHECK(
      x.dim() == 3 && x.size(1) == heads && x.size(2) == dim &&
          x.scalar_type() == ScalarType::Float,
      "got ", name, " of ", x.dim(), " dimensions and dtype ",
      torch::headeronly::toString(x.scalar_type()), "; expected [rows, ", heads, ", ", dim,
      "] of Float");
  return x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// The sentences of a call, checked; keeps the tensors it points into.
struct Call {
  Tensor q, k, v, cu_q, cu_k;
  CheckedBias bias;
  Problem problem;

  Call(
      const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& cu_q_, const Tensor& cu_k_,
      double scale, const std::optional<Tensor>& bias_, const std::optional<Tensor>& positions_,
      double dropout_p, int64_t seed)
      : bias((check_cpu(q_, k_, v_, cu_q_, cu_k_, bias_, positions_), bias_), positions_,
             q_.dim() == 3 ? q_.size(1) : 0, q_.dim() > 0 ? q_.size(0) : 0) {
    STD_TORCH_CHECK(q_.dim() == 3, "got q of ", q_.dim(), " dimensions; expected [A, H, D]");
    STD_TORCH_CHECK(cu_q_.numel() > 0, "got an empty cu_q; expected [B+1]");
    Problem& p = problem;
    p.heads = q_.size(1);
    p.dim = q_.size(2);
    p.num_sentences = cu_q_.numel() - 1;
    q = checked_rows(q_, "q", p.heads, p.dim);
    k = checked_rows(k_, "k", p.heads, p.dim);
    v = checked_rows(v_, "v", p.heads, p.dim);
    cu_q = checked_vector(cu_q_, "cu_q", p.num_sentences + 1);
    cu_k = checked_vector(cu_k_, "cu_k", p.num_sentences + 1);
    p.q = Rows(q);
    p.k = Rows(k);
    p.v = Rows(v);
    p.cu_q = cu_q.const_data_ptr<int64_t>();
    p.cu_k = cu_k.const_data_ptr<int64_t>();
    check_offsets(p.cu_q, p.num_sentences, "cu_q");
    check_offsets(p.cu_k, p.num_sentences, "cu_k");
    STD_TORCH_CHECK(
        p.cu_q[p.num_sentences] == q.size(0) && p.cu_k[p.num_sentences] <= k.size(0) &&
            k.size(0) == v.size(0),
        "got offsets up to ", p.cu_q[p.num_sentences], " and ", p.cu_k[p.num_sentences], " of ",
        q.size(0), " queries, ", k.size(0), " keys and ", v.size(0), " values");
    STD_TORCH_CHECK(  // an expanded tensor may claim any size; sums of sizes must not overflow
        k.size(0) <= (int64_t(1) << 44) / std::max<int64_t>(1, p.heads * p.dim), "got ", k.size(0),
        " keys; expected at most 2^44 elements");
    p.scale = static_cast<float>(scale);
    p.dropout = dropout_p;
    p.seed = static_cast<uint32_t>(seed);
    p.bias = &bias;
  }

  template <class Body>
  void run() const {
    const Problem* p = &problem;
    std::vector<int64_t> start = {0};
    for (int64_t b = 0; b < p->num_sentences; ++b) {
      const int64_t queries = p->cu_q[b + 1] - p->cu_q[b], keys = p->cu_k[b + 1] - p->cu_k[b];
      for (int64_t h = 0; h < p->heads; ++h) {
        start.push_back(start.back() + 1 + (panels_of(queries) + 1) * keys * p->dim);
      }
    }
    parallel_items(start, 4096, [p](int64_t item) {
      dispatch<Body>(p, item / p->heads, item % p->heads);
    });
  }
};

std::tuple<Tensor, Tensor> exit_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
    double scale, const std::optional<Tensor>& bias, const std::optional<Tensor>& positions,
    double dropout_p, int64_t seed, int64_t max_length) {
  Call call(q, k, v, cu_q, cu_k, scale, bias, positions, dropout_p, seed);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)});
  call.problem.out = Rows(out);
  call.problem.lse = lse.mutable_data_ptr<float>();
  call.run<Forward>();
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> exit_attention_backward(
    const Tensor& grad_, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k, double scale,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& positions, double dropout_p,
    int64_t seed, int64_t max_length) {
  check_cpu(grad_, out, lse);
  Call call(q, k, v, cu_q, cu_k, scale, bias, positions, dropout_p, seed);
  Problem& p = call.problem;
  const Tensor grad = checked_rows(grad_, "grad", p.heads, p.dim);
  STD_TORCH_CHECK(grad.size(0) == q.size(0), "got grad of ", grad.size(0), " rows; expected ",
                  q.size(0));
  const auto like = [&](const Tensor& x) {
    return torch::stable::new_zeros(x, {x.size(0), p.heads, p.dim});
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  const int64_t entries = bias ? 2 * call.bias.reach + 1 : 0;
  Tensor parts = torch::stable::new_zeros(q, {bias ? p.num_sentences : 0, p.heads, entries});
  p.grad = Rows(grad);
  p.dq = Rows(dq);
  p.dk = Rows(dk);
  p.dv = Rows(dv);
  if (bias) p.dbias = parts.mutable_data_ptr<float>();
  call.run<Backward>();

  Tensor dbias = torch::stable::new_zeros(q, {bias ? p.heads : 0, entries});
  auto* sum = dbias.mutable_data_ptr<float>();
  const auto* part = parts.const_data_ptr<float>();
  for (int64_t i = 0; i < parts.numel(); ++i) sum[i % (p.heads * entries)] += part[i];
  return {dq, dk, dv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenexit, CPU, m) {
  m.impl("exit_attention", TORCH_BOX(&exit_attention));
  m.impl("exit_attention_backward", TORCH_BOX(&exit_attention_backward));
}

}  // namespace tokenexit
