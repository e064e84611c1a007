// What policy_forward's launch is made of: where weights are in the packed buffer, what a block keeps in shared memory,
// how many blocks share a sequence.
#pragma once
#include "../ops/policy_forward.h"
#include "portable.cuh"

namespace unmask {
namespace cuda {

constexpr int kPolicyThreads = 512;
constexpr int kPolicyWarps = kPolicyThreads / 32;
constexpr int kHeadGroup = 2;         // heads whose attention weights are in shared memory at a time
constexpr int kHidden = 64;           // feed-forward units of a block in one go
constexpr int kMaxTeam = 8;         // blocks of the largest portable cluster
constexpr int kMaxPairs = 128;        // channel pairs of a head
constexpr int kMaxBasisConfidences = 8;
constexpr int kMaxBasisFloats = 8192;  // (heads * basis size) * D

// Offsets in floats of the parts of the packed weights (csrc/ops/policy_forward.h).
struct PolicyOffsets {
  int frequencies, mask_embedding, time0, time2, confidence, norm1, ada, query, key, value, out, norm2, linear1, linear2,
      final_norm, output;
};

inline PolicyOffsets policy_offsets(const PolicySizes& s) {
  const int d = static_cast<int>(s.hidden), f = static_cast<int>(s.ffn), k = static_cast<int>(s.confidences);
  PolicyOffsets o;
  o.frequencies = 0;
  o.mask_embedding = d / 2;
  o.time0 = o.mask_embedding + 2 * d;
  o.time2 = o.time0 + d * d + d;
  o.confidence = o.time2 + d * d + d;
  o.norm1 = o.confidence + d * k + d;
  o.ada = o.norm1 + 2 * d;
  o.query = o.ada + 6 * (d * d + d);
  o.key = o.query + d * d + d;
  o.value = o.key + d * d + d;
  o.out = o.value + d * d + d;
  o.norm2 = o.out + d * d + d;
  o.linear1 = o.norm2 + 2 * d;
  o.linear2 = o.linear1 + f * d + f;
  o.final_norm = o.linear2 + d * f + d;
  o.output = o.final_norm + 2 * d;
  return o;
}

// Shared memory of a block: offsets in floats. Sizes in brackets; D hidden, H heads, K confidences, R rows of a chunk,
// N keys of a tile, T blocks of the team, C = 2 (K + 2) basis vectors, E = entries of an attention sum per head (C, or D / H without
// the basis), P = H heads of D / H padded to a multiple of 4.
struct PolicyShared {
  int embedding;   // [D] time embedding, then the time MLP's hidden layer
  int hidden;      // [D]
  int cond;        // [2][D]
  int ada;         // [2][6D]
  int projection;  // [K + 1][D] confidence_proj, columns first, then its bias; -1: read from global memory
  int means;       // [K + 1] of those rows
  int basis;       // [C][D] what h = LN1(x) * (1 + gamma1) + beta1 is made of, for mask 0 and 1
  int queries;     // [C][P] Wq basis
  int keys;        // [C][P] Wk basis
  int values;      // [H * C][D] Wv basis, one head each and zero elsewhere
  int mix;         // [D][HE + 4] Wo values: what an attention sum's entries contribute to the output
  int query_coefs, key_coefs;  // [R][K + 2], [N][K + 2]
  int query_mask, key_mask;    // [R], [N] int
  int query_rows;  // [R][P]
  int key_rows;    // [N][P + 4]
  int value_rows;  // [E + 1 or D + 1][N + 4]: entries of an attention sum by key; the last row is ones
  int weights;     // [kHeadGroup][R][N + 4] attention weights
  int rescale;     // [kHeadGroup][R]
  int maxima;      // [R][H]
  int sums;        // [R][H][E + 1]
  int mixed;       // [ceil(R / T)][HE] a row's attention sums, combined over the team
  int x1;          // [ceil(R / T)][D] the residual stream after attention
  int h2;          // [R][D + 4] input of the feed-forward layers; without the basis also of the projections
  int units;       // [R][kHidden + 4] its hidden units
  int out;         // [R][D] the block's part of its output
  int scratch;     // [scratch_floats] partial sums of products; may lie over query_rows and key_rows
  int linear1;     // [F / T][D + 4] the block's rows of linear1, or -1
  int linear2;     // [D][F / T + 4] and its columns of linear2
  int total;

  int rows;            // R
  int tile;            // N: at most 32, one key per lane
  int scratch_floats;
  int entries;         // E
  int head_stride;     // of value_rows between heads, in rows: 0 with the basis
  int mix_width;       // HE, a multiple of 4
  bool keep_keys;      // one tile of keys, not overwritten by scratch: built once
};

struct PolicyWork {
  PolicyForwardParams params;
  PolicyOffsets offset;
  PolicyShared shared;
  int team;               // T: blocks of a sequence
  bool basis;
  int* selected;          // (B, T, L) in the workspace
  float* projected;       // (B, L, 3, D) in the workspace, without the basis: query, key, value
  float rotary[kMaxPairs];  // radians per position
};

inline int padded_head(const PolicySizes& s) { return static_cast<int>((s.hidden / s.heads + 3) / 4 * 4); }

// Whether queries, keys and values are made from the basis: if it is small.
inline bool basis_pays(const PolicySizes& s) {
  const int64_t width = (s.heads * 2 * (s.confidences + 2) + 3) / 4 * 4;
  return s.confidences <= kMaxBasisConfidences && width <= s.hidden && width * s.hidden <= kMaxBasisFloats;
}

// What the layout may do without when memory is short.
struct PolicyFit {
  int rows, tile;
  bool stage_linear, own_scratch, stage_projection;
};

inline PolicyShared policy_shared(const PolicySizes& s, int64_t length, int team, bool basis,
                                  const PolicyFit& fit) {
  const int d = static_cast<int>(s.hidden), f = static_cast<int>(s.ffn), k = static_cast<int>(s.confidences);
  const int heads = static_cast<int>(s.heads), p = heads * padded_head(s);
  const int c = basis ? 2 * (k + 2) : 0, r = fit.rows, n = fit.tile, owned = (r + team - 1) / team;
  PolicyShared m = {};
  int at = 0;
  const auto take = [&at](int floats) {
    const int offset = at;
    at += (floats + 3) / 4 * 4;
    return offset;
  };
  m.rows = r;
  m.tile = n;
  m.entries = basis ? c : d / heads;
  m.head_stride = basis ? 0 : d / heads;
  m.mix_width = (heads * m.entries + 3) / 4 * 4;
  m.embedding = take(d);
  m.hidden = take(d);
  m.cond = take(2 * d);
  m.ada = take(12 * d);
  m.projection = basis || fit.stage_projection ? take((k + 1) * d) : -1;
  m.means = take(k + 1);
  m.basis = take(c * d);
  m.queries = take(c * p);
  m.keys = take(c * p);
  m.values = basis ? take(heads * c * d) : 0;
  m.mix = basis ? take(d * (m.mix_width + 4)) : 0;
  m.query_coefs = take(r * (k + 2));
  m.key_coefs = take(n * (k + 2));
  m.query_mask = take(r);
  m.key_mask = take(n);
  m.value_rows = take(((basis ? c : d) + 1) * (n + 4));
  m.weights = take(kHeadGroup * r * (n + 4));
  m.rescale = take(kHeadGroup * r);
  m.maxima = take(r * heads);
  m.sums = take(r * heads * (m.entries + 1));
  m.mixed = take(owned * m.mix_width);
  m.x1 = take(owned * d);
  m.h2 = take(r * (d + 4));
  m.units = take(r * (kHidden + 4));
  m.out = take(r * d);
  m.query_rows = take(r * p);
  m.key_rows = take(n * (p + 4));
  m.scratch = m.query_rows;
  m.scratch_floats = at - m.query_rows;
  if (fit.own_scratch) {
    m.scratch_floats = r * (d > 4 * kHidden ? d : 4 * kHidden);
    m.scratch = take(m.scratch_floats);
    m.keep_keys = (length + team - 1) / team <= n;
  }
  const int units = ((f / 4 + team - 1) / team) * 4;
  m.linear1 = fit.stage_linear ? take(units * (d + 4)) : -1;
  m.linear2 = fit.stage_linear ? take(d * (units + 4)) : -1;
  m.total = at;
  return m;
}

// Fills in the layout for a team of `team` blocks; false if not even the smallest one fits.
inline bool lay_out(const PolicyForwardParams& params, const DeviceInfo& device, int team, PolicyWork* work) {
  work->team = team;
  static const PolicyFit kFits[] = {
      {32, 32, true, true, true},    {32, 32, true, false, true},   {32, 32, false, true, true},
      {32, 32, false, false, true},  {16, 32, false, false, true},  {32, 32, false, false, false},
      {16, 32, false, false, false}, {8, 32, false, false, false},  {8, 16, false, false, false},
      {4, 16, false, false, false},  {4, 8, false, false, false},
  };
  constexpr int kGood = 5;  // with less than these the basis does not pay any more
  const int count = static_cast<int>(sizeof(kFits) / sizeof(kFits[0]));
  for (int i = basis_pays(params.sizes) ? -kGood : 0; i < count; ++i) {
    work->basis = i < 0;
    const PolicyFit& fit = kFits[i < 0 ? i + kGood : i];
    work->shared = policy_shared(params.sizes, params.length, team, work->basis, fit);
    if (work->shared.total * static_cast<int>(sizeof(float)) <= device.shared_bytes) return true;
  }
  return false;
}

}  // namespace cuda
}  // namespace unmask
