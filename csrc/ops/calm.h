// calm_: at which positions a row's distributions have moved by little for some steps (KLASS, arXiv 2511.05664).
//
// For each of a row's places, which are the positions of its active block:
//   divergence  KL(p || q) in nats, of this step's distribution p = softmax(logits) from q, that of `previous`, both without
//               the token `excluded`; 0 log 0 = 0. NaN if one is undefined. A p below 1e-37 may count as 0.
//   previous    becomes the logits
//   calm_for    of the place's position: 1 + the number of steps in a row in which the divergence was below `bound`
//   calm        of the position: calm_for > needed
// There is nothing to compare with (divergence +inf, calm_for 1) in a row's first step, and where calm_for was 0, as it is
// left everywhere outside of the block. Positions ascend. A place whose position the place before has, or that is outside
// of the buffer, is left out: its divergence is +inf.
#pragma once
#include "topk_confidence.h"

namespace unmask {

struct CalmParams {
  const void* logits;  // place s of row b begins at b * stride_row + s * stride_place; its V entries are contiguous
  DType dtype;         // of the logits and of `previous`
  int64_t places;      // of a row
  int64_t vocab;       // V >= 1
  int64_t stride_row, stride_place;
  int64_t length;    // L
  int64_t excluded;  // an id, or -1
  float bound;
  int64_t needed;            // >= 0
  const int64_t* steps;      // (B): 0 in a row's first step
  const int64_t* positions;  // (B, places), or null: place s is position s
  void* previous;            // (B, places, V), in place
  int32_t* calm_for;         // (B, L), in place
  uint8_t* calm;             // (B, L) bool
  float* divergence;         // (B, places)

  // Where a place's logits begin, in elements.
  UNMASK_HD int64_t offset(int64_t place) const { return place / places * stride_row + place % places * stride_place; }
  UNMASK_HD int64_t position(int64_t place) const { return positions ? positions[place] : place % places; }
};

// Place `place` of all rows', by a block as in unmask_row.h. compare(), by the whole block, returns the divergence and
// overwrites `previous`.
template <typename Block, typename Compare>
UNMASK_HD void calm_place(const CalmParams& p, int64_t place, const Block& block, const Compare& compare) {
  const int64_t b = place / p.places, row = b * p.length, at = p.position(place);
  if (place % p.places == 0) {
    const int64_t last = p.position(place + p.places - 1);
    for (int64_t i = block.thread; i < p.length; i += block.threads) {
      if (i >= at && i <= last) continue;
      p.calm_for[row + i] = 0;
      p.calm[row + i] = 0;
    }
  }
  const bool again = place % p.places != 0 && p.position(place - 1) == at;
  if (again || at < 0 || at >= p.length) {
    if (block.thread == 0) p.divergence[place] = HUGE_VALF;
    return;
  }
  const int32_t before = p.steps[b] > 0 ? p.calm_for[row + at] : 0;
  float divergence = compare();
  if (block.thread != 0) return;
  if (before == 0) divergence = HUGE_VALF;
  p.divergence[place] = divergence;
  p.calm_for[row + at] = divergence < p.bound ? before + 1 : 1;
  p.calm[row + at] = p.calm_for[row + at] > p.needed;
}

namespace cpu {
// Places [begin, end) of all rows'.
void calm(const CalmParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int calm(const CalmParams& params, int64_t places, void* stream);
}  // namespace cuda

}  // namespace unmask
