// select_set: the positions that a set policy commits in one step, by its network inside a selection loop.
//
// The network, at position i: t, c and p are the proposal, its k largest probabilities and its own where region_i, else
// the token in the buffer, zeros and 0; a NaN among c and p counts as 0, a token outside of the table as the nearest.
//   x_i = numbers([c, p, log max(p, 1e-4), cos(i f), sin(i f)]) + table[t] + state[mask_i] + share(4 u),
// f the 16 frequencies stored with the weights, u the share of positions not masked, share = linear, SiLU, linear; where i
// is picked, state[2] - state[1] is added. Then each layer, pre-norm: x += out(attention(norm1(x))), x +=
// down(gelu(up(norm2(x)))), full attention over all L positions, exact GELU. p_i = sigmoid(logit(p) + bias_i +
// output(norm(x_i))), p between 1e-4 and 1 - 1e-4, or 0 where that is NaN. LayerNorm eps 1e-5. Rotary: base 10000,
// position 0 at the first of the L, channel pairs (2i, 2i+1) of each head.
//
// The loop, for each row by itself, at most `runs` times: of the positions that are allowed and not yet picked, all with
// p > max(sure, exp(-risk)) are picked. Then the one with the largest p of the others, at ties the lowest, is picked if
// nothing has been picked before (at no cost), or if the costs -log max(p, 1e-6) of such picks stay within risk. A row
// ends when a run picks nothing or nothing is left to pick. A row without allowed positions costs nothing.
// Error of score < 1e-5 absolute against float64 for weights and inputs of order one.
//
// Weights: one float32 buffer, matrices row-major (out, in) as torch's nn.Linear stores them (D hidden, F feed-forward,
// K confidences):
//   frequencies (16) | state (3,D) | numbers W (D,N) b (D) | share W (D,1) b (D) W (D,D) b (D) |
//   for each layer: norm1 w (D) b (D) | qkv W (3D,D) b (3D) | out W (D,D) b (D) | norm2 w b | up W (F,D) b (F) |
//   down W (D,F) b (D) | then norm w b | output W (1,D) b (1)
// N is K + 34 rounded up to a multiple of 16: the last columns are not read or count nothing.
// Rows of query and key stand in qkv so that the channels of a rotary pair are neighbours.
#pragma once
#include "policy_forward.h"

namespace unmask {

constexpr int64_t kMaxSetLayers = 8;
constexpr int64_t kSetPeriods = 16;

struct SetLayer {
  PolicyLinear norm1, qkv, out, norm2, up, down;
};

// N, for what the network reads of a position beside its token.
inline int64_t set_numbers(const PolicySizes& s) { return (s.confidences + 2 + 2 * kSetPeriods + 15) / 16 * 16; }

inline int64_t set_weight_count(const PolicySizes& s, int64_t layers) {
  const int64_t d = s.hidden, f = s.ffn;
  const int64_t input = kSetPeriods + 3 * d + (d * set_numbers(s) + d) + 2 * d + (d * d + d);
  return input + layers * (4 * (d * d + d) + 4 * d + (f * d + f) + (d * f + d)) + 2 * d + (d + 1);
}

// The packed buffer, taken apart in the order above.
struct SetWeightView {
  const float *frequencies, *state;
  PolicyLinear numbers, share_in, share_out;
  SetLayer layers[kMaxSetLayers];
  PolicyLinear norm, output;

  SetWeightView(const float* p, const PolicySizes& s, int64_t count) : layers() {
    PolicyWeightReader read{p};
    const int64_t d = s.hidden, f = s.ffn;
    frequencies = read.take(kSetPeriods);
    state = read.take(3 * d);
    numbers = read.linear(d, set_numbers(s));
    share_in = read.linear(d, 1);
    share_out = read.linear(d, d);
    for (int64_t i = 0; i < count; ++i) {
      layers[i].norm1 = read.linear(d, 1);
      layers[i].qkv = read.linear(3 * d, d);
      layers[i].out = read.linear(d, d);
      layers[i].norm2 = read.linear(d, 1);
      layers[i].up = read.linear(f, d);
      layers[i].down = read.linear(d, f);
    }
    norm = read.linear(d, 1);
    output = read.linear(1, d);
  }
};

struct SelectSetParams {
  const float* weights;
  PolicySizes sizes;
  int64_t layers;  // 1 to kMaxSetLayers
  int64_t batch;
  int64_t length;             // L >= 1
  const float* table;         // (N, D)
  int64_t table_rows;         // N >= 1
  const int64_t* tokens;      // (B, L) the buffer
  const int64_t* candidates;  // (B, L) the proposals
  const uint8_t* mask;        // (B, L) bool: 1 = masked
  const uint8_t* region;      // (B, L) bool: where proposals are read
  const float* confidence;    // (B, L, K) contiguous
  const float* probability;   // (B, L) of the proposals
  const float* bias;          // null, or (B, L): added to the logits
  const uint8_t* allowed;     // (B, L) bool: what may be picked
  const float* risk;          // (B), at least 0
  float sure;
  int64_t runs;
  uint8_t* select;  // (B, L) bool: picked
  float* score;     // (B, L) p of the first run, 0 where not allowed
};

namespace cpu {
// Runs on the calling thread for rows [begin, end).
void select_set(const SelectSetParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int64_t select_set_workspace(const SelectSetParams& params);
int select_set(const SelectSetParams& params, void* workspace, void* stream);
}  // namespace cuda

}  // namespace unmask
