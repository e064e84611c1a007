// Second part of policy_forward: attention, from what the first part left to the feed-forward layers' input.
#pragma once
#include <math.h>

#include "policy_conditioning.cuh"

namespace unmask {
namespace cuda {

constexpr float kLog2OfE = 1.4426950408889634f;

// Row slot i of the chunk belongs to block i % team, as its row i / team.
UNMASK_DEVICE int owned_rows(const PolicyBlock& s, int rows) { return (rows - s.rank + s.team - 1) / s.team; }

// Keys [first_key(rank), first_key(rank + 1)) are a block's share; it takes them in tiles.
UNMASK_DEVICE int64_t first_key(const PolicyBlock& s, int rank) { return s.work.params.length * rank / s.team; }
UNMASK_DEVICE int tile_size(const PolicyBlock& s, int64_t first) {
  const int64_t left = first_key(s, s.rank + 1) - first;
  return static_cast<int>(left < s.work.shared.tile ? left : s.work.shared.tile);
}

// By a warp: the coefficients of h at a position in the basis, and its mask.
UNMASK_DEVICE void basis_coefs(const PolicyBlock& s, int64_t position, float* coefs, int* mask) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const float* confidence = s.confidence(position);
  float x[kPerLane];
  s.project(confidence, x);
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    const int channel = lane + 32 * e;
    if (channel < s.d) x[e] += s.at(s.work.shared.projection)[s.k * s.d + channel];
  }
  const float factor = normalise(x, s.d);
#pragma unroll 1
  for (int j = lane; j < s.k + 2; j += 32) coefs[j] = j < s.k ? confidence[j] * factor : j == s.k ? factor : 1.0f;
  if (lane == 0) *mask = s.masked(position) ? 1 : 0;
}

// Queries (which = 0) or keys (1) of some positions, rotated and scaled, one per row of `out`.
template <bool kBasis, typename PositionOf>
UNMASK_DEVICE void build_rows(const PolicyBlock& s, int which, int count, PositionOf position, const float* coefs,
                              const int* masks, float scale, float* out, int stride) {
  const PolicyShared& m = s.work.shared;
  const int pairs = s.padded / 2, half = s.k + 2, width = s.heads * s.padded;
#pragma unroll 1
  for (int task = static_cast<int>(threadIdx.x); task < count * pairs; task += kPolicyThreads) {
    const int i = task / pairs, pair = task % pairs;
    const bool inside = 2 * pair < s.head_size;
    Angle a{0.0f, 0.0f};
    if (inside) a = angle_of(static_cast<double>(position(i)) * static_cast<double>(s.work.rotary[pair]));
#pragma unroll 1
    for (int head = 0; head < s.heads; ++head) {
      float even = 0.0f, odd = 0.0f;
      if (kBasis) {
        const float* basis = s.at(which == 0 ? m.queries : m.keys) + masks[i] * half * width + head * s.padded + 2 * pair;
        for (int c = 0; c < half; ++c) {
          even = fmaf(coefs[i * half + c], basis[c * width], even);
          odd = fmaf(coefs[i * half + c], basis[c * width + 1], odd);
        }
      } else if (inside) {
        const float* row = s.work.projected + ((s.sequence * s.work.params.length + position(i)) * 3 + which) * s.d;
        even = row[head * s.head_size + 2 * pair];
        odd = row[head * s.head_size + 2 * pair + 1];
      }
      float* to = out + i * stride + head * s.padded + 2 * pair;
      to[0] = (even * a.cos - odd * a.sin) * scale;
      to[1] = (even * a.sin + odd * a.cos) * scale;
    }
  }
}

// What each key adds to an attention sum, by key along rows; keys past `count` add zero. The last row is ones.
template <bool kBasis>
UNMASK_DEVICE void build_values(const PolicyBlock& s, int64_t first, int count) {
  const PolicyShared& m = s.work.shared;
  const int rows = kBasis ? m.entries : s.d, half = s.k + 2, tile = m.tile;
  float* values = s.at(m.value_rows);
  const int* masks = reinterpret_cast<const int*>(s.at(m.key_mask));
#pragma unroll 1
  for (int task = static_cast<int>(threadIdx.x); task < (rows + 1) * tile; task += kPolicyThreads) {
    // With the basis neighbours are keys, else channels: they read one row of the workspace.
    const int row = kBasis ? task / tile : task % (rows + 1), key = kBasis ? task % tile : task / (rows + 1);
    float value = 0.0f;
    if (key < count) {
      if (row == rows) {
        value = 1.0f;
      } else if (kBasis) {
        if (masks[key] == row / half) value = s.at(m.key_coefs)[key * half + row % half];
      } else {
        value = s.work.projected[((s.sequence * s.work.params.length + first + key) * 3 + 2) * s.d + row];
      }
    }
    values[row * (tile + 4) + key] = value;
  }
}

// One tile of keys against the chunk's queries, for `group` heads from `head` on: attention weights relative to the
// running maximum, in shared memory. A warp takes four queries; its lanes are the keys.
UNMASK_DEVICE void attention_weights(const PolicyBlock& s, int rows, int head, int group, int keys) {
  const PolicyShared& m = s.work.shared;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int width = s.heads * s.padded, fours = (rows + 3) / 4;
#pragma unroll 1
  for (int task = warp; task < group * fours; task += kPolicyWarps) {
    const int in_group = task / fours, first = task % fours * 4;
    const float* key = s.at(m.key_rows) + (lane < keys ? lane : 0) * (width + 4) + (head + in_group) * s.padded;
    const float* query = s.at(m.query_rows) + first * width + (head + in_group) * s.padded;
    float4 sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int j = 0; j < s.padded; j += 4) {
      const float4 b = load4(key + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // four chains per score: scores may be large, and must be exact
        const float4 a = load4(query + (first + i < rows ? i : 0) * width + j);
        sums[i].x = fmaf(a.x, b.x, sums[i].x);
        sums[i].y = fmaf(a.y, b.y, sums[i].y);
        sums[i].z = fmaf(a.z, b.z, sums[i].z);
        sums[i].w = fmaf(a.w, b.w, sums[i].w);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float score = (sums[i].x + sums[i].y) + (sums[i].z + sums[i].w);
      if (lane >= keys) score = -INFINITY;
      const float top = warp_max(score);
      if (first + i >= rows) continue;
      float* maximum = s.at(m.maxima) + (first + i) * s.heads + head + in_group;
      const float old = *maximum, now = fmaxf(old, top);
      if (lane < m.tile) s.at(m.weights)[(in_group * m.rows + first + i) * (m.tile + 4) + lane] = exp2_fast(score - now);
      __syncwarp();
      if (lane == 0) {
        *maximum = now;
        s.at(m.rescale)[in_group * m.rows + first + i] = exp2_fast(old - now);
      }
    }
  }
}

UNMASK_DEVICE void add_weighted_values(const PolicyBlock& s, int rows, int head, int group) {
  const PolicyShared& m = s.work.shared;
  const int entries = m.entries + 1, per_row = group * entries;
  const int ones = (m.head_stride ? s.d : m.entries);
#pragma unroll 1
  for (int task = static_cast<int>(threadIdx.x); task < rows * per_row; task += kPolicyThreads) {
    const int row = task / per_row, in_group = task % per_row / entries, e = task % entries;
    const float* weights = s.at(m.weights) + (in_group * m.rows + row) * (m.tile + 4);
    const float* values =
        s.at(m.value_rows) + (e < m.entries ? (head + in_group) * m.head_stride + e : ones) * (m.tile + 4);
    float sum = 0.0f;
    for (int j = 0; j < m.tile; j += 4) sum = dot4(load4(weights + j), load4(values + j), sum);
    float* to = s.at(m.sums) + (row * s.heads + head + in_group) * entries + e;
    *to = fmaf(*to, s.at(m.rescale)[in_group * m.rows + row], sum);
  }
}

// What a chunk of rows needs that does not depend on the conditioning: x of the owned rows, in x1; the queries' masks
// and coefficients; and, for the first chunk, the coefficients of the first tile of keys.
template <bool kBasis>
UNMASK_DEVICE void start_chunk(const PolicyBlock& s, int chunk, int rows) {
  const PolicyShared& m = s.work.shared;
  const int half = s.k + 2;
  int* query_mask = reinterpret_cast<int*>(s.at(m.query_mask));
  const auto query = [&](int i) { return static_cast<int64_t>(s.selected()[chunk + i]); };
  if (kBasis) {
    const int64_t begin = first_key(s, s.rank);
    const int keys = chunk == 0 ? tile_size(s, begin) : 0;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x / 32); i < rows + keys; i += kPolicyWarps) {
      const bool is_query = i < rows;
      const int key = i - rows;
      basis_coefs(s, is_query ? query(i) : begin + key,
                  is_query ? s.at(m.query_coefs) + i * half : s.at(m.key_coefs) + key * half,
                  is_query ? query_mask + i : reinterpret_cast<int*>(s.at(m.key_mask)) + key);
    }
  } else {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += kPolicyThreads) query_mask[i] = s.masked(query(i)) ? 1 : 0;
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < owned_rows(s, rows) * s.d; i += kPolicyThreads) {
    s.at(m.x1)[i] = s.x(s.confidence(query(i / s.d * s.team + s.rank)), i % s.d);
  }
}

// The chunk's queries against this block's share of the keys: sums and maxima in shared memory.
template <bool kBasis>
UNMASK_DEVICE void attend(const PolicyBlock& s, int chunk, int rows) {
  const PolicyShared& m = s.work.shared;
  const int thread = static_cast<int>(threadIdx.x), width = s.heads * s.padded;
  const int64_t begin = first_key(s, s.rank), end = first_key(s, s.rank + 1);
  const int* query_mask = reinterpret_cast<const int*>(s.at(m.query_mask));
  int* key_mask = reinterpret_cast<int*>(s.at(m.key_mask));
  const auto query = [&](int i) { return static_cast<int64_t>(s.selected()[chunk + i]); };
#pragma unroll 1
  for (int i = thread; i < rows * s.heads * (m.entries + 1); i += kPolicyThreads) s.at(m.sums)[i] = 0.0f;
#pragma unroll 1
  for (int i = thread; i < rows * s.heads; i += kPolicyThreads) s.at(m.maxima)[i] = -INFINITY;
  // Scores in units of log 2.
  const float scale = kLog2OfE / sqrtf(static_cast<float>(s.head_size));
  build_rows<kBasis>(s, 0, rows, query, s.at(m.query_coefs), query_mask, scale, s.at(m.query_rows), width);
  for (int64_t first = begin; first < end; first += m.tile) {
    const int keys = tile_size(s, first);
    const auto key = [&](int i) { return first + i; };
    if (chunk == 0 || !m.keep_keys) {
      if (kBasis && (chunk != 0 || first != begin)) {
#pragma unroll 1
        for (int i = thread / 32; i < keys; i += kPolicyWarps) {
          basis_coefs(s, key(i), s.at(m.key_coefs) + i * (s.k + 2), key_mask + i);
        }
        __syncthreads();
      }
      build_rows<kBasis>(s, 1, keys, key, s.at(m.key_coefs), key_mask, 1.0f, s.at(m.key_rows), width + 4);
      build_values<kBasis>(s, first, keys);
    }
    __syncthreads();
    for (int head = 0; head < s.heads; head += kHeadGroup) {
      const int group = s.heads - head < kHeadGroup ? s.heads - head : kHeadGroup;
      attention_weights(s, rows, head, group, keys);
      __syncthreads();
      add_weighted_values(s, rows, head, group);
      __syncthreads();
    }
  }
}

// The attention sums of this block's rows over all keys: the team's parts, brought to a common maximum.
UNMASK_DEVICE void combine_attention(const PolicyBlock& s, int rows) {
  const PolicyShared& m = s.work.shared;
  const int owned = owned_rows(s, rows), entries = m.entries;
#pragma unroll 1
  for (int task = static_cast<int>(threadIdx.x); task < owned * m.mix_width; task += kPolicyThreads) {
    const int row = task / m.mix_width, column = task % m.mix_width;
    const int head = column / entries, e = column % entries;
    float value = 0.0f;
    if (head < s.heads) {
      const int at = (row * s.team + s.rank) * s.heads + head;
      float maxima[kMaxTeam], parts[kMaxTeam], totals[kMaxTeam], top = -INFINITY;
#pragma unroll
      for (int t = 0; t < kMaxTeam; ++t) {  // unrolled, so that all these loads are under way together
        maxima[t] = -INFINITY;
        parts[t] = totals[t] = 0.0f;
        if (t >= s.team) continue;
        const float* part = cluster_map(s.at(m.sums) + at * (entries + 1), static_cast<unsigned>(t));
        maxima[t] = *cluster_map(s.at(m.maxima) + at, static_cast<unsigned>(t));
        parts[t] = part[e];
        totals[t] = part[entries];
      }
#pragma unroll
      for (int t = 0; t < kMaxTeam; ++t) top = fmaxf(top, maxima[t]);
      float sum = 0.0f, total = 0.0f;
#pragma unroll
      for (int t = 0; t < kMaxTeam; ++t) {
        const float scale = t < s.team ? exp2_fast(maxima[t] - top) : 0.0f;
        sum = fmaf(scale, parts[t], sum);
        total = fmaf(scale, totals[t], total);
      }
      value = sum / total;
    }
    s.at(m.mixed)[task] = value;
  }
}

// x1 = x + attention * (1 + alpha1) of the owned rows, then h2 of those rows to the whole team.
template <bool kBasis>
UNMASK_DEVICE void finish_attention(const PolicyBlock& s, int rows) {
  const PolicyShared& m = s.work.shared;
  const PolicyOffsets& o = s.work.offset;
  const int d = s.d, owned = owned_rows(s, rows);
  const int* masks = reinterpret_cast<const int*>(s.at(m.query_mask));
  combine_attention(s, rows);
  __syncthreads();
  const float* mix = kBasis ? s.at(m.mix) : s.weight(o.out);
  product(s.at(m.mixed), m.mix_width, owned, mix, kBasis ? m.mix_width + 4 : d, d, m.mix_width, s.at(m.scratch),
          m.scratch_floats, [&](int row, int channel, float sum) {
            const int slot = row * s.team + s.rank;
            const float alpha = modulation(s, masks[slot] != 0, 2)[channel];
            float* x = s.at(m.x1) + row * d + channel;
            *x = fmaf(sum + s.weight(o.out + d * d)[channel], 1.0f + alpha, *x);
          });
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
  for (int row = warp; row < owned; row += kPolicyWarps) {
    const int slot = row * s.team + s.rank;
    const bool masked = masks[slot] != 0;
    float x[kPerLane];
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) x[e] = lane + 32 * e < d ? s.at(m.x1)[row * d + lane + 32 * e] : 0.0f;
    normalise(x, d);
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      const int channel = lane + 32 * e;
      if (channel >= d) continue;
      const float normal = fmaf(x[e], s.weight(o.norm2)[channel], s.weight(o.norm2)[d + channel]);
      const float h = fmaf(normal, 1.0f + modulation(s, masked, 3)[channel], modulation(s, masked, 4)[channel]);
      for (int sub = 0; sub < 4; ++sub) s.publish(m.h2 + slot * (d + 4) + channel, h, sub);
    }
  }
}

}  // namespace cuda
}  // namespace unmask
