// choose for one row, by the rules of choose.h: the threads of a block share the work, on the CPU a block of one. Blocks are
// those of unmask_row.h, with two more members:
//   before(x)                            sum of x over the threads of lower number
//   rank(n, taken, earlier, give)        give(i, how many j < n have earlier(j, i)) for every i < n with taken(i)
#pragma once
#include <float.h>
#include <math.h>

#include "choose.h"
#include "unmask_row.h"

namespace unmask {

// Of each position of the region, in its order; L of each.
struct ChooseScratch {
  int32_t *place, *rank, *order;  // position in the buffer; rank and, the other way round, which has it
  float* score;
  uint8_t* picked;
  static constexpr int64_t kBytes = 3 * sizeof(int32_t) + sizeof(float) + 1;

  UNMASK_HD ChooseScratch(void* memory, int64_t length)
      : place(static_cast<int32_t*>(memory)),
        rank(place + length),
        order(rank + length),
        score(reinterpret_cast<float*>(order + length)),
        picked(reinterpret_cast<uint8_t*>(score + length)) {}
};

template <typename Block>
struct ChooseRow {
  const ChooseParams& p;
  const Block& block;
  const int64_t row, from;  // from: of the row's first position in (B, L)
  const ChooseScratch s;
  int64_t total = 0;  // masks in the region

  UNMASK_ROW ChooseRow(const ChooseParams& params, int64_t b, const Block& on, const ChooseScratch& scratch)
      : p(params), block(on), row(b), from(b * params.length), s(scratch) {}

  template <typename F>
  UNMASK_ROW void each(const F& f) const {
    for (int64_t n = block.thread; n < total; n += block.threads) f(n);
  }
  template <typename F>
  UNMASK_ROW int64_t count(const F& holds) const {
    int64_t sum = 0;
    each([&](int64_t n) { sum += holds(n) ? 1 : 0; });
    return block.sum(sum);
  }
  // The least f(n) of those for which holds(n), else `none`.
  template <typename T, typename Holds, typename F>
  UNMASK_ROW T least(T none, const Holds& holds, const F& f) const {
    T found = none;
    each([&](int64_t n) {
      if (holds(n) && f(n) < found) found = f(n);
    });
    return block.min(found);
  }
  UNMASK_ROW bool usable(int64_t n) const { return s.score[n] > -FLT_MAX; }
  UNMASK_ROW bool is_allowed(int64_t n) const { return s.score[n] > -HUGE_VALF; }
  UNMASK_ROW bool proposes_stop(int64_t n) const {
    const int64_t token = p.candidates[from + s.place[n]];
    bool found = false;
    for (int i = 0; i < p.num_stops; ++i) found |= token == p.stops[i];
    return found;
  }

  // Fills the scratch memory with the region, and all results with what holds outside of it.
  UNMASK_ROW void begin() {
    const int64_t each_thread = (p.length + block.threads - 1) / block.threads, first = block.thread * each_thread;
    const int64_t end = first + each_thread < p.length ? first + each_thread : p.length;
    int64_t masks = 0;
    for (int64_t i = first; i < end; ++i) {
      masks += p.region[from + i] ? 1 : 0;
      p.select[from + i] = 0;
      p.score[from + i] = -HUGE_VALF;
      if (!p.editable) continue;
      const bool other = p.candidates[from + i] != p.tokens[row * p.token_stride + i];
      p.revise[from + i] = p.editable[from + i] && other && p.probability[from + i] > p.edit;
    }
    int64_t n = block.before(masks);
    for (int64_t i = first; i < end; ++i) {
      if (p.region[from + i]) s.place[n++] = static_cast<int32_t>(i);
    }
    total = block.sum(masks);
  }

  UNMASK_ROW float score_of(int64_t n) const {
    const int64_t at = from + s.place[n];
    if (n >= p.window || (p.allowed && !p.allowed[at])) return -HUGE_VALF;
    const float *value = p.values + at * p.num_values, decay = -p.decay * static_cast<float>(n);
    const float f =
        p.decay == 0.0f ? 1.0f : static_cast<float>(exp(static_cast<double>(decay < -80.0f ? -80.0f : decay)));
    float x = -static_cast<float>(n);
    if (p.kind == ChooseScore::kProbability) x = p.probability[at] * f;
    if (p.kind == ChooseScore::kMargin) x = (value[0] - value[1]) * f;
    if (p.kind == ChooseScore::kCost) x = -(value[0] / f);
    if (p.kind == ChooseScore::kDraw) x = value[0] * f;
    if (p.kind == ChooseScore::kGiven) x = value[0];
    return x > FLT_MAX ? FLT_MAX : x >= -FLT_MAX ? x : -FLT_MAX;
  }

  // What was remembered of the block that the region is in, else `now`, which is remembered from here on.
  UNMASK_ROW int64_t remembered(int64_t number, int64_t now) const {
    int64_t* memory = p.memory + 2 * row;
    const int64_t value = memory[0] == number && p.steps[row] > 0 ? memory[1] : now;
    block.barrier();
    if (block.thread == 0) memory[0] = number, memory[1] = value;
    return value;
  }

  // How many positions an even schedule commits.
  UNMASK_ROW int64_t quota() const {
    const auto x = static_cast<int64_t>(p.numbers[0]);
    if (p.rule == ChooseRule::kCount) return x;
    const int64_t phase = p.phase ? p.phase[row] : 0, number = ((total > 0 ? s.place[0] : 0) + phase) / p.block_length;
    if (p.rule == ChooseRule::kBlockSteps) {
      const int64_t taken = p.steps[row] - remembered(number, p.steps[row]);
      const int64_t share = p.block_length / x + (taken < p.block_length % x ? 1 : 0);
      return share > 1 ? share : 1;
    }
    const int64_t length = p.horizon < p.length ? p.horizon : p.length;
    const int64_t blocks = (length + phase + p.block_length - 1) / p.block_length;
    const int64_t own = x / blocks + (number < x % blocks ? 1 : 0), steps = own > 1 ? own : 1;
    const int64_t begun = remembered(number, total), share = begun / steps;
    return share + (begun - total < begun % steps * (share + 1) ? 1 : 0);
  }

  template <typename F>
  UNMASK_ROW void pick(const F& wanted) const {
    each([&](int64_t n) { s.picked[n] = usable(n) && wanted(n) && (!p.picked || p.picked[from + s.place[n]]); });
  }

  UNMASK_ROW bool is_near(int64_t n, float high) const {
    const auto radius = static_cast<int32_t>(p.numbers[2] < static_cast<double>(p.length) ? p.numbers[2] : p.length);
    bool found = false;
    for (int64_t m = n; m >= 0 && s.place[n] - s.place[m] <= radius; --m) found |= s.score[m] >= high;
    for (int64_t m = n; m < total && s.place[m] - s.place[n] <= radius; ++m) found |= s.score[m] >= high;
    return found;
  }

  // Rule 2. The order is known where it needs one.
  UNMASK_ROW void pick() const {
    const auto x = static_cast<float>(p.numbers[0]), y = static_cast<float>(p.numbers[1]);
    int64_t most = 0;
    if (p.rule == ChooseRule::kPicked) {
      each([&](int64_t n) { s.picked[n] = is_allowed(n) && p.picked[from + s.place[n]]; });
    } else if (p.rule == ChooseRule::kNear) {
      pick([&](int64_t n) { return s.score[n] >= x || (s.score[n] >= y && is_near(n, x)); });
    } else if (p.rule == ChooseRule::kThreshold) {
      const auto wanted = static_cast<int64_t>(p.numbers[1]);
      const bool enough = wanted <= 1 || count([&](int64_t n) { return s.score[n] > x; }) >= wanted;
      pick([&](int64_t n) { return enough ? s.score[n] > x : s.rank[n] < wanted; });
    } else if (p.rule == ChooseRule::kFactor) {
      most = least(
          total, [&](int64_t n) { return !(s.score[n] >= static_cast<float>(1.0 - p.numbers[0] / (s.rank[n] + 2.0))); },
          [&](int64_t n) -> int64_t { return s.rank[n]; });
      pick([&](int64_t n) { return s.rank[n] < most; });
    } else if (p.rule == ChooseRule::kCostBound) {
      double sum = 0.0;
      for (; block.thread == 0 && most < total && sum <= p.numbers[0]; ++most) {
        const float cost = -s.score[s.order[most]];
        sum += static_cast<double>(cost > 0.0f ? cost : 0.0f);
      }
      most = block.sum(most);
      pick([&](int64_t n) { return s.rank[n] < most; });
    } else {
      most = quota();
      const auto first = [&](int64_t n) { return usable(n) && s.rank[n] < most; };
      const auto sure = [&](int64_t n) { return usable(n) && s.score[n] > y; };
      const bool enough = p.rule == ChooseRule::kBlockSteps && count(sure) >= count(first);
      pick([&](int64_t n) { return enough ? sure(n) : first(n); });
    }
    block.barrier();
  }

  // Rule 3, spacing: in the order, so one thread does it.
  UNMASK_ROW void thin() const {
    for (int64_t r = 0; block.thread == 0 && r < total; ++r) {
      const int32_t n = s.order[r];
      const auto takes_back = [&](int64_t m) { return s.picked[m] && s.rank[m] < r; };
      for (int64_t m = n - 1; m >= 0 && s.place[n] - s.place[m] < p.spacing; --m) s.picked[n] &= !takes_back(m);
      for (int64_t m = n + 1; m < total && s.place[m] - s.place[n] < p.spacing; ++m) s.picked[n] &= !takes_back(m);
    }
    block.barrier();
  }

  UNMASK_ROW void run() {
    begin();
    each([&](int64_t n) { s.score[n] = score_of(n); });
    block.barrier();
    const bool plain = (p.rule == ChooseRule::kThreshold && p.numbers[1] <= 1.0) || p.rule == ChooseRule::kNear;
    if (p.spacing > 1 || !(plain || p.rule == ChooseRule::kPicked)) {
      const float* score = s.score;
      block.rank(
          total, [](int64_t) { return true; },
          [score](int64_t i, int64_t j) { return score[i] > score[j] || (score[i] == score[j] && i < j); },
          [&](int64_t n, int32_t r) {
            s.rank[n] = r;
            s.order[r] = static_cast<int32_t>(n);
          });
      block.barrier();
    }
    pick();
    if (p.spacing > 1) thin();
    const auto open = [&](int64_t n) { return !s.picked[n]; };
    const auto number = [](int64_t n) { return n; };
    const int64_t gap = p.hold_eos ? least(total, open, number) : total;
    block.barrier();
    each([&](int64_t n) { s.picked[n] &= n < gap || !proposes_stop(n); });
    block.barrier();
    if (count([&](int64_t n) { return s.picked[n] != 0; }) == 0) {
      const auto able = [&](int64_t n) { return is_allowed(n) && (!p.hold_eos || n == 0 || !proposes_stop(n)); };
      const float best = -least(HUGE_VALF, able, [&](int64_t n) { return -s.score[n]; });
      const int64_t last = least(total, [&](int64_t n) { return able(n) && s.score[n] == best; }, number);
      if (last < total && block.thread == 0) s.picked[last] = 1;
      block.barrier();
    }
    each([&](int64_t n) {
      p.select[from + s.place[n]] = s.picked[n];
      p.score[from + s.place[n]] = s.score[n];
    });
  }
};

template <typename Block>
UNMASK_ROW void choose_row(const ChooseParams& params, int64_t b, const Block& block, const ChooseScratch& scratch) {
  ChooseRow<Block>(params, b, block, scratch).run();
}

}  // namespace unmask
