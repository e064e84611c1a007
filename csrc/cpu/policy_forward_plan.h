// What the CPU policy_forward kernels share: where each weight is, and where each intermediate lives.
#pragma once
#include <stdint.h>

#include "ops/policy_forward.h"

namespace unmask {
namespace cpu {

// Vectors are at most this many lanes wide; rows are worked on two vectors at a time.
constexpr int64_t kMaxLanes = 16;
constexpr int64_t kMaxChunk = 2 * kMaxLanes;
// Sequences whose conditioning is computed together.
constexpr int64_t kMaxGroup = 8;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Cosines and sines of the rotary embedding: row i (of head size / 2) holds frequency i for positions 0, 1, 2, ...
struct RotaryTable {
  const float* cosine;
  const float* sine;
  int64_t stride;
};

// Hands out 64-byte-aligned pieces of one allocation; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* start = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return start;
  }
};

// Sizes that follow from the problem, and the scratch memory of one thread.
//
// Since x_i = W c_i + b, the layer-normed and shifted input of the attention is a combination of K + 2 vectors (the
// centred columns of W and centred b, both times 1/deviation, and the shift), which ada makes different for mask 0 and
// 1. With `low_rank`, keys, values and queries are therefore kept as 2 (K + 2) coefficients per position on a *basis*,
// whose projections are computed once per sequence; so is the attention's output, and the input of the feed-forward.
struct PolicyScratch {
  bool low_rank;
  int64_t span;                           // coefficients per mask value: K + 2
  int64_t inputs;                         // rows of `input`: 2 * span, or D
  int64_t values;                         // rows of the values each head averages: 2 * span, or D / heads
  int64_t residuals;                      // low_rank: coefficients of x after attention: K + 1 + heads * values
  int64_t basis_stride, residual_stride;  // rows of the bases: 2 * span and residuals + 1, rounded up to vectors
  int64_t stride;                         // of `input`, `key` and `value` rows, in floats

  // per group of sequences
  float *embedding, *shared_in, *shared, *cond, *ada;
  // per sequence
  float *input, *key, *value;                  // (inputs | D | D, positions)
  float *basis, *basis_q, *basis_k, *basis_v;  // (D, 2 span)
  float *basis_out, *out_bias;                 // (heads, D, 2 span), (D)
  float *residual, *up_input, *up_low;         // (D, residuals), (D, residuals + 1), (F, residuals + 1)
  int32_t* rows;                               // selected positions, mask 0 first
  // per chunk of rows; (n, chunk) each
  float *confidence, *x, *query_input, *query, *cosine, *sine, *scores, *mixed, *h, *ffn, *update;

  PolicyScratch(const PolicyForwardParams& p, Arena& arena) {
    const int64_t d = p.sizes.hidden, f = p.sizes.ffn, k = p.sizes.confidences, heads = p.sizes.heads;
    span = k + 2;
    low_rank = 2 * span <= d / heads && 4 * span <= p.length;
    inputs = low_rank ? 2 * span : d;
    values = low_rank ? 2 * span : d / heads;
    residuals = low_rank ? k + 1 + heads * values : 0;
    basis_stride = low_rank ? round_up(2 * span, kMaxLanes) : 0;
    residual_stride = low_rank ? round_up(residuals + 1, kMaxLanes) : 0;
    // Not a multiple of a power of two of cache lines: the rows of a column must not share a cache set.
    stride = round_up(p.length, kMaxChunk) + 16;

    embedding = arena.take<float>(kMaxGroup * d);
    shared_in = arena.take<float>(kMaxGroup * d);
    shared = arena.take<float>(kMaxGroup * d);
    cond = arena.take<float>(2 * kMaxGroup * d);
    ada = arena.take<float>(2 * kMaxGroup * 6 * d);
    input = arena.take<float>(inputs * stride);
    key = arena.take<float>(d * stride);
    value = low_rank ? nullptr : arena.take<float>(d * stride);
    basis = arena.take<float>(d * basis_stride);
    basis_q = arena.take<float>(d * basis_stride);
    basis_k = arena.take<float>(d * basis_stride);
    basis_v = arena.take<float>(d * basis_stride);
    basis_out = arena.take<float>(heads * d * basis_stride);
    out_bias = arena.take<float>(d);
    residual = arena.take<float>(d * residual_stride);
    up_input = arena.take<float>(d * residual_stride);
    up_low = arena.take<float>(f * residual_stride);
    rows = arena.take<int32_t>(p.length);
    confidence = arena.take<float>(k * kMaxChunk);
    x = arena.take<float>(d * kMaxChunk);
    query_input = arena.take<float>(inputs * kMaxChunk);
    query = arena.take<float>(d * kMaxChunk);
    cosine = arena.take<float>(d / 2 * kMaxChunk);
    sine = arena.take<float>(d / 2 * kMaxChunk);
    scores = arena.take<float>(p.length * kMaxChunk);
    mixed = arena.take<float>((low_rank ? residuals : d) * kMaxChunk);
    h = arena.take<float>((d > residuals ? d : residuals + 1) * kMaxChunk);
    ffn = arena.take<float>(f * kMaxChunk);
    update = arena.take<float>(d * kMaxChunk);
  }
};

}  // namespace cpu
}  // namespace unmask
