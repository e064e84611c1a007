// prepare: what a step reads of its rows before they change, in one call. For the columns of `rows`, and for blocks, see
// unmask.h.
//   steps (B)          kSteps
//   time (B)           (kSteps + kDrawStep) / horizon, at most 1
//   positions (B, BL)  of the active block in the buffer; outside of the buffer its first or last position
//   places (B, BL)     the same in the flattened canvas
//   sources (B, L)     for each position the number of its entry in the flattened `positions`; outside of the active
//                      block it means nothing
//   revisable (B, L)   `editable`, not masked, row running, in the active block (with `everywhere` in any)
//   read (B, L)        allowed or revisable
//   uniform (B, L)     in (0, 1): word 0 of philox4x32 with the keys of the actions' draws
// Devices agree to the bit.
#pragma once
#include "unmask.h"

namespace unmask {

struct PrepareParams {
  int64_t batch, length;  // L >= 1
  int64_t start, canvas_width;
  int64_t block_length;  // BL >= 1
  float horizon;         // >= 1
  bool everywhere;
  const int64_t* rows;      // (B, kRowColumns)
  const uint8_t* mask;      // (B, L)
  const uint8_t* allowed;   // (B, L)
  const uint8_t* editable;  // (B, L), or null: nothing is revised
  const int64_t* seed;      // one value, or null: nothing is drawn
  int64_t* steps;
  float* time;
  int64_t *positions, *places, *sources;  // null where the buffer is one block
  uint8_t *revisable, *read;              // null without `editable`
  float* uniform;                         // null without `seed`
};

// For one row, by a block as in unmask_row.h.
template <typename Block>
UNMASK_HD void prepare_row(const PrepareParams& p, int64_t b, const Block& block) {
  const int64_t* row = p.rows + b * kRowColumns;
  const int64_t phase = row[kPhase], active = row[kBlock], begin = active * p.block_length - phase;
  for (int64_t n = block.thread; p.positions && n < p.block_length; n += block.threads) {
    const int64_t at = begin + n < 0 ? 0 : begin + n < p.length ? begin + n : p.length - 1;
    p.positions[b * p.block_length + n] = at;
    p.places[b * p.block_length + n] = b * p.canvas_width + p.start + at;
  }
  for (int64_t i = block.thread; i < p.length; i += block.threads) {
    const int64_t at = b * p.length + i;
    if (p.sources) p.sources[at] = b * p.block_length + i - begin;
    if (p.editable) {
      const bool reached = row[kStatus] == kRunning && (p.everywhere || (i + phase) / p.block_length == active);
      p.revisable[at] = reached && p.editable[at] && !p.mask[at];
      p.read[at] = p.allowed[at] || p.revisable[at];
    }
    if (p.seed) {
      const auto position = static_cast<uint32_t>(row[kPosition] + i);
      const auto step = static_cast<uint32_t>(row[kForwards] + row[kDrawStep]);
      const auto sequence = static_cast<uint32_t>(row[kSequence]);
      p.uniform[at] =
          uniform(philox4x32(static_cast<uint64_t>(*p.seed), kActionIndex, position, step, sequence).word[0]);
    }
  }
  if (block.thread != 0) return;
  const float time = static_cast<float>(row[kSteps] + row[kDrawStep]) / p.horizon;
  p.steps[b] = row[kSteps];
  p.time[b] = time < 1.0f ? time : 1.0f;
}

namespace cpu {
void prepare(const PrepareParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int prepare(const PrepareParams& params, void* stream);
}  // namespace cuda

}  // namespace unmask
