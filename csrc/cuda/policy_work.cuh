// What the stages of policy_forward hand to each other, and how their work is cut.
//
// Rows are positions, those of a sequence filled up to tiles of 16; the last position fills up. A tile without a position
// that needs a logit gives keys and values and nothing else.
#pragma once
#include <algorithm>

#include "../ops/policy_forward.h"
#include "policy_tile.cuh"

namespace unmask::cuda {

constexpr int kGroup = 8;               // sequences conditioned together: with two masks the rows of a product
constexpr int kColumns = 64;            // of queries, keys or values that a block computes
constexpr int kMaxSplits = 8;           // blocks that share the keys of a query
constexpr int kMaxPositions = 1 << 14;  // in one pass, and so in the workspace; a larger batch takes several

// A pass over some sequences of a batch.
struct PolicyWork : AttentionShape {
  PolicyForwardParams p;
  PolicyWeightView w;
  int batch, ffn, k;
  int tiles;
  int splits;              // blocks that share the keys
  int units, unit_blocks;  // feed-forward units of a block; blocks that share the units
  uint64_t launch = 0;
  int groups, shares;  // groups of sequences; blocks that share the conditioning of one

  // In the workspace.
  unsigned long long* meeting;
  float* ada;      // (B, 2, 6 D) for mask 0 and 1: gamma1, beta1, alpha1, gamma2, beta2, alpha2
  float* x;        // (rows, D) the embedded inputs, then x after attention
  float* hidden;   // (rows, D) the feed-forward's input
  float* normal;   // (rows, D) LN1(x), before ada
  float* query;    // (rows, D), rotated, scaled to units of log 2
  float* key;      // (rows, D), rotated
  float* value;    // (B, D, rows of a sequence)
  float* sums;     // (splits, rows, D) values weighted by exp2(score - maximum)
  float2* scales;  // (splits, rows, heads) that maximum, and the sum of the weights
  float* parts;    // (unit_blocks, rows, D) of the feed-forward's output; where the attention's memory was
  int64_t bytes;   // of the workspace

  // Over sequences from `first` on: at most kMaxPositions positions, or one sequence. Sizes that results depend on
  // follow from network and length alone. Without a workspace it only says how many bytes one must have.
  PolicyWork(const PolicyForwardParams& params, int64_t first, const DeviceInfo& device, void* workspace);

  int most_tasks() const {
    const int parts = std::max({3 * ceil_div(d, kColumns), heads * splits, unit_blocks});
    return std::max(groups * shares + tiles, parts * tiles);
  }
  // Of the stage that needs most.
  int shared_bytes() const {
    const int stride = row_stride(d), project = (kRows + kColumns) * stride + kColumns;
    const int mix = (2 * kRows + (d <= kMostStaged ? d : 0)) * stride;
    const int feed_forward = (kRows + units) * stride + (kRows + d) * row_stride(units) + units;
    return 4 * std::max({project, floats(), mix, feed_forward});
  }

  UNMASK_DEVICE int64_t position(int row) const {
    return static_cast<int64_t>(row / padded) * length + min(row % padded, length - 1);
  }
  UNMASK_DEVICE bool is_wanted(int row) const { return !p.select || p.select[position(row)] != 0; }
  UNMASK_DEVICE bool is_needed(int tile) const {
    return __any_sync(kFullWarp, is_wanted(tile * kRows + lane_id() % kRows)) != 0;
  }
  // Where a row finds one of the six parts of ada.
  UNMASK_DEVICE const float* modulation(int row, int part) const {
    return ada + ((row / padded * 2 + (p.mask[position(row)] != 0)) * 6 + part) * d;
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

  const int64_t rows = static_cast<int64_t>(tiles) * kRows, matrix = rows * d;
  Pieces take{workspace};
  meeting = reinterpret_cast<unsigned long long*>(take(2));
  ada = take(static_cast<int64_t>(batch) * 12 * d);
  for (float** at : {&x, &hidden}) *at = take(matrix);
  parts = take(0);
  const int64_t end = take.bytes + 4 * unit_blocks * matrix;
  for (float** at : {&normal, &query, &key, &value}) *at = take(matrix);
  sums = take(splits * matrix);
  scales = reinterpret_cast<float2*>(take(splits * rows * heads * 2));
  bytes = std::max(take.bytes, end);
}

}  // namespace unmask::cuda
