// policy_forward on CUDA: one cooperative kernel of six stages of the network, over tiles of 16 rows on all
// multiprocessors. Between two stages all blocks meet. A block copies the weights of its next stage to shared memory while
// it waits for the others.
//
// Rows are positions, those of a sequence filled up to tiles of 16; the last position fills up. A tile without a position
// that needs a logit gives keys and values and nothing else.
#include <algorithm>

#include "policy_tile.cuh"

namespace unmask::cuda {
namespace {

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
  PolicyWork(const PolicyForwardParams& params, int64_t first, const DeviceInfo& device, void* workspace)
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
