// unmask_ on the CPU: the state machine on hand-worked rows, and the generator's published vectors.
#include "ops/unmask.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "ops/random.h"

namespace {

using unmask::ActionMode;
using unmask::kBlock, unmask::kPhase, unmask::kRemaining, unmask::kStatus, unmask::kSteps;
constexpr int64_t kMask = 99, kEos = 7;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A canvas of one row without a prompt, with candidates 10, 11, ...
struct OneRow {
  std::vector<int64_t> tokens, candidates, numbers;
  std::vector<float> score;
  std::vector<uint8_t> mask, allowed;
  std::vector<int32_t> rank;
  int64_t seed = 1;
  unmask::UnmaskParams params{};

  OneRow(std::vector<int64_t> buffer, std::vector<float> scores, int64_t block_length)
      : tokens(std::move(buffer)), numbers(unmask::kRowColumns), score(std::move(scores)) {
    const size_t length = tokens.size();
    for (size_t i = 0; i < length; ++i) candidates.push_back(static_cast<int64_t>(10 + i));
    for (const int64_t t : tokens) mask.push_back(t == kMask);
    allowed.assign(length, 1);  // the kernel itself keeps to the active block
    rank.assign(length, -5);
    params.batch = 1;
    params.length = static_cast<int64_t>(length);
    params.canvas_stride = params.length;
    params.block_length = block_length;
    params.max_steps = 100;
    params.temperature = params.scale = 1.0f;
  }

  int64_t operator[](unmask::RowColumn column) const { return numbers[column]; }

  void step(ActionMode mode) {
    params.mode = mode;
    params.seed = &seed;
    params.candidates = candidates.data();
    params.score = score.data();
    params.tokens = tokens.data();
    params.mask = mask.data();
    params.allowed = allowed.data();
    params.rows = numbers.data();
    params.rank = rank.data();
    unmask::cpu::unmask(params, 0, 1);
  }
};

void expect_words(const unmask::Philox4& got, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  EXPECT_EQ(got.word[0], a);
  EXPECT_EQ(got.word[1], b);
  EXPECT_EQ(got.word[2], c);
  EXPECT_EQ(got.word[3], d);
}

TEST(Random, PhiloxKnownAnswers) {  // vectors of Random123
  expect_words(unmask::philox4x32(0, 0, 0, 0, 0), 0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u);
  expect_words(unmask::philox4x32(~0ull, ~0u, ~0u, ~0u, ~0u), 0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu);
  expect_words(unmask::philox4x32(0x299f31d0a4093822ull, 0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u),
               0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u);
}

TEST(Random, FloatsStayInRangeAndAreAccurate) {
  for (const uint32_t bits : {0u, 1u, 12345u, 0x7fffffffu, 0x80000000u, 0xffffff00u, 0xffffffffu}) {
    const float u = unmask::uniform(bits);
    EXPECT_GT(u, 0.0f);
    EXPECT_LT(u, 1.0f);
    const double e = -std::log1p(-static_cast<double>(u));
    EXPECT_NEAR(unmask::exponential(bits), e, 3e-7 * e);
    EXPECT_NEAR(unmask::gumbel(bits), -std::log(e), 1e-6 * (1 + std::fabs(std::log(e))));
    EXPECT_LT(unmask::gumbel(bits), unmask::kGumbelMax);
  }
}

TEST(Unmask, SelectWritesOnlyMaskedPositionsOfTheActiveBlock) {
  OneRow row({1, kMask, 2, 3, kMask, kMask}, {1, 1, 1, 1, 1, 1}, 2);
  row.step(ActionMode::kSelect);
  EXPECT_EQ(row.tokens, (std::vector<int64_t>{1, 11, 2, 3, kMask, kMask}));
  EXPECT_EQ(row.rank, (std::vector<int32_t>{-1, 0, -1, -1, -1, -1}));
  EXPECT_EQ(row.allowed, (std::vector<uint8_t>{0, 0, 0, 0, 1, 1}));
  EXPECT_EQ(row[kBlock], 2);
  EXPECT_EQ(row[kRemaining], 2);
  EXPECT_EQ(row[kSteps], 1);
  EXPECT_EQ(row[kStatus], unmask::kRunning);
}

TEST(Unmask, ShortLastBlockCompletes) {
  OneRow row({1, 2, 3, kMask}, {0, 0, 0, 1}, 3);
  row.step(ActionMode::kSelect);
  EXPECT_EQ(row[kBlock], 2);
  EXPECT_EQ(row[kStatus], unmask::kComplete);
}

TEST(Unmask, PhaseShiftsTheBlocks) {  // blocks of 3 end behind positions 0, 3 and 4
  OneRow row({kMask, kMask, kMask, kMask, kMask}, {1, 1, 1, 1, 1}, 3);
  row.numbers[kPhase] = 2;
  row.step(ActionMode::kSelect);
  EXPECT_EQ(row.rank, (std::vector<int32_t>{0, -1, -1, -1, -1}));
  EXPECT_EQ(row.allowed, (std::vector<uint8_t>{0, 1, 1, 1, 0}));
  EXPECT_EQ(row[kBlock], 1);
  row.step(ActionMode::kSelect);
  row.step(ActionMode::kSelect);
  EXPECT_EQ(row[kStatus], unmask::kComplete);
  EXPECT_EQ(row[kBlock], 3);
}

TEST(Unmask, EosStopsOnlyWithoutMasksBeforeIt) {
  OneRow row({kMask, kMask, kMask, kMask}, {0, 1, 0, 0}, 2);
  row.params.stops[0] = 1000;
  row.params.stops[1] = kEos;
  row.params.num_stops = 2;
  row.candidates[1] = kEos;
  row.step(ActionMode::kSelect);
  EXPECT_EQ(row[kStatus], unmask::kRunning);
  row.score = {1, 0, 0, 0};
  row.step(ActionMode::kSelect);
  EXPECT_EQ(row.tokens, (std::vector<int64_t>{10, kEos, kEos, kEos}));
  EXPECT_EQ(row[kStatus], unmask::kComplete);
  EXPECT_EQ(row[kRemaining], 0);
  EXPECT_EQ(row[kBlock], 2);
}

TEST(Unmask, ExhaustedRowKeepsItsMasks) {
  OneRow never({kMask, kMask}, {50, 50}, 2);
  never.params.max_steps = 1;
  never.params.scale = 0.0f;
  never.step(ActionMode::kBernoulli);
  EXPECT_EQ(never[kStatus], unmask::kExhausted);
  EXPECT_EQ(never[kRemaining], 2);
  EXPECT_EQ(never.allowed, (std::vector<uint8_t>{0, 0}));
}

TEST(Unmask, PoisonedTokenEndsTheRowUnwritten) {
  OneRow row({kMask, kMask, kMask}, {1, 1, 0}, 3);
  row.candidates[1] = -1;
  row.step(ActionMode::kSelect);
  EXPECT_EQ(row.tokens, (std::vector<int64_t>{kMask, kMask, kMask}));
  EXPECT_EQ(row.rank, (std::vector<int32_t>{-1, -1, -1}));
  EXPECT_EQ(row[kStatus], unmask::kPoisoned);
  EXPECT_EQ(row[kSteps], 0);
}

TEST(Unmask, FallbacksTakeTheHighestScoreAndSkipNaN) {
  for (const ActionMode mode : {ActionMode::kBernoulliArgmax, ActionMode::kGreedy}) {
    OneRow row({kMask, kMask, kMask, kMask}, {kNaN, -5, -4, -4}, 4);
    row.params.scale = 0.0f;
    row.step(mode);
    EXPECT_EQ(row.rank, (std::vector<int32_t>{-1, -1, 0, -1}));
    OneRow lost({kMask, kMask}, {kNaN, kNaN}, 2);
    lost.step(mode);
    EXPECT_EQ(lost.rank, (std::vector<int32_t>{0, -1}));
  }
}

TEST(Unmask, DplsOrdersHugeUtilitiesAndStops) {
  OneRow row({kMask, kMask, kMask, kMask}, {1e5f, -1e5f, 3e5f, 2e5f}, 4);
  row.step(ActionMode::kDpls);
  EXPECT_EQ(row.rank, (std::vector<int32_t>{2, -1, 0, 1}));
  OneRow stopped({kMask, kMask}, {1, 2e6f}, 2);
  stopped.params.stop_logit = 1e7f;
  stopped.step(ActionMode::kDpls);
  EXPECT_EQ(stopped.rank, (std::vector<int32_t>{-1, 0}));
}

TEST(Unmask, RevisesUntilNothingChangesOrTheBudgetIsSpent) {
  for (const int64_t budget : {9, 1}) {
    OneRow row({5, kMask, kMask}, {0, 1, 1}, 2);
    const std::vector<uint8_t> revise(3, 1), editable = row.mask;
    row.params.revise = revise.data();
    row.params.editable = editable.data();
    row.params.max_post = budget;
    row.step(ActionMode::kSelect);
    EXPECT_EQ(row.tokens, (std::vector<int64_t>{5, 11, kMask}));
    EXPECT_EQ(row.allowed, (std::vector<uint8_t>{0, 0, 0}));
    row.candidates[1] = 21;
    row.step(ActionMode::kSelect);
    EXPECT_EQ(row.tokens, (std::vector<int64_t>{5, 21, kMask}));
    EXPECT_EQ(row.rank, (std::vector<int32_t>{-1, unmask::kRevised, -1}));
    EXPECT_EQ(row[unmask::kPost], budget == 9 ? 1 : 0);
    if (budget == 9) row.step(ActionMode::kSelect);
    EXPECT_EQ(row[kBlock], 1);
    EXPECT_EQ(row.allowed, (std::vector<uint8_t>{0, 0, 1}));
    EXPECT_EQ(row[kSteps], 1);
    EXPECT_EQ(row[unmask::kForwards], budget == 9 ? 3 : 2);
  }
}

TEST(Unmask, WrongPhasesAndBlocksHarmNothing) {
  for (const int64_t wrong : {INT64_MIN, INT64_C(-7), INT64_C(1) << 62, INT64_MAX}) {
    OneRow row({5, kMask, kMask}, {1, 1, 1}, 2);
    const std::vector<uint8_t> all(3, 1);
    row.params.revise = row.params.editable = all.data();
    row.params.max_post = 1;
    row.numbers[kBlock] = wrong;
    row.numbers[kPhase] = wrong == INT64_MIN ? 0 : -wrong / 4;
    for (int n = 0; n < 4; ++n) row.step(ActionMode::kDpls);
    for (const int64_t token : row.tokens) EXPECT_TRUE(token == 5 || token == kMask || (token >= 10 && token < 13));
  }
}

TEST(Unmask, RowThatIsNotRunningIsLeftAlone) {
  OneRow row({kMask, kMask}, {1, 1}, 2);
  row.numbers[kStatus] = unmask::kComplete;
  row.step(ActionMode::kSelect);
  EXPECT_EQ(row.tokens, (std::vector<int64_t>{kMask, kMask}));
  EXPECT_EQ(row[kSteps], 0);
  EXPECT_EQ(row.rank, (std::vector<int32_t>{-1, -1}));
}

}  // namespace
