// What the kernels of policy_forward hand to each other, where it lies in the workspace, and how much a block keeps in
// shared memory.
//
// Rows are worked on in tiles of 16 of one sequence. Two kinds of them are counted: positions, 16 by 16 in each sequence
// (L rounded up to full tiles), and slots, the positions that need a logit, close together over the whole batch.
#pragma once
#include "../ops/policy_forward.h"
#include "policy_tile.cuh"

namespace unmask {
namespace cuda {

constexpr int kBeginThreads = 512;
constexpr int kTileThreads = 256;
constexpr int kMixThreads = 32 * kTileRows;  // a warp for each row
constexpr int kOutputThreads = 128;
constexpr int kGroup = 8;           // sequences conditioned together: with two masks the rows of a product
constexpr int kColumns = 64;        // of queries, keys or values that a block computes
constexpr int kMaxSplits = 8;       // blocks that share the keys of a query
constexpr int kMaxPairs = 128;      // channel pairs of a head
constexpr int kMaxRows = 1 << 14;   // positions in one pass: a larger batch takes several
constexpr int kNone = INT32_MIN;    // in `rows`: this slot and all after it are empty
constexpr int kGapOfSums = 4;       // after the sums of a head: their maximum and total, aligned to 16 bytes

struct PolicyWork {
  PolicyForwardParams p;
  PolicyWeightView w;
  int batch, length, d, heads, ffn, k;
  int head;          // channels of a head, and rounded up to a multiple of 16; `width`: of all heads
  int padded, width;
  int padded_length, tiles;  // positions of a sequence; tiles of positions: also the most tiles of slots
  int units, unit_tiles;     // feed-forward units of a block, and blocks that have them all
  int keys, splits;          // keys that a block takes at a time, and blocks that share the keys
  int shares;                // blocks that share the conditioning of a group
  bool stage_time, stage_out;  // whether these matrices are copied to shared memory

  // In the workspace; float32 but for rows.
  int* rows;        // (slots) position in the batch; ~position where it fills up a tile, whose result is not written
  float* ada;       // (B, 2, 6 D) for mask 0 and 1: gamma1, beta1, alpha1, gamma2, beta2, alpha2
  float* x;         // (B L, D) the embedded inputs
  float* residual;  // (slots, D) x after attention
  float* hidden;    // (slots, D) the feed-forward's input
  float* normal;    // (B L, D) LN1(x), before ada
  float* query;     // (slots, width), rotated, scaled to units of log 2
  float* key;       // (positions, width), rotated
  float* value;     // (B, width, positions of a sequence)
  float* sums;      // (slots, heads, splits, padded + kGapOfSums): values weighted by exp2(score - maximum); maximum; total
  float* parts;     // (unit_tiles, slots, D) of the feed-forward's output; over what attention needed
  float rotary[kMaxPairs];  // radians per position

  // Element 0 of one of the six parts of ada for a position in the batch.
  UNMASK_DEVICE const float* modulation(int position, int part) const {
    return ada + ((position / length * 2 + (p.mask[position] != 0)) * 6 + part) * d;
  }
  UNMASK_DEVICE int position_of(int slot) const { return rows[slot] < 0 ? ~rows[slot] : rows[slot]; }
};

// Bytes of shared memory that the kernels need.
inline int begin_bytes(const PolicyWork& s) {
  const int condition = (2 * kTileRows + (s.stage_time ? 2 * s.d : 0)) * row_stride(s.d), input = s.d * (s.k | 1);
  return 4 * (condition > input ? condition : input);
}
inline int project_bytes(const PolicyWork& s) { return 4 * ((kTileRows + kColumns) * row_stride(s.d) + kColumns); }
inline int attend_bytes(const PolicyWork& s) {
  return 4 * ((kTileRows + s.keys) * row_stride(s.padded) + (s.padded + kTileRows) * row_stride(s.keys) + kTileRows);
}
inline int mix_bytes(const PolicyWork& s) { return 4 * (2 * kTileRows + (s.stage_out ? s.d : 0)) * row_stride(s.d); }
inline int feed_forward_bytes(const PolicyWork& s) {
  return 4 * ((kTileRows + s.units) * row_stride(s.d) + (kTileRows + s.d) * row_stride(s.units) + s.units);
}

// Sizes of tiles: the largest that fit the device. What is computed depends on nothing else of it, nor on the batch.
inline PolicyWork plan_policy(const PolicyForwardParams& params, const DeviceInfo& device) {
  PolicyWork s{params, PolicyWeightView(params.weights, params.sizes)};
  s.batch = static_cast<int>(params.batch);
  s.length = static_cast<int>(params.length);
  s.d = static_cast<int>(params.sizes.hidden);
  s.heads = static_cast<int>(params.sizes.heads);
  s.ffn = static_cast<int>(params.sizes.ffn);
  s.k = static_cast<int>(params.sizes.confidences);
  s.head = s.d / s.heads;
  s.padded = (s.head + 15) / 16 * 16;
  s.width = s.heads * s.padded;
  s.padded_length = (s.length + kTileRows - 1) / kTileRows * kTileRows;
  s.tiles = s.batch * (s.padded_length / kTileRows);
  for (s.units = 64; feed_forward_bytes(s) > device.shared_bytes; s.units /= 2) {}
  s.unit_tiles = (s.ffn + s.units - 1) / s.units;
  for (s.keys = 64; attend_bytes(s) > device.shared_bytes; s.keys /= 2) {}
  const int key_tiles = (s.padded_length + s.keys - 1) / s.keys;
  s.splits = key_tiles < kMaxSplits ? key_tiles : kMaxSplits;
  const int groups = (s.batch + kGroup - 1) / kGroup, most = 6 * s.d / 16;
  s.shares = device.multiprocessors / groups < 1 ? 1 : device.multiprocessors / groups;
  if (s.shares > most) s.shares = most;
  // Copies hide the time that loads take, and cost the room for other blocks.
  s.stage_time = groups == 1;
  s.stage_time = s.stage_time && begin_bytes(s) <= device.shared_bytes;
  s.stage_out = true;
  s.stage_out = mix_bytes(s) <= device.shared_bytes;
  for (int i = 0; i < s.head / 2; ++i) {
    s.rotary[i] = static_cast<float>(pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(s.head)));
  }
  return s;
}

// Sets the pointers into the workspace; returns its bytes. With a null workspace it only counts.
inline int64_t lay_out(PolicyWork* s, void* workspace) {
  const int64_t slots = static_cast<int64_t>(s->tiles) * kTileRows, rows = static_cast<int64_t>(s->batch) * s->length;
  float* base = static_cast<float*>(workspace);
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* at = base ? base + used : nullptr;
    used += (floats + 31) / 32 * 32;
    return at;
  };
  s->rows = reinterpret_cast<int*>(take(slots));
  s->ada = take(s->batch * 12 * s->d);
  s->x = take(rows * s->d);
  s->residual = take(slots * s->d);
  s->hidden = take(slots * s->d);
  const int64_t attention = used;
  s->normal = take(rows * s->d);
  s->query = take(slots * s->width);
  s->key = take(slots * s->width);
  s->value = take(slots * s->width);
  s->sums = take(slots * s->heads * s->splits * (s->padded + kGapOfSums));
  const int64_t end = used;
  used = attention;
  s->parts = take(s->unit_tiles * slots * s->d);
  return 4 * (used > end ? used : end);
}

}  // namespace cuda
}  // namespace unmask
