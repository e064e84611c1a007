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
  const int64_t* token;
  const float* score;
  int64_t* tokens;  // the buffer's part of the canvas
  uint8_t* mask;
  uint8_t* allowed;
  int32_t* rank;
  uint64_t seed;
  uint32_t sequence;
  uint32_t step;
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
  return philox4x32(row.seed, index, static_cast<uint32_t>(position), row.step, row.sequence).word[0];
}

// log(exp(a) + exp(b)), infinities included.
double log_add(double a, double b) {
  const double high = std::max(a, b), low = std::min(a, b);
  return std::isinf(high) ? high : high + std::log1p(std::exp(low - high));
}

// The highest score; the lowest position among equals, and among nothing but NaN.
int64_t highest(const Row& row, const std::vector<int64_t>& candidates) {
  int64_t best = -1;
  for (const int64_t i : candidates) {
    if (!std::isnan(row.score[i]) && (best < 0 || row.score[i] > row.score[best])) best = i;
  }
  return best < 0 ? candidates.front() : best;
}

// Marks rank 0 where u < scale * sigmoid(score / temperature); u is below 1, so the product needs no clamp.
bool draw_bernoulli(const UnmaskParams& params, const Row& row, const std::vector<int64_t>& candidates) {
  bool any = false;
  for (const int64_t i : candidates) {
    const double x = static_cast<double>(row.score[i]) / params.temperature;
    const double probability = params.scale * (1.0 / (1.0 + std::exp(-x)));
    if (static_cast<double>(uniform(action_bits(row, kActionIndex, i))) < probability) {
      row.rank[i] = 0;
      any = true;
    }
  }
  return any;
}

bool select_positive(const Row& row, const std::vector<int64_t>& candidates) {
  bool any = false;
  for (const int64_t i : candidates) {
    if (row.score[i] > 0.0f) {
      row.rank[i] = 0;
      any = true;
    }
  }
  return any;
}

// Plackett-Luce as a race: position i arrives at an exponential time of rate exp(utility), and the order of arrivals
// is the order of the draw. Once the first is in, STOP's clock starts (arrivals have no memory); whoever comes
// before it rings is drawn too. Times are compared by their logarithms: utilities of any size are fine.
void draw_dpls(const UnmaskParams& params, const Row& row, const std::vector<int64_t>& candidates,
               std::vector<Arrival>& arrivals) {
  arrivals.clear();
  for (const int64_t i : candidates) {
    if (std::isnan(row.score[i])) continue;
    const double utility = static_cast<double>(row.score[i]) / params.temperature;
    const double draw = exponential(action_bits(row, kActionIndex, i));
    arrivals.push_back(Arrival{std::log(draw) - utility, i});
  }
  if (arrivals.empty()) {
    row.rank[candidates.front()] = 0;
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

void draw_action(const UnmaskParams& params, const Row& row, const std::vector<int64_t>& candidates,
                 std::vector<Arrival>& arrivals) {
  if (candidates.empty()) return;
  bool any = true;
  switch (params.mode) {
    case ActionMode::kSelect:
      select_positive(row, candidates);
      break;
    case ActionMode::kBernoulli:
      draw_bernoulli(params, row, candidates);
      break;
    case ActionMode::kBernoulliArgmax:
      any = draw_bernoulli(params, row, candidates);
      break;
    case ActionMode::kGreedy:
      any = select_positive(row, candidates);
      break;
    case ActionMode::kDpls:
      draw_dpls(params, row, candidates, arrivals);
      break;
  }
  if (!any) row.rank[highest(row, candidates)] = 0;
}

// Whether an EOS stands before the first mask.
bool ends_before(const int64_t* tokens, int64_t first, int64_t eos) {
  return eos >= 0 && std::find(tokens, tokens + first, eos) != tokens + first;
}

// Rules 4 and 5: the row's state after its tokens are written.
void update_state(const UnmaskParams& params, const Row& row, int64_t b) {
  const int64_t length = params.length;
  params.steps[b] += 1;
  int64_t first = first_mask(row.mask, length);
  if (ends_before(row.tokens, first, params.eos)) {
    for (int64_t i = first; i < length; ++i) {
      if (row.mask[i]) row.tokens[i] = params.eos;
      row.mask[i] = 0;
    }
    first = length;
  }
  const bool complete = first == length;
  if (complete || params.steps[b] >= params.max_steps) {
    params.done[b] = 1;
    params.status[b] = complete ? kComplete : kExhausted;
  }
  const int64_t blocks = (length + params.block_length - 1) / params.block_length;
  params.block[b] = complete ? blocks : first / params.block_length;
  const int64_t block_end = (params.block[b] + 1) * params.block_length;
  params.remaining[b] = 0;
  for (int64_t i = 0; i < length; ++i) {
    params.remaining[b] += row.mask[i] != 0;
    // No mask stands before the active block, so its end alone bounds it.
    row.allowed[i] = row.mask[i] != 0 && i < block_end && !params.done[b];
  }
}

}  // namespace

void unmask(const UnmaskParams& params, int64_t begin, int64_t end) {
  const int64_t length = params.length;
  std::vector<int64_t> candidates;
  std::vector<Arrival> arrivals;
  candidates.reserve(static_cast<size_t>(params.block_length));
  for (int64_t b = begin; b < end; ++b) {
    int32_t* rank = params.rank + b * length;
    std::fill(rank, rank + length, -1);
    if (params.done[b]) continue;
    const Row row{params.token + b * length,
                  params.score + b * length,
                  params.tokens + b * params.canvas_stride + params.start,
                  params.mask + b * length,
                  params.allowed + b * length,
                  rank,
                  params.seed ? static_cast<uint64_t>(*params.seed) : 0,
                  static_cast<uint32_t>(params.sequence ? params.sequence[b] : b),
                  static_cast<uint32_t>(params.steps[b])};

    const int64_t first = first_mask(row.mask, length);
    const int64_t block_end = std::min(length, (first / params.block_length + 1) * params.block_length);
    candidates.clear();
    for (int64_t i = first; i < block_end; ++i) {
      if (row.mask[i] && row.allowed[i]) candidates.push_back(i);
    }
    draw_action(params, row, candidates, arrivals);

    const bool poisoned = std::any_of(candidates.begin(), candidates.end(),
                                      [&row](int64_t i) { return row.rank[i] >= 0 && row.token[i] < 0; });
    if (poisoned) {
      std::fill(rank, rank + length, -1);
      std::fill(row.allowed, row.allowed + length, static_cast<uint8_t>(0));
      params.status[b] = kPoisoned;
      params.done[b] = 1;
      continue;
    }
    for (const int64_t i : candidates) {
      if (row.rank[i] < 0) continue;
      row.tokens[i] = row.token[i];
      row.mask[i] = 0;
    }
    update_state(params, row, b);
  }
}

}  // namespace cpu
}  // namespace unmask
