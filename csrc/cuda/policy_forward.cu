// policy_forward on CUDA: one cooperative kernel of six stages of the network, over tiles of 16 rows on all
// multiprocessors. Between two stages all blocks meet. A block copies the weights of its next stage to shared memory while
// it waits for the others.
#include "policy_work.cuh"

namespace unmask::cuda {
namespace {

// 1. ada(cond) of up to 8 sequences for both masks: a share of its outputs. Every block computes the layers before it:
// to wait for another one would take longer.
UNMASK_DEVICE void condition(const PolicyWork& s, int group, int share) {
  const int d = s.d, stride = row_stride(d), last = s.batch - 1;
  float *a = shared_floats(), *b = a + kRows * stride;
  const auto sequence = [&](int row) { return min(group * kGroup + row % kGroup, last); };
  for (int i = thread_id(); i < kGroup * d / 2; i += kRowThreads) {
    const int row = i / (d / 2), c = i % (d / 2);
    const float2 angle = angle_of(static_cast<double>(s.p.time[sequence(row)]) * s.w.frequencies[c]);
    a[row * stride + c] = angle.x;
    a[row * stride + d / 2 + c] = angle.y;
  }
  __syncthreads();
  product<4>(a, stride, s.w.time_in.weight, d, d, d, [&](int row, int c, float x, float y) {
    const float* bias = s.w.time_in.bias + c;
    if (row < kGroup) store2(b + row * stride + c, silu(x + bias[0]), silu(y + bias[1]));
  });
  __syncthreads();
  product<4>(b, stride, s.w.time_out.weight, d, d, d, [&](int row, int c, float x, float y) {
    if (row >= kGroup) return;
    const float *bias = s.w.time_out.bias + c, *extra = s.p.cond ? s.p.cond + sequence(row) * d + c : nullptr;
    for (int mask = 0; mask < 2; ++mask) {
      const float* to_add = s.w.mask_embedding + mask * d + c;
      store2(a + (mask * kGroup + row) * stride + c, x + bias[0] + to_add[0] + (extra ? extra[0] : 0.0f),
             y + bias[1] + to_add[1] + (extra ? extra[1] : 0.0f));
    }
  });
  __syncthreads();
  const int eights = 6 * d / 8, begin = eights * share / s.shares * 8, end = eights * (share + 1) / s.shares * 8;
  product<4>(a, stride, s.w.ada.weight + begin * d, d, end - begin, d, [&](int row, int c, float x, float y) {
    if (group * kGroup + row % kGroup > last) return;
    const float* bias = s.w.ada.bias + begin + c;
    store2(s.ada + (sequence(row) * 2 + row / kGroup) * 6 * d + begin + c, x + bias[0], y + bias[1]);
  });
}

// 1. What the network reads of a tile: a row for each warp.
UNMASK_DEVICE void embed(const PolicyWork& s, int tile) {
  const int row = tile * kRows + warp_id();
  const int64_t position = s.position(row), at = static_cast<int64_t>(row) * s.d;
  float x[kPerLane] = {};
#pragma unroll 4
  for (int j = 0; j < s.k; ++j) {
    const float confidence = s.p.confidence[position * s.k + j];
    for_channels(s.d, [&](int e, int c) { x[e] = fmaf(confidence, s.w.confidence.weight[c * s.k + j], x[e]); });
  }
  for_channels(s.d, [&](int e, int c) {
    x[e] += s.w.confidence.bias[c];
    s.x[at + c] = x[e];
  });
  normalise(x, s.d);
  for_channels(s.d, [&](int e, int c) { s.normal[at + c] = fmaf(x[e], s.w.norm1.weight[c], s.w.norm1.bias[c]); });
}

// 1. Conditioning and inputs beside each other.
UNMASK_DEVICE void begin(const PolicyWork& s) {
  const int lines = static_cast<int>(s.w.output.bias - s.p.weights) / 32;  // of 128 bytes
  for (int i = block_id() * kRowThreads + thread_id(); i < lines; i += block_count() * kRowThreads) {
    prefetch_l2(s.p.weights + i * 32);  // the model that ran before has driven them out
  }
  const int conditioning = s.groups * s.shares;
  for (int task = block_id(); task < conditioning + s.tiles; task += block_count()) {
    if (task < conditioning) {
      condition(s, task / s.shares, task % s.shares);
      __syncthreads();  // before another one
    } else {
      embed(s, task - conditioning);
    }
  }
}

// work(part, tile) for each of `parts` of every tile. A block keeps to one part as long as there are as many blocks;
// stage(part) starts to copy what the part's tiles share, before the blocks meet.
template <typename Stage, typename Work>
UNMASK_DEVICE void share_out(const PolicyWork& s, int parts, Meeting* all, Stage stage, Work work) {
  const int team = block_id() / parts, teams = max(block_count() / parts, 1);
  int part = team < teams ? block_id() % parts : parts;
  __syncthreads();  // the stage before has read its shared memory
  if (part < parts) stage(part);
  commit_copies();
  all->meet();
  while (part < parts) {
    for (int tile = team; tile < s.tiles; tile += teams) {
      work(part, tile);
      __syncthreads();
    }
    part += block_count();
    if (part < parts) stage(part);
    commit_copies();
  }
  wait_copies<0>();
}

// 2. Keys and values of all positions, queries where they are needed. A part is 64 columns of a weight matrix.
UNMASK_DEVICE void project(const PolicyWork& s, Meeting* all) {
  const int d = s.d, stride = row_stride(d), per = ceil_div(d, kColumns);
  float *a = shared_floats(), *b = a + kRows * stride, *bias = b + kColumns * stride;
  const auto columns = [&](int first) { return min(kColumns, d - first); };
  const auto stage_weights = [&](int part) {
    const int which = part / per, first = part % per * kColumns;
    const PolicyLinear& w = which == 0 ? s.w.query : which == 1 ? s.w.key : s.w.value;
    stage(b, columns(first), d, [&](int r) { return w.weight + (first + r) * d; });
    stage(bias, 1, columns(first), [&](int) { return w.bias + first; });
  };
  share_out(s, 3 * per, all, stage_weights, [&](int part, int tile) {
    const int which = part / per, first = part % per * kColumns;
    const int row0 = tile * kRows, start = row0 % s.padded;
    if (which == 0 && !s.is_needed(tile)) return;
    for (int i = thread_id(); i < kRows * d / 4; i += kRowThreads) {
      const int r = i / (d / 4), c = i % (d / 4) * 4;
      const float *ada = s.modulation(row0 + r, 0) + c, *from = s.normal + static_cast<int64_t>(row0 + r) * d + c;
      const float4 x = load4(from), gamma = load4(ada), beta = load4(ada + d);
      store2(a + r * stride + c, fmaf(x.x, 1.0f + gamma.x, beta.x), fmaf(x.y, 1.0f + gamma.y, beta.y));
      store2(a + r * stride + c + 2, fmaf(x.z, 1.0f + gamma.z, beta.z), fmaf(x.w, 1.0f + gamma.w, beta.w));
    }
    wait_copies<0>();
    __syncthreads();
    product(a, stride, b, stride, columns(first), d, [&](int r, int c, float x, float y) {
      const int64_t values = static_cast<int64_t>(row0 - start) * d;  // of the sequence
      const int at = which == 2 ? start + r : row0 + r;
      s.store_projected({s.query, s.key, s.value + values}, which, at, start + r, first + c, x + bias[c],
                        y + bias[c + 1]);
    });
  });
}

// 3. Attention of a tile. A part is one head and a share of the keys.
UNMASK_DEVICE void attend(const PolicyWork& s, Meeting* all) {
  const int key_tiles = ceil_div(s.padded, s.keys);
  share_out(
      s, s.heads * s.splits, all, [](int) {},
      [&](int part, int tile) {
        const int row0 = tile * kRows, head = part / s.splits, split = part % s.splits;
        if (!s.is_needed(tile)) return;
        const int64_t first = row0 / s.padded * s.padded;  // of the sequence's rows
        const int64_t out = static_cast<int64_t>(split) * s.tiles * kRows + row0;
        attend(s, {s.query + static_cast<int64_t>(row0) * s.d, s.key + first * s.d, s.value + first * s.d}, head,
               key_tiles * split / s.splits, key_tiles * (split + 1) / s.splits, shared_floats(), s.sums + out * s.d,
               s.d, [&](int row, float2 scale) { s.scales[(out + row) * s.heads + head] = scale; });
      });
}

// 4. Attention's output, a channel of a row: the splits' sums, brought to a common maximum.
UNMASK_DEVICE float attended(const PolicyWork& s, int64_t row, int channel) {
  float top = -INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll 4
  for (int split = 0; split < s.splits; ++split, row += s.tiles * kRows) {
    const float2 scale = s.scales[row * s.heads + channel / s.head];
    const float now = fmaxf(top, scale.x), before = exp2_fast(top - now), factor = exp2_fast(scale.x - now);
    sum = fmaf(s.sums[row * s.d + channel], factor, sum * before);
    total = fmaf(scale.y, factor, total * before);
    top = now;
  }
  return sum / total;
}

// 4. The residual stream after attention, and the feed-forward's input: a warp for each row of a tile.
UNMASK_DEVICE void mix(const PolicyWork& s, Meeting* all) {
  const int d = s.d, stride = row_stride(d), mine = warp_id() * stride;
  float *a = shared_floats(), *out = a + kRows * stride, *copy = out + kRows * stride;
  const bool staged = d <= kMostStaged;
  const auto stage_weights = [&](int) {
    if (staged) stage(copy, d, d, [&](int r) { return s.w.out.weight + r * d; });
  };
  share_out(s, 1, all, stage_weights, [&](int, int tile) {
    if (!s.is_needed(tile)) return;
    const int row = tile * kRows + warp_id();
    const int64_t at = static_cast<int64_t>(row) * d;
    const float* ada = s.modulation(row, 2);
    // All that the row needs later is asked for now.
    float x[kPerLane], alpha[kPerLane], scale[kPerLane], shift[kPerLane];
    for_channels(d, [&](int e, int c) {
      a[mine + c] = attended(s, row, c);
      alpha[e] = 1.0f + ada[c];
      x[e] = fmaf(s.w.out.bias[c], alpha[e], s.x[at + c]);
      scale[e] = s.w.norm2.weight[c] * (1.0f + ada[d + c]);
      shift[e] = fmaf(s.w.norm2.bias[c], 1.0f + ada[d + c], ada[2 * d + c]);
    });
    wait_copies<0>();
    __syncthreads();
    product(a, stride, staged ? copy : s.w.out.weight, staged ? stride : d, d, d,
            [&](int r, int c, float even, float odd) { store2(out + r * stride + c, even, odd); });
    __syncthreads();
    for_channels(d, [&](int e, int c) {
      x[e] = fmaf(out[mine + c], alpha[e], x[e]);
      s.x[at + c] = x[e];
    });
    normalise(x, d);
    for_channels(d, [&](int e, int c) { s.hidden[at + c] = fmaf(x[e], scale[e], shift[e]); });
  });
}

// 5. The feed-forward layers. A part is some of the units, which give their part of the output.
UNMASK_DEVICE void feed_forward(const PolicyWork& s, Meeting* all) {
  const int d = s.d, stride = row_stride(d), most = row_stride(s.units);
  float *a = shared_floats(), *u = a + kRows * stride, *up = u + kRows * most, *down = up + s.units * stride;
  float* bias = down + d * most;
  const auto units = [&](int part) { return min(s.units, s.ffn - part * s.units); };
  const auto stage_weights = [&](int part) {
    const int first = part * s.units;
    stage(up, units(part), d, [&](int r) { return s.w.up.weight + (first + r) * d; });
    stage(down, d, units(part), [&](int r) { return s.w.down.weight + r * s.ffn + first; });
    stage(bias, 1, units(part), [&](int) { return s.w.up.bias + first; });
  };
  share_out(s, s.unit_blocks, all, stage_weights, [&](int part, int tile) {
    if (!s.is_needed(tile)) return;
    const int unit_stride = row_stride(units(part));
    const float* from = s.hidden + static_cast<int64_t>(tile) * kRows * d;
    stage(a, kRows, d, [&](int r) { return from + r * d; });
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    product(a, stride, up, stride, units(part), d, [&](int r, int c, float x, float y) {
      store2(u + r * unit_stride + c, gelu(x + bias[c]), gelu(y + bias[c + 1]));
    });
    __syncthreads();
    float* to = s.parts + (static_cast<int64_t>(part) * s.tiles + tile) * kRows * d;
    product(u, unit_stride, down, unit_stride, d, units(part),
            [&](int r, int c, float x, float y) { store2(to + r * d + c, x, y); });
  });
}

// 6. The logit of a row, by a warp.
UNMASK_DEVICE void output(const PolicyWork& s, int row) {
  const int d = s.d;
  if (row % s.padded >= s.length) return;
  float x[kPerLane] = {}, logit = -INFINITY;
  if (s.is_wanted(row)) {
    const int64_t at = static_cast<int64_t>(row) * d;
    const float *ada = s.modulation(row, 5), *part = s.parts + at;
#pragma unroll 4
    for (int i = 0; i < s.unit_blocks; ++i, part += static_cast<int64_t>(s.tiles) * kRows * d) {
      for_channels(d, [&](int e, int c) { x[e] += part[c]; });
    }
    for_channels(d, [&](int e, int c) { x[e] = fmaf(x[e] + s.w.down.bias[c], 1.0f + ada[c], s.x[at + c]); });
    logit = output_of(x, d, s.w.final_norm, s.w.output);
  }
  if (lane_id() == 0) s.p.logits[s.position(row)] = logit;
}

__global__ void __launch_bounds__(kRowThreads, 1) policy_forward_kernel(const __grid_constant__ PolicyWork s) {
  Meeting all{s.meeting, s.launch, gridDim.x};
  if (threadIdx.x == 0) all.open();
  begin(s);
  project(s, &all);
  attend(s, &all);
  mix(s, &all);
  feed_forward(s, &all);
  all.meet();
  // The rows of a tile go to different multiprocessors.
  for (int row = warp_id() * block_count() + block_id(); row < s.tiles * kRows; row += kRows * block_count()) {
    output(s, row);
  }
  if (threadIdx.x == 0) all.close();
}

}  // namespace

int64_t policy_forward_workspace(const PolicyForwardParams& params) {
  return PolicyWork(params, 0, DeviceInfo{1, 0, false}, nullptr).bytes;
}

int policy_forward(const PolicyForwardParams& params, void* workspace, void* stream) {
  DeviceInfo device;
  cudaError_t error = check_network(params);
  if (error == cudaSuccess) error = query_device(&device);
  for (int64_t first = 0; first < params.batch && error == cudaSuccess;) {
    const PolicyWork work(params, first, device, workspace);
    LaunchShape shape{1, kRowThreads, work.shared_bytes(), stream};
    shape.blocks = static_cast<unsigned>(std::min(work.most_tasks(), resident_blocks(policy_forward_kernel, shape)));
    error = launch_together(policy_forward_kernel, shape, work);
    first += work.batch;
  }
  return error;
}

}  // namespace unmask::cuda
