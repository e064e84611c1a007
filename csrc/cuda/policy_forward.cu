// policy_forward on CUDA: six kernels, one stage of the network each, over tiles of 16 rows on all multiprocessors.
// What they hand to each other is in the workspace (policy_work.cuh). Where the device can, a kernel starts before the
// one in front of it has ended, copies its weights to shared memory, and then waits for what was computed.
#include "policy_work.cuh"

namespace unmask {
namespace cuda {
namespace {

UNMASK_DEVICE float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared()); }

// 1. ada(cond) of up to 8 sequences for both masks: this block's share of ada's outputs. The layers before it are computed
// by every block: waiting for others would take longer.
UNMASK_DEVICE void condition(const PolicyWork& s, int group, int share) {
  const int d = s.d, stride = row_stride(d), first = group * kGroup, last = s.batch - 1;
  float *a = shared_floats(), *b = a + kTileRows * stride, *staged = b + kTileRows * stride;
  const float *in = s.w.time_in.weight, *out = s.w.time_out.weight;
  const auto sequence = [&](int row) { return min(first + row % kGroup, last); };
  if (s.stage_time) {
    stage(staged, stride, d, d, [&](int r) { return s.w.time_in.weight + r * d; });
    commit_copies();
    stage(staged + d * stride, stride, d, d, [&](int r) { return s.w.time_out.weight + r * d; });
    commit_copies();
    in = staged;
    out = staged + d * stride;
  }
  // Rows 8 to 15 are used for the second mask only.
  for (int i = static_cast<int>(threadIdx.x); i < kGroup * d / 2; i += kBeginThreads) {
    const int row = i / (d / 2), c = i % (d / 2);
    const Angle angle = angle_of(static_cast<double>(s.p.time[sequence(row)]) * s.w.frequencies[c]);
    a[row * stride + c] = angle.cos;
    a[row * stride + d / 2 + c] = angle.sin;
  }
  wait_copies<1>();
  __syncthreads();
  const int ldw = s.stage_time ? stride : d;
  const auto silu = [](float x) { return x / (1.0f + expf(-x)); };
  product<1>(a, stride, in, ldw, d, d, [&](int row, int c, float x, float y) {
    const float* bias = s.w.time_in.bias + c;
    if (row < kGroup) store2(b + row * stride + c, silu(x + bias[0]), silu(y + bias[1]));
  });
  wait_copies<0>();
  __syncthreads();
  product<1>(b, stride, out, ldw, d, d, [&](int row, int c, float x, float y) {
    if (row >= kGroup) return;
    const float* extra = s.p.cond ? s.p.cond + sequence(row) * d + c : nullptr;
    x += s.w.time_out.bias[c] + (extra ? extra[0] : 0.0f);
    y += s.w.time_out.bias[c + 1] + (extra ? extra[1] : 0.0f);
    for (int mask = 0; mask < 2; ++mask) {
      const float* embedding = s.w.mask_embedding + mask * d + c;
      store2(a + (row + mask * kGroup) * stride + c, x + embedding[0], y + embedding[1]);
    }
  });
  __syncthreads();
  const int eights = 6 * d / 8, begin = eights * share / s.shares * 8, end = eights * (share + 1) / s.shares * 8;
  product<1>(a, stride, s.w.ada.weight + begin * d, d, end - begin, d, [&](int row, int c, float x, float y) {
    if (first + row % kGroup > last) return;
    const float* bias = s.w.ada.bias + begin + c;
    store2(s.ada + (sequence(row) * 2 + row / kGroup) * 6 * d + begin + c, x + bias[0], y + bias[1]);
  });
}

// 1. The slots of a sequence, behind those of the sequences before it; -inf to the logits that are not needed.
UNMASK_DEVICE void list_rows(const PolicyWork& s, int sequence) {
  constexpr int kWarps = kBeginThreads / 32;
  const int thread = static_cast<int>(threadIdx.x), warp = warp_id(), lane = lane_id();
  int* counts = reinterpret_cast<int*>(shared_floats());
  const auto wanted = [&](int position) { return !s.p.select || s.p.select[position] != 0; };
  const auto tiles_of = [](int count) { return (count + kTileRows - 1) / kTileRows; };
  int tiles = 0;
  for (int other = warp; other < sequence; other += kWarps) {
    int count = 0;
#pragma unroll 4
    for (int i = lane; i < s.length; i += 32) count += wanted(other * s.length + i) ? 1 : 0;
    tiles += tiles_of(__reduce_add_sync(kFullWarp, count));
  }
  if (lane == 0) counts[warp] = tiles;
  __syncthreads();
  tiles = 0;
  for (int w = 0; w < kWarps; ++w) tiles += counts[w];
  int* rows = s.rows + tiles * kTileRows;
  int total = 0;
  for (int base = 0; base < s.length; base += kBeginThreads) {
    const int i = base + thread, position = sequence * s.length + i;
    const bool inside = i < s.length, listed = inside && wanted(position);
    const unsigned ballot = __ballot_sync(kFullWarp, listed);
    __syncthreads();
    if (lane == 0) counts[warp] = __popc(ballot);
    __syncthreads();
    int before = total;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += counts[w];
      total += counts[w];
    }
    if (listed) rows[before + __popc(ballot & ((1u << lane) - 1))] = position;
    if (inside && !listed) s.p.logits[position] = -INFINITY;
  }
  __syncthreads();
  const int filled = tiles_of(total) * kTileRows, left = s.tiles * kTileRows - tiles * kTileRows;
  for (int i = total + thread; i < filled; i += kBeginThreads) rows[i] = ~rows[total - 1];
  if (sequence != s.batch - 1) return;
  for (int i = filled + thread; i < left; i += kBeginThreads) rows[i] = kNone;
}

// 1. What the network reads of 16 positions: a row for each warp.
UNMASK_DEVICE void embed(const PolicyWork& s, int tile) {
  const int d = s.d, k = s.k, stride = k | 1;  // odd: neighbouring channels are in different banks
  const int position = tile * kTileRows + warp_id();
  float *w = shared_floats(), x[kPerLane] = {};
  for (int i = static_cast<int>(threadIdx.x); i < d * k; i += kBeginThreads) {
    w[i / k * stride + i % k] = s.w.confidence.weight[i];
  }
  __syncthreads();
  if (position >= s.batch * s.length) return;
  const int64_t at = static_cast<int64_t>(position) * d;
  const float* confidence = s.p.confidence + static_cast<int64_t>(position) * k;
#pragma unroll 4
  for (int j = 0; j < k; ++j) {
    const float value = confidence[j];
    for_channels(d, [&](int e, int c) { x[e] = fmaf(value, w[c * stride + j], x[e]); });
  }
  for_channels(d, [&](int e, int c) { s.x[at + c] = x[e] += s.w.confidence.bias[c]; });
  normalise(x, d);
  for_channels(d, [&](int e, int c) { s.normal[at + c] = fmaf(x[e], s.w.norm1.weight[c], s.w.norm1.bias[c]); });
}

// 1. Conditioning, list of rows and inputs, beside each other.
__global__ void __launch_bounds__(kBeginThreads) begin_kernel(const __grid_constant__ PolicyWork s) {
  launch_dependents();
  // The model that ran before has driven the weights out of the cache.
  const int lines = static_cast<int>((s.w.output.bias - s.p.weights) / 32), threads = static_cast<int>(gridDim.x) * kBeginThreads;
  for (int i = static_cast<int>(blockIdx.x * kBeginThreads + threadIdx.x); i < lines; i += threads) {
    prefetch_l2(s.p.weights + i * 32);
  }
  int block = static_cast<int>(blockIdx.x);
  const int conditioning = (s.batch + kGroup - 1) / kGroup * s.shares;
  if (block < conditioning) return condition(s, block / s.shares, block % s.shares);
  block -= conditioning;
  if (block < s.batch) return list_rows(s, block);
  embed(s, block - s.batch);
}

// 2. Keys and values of all positions, queries of the slots. A block keeps 64 columns of a weight matrix.
__global__ void __launch_bounds__(kTileThreads, 2) project_kernel(const __grid_constant__ PolicyWork s) {
  launch_dependents();
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x), d = s.d;
  const int stride = row_stride(d), per = (s.width + kColumns - 1) / kColumns, across = 3 * per;
  const int which = block % across / per, first = block % per * kColumns, columns = min(kColumns, s.width - first);
  const PolicyLinear w = which == 0 ? s.w.query : which == 1 ? s.w.key : s.w.value;
  float *a = shared_floats(), *b = a + kTileRows * stride, *bias = b + kColumns * stride;
  const auto channel = [&](int c) { return c % s.padded < s.head ? c / s.padded * s.head + c % s.padded : -1; };
  stage(b, stride, columns, d, [&](int r) -> const float* {
    return channel(first + r) < 0 ? nullptr : w.weight + channel(first + r) * d;
  });
  commit_copies();
  if (thread < columns) bias[thread] = channel(first + thread) < 0 ? 0.0f : w.bias[channel(first + thread)];
  wait_for_launches();
  const float scale = which == 0 ? 1.4426950408889634f / sqrtf(static_cast<float>(s.head)) : 1.0f;
  for (int tile = block / across; tile < s.tiles; tile += static_cast<int>(gridDim.x) / across) {
    const int row0 = tile * kTileRows, sequence = row0 / s.padded_length, start = row0 % s.padded_length;
    if (which == 0 && s.rows[row0] == kNone) break;
    const auto position = [&](int r) {  // -1: beyond the end of the sequence
      return which == 0 ? s.position_of(row0 + r) : start + r < s.length ? sequence * s.length + start + r : -1;
    };
    __syncthreads();
    for (int i = thread; i < kTileRows * d / 4; i += kTileThreads) {
      const int r = i / (d / 4), c = i % (d / 4) * 4, at = position(r);
      float4 h = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (at >= 0) {
        const float* ada = s.modulation(at, 0) + c;
        const float4 x = load4(s.normal + static_cast<int64_t>(at) * d + c), gamma = load4(ada), beta = load4(ada + d);
        h = make_float4(fmaf(x.x, 1.0f + gamma.x, beta.x), fmaf(x.y, 1.0f + gamma.y, beta.y),
                        fmaf(x.z, 1.0f + gamma.z, beta.z), fmaf(x.w, 1.0f + gamma.w, beta.w));
      }
      *reinterpret_cast<float4*>(a + r * stride + c) = h;
    }
    wait_copies<0>();
    __syncthreads();
    product<1>(a, stride, b, stride, columns, d, [&](int r, int c, float even, float odd) {
      const int64_t column = first + c;
      even += bias[c];
      odd += bias[c + 1];
      if (which == 2) {
        float* to = s.value + (static_cast<int64_t>(sequence) * s.width + column) * s.padded_length + start + r;
        to[0] = even;
        to[s.padded_length] = odd;
        return;
      }
      const int turned = which == 0 ? position(r) % s.length : start + r;
      const float rate = s.rotary[column % s.padded / 2 % kMaxPairs];
      const Angle angle = angle_of(static_cast<double>(turned) * static_cast<double>(rate));
      store2((which == 0 ? s.query : s.key) + static_cast<int64_t>(row0 + r) * s.width + column,
             (even * angle.cos - odd * angle.sin) * scale, (even * angle.sin + odd * angle.cos) * scale);
    });
  }
  wait_copies<0>();
}

// 3. By a warp: scores of one row become exp2(score - maximum so far), and its total is carried on. Returns the factor of
// what was summed before.
UNMASK_DEVICE float attention_weights(float* scores, int count, float* top, float* total) {
  const float first = lane_id() < count ? scores[lane_id()] : -INFINITY;
  const float second = lane_id() + 32 < count ? scores[lane_id() + 32] : -INFINITY;
  const float now = fmaxf(*top, warp_max(fmaxf(first, second)));
  const float a = exp2_fast(first - now), b = exp2_fast(second - now), factor = exp2_fast(*top - now);
  if (lane_id() < count) scores[lane_id()] = a;
  if (lane_id() + 32 < count) scores[lane_id() + 32] = b;
  *total = fmaf(*total, factor, warp_sum(a + b));
  *top = now;
  return factor;
}

// 3. Attention of a tile of slots, for one head and a share of the keys.
__global__ void __launch_bounds__(kTileThreads, 2) attend_kernel(const __grid_constant__ PolicyWork s) {
  launch_dependents();
  constexpr int kWarps = kTileThreads / 32, kRowsOfWarp = kTileRows / kWarps, kMostTiles = 256 / 8 / kWarps;
  const int stride = row_stride(s.padded), key_stride = row_stride(s.keys), per_tile = s.heads * s.splits;
  const int key_tiles = (s.padded_length + s.keys - 1) / s.keys, warp = warp_id(), lane = lane_id();
  float *q = shared_floats(), *k = q + kTileRows * stride, *v = k + s.keys * stride;
  float *weights = v + s.padded * key_stride, *factors = weights + kTileRows * key_stride;
  wait_for_launches();
  for (int task = static_cast<int>(blockIdx.x); task < s.tiles * per_tile; task += static_cast<int>(gridDim.x)) {
    const int row0 = task / per_tile * kTileRows, head = task % per_tile / s.splits, split = task % s.splits;
    if (s.rows[row0] == kNone) break;
    const int64_t sequence = s.rows[row0] / s.length;
    const float* keys = s.key + sequence * s.padded_length * s.width + head * s.padded;
    const float* values = s.value + (sequence * s.width + head * s.padded) * s.padded_length;
    const float* queries = s.query + static_cast<int64_t>(row0) * s.width + head * s.padded;
    float top[kRowsOfWarp], total[kRowsOfWarp], sums[kMostTiles][4] = {};
    for (int i = 0; i < kRowsOfWarp; ++i) top[i] = -INFINITY, total[i] = 0.0f;
    stage(q, stride, kTileRows, s.padded, [&](int r) { return queries + static_cast<int64_t>(r) * s.width; });
    for (int t = key_tiles * split / s.splits; t < key_tiles * (split + 1) / s.splits; ++t) {
      const int64_t first = t * s.keys;
      const int count = min(s.keys, s.padded_length - t * s.keys), inside = s.length - t * s.keys;
      stage(k, stride, count, s.padded, [&](int r) { return keys + (first + r) * s.width; });
      stage(v, key_stride, s.padded, count, [&](int r) { return values + r * static_cast<int64_t>(s.padded_length) + first; });
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      product<1>(q, stride, k, stride, count, s.padded, [&](int r, int c, float x, float y) {
        store2(weights + r * key_stride + c, c < inside ? x : -INFINITY, c + 1 < inside ? y : -INFINITY);
      });
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRowsOfWarp; ++i) {
        const int row = warp + i * kWarps;
        const float factor = attention_weights(weights + row * key_stride, count, &top[i], &total[i]);
        if (lane == 0) factors[row] = factor;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kMostTiles; ++i) {
        const int channel = (warp + i * kWarps) * 8;
        if (channel >= s.padded) break;
        float now[1][4] = {};
        multiply(weights, key_stride, v + channel * key_stride, key_stride, count, now);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][e] = fmaf(sums[i][e], factors[lane / 4 + e / 2 * 8], now[0][e]);
      }
      __syncthreads();
    }
    const auto to = [&](int row) {
      return s.sums + ((static_cast<int64_t>(row0 + row) * s.heads + head) * s.splits + split) * (s.padded + kGapOfSums);
    };
#pragma unroll
    for (int i = 0; i < kMostTiles; ++i) {
      const int channel = (warp + i * kWarps) * 8 + lane % 4 * 2;
      if (channel >= s.padded) break;
      store2(to(lane / 4) + channel, sums[i][0], sums[i][1]);
      store2(to(lane / 4 + 8) + channel, sums[i][2], sums[i][3]);
    }
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      if (lane == 0) store2(to(warp + i * kWarps) + s.padded, top[i], total[i]);
    }
  }
}

// 4. Attention's output of a channel of a slot: the splits' sums, brought to a common maximum.
UNMASK_DEVICE float attended(const PolicyWork& s, int slot, int channel) {
  const int each = s.padded + kGapOfSums;
  const float* part = s.sums + (static_cast<int64_t>(slot) * s.heads + channel / s.head) * s.splits * each;
  float top = -INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll 4
  for (int split = 0; split < s.splits; ++split, part += each) {
    const float maximum = part[s.padded], now = fmaxf(top, maximum);
    const float before = exp2_fast(top - now), factor = exp2_fast(maximum - now);
    sum = fmaf(part[channel % s.head], factor, sum * before);
    total = fmaf(part[s.padded + 1], factor, total * before);
    top = now;
  }
  return sum / total;
}

// 4. The residual stream after attention and the feed-forward's input: a warp for each slot of a tile.
__global__ void __launch_bounds__(kMixThreads) mix_kernel(const __grid_constant__ PolicyWork s) {
  launch_dependents();
  const int d = s.d, stride = row_stride(d), warp = warp_id();
  float *a = shared_floats(), *out = a + kTileRows * stride, *b = out + kTileRows * stride;
  const float* w = s.w.out.weight;
  if (s.stage_out) stage(b, stride, d, d, [&](int r) { return w + r * d; });
  commit_copies();
  wait_for_launches();
  for (int tile = static_cast<int>(blockIdx.x); tile < s.tiles; tile += static_cast<int>(gridDim.x)) {
    const int slot = tile * kTileRows + warp;
    if (s.rows[tile * kTileRows] == kNone) break;
    const int position = s.position_of(slot);
    const int64_t from = static_cast<int64_t>(position) * d, to = static_cast<int64_t>(slot) * d;
    // All that the row needs later is asked for now.
    float x[kPerLane], alpha[kPerLane], scale[kPerLane], shift[kPerLane];
    const float* ada = s.modulation(position, 2);
    for_channels(d, [&](int e, int c) {
      alpha[e] = 1.0f + ada[c];
      x[e] = fmaf(s.w.out.bias[c], alpha[e], s.x[from + c]);
      scale[e] = s.w.norm2.weight[c] * (1.0f + ada[d + c]);
      shift[e] = fmaf(s.w.norm2.bias[c], 1.0f + ada[d + c], ada[2 * d + c]);
    });
    for_channels(d, [&](int, int c) { a[warp * stride + c] = attended(s, slot, c); });
    wait_copies<0>();
    __syncthreads();
    product<1>(a, stride, s.stage_out ? b : w, s.stage_out ? stride : d, d, d,
               [&](int r, int c, float even, float odd) { store2(out + r * stride + c, even, odd); });
    __syncthreads();
    for_channels(d, [&](int e, int c) { s.residual[to + c] = x[e] = fmaf(out[warp * stride + c], alpha[e], x[e]); });
    normalise(x, d);
    for_channels(d, [&](int e, int c) { s.hidden[to + c] = fmaf(x[e], scale[e], shift[e]); });
  }
  wait_copies<0>();
}

// 5. The feed-forward layers. A block keeps some of the units, and gives their part of the output.
__global__ void __launch_bounds__(kTileThreads, 2) feed_forward_kernel(const __grid_constant__ PolicyWork s) {
  launch_dependents();
  const int thread = static_cast<int>(threadIdx.x), d = s.d, stride = row_stride(d), unit_stride = row_stride(s.units);
  const int which = static_cast<int>(blockIdx.x) % s.unit_tiles, deep = static_cast<int>(gridDim.x) / s.unit_tiles;
  const int first = which * s.units, units = min(s.units, s.ffn - first);
  float *a = shared_floats(), *up = a + kTileRows * stride, *u = up + s.units * stride;
  float *down = u + kTileRows * unit_stride, *bias = down + d * unit_stride;
  stage(up, stride, units, d, [&](int r) { return s.w.up.weight + (first + r) * d; });
  stage(down, unit_stride, d, units, [&](int r) { return s.w.down.weight + r * s.ffn + first; });
  commit_copies();
  if (thread < units) bias[thread] = s.w.up.bias[first + thread];
  wait_for_launches();
  const auto start = [&](int tile) {
    if (tile < s.tiles) stage(a, stride, kTileRows, d, [&](int r) {
        return s.hidden + (static_cast<int64_t>(tile) * kTileRows + r) * d;
      });
    commit_copies();
  };
  int tile = static_cast<int>(blockIdx.x) / s.unit_tiles;
  for (start(tile); tile < s.tiles && s.rows[tile * kTileRows] != kNone; tile += deep) {
    wait_copies<0>();
    __syncthreads();
    product<1>(a, stride, up, stride, units, d, [&](int r, int c, float x, float y) {
      store2(u + r * unit_stride + c, gelu(x + bias[c]), gelu(y + bias[c + 1]));
    });
    __syncthreads();
    start(tile + deep);
    float* to = s.parts + (static_cast<int64_t>(which) * s.tiles + tile) * kTileRows * d;
    product<2>(u, unit_stride, down, unit_stride, d, units,
               [&](int r, int c, float x, float y) { store2(to + r * d + c, x, y); });
  }
  wait_copies<0>();
}

// 6. Logits: a warp for each slot.
__global__ void __launch_bounds__(kOutputThreads) output_kernel(const __grid_constant__ PolicyWork s) {
  launch_dependents();
  wait_for_launches();
  const int d = s.d, slots = s.tiles * kTileRows, warps = static_cast<int>(gridDim.x) * warp_count();
  for (int slot = static_cast<int>(blockIdx.x) * warp_count() + warp_id(); slot < slots; slot += warps) {
    const int position = s.rows[slot];
    if (position == kNone) break;
    if (position < 0) continue;
    float x[kPerLane], sums[kPerLane] = {}, logit = 0.0f;
    const float *ada = s.modulation(position, 5), *part = s.parts + static_cast<int64_t>(slot) * d;
#pragma unroll 4
    for (int i = 0; i < s.unit_tiles; ++i, part += static_cast<int64_t>(slots) * d) {
      for_channels(d, [&](int e, int c) { sums[e] += part[c]; });
    }
    for_channels(d, [&](int e, int c) {
      x[e] = fmaf(sums[e] + s.w.down.bias[c], 1.0f + ada[c], s.residual[static_cast<int64_t>(slot) * d + c]);
    });
    normalise(x, d);
    for_channels(d, [&](int e, int c) {
      logit = fmaf(fmaf(x[e], s.w.final_norm.weight[c], s.w.final_norm.bias[c]), s.w.output.weight[c], logit);
    });
    logit = warp_sum(logit);
    if (lane_id() == 0) s.p.logits[position] = logit + s.w.output.bias[0];
  }
}

// A launch of `across` blocks for each of up to `tiles` tiles, as many as the device runs at once: they take turns.
template <typename Kernel>
cudaError_t launch_over(Kernel kernel, const PolicyWork& work, unsigned threads, int bytes, int64_t tiles, int across,
                        bool dependent, void* stream) {
  LaunchShape shape = {1, 1, threads, 1, bytes, stream, dependent};
  int64_t deep = resident_blocks(kernel, shape) / across;
  deep = deep < 1 ? 1 : deep < tiles ? deep : tiles;
  shape.grid_x = static_cast<unsigned>(deep * across);
  return launch(kernel, shape, work);
}

cudaError_t run(const PolicyWork& s, bool dependent, void* stream) {
  const int groups = (s.batch + kGroup - 1) / kGroup, inputs = (s.batch * s.length + kTileRows - 1) / kTileRows;
  const unsigned blocks = static_cast<unsigned>(groups * s.shares + s.batch + inputs);
  const int columns = 3 * ((s.width + kColumns - 1) / kColumns), warps = kOutputThreads / 32;
  // Not the first: what ran before it may be writing what it reads.
  cudaError_t error = launch(begin_kernel, {blocks, 1, kBeginThreads, 1, begin_bytes(s), stream, false}, s);
  const auto next = [&](auto kernel, int threads, int bytes, int64_t tiles, int across) {
    if (error == cudaSuccess) {
      error = launch_over(kernel, s, static_cast<unsigned>(threads), bytes, tiles, across, dependent, stream);
    }
  };
  next(project_kernel, kTileThreads, project_bytes(s), s.tiles, columns);
  next(attend_kernel, kTileThreads, attend_bytes(s), static_cast<int64_t>(s.tiles) * s.heads * s.splits, 1);
  next(mix_kernel, kMixThreads, mix_bytes(s), s.tiles, 1);
  next(feed_forward_kernel, kTileThreads, feed_forward_bytes(s), s.tiles, s.unit_tiles);
  next(output_kernel, kOutputThreads, 0, static_cast<int64_t>(s.tiles) * kTileRows / warps, 1);
  return error;
}

// Sequences of one pass.
int64_t sequences_at_once(const PolicyForwardParams& params) {
  const int64_t most = kMaxRows / ((params.length + kTileRows - 1) / kTileRows * kTileRows);
  return most < 1 ? 1 : most < params.batch ? most : params.batch;
}

}  // namespace

int64_t policy_forward_workspace(const PolicyForwardParams& params) {
  DeviceInfo device;
  if (query_device(&device) != cudaSuccess) return 0;  // the launch will report it
  PolicyForwardParams pass = params;
  pass.batch = sequences_at_once(params);
  PolicyWork work = plan_policy(pass, device);
  return lay_out(&work, nullptr);
}

int policy_forward(const PolicyForwardParams& params, void* workspace, void* stream) {
  // Weights are read 16 bytes at a time.
  if (reinterpret_cast<uintptr_t>(params.weights) % 16 != 0) return cudaErrorMisalignedAddress;
  if (params.length > INT32_MAX / 1024) return cudaErrorInvalidValue;
  DeviceInfo device;
  cudaError_t error = query_device(&device);
  const int64_t most = sequences_at_once(params);
  for (int64_t first = 0; first < params.batch && error == cudaSuccess; first += most) {
    PolicyForwardParams pass = params;
    const int64_t row = first * params.length;
    pass.batch = params.batch - first < most ? params.batch - first : most;
    pass.mask += row;
    pass.confidence += row * params.sizes.confidences;
    pass.time += first;
    pass.logits += row;
    if (pass.cond) pass.cond += first * params.sizes.hidden;
    if (pass.select) pass.select += row;
    PolicyWork work = plan_policy(pass, device);
    lay_out(&work, workspace);
    error = run(work, device.clusters, stream);
  }
  return error;
}

}  // namespace cuda
}  // namespace unmask
