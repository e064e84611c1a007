// select_set on CUDA: one cooperative kernel. A team of blocks takes one row of the batch after the other through all
// its runs, each block the same tiles of 16 positions throughout. The team meets where the keys and values of a layer are
// complete, and where the probabilities are; the choice each block makes for itself, all alike.
#include "../ops/select_set_row.h"
#include "policy_tile.cuh"

namespace unmask::cuda {
namespace {

constexpr int kSetThreads = 32 * kRows;  // a warp for each row of a tile

struct SetWork : AttentionShape {
  SelectSetParams p;
  SetWeightView w;
  int layers, ffn, numbers, wide;  // numbers: that the network reads of a position; wide: floats of a row of `unit`
  int tiles, team, teams;          // tiles of a row; blocks of a team
  // In the workspace: of each team, the first of all of them, the second of each block.
  unsigned* arrived;
  uint8_t* states;             // (positions)
  float *input, *stream;       // (positions, D) of the first layer, and of the layer at work
  float *query, *key, *value;  // (layers, positions, D), value (layers, D, positions)
  float* probability;          // (positions)
  int64_t bytes;

  // For as many blocks as are resident. Without a workspace it only says how many bytes one must have.
  SetWork(const SelectSetParams& params, int blocks, void* workspace);

  int shared_floats_needed() const { return kRows * (row_stride(d) + wide + heads) + 2 * d + 16 + floats(); }
};

SetWork::SetWork(const SelectSetParams& params, int blocks, void* workspace)
    : AttentionShape(params.length, params.sizes.hidden, params.sizes.heads),
      p(params),
      w(params.weights, params.sizes, params.layers) {
  layers = static_cast<int>(p.layers);
  ffn = static_cast<int>(p.sizes.ffn);
  numbers = static_cast<int>(set_numbers(p.sizes));
  wide = row_stride(std::max({ffn, d, ceil_div(numbers, kRows) * kRows}));
  tiles = padded / kRows;
  const int rows = static_cast<int>(std::min<int64_t>(p.batch, blocks));
  team = std::min(blocks / rows, tiles);
  teams = std::min(rows, blocks / team);
  bytes = 0;
  const auto take = [&](int64_t floats) {
    float* at = workspace ? static_cast<float*>(workspace) + bytes / 4 : nullptr;
    bytes += (floats + 31) / 32 * 128;
    return at;
  };
  const int64_t positions = static_cast<int64_t>(teams) * padded;
  arrived = reinterpret_cast<unsigned*>(take(teams));
  states = reinterpret_cast<uint8_t*>(take(team * positions / 4));
  for (float** at : {&input, &stream}) *at = take(positions * d);
  for (float** at : {&query, &key, &value}) *at = take(layers * positions * d);
  probability = take(positions);
}

struct WarpLanes {
  int lane = lane_id();
  static constexpr int lanes = 32;

  UNMASK_DEVICE bool any(bool x) const { return __any_sync(kFullWarp, x) != 0; }
  UNMASK_DEVICE void best(float* p, int64_t* i) const {
    const uint64_t key = warp_max(*p < 0.0f ? 0 : make_key(*p, static_cast<uint32_t>(*i)));
    if (key == 0) return;  // nowhere anything: all lanes have what they began with
    *p = key_value(key);
    *i = key_id(key);
  }
};

// A row of the batch, as a block of the team sees it.
struct SetTeam {
  const SetWork& s;
  const int number = block_id() / s.team, rank = block_id() % s.team;
  const int64_t first = static_cast<int64_t>(number) * s.padded;  // of the team's positions in the workspace
  uint8_t* const state = s.states + static_cast<int64_t>(block_id()) * s.padded;
  float *const input = s.input + first * s.d, *const stream = s.stream + first * s.d;
  float* const probability = s.probability + first;
  // In shared memory.
  float* const a = shared_floats();                 // (16, D)
  float* const unit = a + kRows * row_stride(s.d);  // (16, wide)
  float* const inverse = unit + kRows * s.wide;     // (heads, 16)
  float* const added = inverse + kRows * s.heads;   // (2, D) to the inputs, for mask 0 and 1
  bool* const goes_on = reinterpret_cast<bool*>(added + 2 * s.d);
  float* const attention = added + 2 * s.d + 16;
  unsigned met = 0;

  // Until all blocks of the team have come here; what they wrote can be read then.
  UNMASK_DEVICE void meet() {
    __syncthreads();
    if (s.team == 1) return;
    met += static_cast<unsigned>(s.team);
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(s.arrived + number, 1u);
      while (static_cast<int>(*const_cast<volatile unsigned*>(s.arrived + number) - met) < 0) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  // Of a layer, query, key and value of the team's first position.
  UNMASK_DEVICE AttentionTile projected(int layer) const {
    const int64_t at = (static_cast<int64_t>(layer) * s.teams * s.padded + first) * s.d;
    return {s.query + at, s.key + at, s.value + at};
  }

  // Whether a position of the tile is in this state.
  UNMASK_DEVICE bool any(int tile, uint8_t wanted) const {
    return __any_sync(kFullWarp, state[tile * kRows + lane_id() % kRows] == wanted) != 0;
  }

  // added: the states and the share of positions that are not masked.
  UNMASK_DEVICE void share(int64_t row) const {
    int open = 0;
    for (int i = lane_id(); i < s.length; i += 32) open += s.p.mask[row * s.length + i] ? 0 : 1;
    open = __reduce_add_sync(kFullWarp, open);
    const float part = 4.0f * (static_cast<float>(open) / static_cast<float>(s.length));
    const PolicyLinear &in = s.w.share_in, &out = s.w.share_out;
    for (int c = warp_id(); c < s.d; c += kRows) {
      float sum = 0.0f;
      for (int k = lane_id(); k < s.d; k += 32) {
        sum = fmaf(out.weight[c * s.d + k], silu(fmaf(in.weight[k], part, in.bias[k])), sum);
      }
      sum = warp_sum(sum) + out.bias[c];
      if (lane_id() < 2) added[lane_id() * s.d + c] = sum + s.w.state[lane_id() * s.d + c];
    }
  }

  // By a warp: x of a position, where nothing is picked; zeros where there is none.
  UNMASK_DEVICE void embed(int64_t row, int position, float (&x)[kPerLane]) const {
    if (position >= s.length) return;
    const int64_t at = row * s.length + position;
    const SetPosition read(s.p, at);
    const int k = static_cast<int>(s.p.sizes.confidences);
    float* number = unit + warp_id() * s.wide;
    for (int j = lane_id(); j < s.numbers; j += 32) {
      const int place = j - k - 2;
      const float2 angle = angle_of(static_cast<double>(position) * s.w.frequencies[max(place, 0) % kSetPeriods]);
      number[j] = place < 0 ? read.number(j, k) : place < kSetPeriods ? angle.x : angle.y;
    }
    __syncwarp();
    const float* state_of = added + (s.p.mask[at] ? s.d : 0);
    for_channels(s.d, [&](int e, int c) {
      x[e] = s.w.numbers.bias[c];
      for (int j = 0; j < s.numbers; ++j) x[e] = fmaf(s.w.numbers.weight[c * s.numbers + j], number[j], x[e]);
      x[e] += s.p.table[read.token * s.d + c] + state_of[c];
    });
  }

  // By a warp for each row of a tile: a = layer norm of x.
  UNMASK_DEVICE void norm(const float (&x)[kPerLane], const PolicyLinear& by) const {
    float y[kPerLane];
    for_channels(s.d, [&](int e, int) { y[e] = x[e]; });
    normalise(y, s.d);
    __syncthreads();
    for_channels(s.d, [&](int e, int c) { a[warp_id() * row_stride(s.d) + c] = fmaf(y[e], by.weight[c], by.bias[c]); });
    __syncthreads();
  }

  // Queries, keys and values of a tile whose rows are x.
  UNMASK_DEVICE void project(int layer, int tile, const float (&x)[kPerLane]) const {
    const PolicyLinear& w = s.w.layers[layer].qkv;
    const AttentionTile to = projected(layer);
    norm(x, s.w.layers[layer].norm1);
    product<4>(a, row_stride(s.d), w.weight, s.d, 3 * s.d, s.d, [&](int r, int c, float u, float v) {
      const int position = tile * kRows + r, part = c / s.d, channel = c % s.d;
      u += w.bias[c];
      v += w.bias[c + 1];
      if (part == 2) {
        float* value = const_cast<float*>(to.value) + static_cast<int64_t>(channel) * s.padded + position;
        value[0] = u;
        value[s.padded] = v;
        return;
      }
      const float scale = part == 0 ? s.query_scale() : 1.0f;
      const float2 angle = angle_of(static_cast<double>(position) * s.rotary[channel % s.head / 2]);
      float* out = const_cast<float*>(part == 0 ? to.query : to.key) + static_cast<int64_t>(position) * s.d + channel;
      store2(out, (u * angle.x - v * angle.y) * scale, (u * angle.y + v * angle.x) * scale);
    });
  }

  // x through a layer whose keys and values are complete.
  UNMASK_DEVICE void apply(int layer, int tile, float (&x)[kPerLane]) const {
    const SetLayer& w = s.w.layers[layer];
    const int stride = row_stride(s.d), row = warp_id() * stride;
    AttentionTile of = projected(layer);
    of.query += static_cast<int64_t>(tile) * kRows * s.d;
    __syncthreads();
    for (int head = 0; head < s.heads; ++head) {
      attend<kSetThreads>(s, of, head, 0, ceil_div(s.padded, s.keys), attention, a, stride,
                          [&](int r, float2 scale) { inverse[head * kRows + r] = 1.0f / scale.y; });
    }
    for_channels(s.d, [&](int, int c) { a[row + c] *= inverse[c / s.head * kRows + warp_id()]; });
    __syncthreads();
    const auto emit = [&](int r, int c, float u, float v) { store2(unit + r * s.wide + c, u, v); };
    const auto add = [&](const float* from, const PolicyLinear& part) {
      __syncthreads();
      for_channels(s.d, [&](int e, int c) { x[e] += from[c] + part.bias[c]; });
    };
    product<4>(a, stride, w.out.weight, s.d, s.d, s.d, emit);
    add(unit + warp_id() * s.wide, w.out);
    norm(x, w.norm2);
    product<4>(a, stride, w.up.weight, s.d, s.ffn, s.d,
               [&](int r, int c, float u, float v) { emit(r, c, gelu(u + w.up.bias[c]), gelu(v + w.up.bias[c + 1])); });
    __syncthreads();
    product<4>(unit, s.wide, w.down.weight, s.ffn, s.d, s.ffn,
               [&](int r, int c, float u, float v) { store2(a + r * stride + c, u, v); });
    add(a + row, w.down);
  }

  // By a warp: a row of the first layer's input, with what was picked after the last run marked.
  UNMASK_DEVICE void enter(int64_t row, int position, bool begins, float (&x)[kPerLane]) const {
    float* const at = input + static_cast<int64_t>(position) * s.d;
    const float change = state[position] == kFresh ? 1.0f : 0.0f;
    for_channels(s.d, [&](int e, int c) {
      x[e] = begins ? 0.0f : fmaf(change, s.w.state[2 * s.d + c] - s.w.state[s.d + c], at[c]);
    });
    if (begins) embed(row, position, x);
    for_channels(s.d, [&](int e, int c) { at[c] = x[e]; });
  }

  // By a warp: what the network says of a position.
  UNMASK_DEVICE void predict(int64_t row, int position, bool begins, float (&x)[kPerLane]) const {
    const float logit = output_of(x, s.d, s.w.norm, s.w.output);
    if (lane_id() != 0 || position >= s.length) return;
    const int64_t at = row * s.length + position;
    const float p = set_probability(SetPosition(s.p, at).prior() + (s.p.bias ? s.p.bias[at] : 0.0f) + logit);
    probability[position] = p;
    if (begins && state[position] == kFree) s.p.score[at] = p;
  }

  // One run of the network, as far as this block has a part in it.
  UNMASK_DEVICE void run(int64_t row, bool begins) {
    float x[kPerLane];
    for (int tile = rank; tile < s.tiles; tile += s.team) {
      if (!begins && !any(tile, kFresh)) continue;
      enter(row, tile * kRows + warp_id(), begins, x);
      project(0, tile, x);
    }
    for (int layer = 0; layer < s.layers; ++layer) {
      const bool last = layer == s.layers - 1;
      const float* from = layer == 0 ? input : stream;
      meet();
      for (int tile = rank; tile < s.tiles; tile += s.team) {
        if (last && !any(tile, kFree)) continue;
        const int position = tile * kRows + warp_id();
        const int64_t at = static_cast<int64_t>(position) * s.d;
        for_channels(s.d, [&](int e, int c) { x[e] = from[at + c]; });
        apply(layer, tile, x);
        if (last) {
          predict(row, position, begins, x);
          continue;
        }
        for_channels(s.d, [&](int e, int c) { stream[at + c] = x[e]; });
        project(layer + 1, tile, x);
      }
    }
    meet();
  }
};

__global__ void __launch_bounds__(kSetThreads, 1) select_set_kernel(const __grid_constant__ SetWork s) {
  SetTeam team{s};
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t row = team.number; row < s.p.batch; row += s.teams) {
    const int64_t start = row * s.length;
    bool on = false;
    for (int i = thread; i < s.padded; i += kSetThreads) {
      const bool free = i < s.length && s.p.allowed[start + i] != 0;
      team.state[i] = free ? kFree : kBarred;
      on = on || free;
      if (team.rank == 0 && i < s.length) s.p.score[start + i] = 0.0f;
    }
    on = __syncthreads_or(on) != 0;
    if (on) team.share(row);
    __syncthreads();
    SetChoice choice(s.p.risk[row], s.p.sure);
    for (int64_t turn = 0; on && turn < s.p.runs; ++turn) {
      team.run(row, turn == 0);
      if (warp_id() == 0) {
        const bool more = choice.pick(WarpLanes(), s.length, team.probability, team.state);
        if (lane_id() == 0) *team.goes_on = more;
      }
      __syncthreads();
      on = *team.goes_on;
    }
    for (int i = thread; team.rank == 0 && i < s.length; i += kSetThreads) {
      s.p.select[start + i] = team.state[i] == kPicked || team.state[i] == kFresh;
    }
    __syncthreads();
  }
}

// Blocks of the kernel that the device runs at once: a team must be there together.
int blocks_at_once(const SelectSetParams& params) {
  const int floats = SetWork(params, 1, nullptr).shared_floats_needed();
  return resident_blocks(select_set_kernel, LaunchShape{1, kSetThreads, 4 * floats, nullptr});
}

}  // namespace

int64_t select_set_workspace(const SelectSetParams& params) {
  return SetWork(params, blocks_at_once(params), nullptr).bytes;
}

int select_set(const SelectSetParams& params, void* workspace, void* stream) {
  // Weights are read 16 bytes at a time.
  if (reinterpret_cast<uintptr_t>(params.weights) % 16 != 0) return cudaErrorMisalignedAddress;
  if (params.length > INT32_MAX / 1024) return cudaErrorInvalidValue;
  const SetWork work(params, blocks_at_once(params), workspace);
  const cudaError_t error =
      cudaMemsetAsync(work.arrived, 0, 4 * static_cast<size_t>(work.teams), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return error;
  LaunchShape shape{static_cast<unsigned>(work.team * work.teams), kSetThreads, 4 * work.shared_floats_needed(),
                    stream};
  shape.cooperative = true;
  return launch(select_set_kernel, shape, work);
}

}  // namespace unmask::cuda
