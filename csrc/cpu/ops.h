#pragma once
// What exit_loop runs layer by layer; each is defined beside the op of its name.
#include <cstdint>
#include <vector>

#include "../checks.h"

namespace tokenexit {

// out[r] = weight x[index[r]] + bias, rows of `in` and `features`; without an index, of x[r]. If
// `bf16`, x is that, and results are rounded to it.
void linear(
    const void* x, bool bf16, const int64_t* index, const float* weight, const float* bias,
    float* out, int64_t rows, int64_t in, int64_t features);

// What an exit decision is about: the word of each row of logits, or -1, and the rules of each
// sentence. min_active may be null.
struct Asked {
  const int64_t* words;
  int64_t num_rows, num_labels;
  const int64_t *cu_words, *window, *min_active;
  int64_t num_sentences, layer;
  bool max_prob;
};

template <class scalar_t, class acc_t>
void exit_decision(
    const scalar_t* logits, const Asked& asked, const acc_t* threshold, acc_t* uncertainty,
    int64_t* exit_layer);

// Writes the tokens that stay and the sentences' new offsets; returns how many stay.
int64_t compact_active(
    const int64_t* active, const int64_t* cu_active, int64_t num_sentences,
    const int64_t* word_of_token, const int64_t* exit_layer, int64_t* kept, int64_t* cu_kept);

// The tensors of a layer: weight and bias of each part, for int8 weights also scale and offset. Of its
// products, in fp32, also their weights turned.
constexpr int64_t LAYER_TENSORS = 14, LAYER_PRODUCTS = 5;

// What the layers of a batch have in common. Offsets and tokens have been checked.
struct LayerCall {
  int64_t d, heads, num_sentences;
  const int64_t* cu_tokens;
  const std::vector<double>& costs;
  double scale;
  bool pre_norm;
  bool tanh;                // the GELU between up and down is approximated by it
  bool bf16;                // h, out and weights are; else fp32, or weights int8
  const CheckedBias* bias;  // its position: of each active token
};

// New states of the active tokens: out[i] of the i-th, or, if out is h, in its place there. `scales`
// is null but for int8 weights, `turned` unless there are such copies.
void exit_layer(
    const LayerCall& call, const Tensor* weights, const Tensor* scales, const Tensor* turned,
    double eps, const void* h, const int64_t* active, const int64_t* cu_active, void* out);

}  // namespace tokenexit
