// unmask_ for one row, by the rules of unmask.h: the threads of a block share the work, on the CPU a block of one.
//
// A `Block` has `thread` (this one's number), `threads` (how many there are), `times` (room for one double per position
// of a block of the buffer, for kDpls), and for all threads together:
//   barrier(), all(x), min(x), sum(x)  order the memory of what comes before them and after
//   rank(n, taken, earlier, give)      give(i, how many j < n have earlier(j, i)) for every i < n with taken(i), of which
//                                      none but others that are taken are earlier
#pragma once
#include <math.h>

#include "unmask.h"

#if defined(__CUDACC__)
#define UNMASK_ROW __device__ __forceinline__
#else
#define UNMASK_ROW inline __attribute__((always_inline))
#endif

namespace unmask {

// The buffer's positions of one row.
struct UnmaskRow {
  const UnmaskParams& params;
  const int64_t* candidates;
  const float* score;       // null if there is a decision
  const uint8_t* decision;  // null if there are scores
  const uint8_t* revise;    // null if nothing is revised
  const uint8_t* editable;
  int64_t* tokens;  // the buffer's part of the canvas
  uint8_t* mask;
  uint8_t* allowed;
  int64_t* numbers;  // kRowColumns
  int32_t* rank;
  DrawKey key;                 // its position is that of the buffer's first
  int64_t begin = 0, end = 0;  // of the active block; it may begin with its first mask if nothing before that matters

  UNMASK_ROW UnmaskRow(const UnmaskParams& p, int64_t b)
      : params(p),
        candidates(p.candidates + b * p.length),
        score(p.score ? p.score + b * p.length : nullptr),
        decision(p.decision ? p.decision + b * p.length : nullptr),
        revise(p.revise ? p.revise + b * p.length : nullptr),
        editable(p.revise ? p.editable + b * p.length : nullptr),
        tokens(p.tokens + b * p.canvas_stride + p.start),
        mask(p.mask + b * p.length),
        allowed(p.allowed + b * p.length),
        numbers(p.rows + b * kRowColumns),
        rank(p.rank + b * p.length),
        key{p.seed ? static_cast<uint64_t>(*p.seed) : 0, static_cast<uint32_t>(numbers[kSequence]),
            static_cast<uint32_t>(numbers[kPosition]), static_cast<uint32_t>(numbers[kForwards] + numbers[kDrawStep])} {
  }

  UNMASK_ROW bool is_candidate(int64_t i) const { return mask[i] && allowed[i]; }
  UNMASK_ROW bool is_revised(int64_t i) const {
    return revise && revise[i] && editable[i] && !mask[i] && tokens[i] != candidates[i];
  }
  UNMASK_ROW double utility(int64_t i) const { return static_cast<double>(score[i]) / params.temperature; }

  UNMASK_ROW uint32_t bits(uint32_t index, int64_t position) const {
    const uint32_t at = key.position + static_cast<uint32_t>(position);
    return philox4x32(key.seed, index, at, key.step, key.sequence).word[0];
  }
  UNMASK_ROW double log_exponential(uint32_t index, int64_t position) const {
    return log(static_cast<double>(exponential(bits(index, position))));
  }

  // Whether candidate i is drawn, in every mode but kDpls. A NaN score compares false.
  UNMASK_ROW bool is_drawn(int64_t i) const {
    if (decision) return decision[i] != 0;
    if (params.mode == ActionMode::kSelect || params.mode == ActionMode::kGreedy) return score[i] > 0.0f;
    const double probability = params.scale * (1.0 / (1.0 + exp(-utility(i))));  // uniform draws are below 1: no clamp
    return static_cast<double>(uniform(bits(kActionIndex, i))) < probability;
  }
};

// The candidate with the smallest value(i), a double: the first one of equals, and where all are NaN. row.end if the row
// has no candidate.
template <typename Block, typename Value>
UNMASK_ROW int64_t smallest(const UnmaskRow& row, const Block& block, const Value& value) {
  double best = HUGE_VAL;
  int64_t position = row.end, first = row.end;
  for (int64_t i = row.begin + block.thread; i < row.end; i += block.threads) {
    if (!row.is_candidate(i)) continue;
    if (first == row.end) first = i;
    const double x = value(i);
    if (x < best || (x == best && position == row.end)) {
      best = x;
      position = i;
    }
  }
  position = block.min(best == block.min(best) ? position : row.end);
  return position < row.end ? position : block.min(first);
}

template <typename Block>
UNMASK_ROW void draw_independently(const UnmaskRow& row, const Block& block) {
  bool none = true;
  for (int64_t i = row.begin + block.thread; i < row.end; i += block.threads) {
    if (!row.is_candidate(i) || !row.is_drawn(i)) continue;
    row.rank[i] = 0;
    none = false;
  }
  if (row.params.mode != ActionMode::kBernoulliArgmax && row.params.mode != ActionMode::kGreedy) return;
  if (!block.all(none)) return;
  const int64_t chosen = smallest(row, block, [&row](int64_t i) { return -static_cast<double>(row.score[i]); });
  if (chosen < row.end && block.thread == 0) row.rank[chosen] = 0;
}

// log(exp(a) + exp(b)), infinities included.
UNMASK_ROW double log_add(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high == HUGE_VAL || high == -HUGE_VAL ? high : high + log1p(exp(low - high));
}

// Plackett-Luce as a race: position i arrives at an exponential time of rate exp(utility), and the order of arrivals is
// the order of the draw. Once the first is in, STOP's clock starts (arrivals have no memory); whoever comes before it
// rings is drawn too. Times are compared by their logarithms, so that utilities of any size are fine.
template <typename Block>
UNMASK_ROW void draw_race(const UnmaskRow& row, const Block& block) {
  double* times = block.times - row.begin;  // NaN where there is no candidate
  for (int64_t i = row.begin + block.thread; i < row.end; i += block.threads) {
    times[i] = row.is_candidate(i) ? row.log_exponential(kActionIndex, i) - row.utility(i) : static_cast<double>(NAN);
  }
  const int64_t winner = smallest(row, block, [times](int64_t i) { return times[i]; });  // publishes `times`
  if (winner == row.end) return;
  const double stop = log_add(times[winner], row.log_exponential(kStopIndex, 0) - row.params.stop_logit);
  const double* at = block.times;
  const int64_t first = winner - row.begin;
  block.rank(
      row.end - row.begin, [at, first, stop](int64_t i) { return at[i] < stop || i == first; },
      [at](int64_t i, int64_t j) { return at[i] < at[j] || (at[i] == at[j] && i < j); },
      [&row](int64_t i, int32_t rank) { row.rank[row.begin + i] = rank; });
}

template <typename Block>
UNMASK_ROW int64_t first_mask(const UnmaskRow& row, const Block& block) {
  int64_t i = block.thread;
  while (i < row.params.length && !row.mask[i]) i += block.threads;
  return block.min(i < row.params.length ? i : row.params.length);
}

// The first position before `end` that holds a stop id; `end` if there is none.
template <typename Block>
UNMASK_ROW int64_t first_stop(const UnmaskRow& row, int64_t end, const Block& block) {
  const UnmaskParams& params = row.params;
  if (params.num_stops == 0) return end;
  int64_t first = end;
  for (int64_t i = block.thread; i < end && first == end; i += block.threads) {
    for (int n = 0; n < params.num_stops; ++n) {
      if (row.tokens[i] == params.stops[n]) first = i;
    }
  }
  return block.min(first);
}

// Where the active block begins, if the row's first mask is at `first`.
UNMASK_ROW int64_t active_begin(const UnmaskRow& row, int64_t first) {
  const int64_t phase = row.numbers[kPhase], block = row.numbers[kBlock];
  if (row.params.max_post < 0 || block >= block_of(row.params, phase, first)) {
    return block_begin(row.params, phase, first);
  }
  // Unsigned, so that any block is somewhere.
  const uint64_t at = static_cast<uint64_t>(block) * static_cast<uint64_t>(row.params.block_length);
  const int64_t begin = static_cast<int64_t>(at - static_cast<uint64_t>(phase));
  return begin < 0 ? 0 : begin < first ? begin : first;
}

// Rules 4 to 6: the row's state after its tokens are written. Whether the active block had a mask before the call, and
// whether any token has changed.
template <typename Block>
UNMASK_ROW void update_state(const UnmaskRow& row, bool had_mask, bool changed, const Block& block) {
  const UnmaskParams& params = row.params;
  const int64_t length = params.length, phase = row.numbers[kPhase];
  const bool editing = params.max_post >= 0;
  int64_t first = first_mask(row, block);
  bool goes_on = editing && first >= row.end;  // the active block, without masks
  if (goes_on) goes_on = had_mask ? params.max_post > 0 : changed && row.numbers[kPost] < params.max_post - 1;
  int64_t active = goes_on ? row.begin : first;  // where the active block or its masks begin
  const int64_t limit = editing || params.settled_stop ? block_begin(params, phase, active) : first;
  const int64_t stop = first_stop(row, limit, block);
  if (stop < limit) {
    for (int64_t i = first + block.thread; i < length; i += block.threads) {
      if (row.mask[i]) row.tokens[i] = row.tokens[stop];
      row.mask[i] = 0;
    }
    active = first = length;
    block.barrier();
  }
  const int64_t steps = row.numbers[kSteps] + (!editing || had_mask);
  const bool exhausted = first < length && steps >= params.max_steps;
  const RowStatus status = active == length ? kComplete : exhausted ? kExhausted : kRunning;
  const int64_t end = active + left_in_block(params, phase, active);
  int64_t remaining = 0;
  for (int64_t i = block.thread; i < length; i += block.threads) {
    remaining += row.mask[i] != 0;
    row.allowed[i] = row.mask[i] && i < end && status == kRunning;  // no mask stands before the active block
  }
  remaining = block.sum(remaining);
  if (block.thread != 0) return;
  row.numbers[kSteps] = steps;
  row.numbers[kRemaining] = remaining;
  row.numbers[kBlock] = block_of(params, phase, active);
  row.numbers[kStatus] = status;
  row.numbers[kForwards] += 1;
  row.numbers[kPost] = goes_on && !had_mask && active < length ? row.numbers[kPost] + 1 : 0;
}

// One step of row b.
template <typename Block>
UNMASK_ROW void unmask_row(const UnmaskParams& params, int64_t b, const Block& block) {
  UnmaskRow row(params, b);
  for (int64_t i = block.thread; i < params.length; i += block.threads) row.rank[i] = -1;
  if (row.numbers[kStatus] != kRunning) return;
  const int64_t first = first_mask(row, block);  // orders the ranks above before those below
  row.begin = params.revise || params.max_post >= 0 ? active_begin(row, first) : first;
  row.end = row.begin + left_in_block(params, row.numbers[kPhase], row.begin);
  if (params.mode == ActionMode::kDpls) {
    draw_race(row, block);
  } else {
    draw_independently(row, block);
  }
  block.barrier();

  bool good = true, unchanged = true;
  const int64_t begin = params.everywhere ? 0 : row.begin;
  for (int64_t i = begin + block.thread; i < row.end; i += block.threads) {
    if (row.is_revised(i)) row.rank[i] = kRevised;
    good &= (row.rank[i] == -1) | (row.candidates[i] >= 0);
  }
  if (!block.all(good)) {
    for (int64_t i = block.thread; i < params.length; i += block.threads) {
      row.rank[i] = -1;
      row.allowed[i] = 0;
    }
    if (block.thread == 0) row.numbers[kStatus] = kPoisoned;
    return;
  }
  for (int64_t i = begin + block.thread; i < row.end; i += block.threads) {
    if (row.rank[i] == -1) continue;
    row.tokens[i] = row.candidates[i];
    row.mask[i] = 0;
    unchanged = false;
  }
  unchanged = block.all(unchanged);
  update_state(row, first < row.end, !unchanged, block);
}

}  // namespace unmask
