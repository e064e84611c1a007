// unmask_ on CUDA: one block per row. The rows are short, so a launch costs more than the work in it.
#include "../ops/unmask.h"

#include <float.h>

#include "../ops/random.h"
#include "portable.cuh"

namespace unmask {
namespace cuda {
namespace {

constexpr int kUnmaskThreads = 256;
constexpr int kUnmaskWarps = kUnmaskThreads / 32;
constexpr double kInfinity = HUGE_VAL;

// Dynamic shared memory: this, and for kDpls one arrival time per position of a block.
struct Shared {
  int64_t lowest[kUnmaskWarps];
  double time[kUnmaskWarps];
  int64_t count;
};
constexpr int kTimesOffset = (sizeof(Shared) + 15) / 16 * 16;

struct Row {
  const int64_t* candidates;
  const float* score;  // null if there is a decision
  const uint8_t* decision;
  int64_t* tokens;  // the buffer's part of the canvas
  uint8_t* mask;
  uint8_t* allowed;
  int32_t* rank;
  uint64_t seed;
  uint32_t sequence, step, offset;  // of the key of the draws
  int64_t phase;
  int64_t begin, end;  // from the first mask to the end of its block
};

UNMASK_DEVICE uint32_t action_bits(const Row& row, uint32_t index, int64_t position) {
  return philox4x32(row.seed, index, static_cast<uint32_t>(position) + row.offset, row.step, row.sequence).word[0];
}

// By the block: the smallest of the threads' values, in every thread.
UNMASK_DEVICE int64_t block_min(int64_t x, Shared* shared) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    const long long other = __shfl_xor_sync(kFullWarp, static_cast<long long>(x), offset);
    x = other < x ? other : x;
  }
  __syncthreads();  // earlier readers are done
  if (threadIdx.x % 32 == 0) shared->lowest[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < kUnmaskWarps; ++w) x = shared->lowest[w] < x ? shared->lowest[w] : x;
  return x;
}

UNMASK_DEVICE bool block_any(bool x, Shared* shared) { return block_min(x ? 0 : 1, shared) == 0; }

// By the block: the position of the smallest (value, position) pair.
UNMASK_DEVICE int64_t block_argmin(double value, int64_t position, Shared* shared) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    const double other = __shfl_xor_sync(kFullWarp, value, offset);
    const long long at = __shfl_xor_sync(kFullWarp, static_cast<long long>(position), offset);
    if (other < value || (other == value && at < position)) {
      value = other;
      position = at;
    }
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    shared->time[threadIdx.x / 32] = value;
    shared->lowest[threadIdx.x / 32] = position;
  }
  __syncthreads();
  for (int w = 0; w < kUnmaskWarps; ++w) {
    if (shared->time[w] < value || (shared->time[w] == value && shared->lowest[w] < position)) {
      value = shared->time[w];
      position = shared->lowest[w];
    }
  }
  return position;
}

UNMASK_DEVICE int64_t first_mask(const uint8_t* mask, int64_t length, Shared* shared) {
  int64_t first = length;
  for (int64_t i = threadIdx.x; i < length && first == length; i += kUnmaskThreads) {
    if (mask[i]) first = i;
  }
  return block_min(first, shared);
}

UNMASK_DEVICE bool is_candidate(const Row& row, int64_t i) { return row.mask[i] && row.allowed[i]; }

// log(exp(a) + exp(b)), infinities included.
UNMASK_DEVICE double log_add(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high == kInfinity || high == -kInfinity ? high : high + log1p(exp(low - high));
}

UNMASK_DEVICE bool drawn(const UnmaskParams& params, const Row& row, int64_t i) {
  if (row.decision) return row.decision[i] != 0;
  const float score = row.score[i];
  if (params.mode == ActionMode::kSelect || params.mode == ActionMode::kGreedy) return score > 0.0f;
  const double x = static_cast<double>(score) / params.temperature;
  const double probability = params.scale * (1.0 / (1.0 + exp(-x)));  // NaN compares false
  return static_cast<double>(uniform(action_bits(row, kActionIndex, i))) < probability;
}

// By the block: every mode but kDpls. Each thread looks after the positions begin + thread + n * kUnmaskThreads.
UNMASK_DEVICE void draw_independently(const UnmaskParams& params, const Row& row, Shared* shared) {
  bool any = false;
  double best = kInfinity;  // of the negated scores
  int64_t best_position = row.end, first = row.end;
  for (int64_t i = row.begin + threadIdx.x; i < row.end; i += kUnmaskThreads) {
    if (!is_candidate(row, i)) continue;
    if (first == row.end) first = i;
    if (drawn(params, row, i)) {
      row.rank[i] = 0;
      any = true;
    }
    if (row.decision) continue;
    const double negated = -static_cast<double>(row.score[i]);
    if (negated < best || (negated == best && best_position == row.end)) {
      best = negated;
      best_position = i;
    }
  }
  if (params.mode != ActionMode::kBernoulliArgmax && params.mode != ActionMode::kGreedy) return;
  if (block_any(any, shared)) return;
  int64_t chosen = block_argmin(best, best_position, shared);
  if (chosen == row.end) chosen = block_min(first, shared);  // nothing but NaN
  if (chosen < row.end && threadIdx.x == 0) row.rank[chosen] = 0;
}

// By the block: dynamic Plackett-Luce as a race, see csrc/ops/unmask.h. times[i] is the logarithm of the arrival time
// of position begin + i, NaN where there is none.
UNMASK_DEVICE void draw_race(const UnmaskParams& params, const Row& row, Shared* shared, double* times) {
  double best = kInfinity;
  int64_t best_position = row.end, first = row.end;
  for (int64_t i = row.begin + threadIdx.x; i < row.end; i += kUnmaskThreads) {
    double time = NAN;
    if (is_candidate(row, i)) {
      if (first == row.end) first = i;
      const double utility = static_cast<double>(row.score[i]) / params.temperature;
      time = log(static_cast<double>(exponential(action_bits(row, kActionIndex, i)))) - utility;
      if (time < best || (time == best && best_position == row.end)) {
        best = time;
        best_position = i;
      }
    }
    times[i - row.begin] = time;
  }
  const int64_t winner = block_argmin(best, best_position, shared);  // its barriers publish `times`
  if (winner == row.end) {
    first = block_min(first, shared);
    if (first < row.end && threadIdx.x == 0) row.rank[first] = 0;
    return;
  }
  const double stop = log(static_cast<double>(exponential(action_bits(row, kStopIndex, 0)))) - params.stop_logit;
  const double start = times[winner - row.begin];
  const double end = log_add(start, stop);
  const int64_t count = row.end - row.begin;
  for (int64_t i = threadIdx.x; i < count; i += kUnmaskThreads) {
    const double time = times[i];
    if (!(time < end) && row.begin + i != winner) continue;
    // The rank is the number of earlier arrivals; all of them come before `end` too, or are the winner.
    int32_t earlier = 0;
    for (int64_t j = 0; j < count; ++j) earlier += times[j] < time || (times[j] == time && j < i) ? 1 : 0;
    row.rank[row.begin + i] = earlier;
  }
}

UNMASK_DEVICE bool is_stop(const UnmaskParams& params, int64_t token) {
  bool found = false;
  for (int n = 0; n < params.num_stops; ++n) found |= token == params.stops[n];
  return found;
}

// By the block: rules 4 and 5, the row's state after its tokens are written.
UNMASK_DEVICE void update_state(const UnmaskParams& params, const Row& row, int64_t* numbers, Shared* shared) {
  const int64_t length = params.length;
  __syncthreads();  // the tokens and masks written by other threads
  int64_t first = first_mask(row.mask, length, shared);
  if (params.num_stops > 0) {
    int64_t stop = length;
    for (int64_t i = threadIdx.x; i < first && stop == length; i += kUnmaskThreads) {
      if (is_stop(params, row.tokens[i])) stop = i;
    }
    stop = block_min(stop, shared);
    if (stop < length) {
      const int64_t fill = row.tokens[stop];
      for (int64_t i = first + threadIdx.x; i < length; i += kUnmaskThreads) {
        if (row.mask[i]) row.tokens[i] = fill;
        row.mask[i] = 0;
      }
      first = length;
    }
  }
  const bool complete = first == length;
  const int64_t steps = numbers[kSteps] + 1;
  const RowStatus status = complete ? kComplete : steps >= params.max_steps ? kExhausted : kRunning;
  const int64_t block_end = first + left_in_block(params, row.phase, first);
  if (threadIdx.x == 0) shared->count = 0;
  __syncthreads();  // also: every thread has read steps
  unsigned long long remaining = 0;
  for (int64_t i = threadIdx.x; i < length; i += kUnmaskThreads) {
    const bool masked = !complete && row.mask[i];
    remaining += masked ? 1 : 0;
    row.allowed[i] = masked && i < block_end && status == kRunning ? 1 : 0;  // no mask stands before the active block
  }
  if (remaining > 0) atomicAdd(reinterpret_cast<unsigned long long*>(&shared->count), remaining);
  __syncthreads();
  if (threadIdx.x != 0) return;
  numbers[kSteps] = steps;
  numbers[kRemaining] = shared->count;
  numbers[kBlock] = block_of(params, row.phase, first);
  numbers[kStatus] = status;
}

__global__ void __launch_bounds__(kUnmaskThreads) unmask_kernel(const __grid_constant__ UnmaskParams params) {
  Shared* shared = reinterpret_cast<Shared*>(dynamic_shared());
  double* times = reinterpret_cast<double*>(dynamic_shared() + kTimesOffset);
  const int64_t b = blockIdx.x, length = params.length;
  int64_t* numbers = params.rows + b * kRowColumns;
  int32_t* rank = params.rank + b * length;
  for (int64_t i = threadIdx.x; i < length; i += kUnmaskThreads) rank[i] = -1;
  if (numbers[kStatus] != kRunning) return;
  Row row{params.candidates + b * length,
          params.score ? params.score + b * length : nullptr,
          params.decision ? params.decision + b * length : nullptr,
          params.tokens + b * params.canvas_stride + params.start,
          params.mask + b * length,
          params.allowed + b * length,
          rank,
          params.seed ? static_cast<uint64_t>(*params.seed) : 0,
          static_cast<uint32_t>(numbers[kSequence]),
          static_cast<uint32_t>(numbers[kSteps] + numbers[kDrawStep]),
          static_cast<uint32_t>(numbers[kPosition]),
          numbers[kPhase],
          0,
          0};
  row.begin = first_mask(row.mask, length, shared);  // its barriers order the ranks above before those below
  row.end = row.begin + left_in_block(params, row.phase, row.begin);
  if (params.mode == ActionMode::kDpls) {
    draw_race(params, row, shared, times);
  } else {
    draw_independently(params, row, shared);
  }
  __syncthreads();

  bool bad = false;
  for (int64_t i = row.begin + threadIdx.x; i < row.end; i += kUnmaskThreads) {
    bad |= rank[i] >= 0 && row.candidates[i] < 0;
  }
  if (block_any(bad, shared)) {
    for (int64_t i = threadIdx.x; i < length; i += kUnmaskThreads) {
      rank[i] = -1;
      row.allowed[i] = 0;
    }
    if (threadIdx.x == 0) numbers[kStatus] = kPoisoned;
    return;
  }
  for (int64_t i = row.begin + threadIdx.x; i < row.end; i += kUnmaskThreads) {
    if (rank[i] < 0) continue;
    row.tokens[i] = row.candidates[i];
    row.mask[i] = 0;
  }
  update_state(params, row, numbers, shared);
}

}  // namespace

int unmask(const UnmaskParams& params, void* stream) {
  if (params.batch == 0) return cudaSuccess;
  DeviceInfo device;
  const cudaError_t error = query_device(&device);
  if (error != cudaSuccess) return error;
  int64_t shared_bytes = kTimesOffset;
  const int64_t block = params.block_length < params.length ? params.block_length : params.length;
  if (params.mode == ActionMode::kDpls) shared_bytes += block * static_cast<int64_t>(sizeof(double));
  // A block of some 28,000 positions on Hopper: more than any generation buffer.
  if (shared_bytes > device.shared_bytes || params.batch > INT32_MAX) return cudaErrorInvalidValue;
  LaunchShape shape = {};
  shape.grid_x = static_cast<unsigned>(params.batch);
  shape.grid_y = 1;
  shape.threads = kUnmaskThreads;
  shape.cluster = 1;
  shape.shared_bytes = static_cast<int>(shared_bytes);
  shape.stream = stream;
  return launch(unmask_kernel, shape, params);
}

}  // namespace cuda
}  // namespace unmask
