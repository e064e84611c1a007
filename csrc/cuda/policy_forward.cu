// policy_forward on CUDA: six kernels, one stage of the network each, over tiles of 16 rows on all multiprocessors.
// Where the device can, a kernel starts before those in front of it have ended, copies weights to shared memory, and
// then waits for what they compute.
#include "policy_work.cuh"

namespace unmask::cuda {
namespace {

constexpr int kRowThreads = 32 * kRows;  // a warp for each row of a tile
constexpr int kTileThreads = 256;
constexpr int kOutputThreads = 128;

// 1. ada(cond) of up to 8 sequences for both masks: a share of its outputs. Every block computes the layers before it:
// to wait for another one would take longer.
UNMASK_DEVICE void condition(const PolicyWork& s, int group, int share) {
  const int d = s.d, stride = row_stride(d), last = s.batch - 1;
  float *a = shared_floats(), *b = a + kRows * stride;
  const auto sequence = [&](int row) { return min(group * kGroup + row % kGroup, last); };
  for (int i = static_cast<int>(threadIdx.x); i < kGroup * d / 2; i += kRowThreads) {
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

// 1. By one block: the slots, and -inf to the logits that are not needed. A warp takes a sequence.
UNMASK_DEVICE void list_rows(const PolicyWork& s) {
  int* counts = reinterpret_cast<int*>(shared_floats());  // tiles of each sequence
  const auto wanted = [&](int position) { return !s.p.select || s.p.select[position] != 0; };
  for (int b = warp_id(); b < s.batch; b += kRows) {
    int count = 0;
#pragma unroll 4
    for (int i = lane_id(); i < s.length; i += 32) count += wanted(b * s.length + i) ? 1 : 0;
    count = __reduce_add_sync(kFullWarp, count);
    if (lane_id() == 0) counts[b] = (count + kRows - 1) / kRows;
  }
  __syncthreads();
  for (int b = warp_id(); b < s.batch; b += kRows) {
    int before = 0, total = 0;
    for (int i = lane_id(); i < b; i += 32) before += counts[i];
    int* rows = s.rows + __reduce_add_sync(kFullWarp, before) * kRows;
#pragma unroll 4
    for (int first = 0; first < s.length; first += 32) {
      const bool inside = first + lane_id() < s.length;
      const int position = b * s.length + first + lane_id();
      const bool listed = inside && wanted(position);
      const unsigned ballot = __ballot_sync(kFullWarp, listed);
      if (listed) rows[total + __popc(ballot & ((1u << lane_id()) - 1))] = 2 * position + (s.p.mask[position] != 0);
      if (inside && !listed) s.p.logits[position] = -INFINITY;
      total += __popc(ballot);
    }
    __syncwarp();
    int* end = s.rows + s.tiles * kRows;
    for (int i = total + lane_id(); i < counts[b] * kRows; i += 32) rows[i] = ~rows[total - 1];
    for (int i = counts[b] * kRows + lane_id(); b == s.batch - 1 && rows + i < end; i += 32) rows[i] = kNone;
  }
}

// 1. What the network reads of 16 positions: a row for each warp.
UNMASK_DEVICE void embed(const PolicyWork& s, int tile) {
  const int d = s.d, k = s.k, stride = k | 1;  // odd: neighbouring channels are in different banks
  float *w = shared_floats(), x[kPerLane] = {};
  for (int i = static_cast<int>(threadIdx.x); i < d * k; i += kRowThreads) {
    w[i / k * stride + i % k] = s.w.confidence.weight[i];
  }
  __syncthreads();
  const int64_t position = tile * kRows + warp_id(), at = position * d;
  if (position >= s.batch * s.length) return;
#pragma unroll 4
  for (int j = 0; j < k; ++j) {
    const float confidence = s.p.confidence[position * k + j];
    for_channels(d, [&](int e, int c) { x[e] = fmaf(confidence, w[c * stride + j], x[e]); });
  }
  for_channels(d, [&](int e, int c) {
    x[e] += s.w.confidence.bias[c];
    s.x[at + c] = x[e];
  });
  normalise(x, d);
  for_channels(d, [&](int e, int c) { s.normal[at + c] = fmaf(x[e], s.w.norm1.weight[c], s.w.norm1.bias[c]); });
}

// 1. Conditioning, slots and inputs beside each other.
__global__ void __launch_bounds__(kRowThreads, 1) begin_kernel(const __grid_constant__ PolicyWork s) {
  const int lines = static_cast<int>(s.w.output.bias - s.p.weights) / 32;  // of 128 bytes
  for (unsigned i = blockIdx.x * kRowThreads + threadIdx.x; i < lines; i += gridDim.x * kRowThreads) {
    prefetch_l2(s.p.weights + i * 32);  // the model that ran before has driven them out
  }
  wait_for_launches();
  launch_dependents();  // not sooner: the next kernel reads weights before it waits, and whatever wrote them has ended now
  const int conditioning = s.groups * s.shares, block = block_id();
  if (block < conditioning) {
    condition(s, block / s.shares, block % s.shares);
  } else if (block == conditioning) {
    list_rows(s);
  } else {
    embed(s, block - conditioning - 1);
  }
}

// 2. Keys and values of all positions, queries of the slots. A block keeps 64 columns of a weight matrix.
__global__ void __launch_bounds__(kTileThreads, 2) project_kernel(const __grid_constant__ PolicyWork s) {
  launch_dependents();
  const int block = block_id(), d = s.d, stride = row_stride(d), per = (d + kColumns - 1) / kColumns;
  const int which = block % (3 * per) / per, first = block % per * kColumns, columns = min(kColumns, d - first);
  const PolicyLinear w = which == 0 ? s.w.query : which == 1 ? s.w.key : s.w.value;
  float *a = shared_floats(), *b = a + kRows * stride, *bias = b + kColumns * stride;
  stage(b, columns, d, [&](int r) { return w.weight + (first + r) * d; });
  stage(bias, 1, columns, [&](int) { return w.bias + first; });
  commit_copies();
  wait_for_launches();
  for (int tile = block / (3 * per); tile < s.tiles; tile += block_count() / (3 * per)) {
    const int row0 = tile * kRows, sequence = row0 / s.padded, start = row0 % s.padded;
    if (which == 0 && s.rows[row0] == kNone) break;
    const auto row = [&](int r) {  // beyond a sequence's end the last one again
      const int position = sequence * s.length + min(start + r, s.length - 1);
      return which == 0 ? s.row_of(row0 + r) : 2 * position + (s.p.mask[position] != 0);
    };
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * d / 4; i += kTileThreads) {
      const int r = i / (d / 4), c = i % (d / 4) * 4, at = row(r);
      const float *ada = s.modulation(at, 0) + c, *from = s.normal + static_cast<int64_t>(at / 2) * d + c;
      const float4 x = load4(from), gamma = load4(ada), beta = load4(ada + d);
      store2(a + r * stride + c, fmaf(x.x, 1.0f + gamma.x, beta.x), fmaf(x.y, 1.0f + gamma.y, beta.y));
      store2(a + r * stride + c + 2, fmaf(x.z, 1.0f + gamma.z, beta.z), fmaf(x.w, 1.0f + gamma.w, beta.w));
    }
    wait_copies<0>();
    __syncthreads();
    product(a, stride, b, stride, columns, d, [&](int r, int c, float x, float y) {
      const int64_t values = static_cast<int64_t>(row0 - start) * d;  // of the sequence
      const int at = which == 2 ? start + r : row0 + r;
      s.store_projected({s.query, s.key, s.value + values}, which, at, row(r) / 2 % s.length, first + c, x + bias[c],
                        y + bias[c + 1]);
    });
  }
  wait_copies<0>();
}

// 3. Attention of a tile of slots, for one head and a share of the keys.
__global__ void __launch_bounds__(kTileThreads, 2) attend_kernel(const __grid_constant__ PolicyWork s) {
  launch_dependents();
  const int per_tile = s.heads * s.splits, key_tiles = ceil_div(s.padded, s.keys);
  wait_for_launches();
  for (int task = block_id(); task < s.tiles * per_tile; task += block_count()) {
    const int row0 = task / per_tile * kRows, head = task % per_tile / s.splits, split = task % s.splits;
    if (s.rows[row0] == kNone) break;
    const int64_t first = s.rows[row0] / 2 / s.length * s.padded;  // of the sequence's positions
    const int64_t out = static_cast<int64_t>(split) * s.tiles * kRows + row0;
    attend<kTileThreads>(s, {s.query + static_cast<int64_t>(row0) * s.d, s.key + first * s.d, s.value + first * s.d},
                         head, key_tiles * split / s.splits, key_tiles * (split + 1) / s.splits, shared_floats(),
                         s.sums + out * s.d, s.d,
                         [&](int row, float2 scale) { s.scales[(out + row) * s.heads + head] = scale; });
  }
}

// 4. Attention's output, a channel of a slot: the splits' sums, brought to a common maximum.
UNMASK_DEVICE float attended(const PolicyWork& s, int64_t slot, int channel) {
  float top = -INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll 4
  for (int split = 0; split < s.splits; ++split, slot += s.tiles * kRows) {
    const float2 scale = s.scales[slot * s.heads + channel / s.head];
    const float now = fmaxf(top, scale.x), before = exp2_fast(top - now), factor = exp2_fast(scale.x - now);
    sum = fmaf(s.sums[slot * s.d + channel], factor, sum * before);
    total = fmaf(scale.y, factor, total * before);
    top = now;
  }
  return sum / total;
}

// 4. The residual stream after attention, and the feed-forward's input: a warp for each slot of a tile.
__global__ void __launch_bounds__(kRowThreads, 1) mix_kernel(const __grid_constant__ PolicyWork s) {
  launch_dependents();
  const int d = s.d, stride = row_stride(d), row = warp_id() * stride;
  float *a = shared_floats(), *out = a + kRows * stride, *copy = out + kRows * stride;
  const bool staged = d <= kMostStaged;
  if (staged) stage(copy, d, d, [&](int r) { return s.w.out.weight + r * d; });
  commit_copies();
  wait_for_launches();
  for (int tile = block_id(); tile < s.tiles; tile += block_count()) {
    if (s.rows[tile * kRows] == kNone) break;
    const int slot = tile * kRows + warp_id(), which = s.row_of(slot);
    const float *ada = s.modulation(which, 2), *from = s.x + static_cast<int64_t>(which / 2) * d;
    // All that the row needs later is asked for now.
    float x[kPerLane], alpha[kPerLane], scale[kPerLane], shift[kPerLane];
    for_channels(d, [&](int e, int c) {
      a[row + c] = attended(s, slot, c);
      alpha[e] = 1.0f + ada[c];
      x[e] = fmaf(s.w.out.bias[c], alpha[e], from[c]);
      scale[e] = s.w.norm2.weight[c] * (1.0f + ada[d + c]);
      shift[e] = fmaf(s.w.norm2.bias[c], 1.0f + ada[d + c], ada[2 * d + c]);
    });
    wait_copies<0>();
    __syncthreads();
    product(a, stride, staged ? copy : s.w.out.weight, staged ? stride : d, d, d,
            [&](int r, int c, float even, float odd) { store2(out + r * stride + c, even, odd); });
    __syncthreads();
    const int64_t to = static_cast<int64_t>(slot) * d;
    for_channels(d, [&](int e, int c) {
      x[e] = fmaf(out[row + c], alpha[e], x[e]);
      s.residual[to + c] = x[e];
    });
    normalise(x, d);
    for_channels(d, [&](int e, int c) { s.hidden[to + c] = fmaf(x[e], scale[e], shift[e]); });
  }
  wait_copies<0>();
}

// 5. The feed-forward layers. A block keeps some of the units, and gives their part of the output.
__global__ void __launch_bounds__(kTileThreads, 2) feed_forward_kernel(const __grid_constant__ PolicyWork s) {
  launch_dependents();
  const int d = s.d, stride = row_stride(d), which = block_id() % s.unit_blocks;
  const int first = which * s.units, units = min(s.units, s.ffn - first), unit_stride = row_stride(units);
  float *a = shared_floats(), *u = a + kRows * stride, *up = u + kRows * unit_stride, *down = up + units * stride;
  float* bias = down + d * unit_stride;
  stage(up, units, d, [&](int r) { return s.w.up.weight + (first + r) * d; });
  stage(down, d, units, [&](int r) { return s.w.down.weight + r * s.ffn + first; });
  stage(bias, 1, units, [&](int) { return s.w.up.bias + first; });
  wait_for_launches();
  const auto start = [&](int tile) {  // where there are no slots, what it copies is not used
    const float* from = s.hidden + static_cast<int64_t>(tile) * kRows * d;
    if (tile < s.tiles) stage(a, kRows, d, [&](int r) { return from + r * d; });
    commit_copies();
  };
  int tile = block_id() / s.unit_blocks, step = block_count() / s.unit_blocks;
  for (start(tile); tile < s.tiles && s.rows[tile * kRows] != kNone; tile += step) {
    wait_copies<0>();
    __syncthreads();
    product(a, stride, up, stride, units, d, [&](int r, int c, float x, float y) {
      store2(u + r * unit_stride + c, gelu(x + bias[c]), gelu(y + bias[c + 1]));
    });
    __syncthreads();
    start(tile + step);
    float* to = s.parts + (static_cast<int64_t>(which) * s.tiles + tile) * kRows * d;
    product(u, unit_stride, down, unit_stride, d, units,
            [&](int r, int c, float x, float y) { store2(to + r * d + c, x, y); });
  }
  wait_copies<0>();
}

// 6. Logits: a warp for each slot.
__global__ void __launch_bounds__(kOutputThreads) output_kernel(const __grid_constant__ PolicyWork s) {
  launch_dependents();
  wait_for_launches();
  const int d = s.d, slots = s.tiles * kRows, warps = kOutputThreads / 32;
  for (int slot = block_id() * warps + warp_id(); slot < slots; slot += block_count() * warps) {
    const int which = s.rows[slot];
    if (which == kNone) break;
    if (which < 0) continue;
    float x[kPerLane] = {};
    const int64_t row = static_cast<int64_t>(slot) * d;
    const float *ada = s.modulation(which, 5), *part = s.parts + row;
#pragma unroll 4
    for (int i = 0; i < s.unit_blocks; ++i, part += static_cast<int64_t>(slots) * d) {
      for_channels(d, [&](int e, int c) { x[e] += part[c]; });
    }
    for_channels(d, [&](int e, int c) { x[e] = fmaf(x[e] + s.w.down.bias[c], 1.0f + ada[c], s.residual[row + c]); });
    const float logit = output_of(x, d, s.w.final_norm, s.w.output);
    if (lane_id() == 0) s.p.logits[which / 2] = logit;
  }
}

cudaError_t run(const PolicyWork& s, bool dependent, void* stream) {
  const int stride = row_stride(s.d), embed = s.d * (s.k | 1), inputs = ceil_div(s.batch * s.length, kRows);
  LaunchShape shape{1, 1, 0, stream, 1, dependent};
  cudaError_t error = cudaSuccess;
  // `across` blocks for each tile, or for as many tiles as the device has room for: the blocks take turns.
  const auto next = [&](auto kernel, unsigned threads, int floats, int across, int tiles) {
    // The same for all: before a multiprocessor changes how its memory is divided, it must be empty.
    const auto divided = cudaFuncAttributePreferredSharedMemoryCarveout;
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, divided, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return;
    shape.threads = threads;
    shape.shared_bytes = 4 * floats;
    shape.blocks =
        static_cast<unsigned>(std::max(std::min(resident_blocks(kernel, shape) / across, tiles), 1) * across);
    error = launch(kernel, shape, s);
  };
  next(begin_kernel, kRowThreads, std::max({2 * kRows * stride, embed, s.batch}), s.groups * s.shares + 1 + inputs, 1);
  next(project_kernel, kTileThreads, (kRows + kColumns) * stride + kColumns, 3 * ceil_div(s.d, kColumns), s.tiles);
  next(attend_kernel, kTileThreads, s.floats(), s.heads * s.splits, s.tiles);
  next(mix_kernel, kRowThreads, (2 * kRows + (s.d <= kMostStaged ? s.d : 0)) * stride, 1, s.tiles);
  next(feed_forward_kernel, kTileThreads, (kRows + s.units) * stride + (kRows + s.d) * row_stride(s.units) + s.units,
       s.unit_blocks, s.tiles);
  next(output_kernel, kOutputThreads, 0, 32 * kRows / kOutputThreads, s.tiles);
  return error;
}

}  // namespace

int64_t policy_forward_workspace(const PolicyForwardParams& params) {
  return PolicyWork(params, 0, DeviceInfo{1, 0, false}, nullptr).bytes;
}

int policy_forward(const PolicyForwardParams& params, void* workspace, void* stream) {
  // Weights are read 16 bytes at a time.
  if (reinterpret_cast<uintptr_t>(params.weights) % 16 != 0) return cudaErrorMisalignedAddress;
  if (params.length > INT32_MAX / 1024) return cudaErrorInvalidValue;
  DeviceInfo device;
  cudaError_t error = query_device(&device);
  for (int64_t first = 0; first < params.batch && error == cudaSuccess;) {
    const PolicyWork work(params, first, device, workspace);
    error = run(work, device.clusters, stream);
    first += work.batch;
  }
  return error;
}

}  // namespace unmask::cuda
