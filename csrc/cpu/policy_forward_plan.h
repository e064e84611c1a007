// Where the CPU kernels of the policy networks keep each intermediate.
#pragma once
#include <stdint.h>

#include "ops/select_set.h"

namespace unmask::cpu {

// Vectors are at most this many lanes wide; rows are worked on two vectors at a time.
constexpr int64_t kMaxLanes = 16;
constexpr int64_t kMaxChunk = 2 * kMaxLanes;
// Sequences whose conditioning is computed together.
constexpr int64_t kMaxGroup = 8;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Cosines and sines of positions 0, 1, 2, ... times frequencies: a row for each frequency, `stride` apart, the sines behind
// the cosines.
struct SinusoidTable {
  const float* cosine;
  const float* sine;
  int64_t stride;
};

// Scratch memory of one thread, handed out in pieces aligned to 64 bytes; with a null base, `used` is only counted.
struct ScratchMemory {
  char* const base;
  int64_t used = 0;

  explicit ScratchMemory(char* memory) : base(memory) {}

  float* take(int64_t count) {
    float* start = base ? reinterpret_cast<float*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(float)), 64);
    return start;
  }
};

// What every policy network needs for the chunk of rows in hand: (n, chunk).
struct ChunkScratch : ScratchMemory {
  const int64_t d, f, heads, head, length;  // head: channels of one
  // Floats between the rows of what is kept of all positions. Not a multiple of a power of two of cache lines: the rows of
  // a column must not share a cache set.
  const int64_t stride = round_up(length, kMaxChunk) + 16;
  float* const x = take(d * kMaxChunk);
  float* const query = take(d * kMaxChunk);
  float* const cosine = take(d / 2 * kMaxChunk);
  float* const sine = take(d / 2 * kMaxChunk);
  float* const scores = take(length * kMaxChunk);
  float* const ffn = take(f * kMaxChunk);
  float* const update = take(d * kMaxChunk);

  ChunkScratch(const PolicySizes& sizes, int64_t positions, char* memory)
      : ScratchMemory(memory),
        d(sizes.hidden),
        f(sizes.ffn),
        heads(sizes.heads),
        head(sizes.hidden / sizes.heads),
        length(positions) {}
};

// Sizes that follow from the problem, and the scratch memory of policy_forward.
//
// Since x_i = W c_i + b, the layer-normed and shifted input of the attention is a combination of K + 2 vectors (the
// centred columns of W and centred b, both times 1/deviation, and the shift), which ada makes different for mask 0 and
// 1. With `low_rank`, keys, values and queries are therefore kept as 2 (K + 2) coefficients per position on a *basis*,
// whose projections are computed once per sequence; so is the attention's output, and the input of the feed-forward.
struct PolicyScratch : ChunkScratch {
  const int64_t k;
  const int64_t span = k + 2;  // coefficients per mask value
  const bool low_rank = 2 * span <= d / heads && 4 * span <= length;
  const int64_t inputs = low_rank ? 2 * span : d;                   // rows of `input`
  const int64_t values = low_rank ? 2 * span : d / heads;           // rows of the values that each head averages
  const int64_t residuals = low_rank ? k + 1 + heads * values : 0;  // low_rank: coefficients of x after attention
  const int64_t basis_stride = low_rank ? round_up(2 * span, kMaxLanes) : 0;
  const int64_t residual_stride = low_rank ? round_up(residuals + 1, kMaxLanes) : 0;

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
  float* const query_input = take(inputs * kMaxChunk);
  float* const mixed = take((low_rank ? residuals : d) * kMaxChunk);
  float* const h = take((d > residuals ? d : residuals + 1) * kMaxChunk);

  PolicyScratch(const PolicyForwardParams& p, char* memory)
      : ChunkScratch(p.sizes, p.length, memory), k(p.sizes.confidences) {}
};

// Scratch memory of select_set.
struct SetScratch : ChunkScratch {
  const int64_t layers, all_numbers;
  // of all positions: (n, L)
  float* const input = take(d * stride);                    // of the first layer
  float* const stream = take(layers > 1 ? d * stride : 0);  // of the layer at work
  float* const p = take(length);
  int32_t* const all = reinterpret_cast<int32_t*>(take(length));    // 0, 1, 2, ...
  int32_t* const fresh = reinterpret_cast<int32_t*>(take(length));  // positions whose input is new
  int32_t* const free = reinterpret_cast<int32_t*>(take(length));   // positions that may be picked
  // per chunk of rows
  float* const share = take(d);
  float* const added = take(2 * d);  // to the inputs, for mask 0 and 1
  float* const numbers = take(all_numbers * kMaxChunk);
  float* const h = take(d * kMaxChunk);
  float* const mixed = take(d * kMaxChunk);
  float* const qkv = take(3 * d * kMaxChunk);
  float* const all_projected = take(layers * 3 * d * stride);

  // Queries, keys and values (3 D, L) of a layer.
  float* projected(int64_t layer) const { return all_projected + layer * 3 * d * stride; }

  SetScratch(const SelectSetParams& p, char* memory)
      : ChunkScratch(p.sizes, p.length, memory), layers(p.layers), all_numbers(set_numbers(p.sizes)) {}
};

// On the active instruction set.
void policy_forward(const PolicyForwardParams& params, int64_t begin, int64_t end, const PolicyScratch& scratch,
                    const SinusoidTable& rotary);
void select_set(const SelectSetParams& params, int64_t begin, int64_t end, const SetScratch& scratch,
                const SinusoidTable& rotary, const SinusoidTable& places);

}  // namespace unmask::cpu
