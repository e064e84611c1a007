// What the CPU policy_forward kernels share: where each weight is, and where each intermediate lives.
#pragma once
#include <stdint.h>

#include "ops/policy_forward.h"

namespace unmask::cpu {

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

// Sizes that follow from the problem, and the scratch memory of one thread.
//
// Since x_i = W c_i + b, the layer-normed and shifted input of the attention is a combination of K + 2 vectors (the
// centred columns of W and centred b, both times 1/deviation, and the shift), which ada makes different for mask 0 and
// 1. With `low_rank`, keys, values and queries are therefore kept as 2 (K + 2) coefficients per position on a *basis*,
// whose projections are computed once per sequence; so is the attention's output, and the input of the feed-forward.
struct PolicyScratch {
  const PolicySizes sizes;
  const int64_t length;
  const int64_t d = sizes.hidden, f = sizes.ffn, k = sizes.confidences, heads = sizes.heads;
  const int64_t span = k + 2;  // coefficients per mask value
  const bool low_rank = 2 * span <= d / heads && 4 * span <= length;
  const int64_t inputs = low_rank ? 2 * span : d;                   // rows of `input`
  const int64_t values = low_rank ? 2 * span : d / heads;           // rows of the values that each head averages
  const int64_t residuals = low_rank ? k + 1 + heads * values : 0;  // low_rank: coefficients of x after attention
  const int64_t basis_stride = low_rank ? round_up(2 * span, kMaxLanes) : 0;
  const int64_t residual_stride = low_rank ? round_up(residuals + 1, kMaxLanes) : 0;
  // Floats between the rows of `input`, `key` and `value`. Not a multiple of a power of two of cache lines: the rows of a
  // column must not share a cache set.
  const int64_t stride = round_up(length, kMaxChunk) + 16;

  // Memory is handed out below in pieces aligned to 64 bytes; with a null base, `used` is only counted.
  char* const base;
  int64_t used = 0;

  // per group of sequences
  float* const embedding = take(kMaxGroup * d);
  float* const shared_in = take(kMaxGroup * d);
  float* const shared = take(kMaxGroup * d);
  float* const cond = take(2 * kMaxGroup * d);
  float* const ada = take(2 * kMaxGroup * 6 * d);
  // per sequence
  float* const input = take(inputs * stride);
  float* const key = take(d * stride);
  float* const value = take(low_rank ? 0 : d * stride);
  float* const basis = take(d * basis_stride);
  float* const basis_q = take(d * basis_stride);
  float* const basis_k = take(d * basis_stride);
  float* const basis_v = take(d * basis_stride);
  float* const basis_out = take(heads * d * basis_stride);  // (heads, D, 2 span)
  float* const out_bias = take(d);
  float* const residual = take(d * residual_stride);               // (D, residuals)
  float* const up_input = take(d * residual_stride);               // (D, residuals + 1)
  float* const up_low = take(f * residual_stride);                 // (F, residuals + 1)
  int32_t* const rows = reinterpret_cast<int32_t*>(take(length));  // selected positions of one mask value
  // per chunk of rows: (n, chunk)
  float* const confidence = take(k * kMaxChunk);
  float* const x = take(d * kMaxChunk);
  float* const query_input = take(inputs * kMaxChunk);
  float* const query = take(d * kMaxChunk);
  float* const cosine = take(d / 2 * kMaxChunk);
  float* const sine = take(d / 2 * kMaxChunk);
  float* const scores = take(length * kMaxChunk);
  float* const mixed = take((low_rank ? residuals : d) * kMaxChunk);
  float* const h = take((d > residuals ? d : residuals + 1) * kMaxChunk);
  float* const ffn = take(f * kMaxChunk);
  float* const update = take(d * kMaxChunk);

  PolicyScratch(const PolicyForwardParams& p, char* memory) : sizes(p.sizes), length(p.length), base(memory) {}

 private:
  float* take(int64_t count) {
    float* start = base ? reinterpret_cast<float*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(float)), 64);
    return start;
  }
};

void policy_forward(const PolicyForwardParams& params, int64_t begin, int64_t end, const PolicyScratch& scratch,
                    const RotaryTable& rotary);  // on the active instruction set

}  // namespace unmask::cpu
