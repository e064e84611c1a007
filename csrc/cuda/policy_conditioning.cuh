// First part of policy_forward: from time, masks and weights to what attention needs of every position.
#pragma once
#include "policy_math.cuh"

namespace unmask {
namespace cuda {

// A block's view of its sequence.
struct PolicyBlock {
  const PolicyWork& work;
  float* shared;
  int rank, team;  // of the blocks that share the sequence
  int64_t sequence;
  int d, heads, head_size, padded, k;  // D, H, D / H, that padded, K
  int count;                           // selected positions

  // The selected positions in order: the block's own list in the workspace.
  UNMASK_DEVICE int* selected() const { return work.selected + (sequence * team + rank) * work.params.length; }
  UNMASK_DEVICE float* at(int offset) const { return shared + offset; }
  UNMASK_DEVICE const float* weight(int offset) const { return work.params.weights + offset; }
  UNMASK_DEVICE bool masked(int64_t i) const { return work.params.mask[sequence * work.params.length + i] != 0; }
  UNMASK_DEVICE const float* confidence(int64_t i) const {
    return work.params.confidence + (sequence * work.params.length + i) * k;
  }
  // This block's share of n things.
  UNMASK_DEVICE int share(int n) const { return n * rank / team; }
  UNMASK_DEVICE int share_end(int n) const { return n * (rank + 1) / team; }

  // Writes to the same place in every block of the team; called by four lanes with sub = 0..3.
  UNMASK_DEVICE void publish(int offset, float value, int sub) const {
#pragma unroll 1
    for (int to = sub; to < team; to += 4) *cluster_map(shared + offset, static_cast<unsigned>(to)) = value;
  }
  UNMASK_DEVICE void sync() const {
    cluster_arrive();
    cluster_wait();
  }
  // Element of confidence_proj(confidence[i]) without its bias.
  UNMASK_DEVICE float project(const float* values, int channel) const {
    const int projection = work.shared.projection;
    const float* w = projection >= 0 ? at(projection) + channel : weight(work.offset.confidence) + channel * k;
    const int stride = projection >= 0 ? d : 1;
    float sum = 0.0f;
    for (int j = 0; j < k; ++j) sum = fmaf(values[j], w[j * stride], sum);
    return sum;
  }
  // By a warp: the same for channel lane + 32 e, to x[e].
  UNMASK_DEVICE void project(const float* values, float (&x)[kPerLane]) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const bool staged = work.shared.projection >= 0;
    const float* w = staged ? at(work.shared.projection) : weight(work.offset.confidence);
    const int by_channel = staged ? 1 : k, by_value = staged ? d : 1;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) x[e] = 0.0f;
#pragma unroll 1
    for (int j = 0; j < k; ++j) {
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        const int channel = lane + 32 * e;
        if (channel < d) x[e] = fmaf(values[j], w[channel * by_channel + j * by_value], x[e]);
      }
    }
  }
  UNMASK_DEVICE float x(const float* values, int channel) const {
    return project(values, channel) + weight(work.offset.confidence + d * k)[channel];
  }
};

// Rows [begin, end) of linear1 that this block owns: multiples of 4, so that copies of 16 bytes are aligned.
UNMASK_DEVICE int unit_share(const PolicyBlock& s, int rank) {
  return static_cast<int>(s.work.params.sizes.ffn) / 4 * rank / s.team * 4;
}

// Weights start to travel now: all of them to L2, each block a share, and linear1 and linear2 to shared memory.
UNMASK_DEVICE void start_copies(const PolicyBlock& s) {
  const PolicyShared& m = s.work.shared;
  const PolicyOffsets& o = s.work.offset;
  const int thread = static_cast<int>(threadIdx.x), d = s.d, f = static_cast<int>(s.work.params.sizes.ffn);
  const int begin = unit_share(s, s.rank), units = unit_share(s, s.rank + 1) - begin;
  constexpr int kLine = 32;  // floats
#pragma unroll 1
  for (int line = s.share(o.output / kLine) + thread; line < s.share_end(o.output / kLine); line += kPolicyThreads) {
    prefetch_l2(s.weight(line * kLine));
  }
  if (m.linear1 >= 0) {
    // A warp takes a row at a time: dividing by the width would take longer than the copy.
    const int warp = thread / 32, lane = thread % 32, stride = (f / 4 + s.team - 1) / s.team * 4 + 4;
#pragma unroll 1
    for (int row = warp; row < units; row += kPolicyWarps) {
#pragma unroll 1
      for (int column = 4 * lane; column < d; column += 128) {
        copy_async(s.at(m.linear1) + row * (d + 4) + column, s.weight(o.linear1) + (begin + row) * d + column);
      }
    }
#pragma unroll 1
    for (int row = warp; row < d; row += kPolicyWarps) {
#pragma unroll 1
      for (int column = 4 * lane; column < units; column += 128) {
        copy_async(s.at(m.linear2) + row * stride + column, s.weight(o.linear2) + row * f + begin + column);
      }
    }
  }
  commit_copies();
}

// The positions that need a logit, in order, to the block's own list in the workspace; -inf to the other logits.
UNMASK_DEVICE int list_selected(const PolicyBlock& s) {
  const PolicyForwardParams& p = s.work.params;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int* counts = reinterpret_cast<int*>(s.at(s.work.shared.weights));  // not in use yet
  int total = 0;
#pragma unroll 1
  for (int64_t base = 0; base < p.length; base += kPolicyThreads) {
    const int64_t i = base + thread;
    const bool inside = i < p.length, wanted = inside && (!p.select || p.select[s.sequence * p.length + i]);
    const unsigned ballot = __ballot_sync(kFullWarp, wanted);
    if (lane == 0) counts[warp] = __popc(ballot);
    __syncthreads();
    int before = total;
    for (int w = 0; w < kPolicyWarps; ++w) {
      if (w < warp) before += counts[w];
      total += counts[w];
    }
    if (wanted) s.selected()[before + __popc(ballot & ((1u << lane) - 1))] = static_cast<int>(i);
    if (inside && !wanted && s.rank == 0) p.logits[s.sequence * p.length + i] = -INFINITY;
    __syncthreads();
  }
  return total;
}

// Time embedding and confidence_proj to shared memory, and zeros wherever only parts will be written.
UNMASK_DEVICE void prepare(const PolicyBlock& s) {
  const PolicyShared& m = s.work.shared;
  const int thread = static_cast<int>(threadIdx.x), d = s.d;
  const float time = s.work.params.time[s.sequence];
#pragma unroll 1
  for (int i = thread; i < d / 2; i += kPolicyThreads) {
    const Angle a = angle_of(static_cast<double>(time) * s.weight(s.work.offset.frequencies)[i]);
    s.at(m.embedding)[i] = a.cos;
    s.at(m.embedding)[d / 2 + i] = a.sin;
  }
  if (m.projection >= 0) {
#pragma unroll 1
    for (int i = thread; i < (s.k + 1) * d; i += kPolicyThreads) {
      const int j = i / d, channel = i % d;
      s.at(m.projection)[i] = s.weight(s.work.offset.confidence)[j < s.k ? channel * s.k + j : d * s.k + channel];
    }
  }
  if (s.work.basis) {  // queries, keys, values and mix follow one another
#pragma unroll 1
    for (int i = m.queries + thread; i < m.query_coefs; i += kPolicyThreads) s.shared[i] = 0.0f;
  }
}

UNMASK_DEVICE void column_means(const PolicyBlock& s) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
  for (int j = warp; j <= s.k; j += kPolicyWarps) {
    float sum = 0.0f;
    for (int i = lane; i < s.d; i += 32) sum += s.at(s.work.shared.projection)[j * s.d + i];
    sum = warp_sum(sum);
    if (lane == 0) s.at(s.work.shared.means)[j] = sum / static_cast<float>(s.d);
  }
}

// cond and ada(cond) for mask 0 and 1, in every block's shared memory. Each block computes a share of every layer.
UNMASK_DEVICE void condition(const PolicyBlock& s) {
  const PolicyShared& m = s.work.shared;
  const PolicyOffsets& o = s.work.offset;
  const int d = s.d;
  dots(s.share(d), s.share_end(d), d, s.at(m.embedding), 1, [&](int r) { return s.weight(o.time0) + r * d; },
       [&](int r, int, float sum, int sub) {
         const float x = sum + s.weight(o.time0 + d * d)[r];
         s.publish(m.hidden + r, x / (1.0f + expf(-x)), sub);
       });
  s.sync();
  const float* extra = s.work.params.cond ? s.work.params.cond + s.sequence * d : nullptr;
  dots(s.share(d), s.share_end(d), d, s.at(m.hidden), 1, [&](int r) { return s.weight(o.time2) + r * d; },
       [&](int r, int, float sum, int sub) {
         const float x = sum + s.weight(o.time2 + d * d)[r] + (extra ? extra[r] : 0.0f);
         for (int mask = 0; mask < 2; ++mask) {
           s.publish(m.cond + mask * d + r, x + s.weight(o.mask_embedding)[mask * d + r], sub);
         }
       });
  s.sync();
  dots(s.share(6 * d), s.share_end(6 * d), d, s.at(m.cond), 2, [&](int r) { return s.weight(o.ada) + r * d; },
       [&](int r, int mask, float sum, int sub) {
         s.publish(m.ada + mask * 6 * d + r, sum + s.weight(o.ada + 6 * d * d)[r], sub);
       });
  s.sync();
}

// Part `part` (0..5: gamma1, beta1, alpha1, gamma2, beta2, alpha2) of ada(cond) for positions with this mask.
UNMASK_DEVICE const float* modulation(const PolicyBlock& s, bool masked, int part) {
  return s.at(s.work.shared.ada) + (masked ? 6 : 0) * s.d + part * s.d;
}

// With x_i = W c + b, LN1 scales (x_i - mean) by one factor r_i, so h_i is a sum of K + 2 vectors that depend on the
// mask only: coefficients r_i c_ij, r_i and 1. Queries, keys and values are sums of those vectors' projections.
UNMASK_DEVICE void project_basis(const PolicyBlock& s) {
  const PolicyShared& m = s.work.shared;
  const PolicyOffsets& o = s.work.offset;
  const int d = s.d, half = s.k + 2, basis = 2 * half;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < basis * d; i += kPolicyThreads) {
    const int c = i / d % half, channel = i % d;
    const bool masked = i / d >= half;
    const float scale = 1.0f + modulation(s, masked, 0)[channel];
    const float* norm = s.weight(o.norm1);
    s.at(m.basis)[i] =
        c <= s.k ? (s.at(m.projection)[c * d + channel] - s.at(m.means)[c]) * norm[channel] * scale
                 : fmaf(norm[d + channel], scale, modulation(s, masked, 1)[channel]);
  }
  __syncthreads();
  const auto row_of = [&](int r) {
    return s.weight(r < d ? o.query : r < 2 * d ? o.key - d * d : o.value - 2 * d * d) + static_cast<int64_t>(r) * d;
  };
  dots(s.share(3 * d), s.share_end(3 * d), d, s.at(m.basis), basis, row_of, [&](int r, int c, float sum, int sub) {
    const int which = r / d, channel = r % d, head = channel / s.head_size;
    const float bias = s.weight(which == 0 ? o.query : which == 1 ? o.key : o.value)[d * d + channel];
    const float value = c % half == s.k + 1 ? sum + bias : sum;
    const int padded = c * s.heads * s.padded + head * s.padded + channel % s.head_size;
    s.publish(which == 0 ? m.queries + padded : which == 1 ? m.keys + padded : m.values + (head * basis + c) * d + channel,
              value, sub);
  });
  s.sync();
  // Seen by the others after the next sync, in attention.
  dots(s.share(d), s.share_end(d), d, s.at(m.values), s.heads * basis, [&](int r) { return s.weight(o.out) + r * d; },
       [&](int r, int v, float sum, int sub) { s.publish(m.mix + r * (m.mix_width + 4) + v, sum, sub); });
}

// Without the basis: query, key and value of this block's share of the positions, to the workspace.
UNMASK_DEVICE void project_positions(const PolicyBlock& s) {
  const PolicyShared& m = s.work.shared;
  const PolicyOffsets& o = s.work.offset;
  const int d = s.d, warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t length = s.work.params.length;
  const int64_t begin = length * s.rank / s.team, end = length * (s.rank + 1) / s.team;
  float* h = s.at(m.h2);
  for (int64_t first = begin; first < end; first += m.rows) {
    const int rows = static_cast<int>(end - first < m.rows ? end - first : m.rows);
#pragma unroll 1
    for (int row = warp; row < rows; row += kPolicyWarps) {
      float x[kPerLane];
      s.project(s.confidence(first + row), x);
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        if (lane + 32 * e < d) x[e] += s.weight(o.confidence + d * s.k)[lane + 32 * e];
      }
      normalise(x, d);
      const bool masked = s.masked(first + row);
      for (int e = 0; e < kPerLane; ++e) {
        const int channel = lane + 32 * e;
        if (channel >= d) continue;
        const float normal = fmaf(x[e], s.weight(o.norm1)[channel], s.weight(o.norm1)[d + channel]);
        h[row * (d + 4) + channel] =
            fmaf(normal, 1.0f + modulation(s, masked, 0)[channel], modulation(s, masked, 1)[channel]);
      }
    }
    __syncthreads();
    for (int which = 0; which < 3; ++which) {
      const int from = which == 0 ? o.query : which == 1 ? o.key : o.value;
      product(h, d + 4, rows, s.weight(from), d, d, d, s.at(m.scratch), m.scratch_floats,
              [&](int row, int channel, float sum) {
                float* out = s.work.projected + ((s.sequence * length + first + row) * 3 + which) * d;
                out[channel] = sum + s.weight(from + d * d)[channel];
              });
      __syncthreads();
    }
  }
  s.sync();
}

}  // namespace cuda
}  // namespace unmask
