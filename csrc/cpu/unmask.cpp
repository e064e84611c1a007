// unmask_ on the CPU: a few hundred positions per row, so plain scalar code, one row after the other.
#include "../ops/unmask.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../ops/random.h"

namespace unmask {
namespace cpu {
namespace {

struct Row {
  const int64_t* candidates;
  const float* score;  // null if there is a decision
  const uint8_t* decision;
  int64_t* tokens;  // the buffer's part of the canvas
  uint8_t* mask;
  uint8_t* allowed;
  int32_t* rank;
  int64_t* numbers;  // kRowColumns
  uint64_t seed;
};

// One position that may be unmasked and the logarithm of its DPLS arrival time.
struct Arrival {
  double log_time;
  int64_t position;
};

int64_t first_mask(const uint8_t* mask, int64_t length) {
  int64_t i = 0;
  while (i < length && !mask[i]) ++i;
  return i;
}

uint32_t action_bits(const Row& row, uint32_t index, int64_t position) {
  const int64_t* n = row.numbers;
  return philox4x32(row.seed, index, static_cast<uint32_t>(position + n[kPosition]),
                    static_cast<uint32_t>(n[kSteps] + n[kDrawStep]), static_cast<uint32_t>(n[kSequence]))
      .word[0];
}

// log(exp(a) + exp(b)), infinities included.
double log_add(double a, double b) {
  const double high = std::max(a, b), low = std::min(a, b);
  return std::isinf(high) ? high : high + std::log1p(std::exp(low - high));
}

// The highest score; the lowest position among equals, and among nothing but NaN.
int64_t highest(const Row& row, const std::vector<int64_t>& positions) {
  int64_t best = -1;
  for (const int64_t i : positions) {
    if (!std::isnan(row.score[i]) && (best < 0 || row.score[i] > row.score[best])) best = i;
  }
  return best < 0 ? positions.front() : best;
}

// Marks rank 0 where u < scale * sigmoid(score / temperature); u is below 1, so the product needs no clamp.
bool draw_bernoulli(const UnmaskParams& params, const Row& row, const std::vector<int64_t>& positions) {
  bool any = false;
  for (const int64_t i : positions) {
    const double x = static_cast<double>(row.score[i]) / params.temperature;
    const double probability = params.scale * (1.0 / (1.0 + std::exp(-x)));
    if (static_cast<double>(uniform(action_bits(row, kActionIndex, i))) < probability) {
      row.rank[i] = 0;
      any = true;
    }
  }
  return any;
}

bool select_positive(const Row& row, const std::vector<int64_t>& positions) {
  bool any = false;
  for (const int64_t i : positions) {
    if (row.decision ? row.decision[i] != 0 : row.score[i] > 0.0f) {
      row.rank[i] = 0;
      any = true;
    }
  }
  return any;
}

// Plackett-Luce as a race: position i arrives at an exponential time of rate exp(utility), and the order of arrivals
// is the order of the draw. Once the first is in, STOP's clock starts (arrivals have no memory); whoever comes
// before it rings is drawn too. Times are compared by their logarithms: utilities of any size are fine.
void draw_dpls(const UnmaskParams& params, const Row& row, const std::vector<int64_t>& positions,
               std::vector<Arrival>& arrivals) {
  arrivals.clear();
  for (const int64_t i : positions) {
    if (std::isnan(row.score[i])) continue;
    const double utility = static_cast<double>(row.score[i]) / params.temperature;
    const double draw = exponential(action_bits(row, kActionIndex, i));
    arrivals.push_back(Arrival{std::log(draw) - utility, i});
  }
  if (arrivals.empty()) {
    row.rank[positions.front()] = 0;
    return;
  }
  std::sort(arrivals.begin(), arrivals.end(), [](const Arrival& a, const Arrival& b) {
    return a.log_time < b.log_time || (a.log_time == b.log_time && a.position < b.position);
  });
  const double stop_draw = exponential(action_bits(row, kStopIndex, 0));
  const double end = log_add(arrivals.front().log_time, std::log(stop_draw) - params.stop_logit);
  row.rank[arrivals.front().position] = 0;
  for (size_t n = 1; n < arrivals.size() && arrivals[n].log_time < end; ++n) {
    row.rank[arrivals[n].position] = static_cast<int32_t>(n);
  }
}

void draw_action(const UnmaskParams& params, const Row& row, const std::vector<int64_t>& positions,
                 std::vector<Arrival>& arrivals) {
  if (positions.empty()) return;
  bool any = true;
  switch (params.mode) {
    case ActionMode::kSelect:
      select_positive(row, positions);
      break;
    case ActionMode::kBernoulli:
      draw_bernoulli(params, row, positions);
      break;
    case ActionMode::kBernoulliArgmax:
      any = draw_bernoulli(params, row, positions);
      break;
    case ActionMode::kGreedy:
      any = select_positive(row, positions);
      break;
    case ActionMode::kDpls:
      draw_dpls(params, row, positions, arrivals);
      break;
  }
  if (!any) row.rank[highest(row, positions)] = 0;
}

// The first stop id before the first mask, -1 if there is none.
int64_t stop_before(const UnmaskParams& params, const int64_t* tokens, int64_t first) {
  const int64_t* stops = params.stops;
  const int64_t* found = std::find_first_of(tokens, tokens + first, stops, stops + params.num_stops);
  return found == tokens + first ? -1 : *found;
}

// Rules 4 and 5: the row's state after its tokens are written.
void update_state(const UnmaskParams& params, const Row& row) {
  const int64_t length = params.length, phase = row.numbers[kPhase];
  int64_t first = first_mask(row.mask, length);
  const int64_t stop = stop_before(params, row.tokens, first);
  if (stop >= 0) {
    for (int64_t i = first; i < length; ++i) {
      if (row.mask[i]) row.tokens[i] = stop;
      row.mask[i] = 0;
    }
    first = length;
  }
  const bool complete = first == length;
  const int64_t steps = row.numbers[kSteps] + 1;
  const RowStatus status = complete ? kComplete : steps >= params.max_steps ? kExhausted : kRunning;
  // No mask stands before the active block, so its end alone bounds it.
  const int64_t block_end = first + left_in_block(params, phase, first);
  int64_t remaining = 0;
  for (int64_t i = 0; i < length; ++i) {
    remaining += row.mask[i] != 0;
    row.allowed[i] = row.mask[i] != 0 && i < block_end && status == kRunning;
  }
  row.numbers[kSteps] = steps;
  row.numbers[kRemaining] = remaining;
  row.numbers[kBlock] = block_of(params, phase, first);
  row.numbers[kStatus] = status;
}

}  // namespace

void unmask(const UnmaskParams& params, int64_t begin, int64_t end) {
  const int64_t length = params.length;
  std::vector<int64_t> positions;
  std::vector<Arrival> arrivals;
  positions.reserve(static_cast<size_t>(std::min(params.block_length, length)));
  for (int64_t b = begin; b < end; ++b) {
    int32_t* rank = params.rank + b * length;
    int64_t* numbers = params.rows + b * kRowColumns;
    std::fill(rank, rank + length, -1);
    if (numbers[kStatus] != kRunning) continue;
    const Row row{params.candidates + b * length,
                  params.score ? params.score + b * length : nullptr,
                  params.decision ? params.decision + b * length : nullptr,
                  params.tokens + b * params.canvas_stride + params.start,
                  params.mask + b * length,
                  params.allowed + b * length,
                  rank,
                  numbers,
                  params.seed ? static_cast<uint64_t>(*params.seed) : 0};

    const int64_t first = first_mask(row.mask, length);
    const int64_t block_end = first + left_in_block(params, numbers[kPhase], first);
    positions.clear();
    for (int64_t i = first; i < block_end; ++i) {
      if (row.mask[i] && row.allowed[i]) positions.push_back(i);
    }
    draw_action(params, row, positions, arrivals);

    const bool poisoned = std::any_of(positions.begin(), positions.end(),
                                      [&row](int64_t i) { return row.rank[i] >= 0 && row.candidates[i] < 0; });
    if (poisoned) {
      std::fill(rank, rank + length, -1);
      std::fill(row.allowed, row.allowed + length, static_cast<uint8_t>(0));
      numbers[kStatus] = kPoisoned;
      continue;
    }
    for (const int64_t i : positions) {
      if (row.rank[i] < 0) continue;
      row.tokens[i] = row.candidates[i];
      row.mask[i] = 0;
    }
    update_state(params, row);
  }
}

}  // namespace cpu
}  // namespace unmask
