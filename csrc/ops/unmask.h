// unmask_: draw each row's action, write its tokens, and bring the row's state up to date, in place.
//
// The canvas is (B, T) token ids; the buffer is its positions start..start+L. A row's *active block* is the first
// block of `block_length` buffer positions (the last may be shorter) that still holds a mask; allowed = masked, in
// the active block, row not done. Per row not done (a done row is left exactly as it is):
//   1. action: a subset of the allowed positions, by `mode`:
//        kSelect           score > 0 (a decision already made: 1 or 0)
//        kBernoulli        u < min(1, scale * sigmoid(score / temperature)), may be empty
//        kBernoulliArgmax  the same; if empty, the allowed position with the highest score (lowest position on ties)
//        kGreedy           sigmoid(score) > 0.5, i.e. score > 0; if empty, the highest score
//        kDpls             dynamic Plackett-Luce with STOP utility `stop_logit`, utilities score / temperature:
//                          E_i = exponential draw of position i, T_i = E_i exp(-u_i); the position with the smallest
//                          T is first; every other one with T_i < T_first + E_stop exp(-stop_logit) follows, by T
//                          (kSelect with nothing selected, like kBernoulli, wastes the step)
//      Draws: word 0 of philox4x32(seed, kActionIndex, position in the buffer, steps[b], sequence[b]); kStopIndex and
//      position 0 for STOP. A NaN score is never drawn; where one position is certain (the argmax fallback, the first of
//      kDpls) and all scores are NaN, it is the first allowed. Draws are floats; probabilities and the logarithms
//      of T are evaluated in double, so that devices agree. Incoming `allowed` can narrow the allowed positions, not widen.
//   2. rank (B, L) int32: -1 where nothing was unmasked, else 0; for kDpls the order of the draw 0, 1, 2, ...
//   3. tokens[b, start + i] = token[b, i] where unmasked. A token < 0 (a poisoned row of logits) there sets
//      status[b] = kPoisoned and done[b] = 1, clears allowed[b], and leaves the rest of the row as it was (rank -1).
//   4. steps[b] += 1. If eos >= 0 and some EOS of the buffer has no mask before it in the buffer, the remaining masks
//      become eos and the row is done (kComplete). A row with no mask left is done (kComplete). Otherwise, a row with
//      steps[b] >= max_steps is done (kExhausted).
//   5. mask, allowed, remaining (masks left), block (index of the active block; number of blocks if none) updated.
// Deterministic: no order of threads changes the result. Never writes outside a row's active block, but for 4's EOS fill.
#pragma once
#include <stdint.h>

namespace unmask {

enum class ActionMode : int32_t { kSelect = 0, kBernoulli = 1, kBernoulliArgmax = 2, kGreedy = 3, kDpls = 4 };
enum RowStatus : int32_t { kRunning = 0, kComplete = 1, kExhausted = 2, kPoisoned = 3 };

struct UnmaskParams {
  int64_t batch;
  int64_t length;          // L >= 1
  int64_t start;           // first buffer position in the canvas
  int64_t canvas_stride;   // elements between canvas rows
  int64_t block_length;    // 1..L
  int64_t max_steps;
  int64_t eos;             // < 0: do not stop at EOS
  ActionMode mode;
  float temperature;       // > 0
  float scale;             // >= 0
  float stop_logit;
  const int64_t* seed;     // one value, or null for the modes that draw nothing
  const int64_t* sequence; // (B) or null = row index
  const int64_t* token;    // (B, L) candidate token per position
  const float* score;      // (B, L): decision (kSelect) or logits
  int64_t* tokens;         // (B, T) canvas, in place
  uint8_t* mask;           // (B, L) bool, in place
  uint8_t* allowed;        // (B, L) bool, in place
  int64_t* steps;          // (B), in place
  int64_t* remaining;      // (B), in place
  int64_t* block;          // (B), in place
  uint8_t* done;           // (B) bool, in place
  int32_t* status;         // (B) RowStatus, in place
  int32_t* rank;           // (B, L), written for every row (done rows: -1)
};

namespace cpu {
void unmask(const UnmaskParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int unmask(const UnmaskParams& params, void* stream);
}  // namespace cuda

}  // namespace unmask
