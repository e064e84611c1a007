// unmask_: draw each row's action, write and revise its tokens, and bring the row's state up to date, in place.
//
// The canvas is (B, T) token ids; the buffer is its positions start..start+L. Buffer position i of a row belongs to
// block (i + phase) / block_length, so a block of the buffer may be shorter at either end. A row has kRowColumns
// integers, its line of `rows`. Its *active block* is the first that holds a mask; with max_post >= 0 it is kBlock while
// that comes before it. allowed = masked, in the active block, row running. A row whose status is not kRunning is left
// exactly as it is; per running row:
//   1. action: a subset of the allowed positions, by `mode`:
//        kSelect           the decision, or score > 0 (a decision already made: 1 or 0)
//        kBernoulli        u < min(1, scale * sigmoid(score / temperature)), may be empty
//        kBernoulliArgmax  the same; if empty, the allowed position with the highest score (lowest position on ties)
//        kGreedy           sigmoid(score) > 0.5, i.e. score > 0; if empty, the highest score
//        kDpls             dynamic Plackett-Luce with STOP utility `stop_logit`, utilities score / temperature:
//                          E_i = exponential draw of position i, T_i = E_i exp(-u_i); the position with the smallest
//                          T is first; every other one with T_i < T_first + E_stop exp(-stop_logit) follows, by T
//                          (kSelect with nothing selected, like kBernoulli, wastes the step)
//      Draws: word 0 of philox4x32(seed, kActionIndex, i + kPosition, kForwards + kDrawStep, kSequence), the columns
//      being the row's; for STOP the same with kStopIndex and i = 0. A NaN score is never drawn; where one position is
//      certain (the argmax fallback, the first of kDpls) and all scores are NaN, it is the first allowed. Draws are
//      floats; probabilities and the logarithms of T are evaluated in double, so that devices agree. Incoming `allowed`
//      can narrow the allowed positions, not widen.
//      Revised is every position of `revise` that is editable, not masked before the call, in the active block (with
//      `everywhere` or in one before it), and whose candidate is another token than it has.
//   2. rank (B, L) int32: 0 where a token was unmasked (for kDpls the order of the draw 0, 1, 2, ...), kRevised where
//      one was revised, -1 elsewhere.
//   3. tokens[b, start + i] = candidates[b, i] where unmasked or revised. A candidate < 0 (a poisoned row of logits)
//      there sets the status kPoisoned, clears allowed[b], and leaves the rest of the row as it was (rank -1).
//   4. The active block ends when it has no mask. With max_post >= 0 it then goes on for calls that only revise, until
//      one of them has changed nothing or is its max_post-th; kPost counts them, and is 0 in a block with masks.
//   5. kForwards += 1; kSteps += 1, but for calls that only revise. If some stop id of the buffer has no mask before it
//      in the buffer, the remaining masks become the first such id and the row is kComplete; with max_post >= 0 or
//      `settled_stop`, only a stop id in a block before the active one counts. A row whose last block has ended is
//      kComplete. Otherwise, a row with masks and kSteps >= max_steps is kExhausted.
//   6. mask, allowed, kRemaining (masks left), kBlock (the active block; number of blocks if none) updated.
// Deterministic: no order of threads changes the result. Never writes outside a row's active block, but for `everywhere`
// and 5's fill with a stop id. A phase outside [0, block_length) or a block that this op did not write makes the blocks
// undefined, and harms nothing else.
#pragma once
#include <stdint.h>

#include "random.h"

namespace unmask {

enum class ActionMode : int32_t { kSelect = 0, kBernoulli = 1, kBernoulliArgmax = 2, kGreedy = 3, kDpls = 4 };
enum RowStatus : int64_t { kRunning = 0, kComplete = 1, kExhausted = 2, kPoisoned = 3 };
// Forwards with a mask in the active block; masks left; active block; RowStatus; then the key of the row's draws, what is
// added to its forwards and to its positions there, and where in a block the buffer begins (0 <= phase < block_length);
// all forwards; those since the active block has no mask.
enum RowColumn {
  kSteps,
  kRemaining,
  kBlock,
  kStatus,
  kSequence,
  kDrawStep,
  kPosition,
  kPhase,
  kForwards,
  kPost,
  kRowColumns
};

constexpr int32_t kRevised = -2;  // in `rank`
constexpr int kMaxStops = 16;

struct UnmaskParams {
  int64_t batch;
  int64_t length;         // L >= 1
  int64_t start;          // first buffer position in the canvas
  int64_t canvas_stride;  // elements between canvas rows
  int64_t block_length;   // >= 1
  int64_t max_steps;
  int64_t max_post = -1;  // -1: a block ends with its masks
  bool settled_stop;
  bool everywhere;           // only with `revise`
  int64_t stops[kMaxStops];  // ids, >= 0
  int num_stops;
  ActionMode mode;
  float temperature;  // > 0
  float scale;        // >= 0
  float stop_logit;
  const int64_t* seed;        // one value, or null for the modes that draw nothing
  const int64_t* candidates;  // (B, L) token each position would get
  const float* score;         // (B, L) logits, or the decision (kSelect); null if there is `decision`
  const uint8_t* decision;    // (B, L) bool, for kSelect
  const uint8_t* revise;      // (B, L) bool, or null
  const uint8_t* editable;    // (B, L) bool; null without `revise`
  int64_t* tokens;            // (B, T) canvas, in place
  uint8_t* mask;              // (B, L) bool, in place
  uint8_t* allowed;           // (B, L) bool, in place
  int64_t* rows;              // (B, kRowColumns), in place
  int32_t* rank;              // (B, L), written for every row (-1 where it is not running)
};

// The block of buffer position `position`; for L, which lies behind the buffer, the number of blocks.
UNMASK_HD int64_t block_of(const UnmaskParams& params, int64_t phase, int64_t position) {
  const int64_t last = position < params.length ? position : params.length - 1;
  return (last + phase) / params.block_length + (position - last);
}

// How many positions of its block come before `position`, in the buffer or not: less than a block for any phase.
UNMASK_HD int64_t within_block(const UnmaskParams& params, int64_t phase, int64_t position) {
  const uint64_t from_grid = static_cast<uint64_t>(position) + static_cast<uint64_t>(phase);
  return static_cast<int64_t>(from_grid % static_cast<uint64_t>(params.block_length));
}

// The first position of the buffer that is in the block of `position`; L for L.
UNMASK_HD int64_t block_begin(const UnmaskParams& params, int64_t phase, int64_t position) {
  const int64_t within = position < params.length ? within_block(params, phase, position) : 0;
  return within < position ? position - within : 0;
}

// How many positions from `position` of the buffer on, itself included, are in its block.
UNMASK_HD int64_t left_in_block(const UnmaskParams& params, int64_t phase, int64_t position) {
  const int64_t block = params.block_length - within_block(params, phase, position), buffer = params.length - position;
  return block < buffer ? block : buffer;
}

namespace cpu {
void unmask(const UnmaskParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int unmask(const UnmaskParams& params, void* stream);
}  // namespace cuda

}  // namespace unmask
