// policy_forward: the whole policy network in one call.
//
// For sequence b: cond(m) = mask_embedding[m] + time_mlp(embed(time[b])) (+ cond[b] when given), m in {0, 1};
// x_i = confidence_proj(confidence[b, i]); one DiT block (adaptive scale/shift from ada(cond(mask_i)), rotary
// attention over all L positions, exact GELU), then final LayerNorm and output projection: one logit per position.
// embed(t) = [cos(t f), sin(t f)] with the D/2 frequencies stored with the weights. LayerNorm eps 1e-5.
// Rotary: base 10000, position 0 at the first generated token, channel pairs (2i, 2i+1) of each head, rotated
// halves concatenated [even', odd'].
// Only rows with select != 0 need a logit; the others get -inf. Keys and values always come from all L positions.
// Error < 1e-4 absolute against float64 for weights and inputs of order one.
//
// Weights: one float32 buffer, matrices row-major (out, in) exactly as torch's nn.Linear stores them, in this order
// (D hidden, F feed-forward, K confidences):
//   frequencies (D/2) | mask_embedding (2,D) | time_mlp.0 W (D,D) b (D) | time_mlp.2 W (D,D) b (D) |
//   confidence_proj W (D,K) b (D) | norm1 w (D) b (D) | ada W (6D,D) b (6D) | q W b | k W b | v W b | out W b (all
//   (D,D),(D)) | norm2 w b | linear1 W (F,D) b (F) | linear2 W (D,F) b (D) | final_norm w b | output_proj W (1,D) b (1)
// ada's 6D outputs are, in order: gamma1, beta1, alpha1, gamma2, beta2, alpha2 (g1 b1 a1 g2 b2 a2 of the method).
#pragma once
#include <stdint.h>

namespace unmask {

struct PolicySizes {
  int64_t hidden;       // D: multiple of 16, at most 256
  int64_t heads;        // D / heads even
  int64_t ffn;          // F: multiple of 16, at most 1024
  int64_t confidences;  // K: 1..64
};

inline int64_t policy_weight_count(const PolicySizes& s) {
  const int64_t d = s.hidden, f = s.ffn;
  return d / 2 + 2 * d + 2 * (d * d + d) + (d * s.confidences + d) + 2 * d + 6 * (d * d + d) + 4 * (d * d + d) + 2 * d +
         (f * d + f) + (d * f + d) + 2 * d + (d + 1);
}

struct PolicyLinear {
  const float* weight;
  const float* bias;
};

// Hands out a packed buffer piece by piece.
struct PolicyWeightReader {
  const float* p;

  const float* take(int64_t count) {
    const float* start = p;
    p += count;
    return start;
  }
  PolicyLinear linear(int64_t rows, int64_t columns) {
    const float* weight = take(rows * columns);
    return PolicyLinear{weight, take(rows)};
  }
};

// The packed buffer, taken apart in the order above. A norm has weight and bias as a layer has.
struct PolicyWeightView {
  const float *frequencies, *mask_embedding;
  PolicyLinear time_in, time_out, confidence, norm1, ada, query, key, value, out, norm2, up, down, final_norm, output;

  PolicyWeightView(const float* p, const PolicySizes& s) {
    const int64_t d = s.hidden;
    PolicyWeightReader read{p};
    frequencies = read.take(d / 2);
    mask_embedding = read.take(2 * d);
    time_in = read.linear(d, d);
    time_out = read.linear(d, d);
    confidence = read.linear(d, s.confidences);
    norm1 = read.linear(d, 1);
    ada = read.linear(6 * d, d);
    query = read.linear(d, d);
    key = read.linear(d, d);
    value = read.linear(d, d);
    out = read.linear(d, d);
    norm2 = read.linear(d, 1);
    up = read.linear(s.ffn, d);
    down = read.linear(d, s.ffn);
    final_norm = read.linear(d, 1);
    output = read.linear(1, d);
  }
};

struct PolicyForwardParams {
  const float* weights;
  PolicySizes sizes;
  int64_t batch;
  int64_t length;           // L >= 1
  const uint8_t* mask;      // (B, L) bool: 1 = still masked
  const float* confidence;  // (B, L, K) contiguous
  const float* time;        // (B)
  const float* cond;        // null, or (B, D): added to both cond vectors (other conditioning, for instance alpha)
  const uint8_t* select;    // null = all, or (B, L) bool: rows that need a logit
  float* logits;            // (B, L)
};

namespace cpu {
// Runs on the calling thread for sequences [begin, end).
void policy_forward(const PolicyForwardParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int64_t policy_forward_workspace(const PolicyForwardParams& params);
int policy_forward(const PolicyForwardParams& params, void* workspace, void* stream);
}  // namespace cuda

}  // namespace unmask
