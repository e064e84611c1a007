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
constexpr int kMaxPositions = 1 << 14;  // in one pass, and so in the workspace; a larger batch takes several
constexpr int kNone = INT32_MIN;        // in `rows`: this slot and all after it are empty

// A pass over some sequences of a batch.
struct PolicyWork : AttentionShape {
  PolicyForwardParams p;
  PolicyWeightView w;
  int batch, ffn, k;
  int tiles;               // of positions, and tiles of slots at most
  int splits;              // blocks that share the keys
  int units, unit_blocks;  // feed-forward units of a block; blocks that share the units
  int groups, shares;      // groups of sequences; blocks that share the conditioning of one

  // In the workspace.
  int* rows;        // (slots) which row: 2 * position in the batch + mask; ~that where it only fills up a tile
  float* ada;       // (B, 2, 6 D) for mask 0 and 1: gamma1, beta1, alpha1, gamma2, beta2, alpha2
  float* x;         // (B L, D) the embedded inputs
  float* residual;  // (slots, D) x after attention
  float* hidden;    // (slots, D) the feed-forward's input
  float* normal;    // (B L, D) LN1(x), before ada
  float* query;     // (slots, D), rotated, scaled to units of log 2
  float* key;       // (positions, D), rotated
  float* value;     // (B, D, positions of a sequence)
  float* sums;      // (splits, slots, D) values weighted by exp2(score - maximum)
  float2* scales;   // (splits, slots, heads) that maximum, and the sum of the weights
  float* parts;     // (unit_blocks, slots, D) of the feed-forward's output; where the attention's memory was
  int64_t bytes;    // of the workspace

  // Over sequences from `first` on: at most kMaxPositions positions, or one sequence. Sizes that results depend on
  // follow from network and length alone. Without a workspace it only says how many bytes one must have.
  PolicyWork(const PolicyForwardParams& params, int64_t first, const DeviceInfo& device, void* workspace);

  UNMASK_DEVICE int row_of(int slot) const { return rows[slot] < 0 ? ~rows[slot] : rows[slot]; }
  // Where a row finds one of the six parts of ada.
  UNMASK_DEVICE const float* modulation(int row, int part) const {
    return ada + ((row / 2 / length * 2 + row % 2) * 6 + part) * d;
  }
};

inline PolicyWork::PolicyWork(const PolicyForwardParams& params, int64_t first, const DeviceInfo& device,
                              void* workspace)
    : AttentionShape(params.length, params.sizes.hidden, params.sizes.heads),
      p(params),
      w(params.weights, params.sizes) {
  batch = static_cast<int>(std::min<int64_t>(p.batch - first, std::max(kMaxPositions / padded, 1)));
  tiles = batch * (padded / kRows);
  ffn = static_cast<int>(p.sizes.ffn);
  k = static_cast<int>(p.sizes.confidences);
  splits = std::min(ceil_div(padded, keys), kMaxSplits);
  units = rows_staged(d);
  unit_blocks = ceil_div(ffn, units);
  groups = ceil_div(batch, kGroup);
  shares = std::min(std::max(device.multiprocessors / groups, 1), 6 * d / 16);
  p.mask += first * length;
  p.confidence += first * length * k;
  p.time += first;
  p.logits += first * length;
  if (p.cond) p.cond += first * d;
  if (p.select) p.select += first * length;

  const int64_t slots = static_cast<int64_t>(tiles) * kRows, matrix = slots * d;
  Pieces take{workspace};
  rows = reinterpret_cast<int*>(take(slots));
  ada = take(static_cast<int64_t>(batch) * 12 * d);
  for (float** at : {&x, &residual, &hidden}) *at = take(matrix);
  parts = take(0);
  const int64_t end = take.bytes + 4 * unit_blocks * matrix;
  for (float** at : {&normal, &query, &key, &value}) *at = take(matrix);
  sums = take(splits * matrix);
  scales = reinterpret_cast<float2*>(take(splits * slots * heads * 2));
  bytes = std::max(take.bytes, end);
}

}  // namespace unmask::cuda
