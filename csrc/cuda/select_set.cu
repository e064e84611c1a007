// select_set on CUDA: one cooperative kernel. A team of blocks takes one row of the batch after the other through all
// its runs, each block the same tiles of 16 positions throughout. The team meets where the keys and values of a layer are
// complete, and where the probabilities are; the choice each block makes for itself, all alike.
#include "../ops/select_set_row.h"
#include "policy_tile.cuh"

namespace unmask::cuda {
namespace {

struct SetWork : AttentionShape {
  SelectSetParams p;
  SetWeightView w;
  int layers, ffn, numbers, wide;  // wide: floats from one row of hidden units to the next
  uint64_t launch = 0;
  int tiles, team, teams;  // tiles of a row; blocks of a team
  // In the workspace: of each team, but states of each block.
  unsigned long long* meetings;
  uint8_t* states;             // (positions)
  float *input, *stream;       // (positions, D) of the first layer, and of the layer at work
  float *query, *key, *value;  // (layers, positions, D), value (layers, D, positions)
  float* probability;          // (positions)
  int64_t bytes;

  // For as many blocks as are resident. Without a workspace it only says how many bytes one must have.
  SetWork(const SelectSetParams& params, int blocks, void* workspace)
      : AttentionShape(params.length, params.sizes.hidden, params.sizes.heads),
        p(params),
        w(params.weights, params.sizes, params.layers),
        layers(static_cast<int>(p.layers)),
        ffn(static_cast<int>(p.sizes.ffn)),
        numbers(static_cast<int>(set_numbers(p.sizes))),
        wide(row_stride(std::max(ffn, d))),
        tiles(padded / kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(p.batch, blocks));
    team = std::min(blocks / rows, tiles);
    teams = std::min(rows, blocks / team);
    const int64_t positions = static_cast<int64_t>(teams) * padded;
    Pieces take{workspace};
    meetings = reinterpret_cast<unsigned long long*>(take(2 * teams));
    states = reinterpret_cast<uint8_t*>(take(team * positions / 4));
    for (float** at : {&input, &stream}) *at = take(positions * d);
    for (float** at : {&query, &key, &value}) *at = take(layers * positions * d);
    probability = take(positions);
    bytes = take.bytes;
  }
  int shared_bytes() const {
    const int most = std::max(kRows * std::max(wide, row_stride(numbers) + row_stride(d)), floats());
    return 4 * (kRows * (row_stride(d) + heads + 1) + most);
  }
};

struct WarpLanes {
  int lane = lane_id(), lanes = 32;

  UNMASK_DEVICE bool any(bool x) const { return __any_sync(kFullWarp, x) != 0; }
  UNMASK_DEVICE void best(float* p, int64_t* i) const {
    const uint64_t key = warp_max(*p < 0.0f ? 0 : make_key(*p, static_cast<uint32_t>(*i)));
    if (key == 0) return;  // in no lane anything
    *p = key_value(key);
    *i = key_id(key);
  }
};

// A row of the batch, as a block of the team sees it. What is said of x: a warp has a row of a tile.
struct SetTeam {
  const SetWork& s;
  const int number = block_id() / s.team, rank = block_id() % s.team;
  const int64_t first = static_cast<int64_t>(number) * s.padded;  // of the team's positions in the workspace
  uint8_t* const state = s.states + static_cast<int64_t>(block_id()) * s.padded;
  // In shared memory.
  float* const a = shared_floats();                    // (16, D)
  float* const inverse = a + kRows * row_stride(s.d);  // (heads, 16)
  bool* const goes_on = reinterpret_cast<bool*>(inverse + kRows * s.heads);
  float* const unit = inverse + kRows * (s.heads + 1);  // what is at work: inputs, attention, hidden units (16, wide)
  const int stride = row_stride(s.d), mine = warp_id() * stride;
  Meeting blocks{s.meetings + number, s.launch, static_cast<unsigned>(s.team)};

  UNMASK_DEVICE float* input() const { return s.input + first * s.d; }
  UNMASK_DEVICE float* stream() const { return s.stream + first * s.d; }
  UNMASK_DEVICE float* probability() const { return s.probability + first; }

  // Of a layer, query, key and value of the team's first position.
  UNMASK_DEVICE AttentionTile projected(int layer) const {
    const int64_t at = (static_cast<int64_t>(layer) * s.teams * s.padded + first) * s.d;
    return {s.query + at, s.key + at, s.value + at};
  }

  // Whether a position of the tile is in this state.
  UNMASK_DEVICE bool any(int tile, uint8_t wanted) const {
    return __any_sync(kFullWarp, state[tile * kRows + lane_id() % kRows] == wanted) != 0;
  }

  // x = the network's input at a position, beyond the row's end that of the last one, where nothing is picked.
  UNMASK_DEVICE void embed(int64_t row, int position, float (&x)[kPerLane]) const {
    int open = 0;
    for (int i = lane_id(); i < s.length; i += 32) open += s.p.mask[row * s.length + i] ? 0 : 1;
    open = __reduce_add_sync(kFullWarp, open);
    const float part = 4.0f * (static_cast<float>(open) / static_cast<float>(s.length));
    const int64_t at = row * s.length + position;
    const SetPosition read(s.p, at);
    const int k = static_cast<int>(s.p.sizes.confidences), wide = row_stride(s.numbers);
    float* const sums = unit + kRows * wide;
    __syncthreads();  // the tile before may still be read
    for (int j = lane_id(); j < s.numbers; j += 32) {
      const int place = j - k - 2;
      const float2 angle = angle_of(static_cast<double>(position) * s.w.frequencies[max(place, 0) % kSetPeriods]);
      unit[warp_id() * wide + j] = place < 0                 ? read.number(j, k)
                                   : place < kSetPeriods     ? angle.x
                                   : place < 2 * kSetPeriods ? angle.y
                                                             : 0.0f;
    }
    for_channels(s.d,
                 [&](int, int c) { a[mine + c] = silu(fmaf(s.w.share_in.weight[c], part, s.w.share_in.bias[c])); });
    __syncthreads();
    product<4>(unit, wide, s.w.numbers.weight, s.numbers, s.d, s.numbers,
               [&](int r, int c, float u, float v) { store2(sums + r * stride + c, u, v); });
    product<4>(a, stride, s.w.share_out.weight, s.d, s.d, s.d, [&](int r, int c, float u, float v) {
      float* to = sums + r * stride + c;
      store2(to, to[0] + u, to[1] + v);
    });
    __syncthreads();
    const float *token = s.p.table + read.token * s.d, *mask = s.w.state + (s.p.mask[at] ? s.d : 0);
    for_channels(s.d, [&](int e, int c) {
      x[e] = sums[mine + c] + s.w.numbers.bias[c] + s.w.share_out.bias[c] + token[c] + mask[c];
    });
  }

  // a = layer norm of x.
  UNMASK_DEVICE void norm(const float (&x)[kPerLane], const PolicyLinear& by) const {
    float y[kPerLane];
    for_channels(s.d, [&](int e, int) { y[e] = x[e]; });
    normalise(y, s.d);
    __syncthreads();
    for_channels(s.d, [&](int e, int c) { a[mine + c] = fmaf(y[e], by.weight[c], by.bias[c]); });
    __syncthreads();
  }

  // Queries, keys and values of a tile whose rows are x.
  UNMASK_DEVICE void project(int layer, int tile, const float (&x)[kPerLane]) const {
    const PolicyLinear& w = s.w.layers[layer].qkv;
    const AttentionTile to = projected(layer);
    norm(x, s.w.layers[layer].norm1);
    product<4>(a, stride, w.weight, s.d, 3 * s.d, s.d, [&](int r, int c, float u, float v) {
      s.store_projected(to, c / s.d, tile * kRows + r, tile * kRows + r, c % s.d, u + w.bias[c], v + w.bias[c + 1]);
    });
  }

  // x through a layer whose keys and values are complete.
  UNMASK_DEVICE void apply(int layer, int tile, float (&x)[kPerLane]) const {
    const SetLayer& w = s.w.layers[layer];
    AttentionTile of = projected(layer);
    of.query += static_cast<int64_t>(tile) * kRows * s.d;
    __syncthreads();
    for (int head = 0; head < s.heads; ++head) {
      attend(s, of, head, 0, ceil_div(s.padded, s.keys), unit, a, stride,
             [&](int r, float2 scale) { inverse[head * kRows + r] = 1.0f / scale.y; });
    }
    for_channels(s.d, [&](int, int c) { a[mine + c] *= inverse[c / s.head * kRows + warp_id()]; });
    __syncthreads();
    const auto add = [&](const float* from, const PolicyLinear& layer_of) {
      __syncthreads();
      for_channels(s.d, [&](int e, int c) { x[e] += from[c] + layer_of.bias[c]; });
    };
    product<4>(a, stride, w.out.weight, s.d, s.d, s.d,
               [&](int r, int c, float u, float v) { store2(unit + r * s.wide + c, u, v); });
    add(unit + warp_id() * s.wide, w.out);
    norm(x, w.norm2);
    product<4>(a, stride, w.up.weight, s.d, s.ffn, s.d, [&](int r, int c, float u, float v) {
      store2(unit + r * s.wide + c, gelu(u + w.up.bias[c]), gelu(v + w.up.bias[c + 1]));
    });
    __syncthreads();
    product<4>(unit, s.wide, w.down.weight, s.ffn, s.d, s.ffn,
               [&](int r, int c, float u, float v) { store2(a + r * stride + c, u, v); });
    add(a + mine, w.down);
  }

  // What the network says of a position, from the last layer's x.
  UNMASK_DEVICE void predict(int64_t row, int position, bool begins, float (&x)[kPerLane]) const {
    const float logit = output_of(x, s.d, s.w.norm, s.w.output);
    if (lane_id() != 0 || position >= s.length) return;
    const int64_t at = row * s.length + position;
    const float p = set_probability(SetPosition(s.p, at).prior() + (s.p.bias ? s.p.bias[at] : 0.0f) + logit);
    probability()[position] = p;
    if (begins && state[position] == kFree) s.p.score[at] = p;
  }

  // One run of the network, as far as this block has a part in it.
  UNMASK_DEVICE void run(int64_t row, bool begins) {
    float x[kPerLane];
    for (int tile = rank; tile < s.tiles; tile += s.team) {
      if (!begins && !any(tile, kFresh)) continue;
      const int position = tile * kRows + warp_id();
      float* const at = input() + static_cast<int64_t>(position) * s.d;
      const float change = state[position] == kFresh ? 1.0f : 0.0f;
      if (begins) embed(row, min(position, s.length - 1), x);
      for_channels(s.d, [&](int e, int c) {
        if (!begins) x[e] = fmaf(change, s.w.state[2 * s.d + c] - s.w.state[s.d + c], at[c]);
        at[c] = x[e];
      });
      project(0, tile, x);
    }
    for (int layer = 0; layer < s.layers; ++layer) {
      const bool last = layer == s.layers - 1;
      blocks.meet();
      for (int tile = rank; tile < s.tiles; tile += s.team) {
        if (last && !any(tile, kFree)) continue;
        const int position = tile * kRows + warp_id();
        const int64_t at = static_cast<int64_t>(position) * s.d;
        for_channels(s.d, [&](int e, int c) { x[e] = (layer == 0 ? input() : stream())[at + c]; });
        apply(layer, tile, x);
        if (last) {
          predict(row, position, begins, x);
          continue;
        }
        for_channels(s.d, [&](int e, int c) { stream()[at + c] = x[e]; });
        project(layer + 1, tile, x);
      }
    }
    blocks.meet();
  }
};

__global__ void __launch_bounds__(kRowThreads, 1) select_set_kernel(const __grid_constant__ SetWork s) {
  SetTeam team{s};
  if (threadIdx.x == 0) team.blocks.open();
  for (int64_t row = team.number; row < s.p.batch; row += s.teams) {
    const int64_t start = row * s.length;
    bool on = false;
    for (int i = thread_id(); i < s.padded; i += kRowThreads) {
      const bool free = i < s.length && s.p.allowed[start + i] != 0;
      team.state[i] = free ? kFree : kBarred;
      on = on || free;
      if (team.rank == 0 && i < s.length) s.p.score[start + i] = 0.0f;
    }
    on = __syncthreads_or(on) != 0;
    SetChoice choice(s.p.risk[row], s.p.sure);
    for (int64_t turn = 0; on && turn < s.p.runs; ++turn) {
      team.run(row, turn == 0);
      if (warp_id() == 0) {
        const bool more = choice.pick(WarpLanes(), s.length, team.probability(), team.state);
        if (lane_id() == 0) *team.goes_on = more;
      }
      __syncthreads();
      on = *team.goes_on;
    }
    for (int i = thread_id(); team.rank == 0 && i < s.length; i += kRowThreads) {
      s.p.select[start + i] = team.state[i] == kPicked || team.state[i] == kFresh;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) team.blocks.close();
}

// For the blocks that the device runs at once, as a team must be there together.
SetWork work_of(const SelectSetParams& params, void* workspace) {
  const LaunchShape shape{1, kRowThreads, SetWork(params, 1, nullptr).shared_bytes(), nullptr};
  return SetWork(params, resident_blocks(select_set_kernel, shape), workspace);
}

}  // namespace

int64_t select_set_workspace(const SelectSetParams& params) { return work_of(params, nullptr).bytes; }

int select_set(const SelectSetParams& params, void* workspace, void* stream) {
  const cudaError_t error = check_network(params);
  if (error != cudaSuccess) return error;
  const SetWork work = work_of(params, workspace);
  const LaunchShape shape{static_cast<unsigned>(work.team * work.teams), kRowThreads, work.shared_bytes(), stream};
  return launch_together(select_set_kernel, shape, work);
}

}  // namespace unmask::cuda
