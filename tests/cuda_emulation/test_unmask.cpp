// The CUDA kernel of unmask_, emulated, against a scalar reference written from the contract.
#include <math.h>

#include <algorithm>
#include <limits>

#include "ops/random.h"
#include "ops/unmask.h"
#include "testing.h"

namespace {

using namespace testing_tools;
using unmask::ActionMode;
using Order = Settings::Order;

constexpr int64_t kMask = 99, kEos = 7;
constexpr double kInf = std::numeric_limits<double>::infinity();

struct State {
  std::vector<int64_t> tokens, steps, remaining, block;
  std::vector<uint8_t> mask, allowed, done;
  std::vector<int32_t> status, rank;
};

bool operator==(const State& a, const State& b) {
  return a.tokens == b.tokens && a.steps == b.steps && a.remaining == b.remaining && a.block == b.block &&
         a.mask == b.mask && a.allowed == b.allowed && a.done == b.done && a.status == b.status && a.rank == b.rank;
}

struct Problem {
  int64_t batch = 4, length = 37, start = 3, canvas = 45, block_length = 8, max_steps = 1000, eos = -1;
  ActionMode mode = ActionMode::kSelect;
  float temperature = 1.0f, scale = 1.0f, stop_logit = 0.0f;
  int64_t seed = 5;
  std::vector<int64_t> sequence, token;
  std::vector<float> score;
  State state;
};

std::vector<int64_t> active(const Problem& p, const std::vector<uint8_t>& mask) {
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < p.length; ++i) {
    if (!mask[size_t(i)]) continue;
    if (positions.empty() || i / p.block_length == positions[0] / p.block_length) positions.push_back(i);
  }
  return positions;
}

// The positions the row unmasks, in order of their ranks.
std::vector<int64_t> action(const Problem& p, int64_t b, const std::vector<int64_t>& may) {
  const auto score = [&](int64_t i) { return static_cast<double>(p.score[size_t(b * p.length + i)]); };
  const auto word = [&](uint32_t index, int64_t position) {
    const int64_t sequence = p.sequence.empty() ? b : p.sequence[size_t(b)];
    return unmask::philox4x32(uint64_t(p.seed), index, uint32_t(position), uint32_t(p.state.steps[size_t(b)]),
                              uint32_t(sequence))
        .word[0];
  };
  std::vector<int64_t> chosen, known;
  for (int64_t i : may)
    if (score(i) == score(i)) known.push_back(i);
  if (may.empty()) return chosen;
  if (p.mode == ActionMode::kDpls) {
    if (known.empty()) return {may[0]};
    std::vector<std::pair<double, int64_t>> race;
    for (int64_t i : known)
      race.emplace_back(log(double(unmask::exponential(word(unmask::kActionIndex, i)))) - score(i) / p.temperature, i);
    std::sort(race.begin(), race.end());
    const double first = race[0].first;
    const double stop = log(double(unmask::exponential(word(unmask::kStopIndex, 0)))) - p.stop_logit;
    double end = std::max(first, stop);
    if (!isinf(end)) end += log1p(exp(std::min(first, stop) - end));
    for (const auto& arrival : race)
      if (chosen.empty() || arrival.first < end) chosen.push_back(arrival.second);
    return chosen;
  }
  const bool bernoulli = p.mode == ActionMode::kBernoulli || p.mode == ActionMode::kBernoulliArgmax;
  for (int64_t i : known) {
    const double probability = p.scale * (1.0 / (1.0 + exp(-score(i) / p.temperature)));
    if (bernoulli ? unmask::uniform(word(unmask::kActionIndex, i)) < probability : score(i) > 0.0) chosen.push_back(i);
  }
  if (chosen.empty() && (p.mode == ActionMode::kBernoulliArgmax || p.mode == ActionMode::kGreedy)) {
    if (known.empty()) return {may[0]};
    chosen.push_back(*std::max_element(known.begin(), known.end(),
                                       [&](int64_t i, int64_t j) { return score(i) < score(j); }));
  }
  return chosen;
}

State reference(const Problem& p) {
  State s = p.state;
  s.rank.assign(size_t(p.batch * p.length), -1);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (s.done[size_t(b)]) continue;
    const size_t at = size_t(b * p.length);
    std::vector<uint8_t> mask(s.mask.begin() + int64_t(at), s.mask.begin() + int64_t(at) + p.length);
    std::vector<int64_t> may;
    for (int64_t i : active(p, mask))
      if (s.allowed[at + size_t(i)]) may.push_back(i);
    const std::vector<int64_t> chosen = action(p, b, may);
    const bool bad = std::any_of(chosen.begin(), chosen.end(), [&](int64_t i) { return p.token[at + size_t(i)] < 0; });
    for (int64_t i = 0; i < p.length; ++i) s.allowed[at + size_t(i)] = 0;
    if (bad) {
      s.status[size_t(b)] = unmask::kPoisoned;
      s.done[size_t(b)] = 1;
      continue;
    }
    int64_t* row = s.tokens.data() + b * p.canvas + p.start;
    for (size_t n = 0; n < chosen.size(); ++n) {
      const size_t i = size_t(chosen[n]);
      s.rank[at + i] = p.mode == ActionMode::kDpls ? int32_t(n) : 0;
      row[i] = p.token[at + i];
      mask[i] = 0;
    }
    s.steps[size_t(b)] += 1;
    bool finished = true, ended = false;
    for (int64_t i = 0; i < p.length; ++i) {
      if (mask[size_t(i)]) finished = false;
      if (finished && p.eos >= 0 && row[i] == p.eos) ended = true;
    }
    for (int64_t i = 0; i < p.length && ended; ++i) {
      if (mask[size_t(i)]) row[i] = p.eos;
      mask[size_t(i)] = 0;
    }
    finished = finished || ended;
    const bool exhausted = s.steps[size_t(b)] >= p.max_steps;
    if (finished || exhausted) {
      s.done[size_t(b)] = 1;
      s.status[size_t(b)] = finished ? unmask::kComplete : unmask::kExhausted;
    }
    const std::vector<int64_t> next = active(p, mask);
    s.block[size_t(b)] =
        finished ? (p.length + p.block_length - 1) / p.block_length : next[0] / p.block_length;
    if (!s.done[size_t(b)])
      for (int64_t i : next) s.allowed[at + size_t(i)] = 1;
    s.remaining[size_t(b)] = std::count(mask.begin(), mask.end(), 1);
    std::copy(mask.begin(), mask.end(), s.mask.begin() + int64_t(at));
  }
  return s;
}

// Random rows: every pattern of masks (holes as in infilling), some done, some narrowed.
Problem random_problem(ActionMode mode, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto below = [&](uint64_t n) { return static_cast<int64_t>(random() % n); };
  Problem p;
  p.mode = mode;
  p.batch = 1 + below(4);
  const int64_t lengths[] = {1, 2, 31, 37, 64, 256, 300, 700};
  p.length = lengths[below(8)];
  p.block_length = 1 + below(uint64_t(p.length));
  p.start = below(5);
  p.canvas = p.start + p.length + below(4);
  p.max_steps = below(3) ? 1000 : 4;
  p.eos = below(2) ? kEos : -1;
  p.temperature = below(2) ? 1.0f : 0.5f;
  p.scale = below(2) ? 1.0f : 1.7f;
  p.stop_logit = static_cast<float>(below(7)) - 3.0f;
  p.seed = below(1000000);
  const size_t cells = size_t(p.batch * p.length);
  if (below(2))
    for (int64_t b = 0; b < p.batch; ++b) p.sequence.push_back(below(100));
  State& s = p.state;
  s.tokens.assign(size_t(p.batch * p.canvas), 1234);
  s.mask.assign(cells, 0);
  s.allowed.assign(cells, 0);
  s.rank.assign(cells, 77);
  const uint64_t density = uint64_t(below(5));  // 0: nothing masked
  const uint64_t fill = random() % 4 == 0 ? 3 : 1000;  // often or seldom an EOS
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < p.length; ++i) {
      const size_t at = size_t(b * p.length + i);
      s.mask[at] = random() % 4 < density;
      int64_t& token = s.tokens[size_t(b * p.canvas + p.start + i)];
      token = s.mask[at] ? kMask : (random() % fill == 0 ? kEos : 20 + below(50));
      p.token.push_back(random() % fill == 0 ? kEos : 20 + below(50));
      if (random() % 500 == 0) p.token.back() = -1;
      const int kind = int(random() % 40);
      std::normal_distribution<float> normal(-1.0f, 2.0f);
      float score = normal(random);
      if (kind == 0) score = NAN;
      if (kind == 1) score = INFINITY;
      if (kind == 2) score = -INFINITY;
      if (mode == ActionMode::kSelect) score = random() % 3 == 0 ? 1.0f : 0.0f;
      if (seed % 7 == 3) score = -1.5f;  // ties
      if (seed % 11 == 4) score = NAN;
      p.score.push_back(score);
    }
    const std::vector<uint8_t> mask(s.mask.begin() + b * p.length, s.mask.begin() + (b + 1) * p.length);
    for (int64_t i : active(p, mask)) s.allowed[size_t(b * p.length + i)] = random() % 8 != 0;
    s.steps.push_back(below(6));
    s.remaining.push_back(-5);
    s.block.push_back(-6);
    s.done.push_back(random() % 6 == 0);
    s.status.push_back(s.done.back() ? int32_t(unmask::kComplete) : int32_t(unmask::kRunning));
  }
  return p;
}

State run(const Problem& p) {
  State s = p.state;
  unmask::UnmaskParams q = {};
  q.batch = p.batch;
  q.length = p.length;
  q.start = p.start;
  q.canvas_stride = p.canvas;
  q.block_length = p.block_length;
  q.max_steps = p.max_steps;
  q.eos = p.eos;
  q.mode = p.mode;
  q.temperature = p.temperature;
  q.scale = p.scale;
  q.stop_logit = p.stop_logit;
  const bool draws = p.mode != ActionMode::kSelect && p.mode != ActionMode::kGreedy;
  q.seed = draws ? &p.seed : nullptr;
  q.sequence = p.sequence.empty() ? nullptr : p.sequence.data();
  q.token = p.token.data();
  q.score = p.score.data();
  q.tokens = s.tokens.data();
  q.mask = s.mask.data();
  q.allowed = s.allowed.data();
  q.steps = s.steps.data();
  q.remaining = s.remaining.data();
  q.block = s.block.data();
  q.done = s.done.data();
  q.status = s.status.data();
  q.rank = s.rank.data();
  EXPECT_EQ(unmask::cuda::unmask(q, nullptr), 0);
  return s;
}

const ActionMode kModes[] = {ActionMode::kSelect, ActionMode::kBernoulli, ActionMode::kBernoulliArgmax,
                             ActionMode::kGreedy, ActionMode::kDpls};

TEST(Unmask, EveryModeAndPattern) {
  int drawn[5] = {}, statuses[4] = {};
  for (uint64_t seed = 0; seed < 300; ++seed) {
    const Order order = seed % 3 == 0 ? Order::kForward : seed % 3 == 1 ? Order::kBackward : Order::kRandom;
    Device scope(hopper(order, seed));
    for (ActionMode mode : kModes) {
      const Problem p = random_problem(mode, seed);
      const State expected = reference(p), actual = run(p);
      ASSERT_TRUE(actual == expected) << "mode " << int(mode) << " seed " << seed;
      for (int32_t r : actual.rank) drawn[int(mode)] += r >= 0;
      for (int32_t status : actual.status) statuses[status] += 1;
    }
  }
  for (int count : drawn) EXPECT_GT(count, 500);
  for (int count : statuses) EXPECT_GT(count, 30);
}

// A whole generation, step by step.
TEST(Unmask, RunsToTheEnd) {
  for (ActionMode mode : kModes) {
    Problem p = random_problem(mode, 1);
    p.batch = 2;
    p.length = 70;
    p.block_length = 32;
    p.canvas = 80;
    p.start = 10;
    p.max_steps = 200;
    p.eos = -1;
    p.sequence.clear();
    const size_t cells = 140;
    p.state = State();
    p.state.tokens.assign(160, kMask);
    p.state.mask.assign(cells, 1);
    p.state.allowed.assign(cells, 0);
    for (size_t i = 0; i < 32; ++i) p.state.allowed[i] = p.state.allowed[70 + i] = 1;
    p.state.steps = p.state.remaining = p.state.block = {0, 0};
    p.state.done = {0, 0};
    p.state.status = {0, 0};
    p.state.rank.assign(cells, 0);
    p.token.assign(cells, 42);
    std::mt19937_64 random(3);
    int steps = 0;
    while (!(p.state.done[0] && p.state.done[1]) && steps < 200) {
      p.score.clear();
      for (size_t i = 0; i < cells; ++i) p.score.push_back(random() % 4 == 0 ? 0.8f : -2.0f);
      const State expected = reference(p), actual = run(p);
      ASSERT_TRUE(actual == expected) << "mode " << int(mode) << " step " << steps;
      p.state = actual;
      ++steps;
    }
    EXPECT_EQ(p.state.status, (std::vector<int32_t>{unmask::kComplete, unmask::kComplete}));
    EXPECT_EQ(p.state.block, (std::vector<int64_t>{3, 3}));
  }
}

TEST(Unmask, RefusesABlockThatDoesNotFit) {
  unmask::UnmaskParams q = {};
  q.batch = 1;
  q.length = q.block_length = 40000;
  q.mode = ActionMode::kDpls;
  EXPECT_NE(unmask::cuda::unmask(q, nullptr), 0);
  q.batch = 0;
  EXPECT_EQ(unmask::cuda::unmask(q, nullptr), 0);
}

}  // namespace
