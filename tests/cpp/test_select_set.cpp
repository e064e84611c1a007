// select_set on the CPU: what every set must fulfil, on random networks of many sizes and memory of exact size, with every
// instruction set; rows by themselves.
#include "ops/select_set.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu/isa.h"

namespace {

using Numbers = std::vector<float>;

struct Problem {
  std::mt19937 draws;
  unmask::SelectSetParams params{};
  Numbers weights, table, confidence, probability, bias, risk, score;
  std::vector<int64_t> tokens, candidates;
  std::vector<uint8_t> mask, region, allowed, select;

  int64_t below(int64_t n) { return static_cast<int64_t>(draws() % static_cast<uint32_t>(n)); }
  Numbers uniform(int64_t count, float low, float high) {
    Numbers values(static_cast<size_t>(count));
    for (float& x : values) x = std::uniform_real_distribution<float>(low, high)(draws);
    return values;
  }

  explicit Problem(unsigned seed) : draws(seed) {
    const int64_t hidden = 16 * (1 + below(6));
    unmask::SelectSetParams& p = params;
    p.sizes = {hidden, hidden % 32 == 0 ? 4 : 1 + below(2), 16 * (1 + below(9)), 1 + below(6)};
    p.layers = 1 + below(3);
    p.batch = 1 + below(3);
    p.length = 1 + below(70);
    p.sure = 0.9f;
    p.runs = 1 + below(9);
    p.table_rows = 1 + below(5);
    const int64_t count = p.batch * p.length;
    weights = uniform(unmask::set_weight_count(p.sizes, p.layers), -0.2f, 0.25f);
    table = uniform(p.table_rows * hidden, -1, 1);
    confidence = uniform(count * p.sizes.confidences, 0, 1);
    probability = uniform(count, 0, 1);
    bias = uniform(count, -1, 1);
    risk = uniform(p.batch, 0, 2);
    for (int64_t i = 0; i < count; ++i) {
      tokens.push_back(below(9) - 2);
      candidates.push_back(below(2) ? below(5) : std::numeric_limits<int64_t>::min());
      mask.push_back(below(3) != 0);
      region.push_back(mask.back() && below(5) != 0);
      allowed.push_back(region.back() && below(3) != 0);
    }
    if (below(4) == 0) probability[0] = confidence[0] = std::numeric_limits<float>::quiet_NaN();
    select.assign(static_cast<size_t>(count), 7);
    score.assign(static_cast<size_t>(count), 7.0f);
    p.weights = weights.data();
    p.table = table.data();
    p.confidence = confidence.data();
    p.probability = probability.data();
    p.bias = below(2) ? bias.data() : nullptr;
    p.risk = risk.data();
    p.tokens = tokens.data();
    p.candidates = candidates.data();
    p.mask = mask.data();
    p.region = region.data();
    p.allowed = allowed.data();
    p.select = select.data();
    p.score = score.data();
  }

  void run() { unmask::cpu::select_set(params, 0, params.batch); }
};

void expect_a_set(const Problem& problem) {
  const int64_t length = problem.params.length;
  for (int64_t row = 0; row < problem.params.batch; ++row) {
    int picked = 0, possible = 0;
    for (int64_t i = row * length; i < (row + 1) * length; ++i) {
      const auto at = static_cast<size_t>(i);
      EXPECT_LE(problem.select[at], problem.allowed[at]);
      EXPECT_TRUE(problem.score[at] >= 0 && problem.score[at] <= 1);
      EXPECT_TRUE(problem.allowed[at] || problem.score[at] == 0);
      picked += problem.select[at];
      possible += problem.allowed[at];
    }
    EXPECT_EQ(picked > 0, possible > 0);
  }
}

TEST(SelectSet, SetsOfRandomNetworks) {
  const unmask::cpu::Isa best = unmask::cpu::active_isa();
  for (unsigned seed = 0; seed < 300; ++seed) {
    Problem problem(seed);
    problem.run();
    expect_a_set(problem);
    const Numbers score = problem.score;
    for (const unmask::cpu::Isa isa : unmask::cpu::kBestFirst) {
      if (!unmask::cpu::isa_supported(isa)) continue;
      unmask::cpu::active_isa() = isa;
      problem.run();
      expect_a_set(problem);
      for (size_t i = 0; i < score.size(); ++i) EXPECT_NEAR(problem.score[i], score[i], 1e-5);
    }
    unmask::cpu::active_isa() = best;
  }
}

TEST(SelectSet, RowsByThemselves) {
  for (unsigned seed = 0; seed < 40; ++seed) {
    Problem whole(seed), apart(seed);
    whole.run();
    for (int64_t row = apart.params.batch; row-- > 0;) unmask::cpu::select_set(apart.params, row, row + 1);
    EXPECT_EQ(whole.select, apart.select);
    EXPECT_EQ(whole.score, apart.score);
  }
}

}  // namespace
