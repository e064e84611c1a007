// What the kernels of policy_forward hand to each other, and how their work is cut.
//
// Rows are worked on in tiles of 16 of one sequence, of two kinds: positions, 16 by 16 from a sequence's first on, and
// slots, which are the positions that need a logit, close together over the whole batch.
#pragma once
#include <algorithm>

#include "../ops/policy_forward.h"
#include "policy_tile.cuh"

namespace unmask::cuda {

constexpr int kGroup = 8;               // sequences conditioned together: with two masks the rows of a product
constexpr int kColumns = 64;            // of queries, keys or values that a block computes
constexpr int kMaxSplits = 8;           // blocks that share the keys of a query
constexpr int kMaxPairs = 128;          // channel pairs of a head
constexpr int kMaxPositions = 1 << 14;  // in one pass, and so in the workspace; a larger batch takes several
constexpr int kNone = INT32_MIN;        // in `rows`: this slot and all after it are empty

// Of a matrix whose rows are at most so long as much is in shared memory as helps; of others what fits on every device.
constexpr int kMostStaged = 128;
constexpr int rows_staged(int columns) { return columns <= kMostStaged ? 64 : 16; }

// A pass over some sequences of a batch.
struct PolicyWork {
  PolicyForwardParams p;
  PolicyWeightView w;
  int batch, length, d, heads, head, ffn, k;  // head: channels of one
  int padded, tiles;       // positions of a sequence in full tiles; tiles of positions, and tiles of slots at most
  int span;                // channels of a head, with those of neighbours up to multiples of 16, at most
  int keys, splits;        // keys that a block takes at a time; blocks that share the keys
  int units, unit_blocks;  // feed-forward units of a block; blocks that share the units
  int groups, shares;      // groups of sequences; blocks that share the conditioning of one

  // In the workspace.
  int* rows;                // (slots) which row: 2 * position in the batch + mask; ~that where it only fills up a tile
  float* ada;               // (B, 2, 6 D) for mask 0 and 1: gamma1, beta1, alpha1, gamma2, beta2, alpha2
  float* x;                 // (B L, D) the embedded inputs
  float* residual;          // (slots, D) x after attention
  float* hidden;            // (slots, D) the feed-forward's input
  float* normal;            // (B L, D) LN1(x), before ada
  float* query;             // (slots, D), rotated, scaled to units of log 2
  float* key;               // (positions, D), rotated
  float* value;             // (B, D, positions of a sequence)
  float* sums;              // (splits, slots, D) values weighted by exp2(score - maximum)
  float2* scales;           // (splits, slots, heads) that maximum, and the sum of the weights
  float* parts;             // (unit_blocks, slots, D) of the feed-forward's output; where the attention's memory was
  float rotary[kMaxPairs];  // radians per position
  int64_t bytes;            // of the workspace

  // Over sequences from `first` on: at most kMaxPositions positions, or one sequence. Sizes that results depend on
  // follow from network and length alone. Without a workspace it only says how many bytes one must have.
  PolicyWork(const PolicyForwardParams& params, int64_t first, const DeviceInfo& device, void* workspace);

  UNMASK_DEVICE int row_of(int slot) const { return rows[slot] < 0 ? ~rows[slot] : rows[slot]; }
  // Where a row finds one of the six parts of ada.
  UNMASK_DEVICE const float* modulation(int row, int part) const {
    return ada + ((row / 2 / length * 2 + row % 2) * 6 + part) * d;
  }
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

inline PolicyWork::PolicyWork(const PolicyForwardParams& params, int64_t first, const DeviceInfo& device,
                              void* workspace)
    : p(params), w(params.weights, params.sizes) {
  length = static_cast<int>(p.length);
  padded = ceil_div(length, kRows) * kRows;
  batch = static_cast<int>(std::min<int64_t>(p.batch - first, std::max(kMaxPositions / padded, 1)));
  tiles = batch * (padded / kRows);
  d = static_cast<int>(p.sizes.hidden);
  heads = static_cast<int>(p.sizes.heads);
  head = d / heads;
  ffn = static_cast<int>(p.sizes.ffn);
  k = static_cast<int>(p.sizes.confidences);
  span = head % 16 == 0 ? head : std::min(head / 16 * 16 + 32, d);
  keys = rows_staged(span);
  splits = std::min(ceil_div(padded, keys), kMaxSplits);
  units = rows_staged(d);
  unit_blocks = ceil_div(ffn, units);
  groups = ceil_div(batch, kGroup);
  shares = std::min(std::max(device.multiprocessors / groups, 1), 6 * d / 16);
  for (int i = 0; i < head / 2; ++i) {
    rotary[i] = static_cast<float>(pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(head)));
  }
  p.mask += first * length;
  p.confidence += first * length * k;
  p.time += first;
  p.logits += first * length;
  if (p.cond) p.cond += first * d;
  if (p.select) p.select += first * length;

  const int64_t slots = static_cast<int64_t>(tiles) * kRows, matrix = slots * d;
  bytes = 0;
  const auto take = [&](int64_t floats) {
    float* at = workspace ? static_cast<float*>(workspace) + bytes / 4 : nullptr;
    bytes += (floats + 31) / 32 * 128;
    return at;
  };
  rows = reinterpret_cast<int*>(take(slots));
  ada = take(static_cast<int64_t>(batch) * 12 * d);
  for (float** at : {&x, &residual, &hidden}) *at = take(matrix);
  parts = take(0);
  const int64_t end = bytes + 4 * unit_blocks * matrix;
  for (float** at : {&normal, &query, &key, &value}) *at = take(matrix);
  sums = take(splits * matrix);
  scales = reinterpret_cast<float2*>(take(splits * slots * heads * 2));
  bytes = std::max(bytes, end);
}

}  // namespace unmask::cuda
