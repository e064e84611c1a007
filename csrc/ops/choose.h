// choose: what a rule commits in one step, each row of the batch by itself.
//
// The *region* are the masked positions of a row's active block; n = 0, 1, ... counts them. The *allowed* are those with
// n < window that `allowed`, if it is given, names. Per row:
//   1. score of an allowed position, with f = exp(max(-decay n, -80)):
//        kProbability  probability f              kMargin  (value 0 - value 1) f
//        kCost         -(value / f)               kDraw    value f
//        kPlace        -n                         kGiven   value
//      A NaN counts as the lowest number. The order goes from the highest score on, equals from the left; rank r = 0, 1, ...
//   2. picked, from the allowed with a score other than NaN, and among `picked` if it is given, with x, y, z the `numbers`
//      and M masks in the region:
//        kPicked       `picked`, whatever the score
//        kThreshold    score > x; fewer than y: the first y
//        kFactor       all r up to the first with score < 1 - x / (r + 2)
//        kCostBound    all r for which the summed costs (-score, at least 0) of those before it are <= x
//        kCount        r < x
//        kFixedSteps   r < q: the buffer's blocks share x steps, the first x % blocks of them one more; a block that began
//                      with m masks and has s >= 1 steps commits m / s at a time, one more in the first m % s
//        kBlockSteps   score > y if these are at least as many as the r < q, else the r < q: q = block_length / x, one
//                      more in the first block_length % x steps of a block, at least 1
//        kNear         score >= x; score >= y within z positions of such a one
//      kFixedSteps and kBlockSteps keep in `memory` which block they are in, and what M or steps were at its begin.
//   3. taken back, in this order: from the highest score on, what is closer than `spacing` to a position that stays; with
//      `hold_eos` what proposes a stop id while a position of the region before it is not picked.
//   4. If nothing is left, the first in the order is picked, with `hold_eos` the first that proposes no stop id or has
//      n = 0.
// revise, if `editable` is given: editable positions whose candidate is another token, more probable than `edit`.
// Scores are float32, costs are summed in double, in the order: devices agree to the bit.
#pragma once
#include <stdint.h>

#include "random.h"

namespace unmask {

enum class ChooseRule : int32_t {
  kPicked,
  kThreshold,
  kFactor,
  kCostBound,
  kCount,
  kFixedSteps,
  kBlockSteps,
  kNear,
  kRules
};
enum class ChooseScore : int32_t { kProbability, kMargin, kCost, kDraw, kPlace, kGiven, kScores };

constexpr int kMaxChooseNumbers = 3;
constexpr int kMaxChooseStops = 16;

struct ChooseParams {
  int64_t batch, length;
  int64_t token_stride;  // elements between rows of `tokens`
  int64_t num_values;    // of a position
  int64_t block_length, horizon;
  int64_t window, spacing;  // at least 1
  int64_t stops[kMaxChooseStops];
  double numbers[kMaxChooseNumbers];
  float decay, edit;
  int num_stops;
  bool hold_eos;
  ChooseRule rule;
  ChooseScore kind;
  const uint8_t* region;      // (B, L)
  const uint8_t* allowed;     // (B, L) or null
  const float* probability;   // (B, L) of the candidate
  const int64_t* candidates;  // (B, L)
  const float* values;        // (B, L, num_values); null for kProbability and kPlace
  const uint8_t* picked;      // (B, L) or null
  const int64_t* tokens;      // (B, L) and
  const uint8_t* editable;    // (B, L), or both null
  const int64_t* steps;       // (B) taken before; null but for the rules with memory
  const int64_t* phase;       // (B) or null: 0
  int64_t* memory;            // (B, 2), in place; null but for these rules
  uint8_t* select;            // (B, L)
  float* score;               // (B, L), -inf where not allowed
  uint8_t* revise;            // (B, L), or null as `editable` is
};

namespace cpu {
void choose(const ChooseParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int choose(const ChooseParams& params, void* stream);
}  // namespace cuda

}  // namespace unmask
