// policy_forward on CUDA: one launch. On devices with clusters up to eight blocks share a sequence: each reads its share
// of every weight matrix and of the keys, and owns every eighth of the rows that need a logit; small vectors are
// published to all blocks' shared memory, partial sums are collected from it. Elsewhere one block does it all.
#include <math.h>

#include "policy_attention.cuh"

namespace unmask {
namespace cuda {
namespace {

// This block's feed-forward units: its part of linear2's output for all rows of the chunk.
UNMASK_DEVICE void feed_forward(const PolicyBlock& s, int rows) {
  const PolicyShared& m = s.work.shared;
  const PolicyOffsets& o = s.work.offset;
  const int d = s.d, f = static_cast<int>(s.work.params.sizes.ffn);
  const int begin = unit_share(s, s.rank), units = unit_share(s, s.rank + 1) - begin;
  const bool staged = m.linear1 >= 0;
  const float* linear1 = staged ? s.at(m.linear1) : s.weight(o.linear1) + begin * d;
  const float* linear2 = staged ? s.at(m.linear2) : s.weight(o.linear2) + begin;
  const int stride1 = staged ? d + 4 : d, stride2 = staged ? (f / 4 + s.team - 1) / s.team * 4 + 4 : f;
  if (units == 0) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rows * d; i += kPolicyThreads) s.at(m.out)[i] = 0.0f;
  }
  for (int first = 0; first < units; first += kHidden) {
    const int now = units - first < kHidden ? units - first : kHidden;
    product(s.at(m.h2), d + 4, rows, linear1 + first * stride1, stride1, now, d, s.at(m.scratch), m.scratch_floats,
            [&](int row, int unit, float sum) {
              s.at(m.units)[row * (kHidden + 4) + unit] = gelu(sum + s.weight(o.linear1 + f * d)[begin + first + unit]);
            });
    __syncthreads();
    product(s.at(m.units), kHidden + 4, rows, linear2 + first, stride2, d, now, s.at(m.scratch), m.scratch_floats,
            [&](int row, int channel, float sum) {
              float* to = s.at(m.out) + row * d + channel;
              *to = first == 0 ? sum : *to + sum;
            });
    __syncthreads();
  }
}

// Logits of the owned rows.
UNMASK_DEVICE void finish_rows(const PolicyBlock& s, int chunk, int rows) {
  const PolicyShared& m = s.work.shared;
  const PolicyOffsets& o = s.work.offset;
  const int d = s.d, f = static_cast<int>(s.work.params.sizes.ffn), owned = owned_rows(s, rows);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int* masks = reinterpret_cast<const int*>(s.at(m.query_mask));
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < owned * d; i += kPolicyThreads) {
    const int slot = i / d * s.team + s.rank, channel = i % d;
    float sum = s.weight(o.linear2 + d * f)[channel], parts[kMaxTeam];
#pragma unroll
    for (int t = 0; t < kMaxTeam; ++t) {
      parts[t] = t < s.team ? *cluster_map(s.at(m.out) + slot * d + channel, static_cast<unsigned>(t)) : 0.0f;
    }
#pragma unroll
    for (int t = 0; t < kMaxTeam; ++t) sum += parts[t];
    s.at(m.x1)[i] = fmaf(sum, 1.0f + modulation(s, masks[slot] != 0, 5)[channel], s.at(m.x1)[i]);
  }
  __syncthreads();
#pragma unroll 1
  for (int row = warp; row < owned; row += kPolicyWarps) {
    const int slot = row * s.team + s.rank;
    float x[kPerLane];
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) x[e] = lane + 32 * e < d ? s.at(m.x1)[row * d + lane + 32 * e] : 0.0f;
    normalise(x, d);
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      const int channel = lane + 32 * e;
      if (channel >= d) continue;
      const float normal = fmaf(x[e], s.weight(o.final_norm)[channel], s.weight(o.final_norm)[d + channel]);
      sum = fmaf(normal, s.weight(o.output)[channel], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      s.work.params.logits[s.sequence * s.work.params.length + s.selected()[chunk + slot]] = sum + s.weight(o.output)[d];
    }
  }
}

template <bool kBasis>
__global__ void __launch_bounds__(kPolicyThreads, 1) policy_kernel(const __grid_constant__ PolicyWork work) {
  // The wait before anything is published: by then all blocks have started. It says no more, nothing is written yet.
  cluster_arrive_relaxed();
  const PolicySizes& z = work.params.sizes;
  const int team = work.team, rank = static_cast<int>(blockIdx.x) % team;
  const int64_t sequence = static_cast<int>(blockIdx.x) / team;
  const int head_size = static_cast<int>(z.hidden / z.heads);
  PolicyBlock s{work,
                reinterpret_cast<float*>(dynamic_shared()),
                rank,
                team,
                sequence,
                static_cast<int>(z.hidden),
                static_cast<int>(z.heads),
                head_size,
                (head_size + 3) / 4 * 4,
                static_cast<int>(z.confidences),
                0};
  start_copies(s);
  prepare(s);
  s.count = list_selected(s);
  if (s.count == 0) {  // in every block of the team
    wait_copies<0>();
    return;
  }
  __syncthreads();
  if (kBasis) column_means(s);
  for (int chunk = 0; chunk < s.count; chunk += work.shared.rows) {
    const int rows = s.count - chunk < work.shared.rows ? s.count - chunk : work.shared.rows;
    start_chunk<kBasis>(s, chunk, rows);
    if (chunk == 0) {
      cluster_wait();
      __syncthreads();
      condition(s);
      if (kBasis) {
        project_basis(s);
      } else {
        project_positions(s);
      }
      wait_copies<0>();  // visible to the block after the barriers of attend()
    } else {
      __syncthreads();
    }
    attend<kBasis>(s, chunk, rows);
    s.sync();
    finish_attention<kBasis>(s, rows);
    s.sync();
    feed_forward(s, rows);
    s.sync();
    finish_rows(s, chunk, rows);
    __syncthreads();
  }
  // Nobody leaves while others still read its shared memory. Nothing is written for them any more, and what this block
  // read of theirs was there before the barrier above, in finish_rows() it went into sums.
  cluster_arrive_relaxed();
  cluster_wait();
}

auto kernel_for(const PolicyWork& work) { return work.basis ? policy_kernel<true> : policy_kernel<false>; }

LaunchShape launch_shape(const PolicyWork& work, int64_t batch, void* stream) {
  LaunchShape shape = {};
  shape.grid_x = static_cast<unsigned>(batch * work.team);
  shape.grid_y = 1;
  shape.threads = kPolicyThreads;
  shape.cluster = static_cast<unsigned>(work.team);
  shape.shared_bytes = work.shared.total * static_cast<int>(sizeof(float));
  shape.stream = stream;
  return shape;
}

// Fills in team and layout; false if no layout fits. The team is the largest with which the device runs the whole batch
// at once: a sequence that had to wait would take as long again.
bool plan_policy(const PolicyForwardParams& params, const DeviceInfo& device, PolicyWork* work) {
  for (int team = device.clusters ? kMaxTeam : 1; team > 1; team /= 2) {
    if (params.batch * team > device.multiprocessors || !lay_out(params, device, team, work)) continue;
    const LaunchShape shape = launch_shape(*work, params.batch, nullptr);
    if (params.batch * team <= resident_blocks(kernel_for(*work), shape)) return true;
  }
  return lay_out(params, device, 1, work);
}

int64_t selected_bytes(const PolicyForwardParams& p, int team) { return (p.batch * team * p.length * 4 + 15) / 16 * 16; }

}  // namespace

int64_t policy_forward_workspace(const PolicyForwardParams& params) {
  DeviceInfo device;
  PolicyWork work = {};
  if (query_device(&device) != cudaSuccess || !plan_policy(params, device, &work)) return 0;
  const int64_t projected = work.basis ? 0 : params.batch * params.length * 3 * params.sizes.hidden * 4;
  return selected_bytes(params, work.team) + projected;
}

int policy_forward(const PolicyForwardParams& params, void* workspace, void* stream) {
  if (params.batch == 0) return cudaSuccess;
  // Weights are read 16 bytes at a time.
  if (reinterpret_cast<uintptr_t>(params.weights) % 16 != 0) return cudaErrorMisalignedAddress;
  DeviceInfo device;
  const cudaError_t error = query_device(&device);
  if (error != cudaSuccess) return error;
  PolicyWork work = {};
  work.params = params;
  work.offset = policy_offsets(params.sizes);
  if (!plan_policy(params, device, &work)) return cudaErrorInvalidValue;
  if (params.batch * work.team > INT32_MAX || params.length > INT32_MAX / 2) return cudaErrorInvalidValue;
  work.selected = static_cast<int*>(workspace);
  work.projected = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + selected_bytes(params, work.team));
  const int64_t head_size = params.sizes.hidden / params.sizes.heads;
  for (int64_t i = 0; i < head_size / 2; ++i) {
    work.rotary[i] = static_cast<float>(pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(head_size)));
  }
  return launch(kernel_for(work), launch_shape(work, params.batch, stream), work);
}

}  // namespace cuda
}  // namespace unmask
