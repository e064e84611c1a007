// The choice of select_set after a run of the network, by the rules of select_set.h: the lanes of a warp share the work,
// on the CPU there is one.
//
// `Lanes` has `lane` (this one's number), `lanes` (how many there are), any(x) over all lanes, and best(&p, &i), which
// gives all lanes the largest p and its i, at ties the lowest i.
#pragma once
#include <math.h>

#include "select_set.h"

#if defined(__CUDACC__)
#define UNMASK_SET __device__ __forceinline__
#else
#define UNMASK_SET inline __attribute__((always_inline))
#endif

namespace unmask {

constexpr uint8_t kFree = 0, kPicked = 1, kFresh = 2, kBarred = 3;  // of positions; kFresh: picked after the last run

UNMASK_SET float set_probability(float logit) {
  const float p = 1.0f / (1.0f + expf(-logit));
  return p >= 0.0f ? p : 0.0f;  // also where it is NaN
}

// What the network reads of position `at` of the batch.
struct SetPosition {
  int64_t token;        // row of the table
  float p;              // of the proposal
  const float* values;  // confidences, or null

  UNMASK_SET SetPosition(const SelectSetParams& q, int64_t at)
      : token(q.region[at] ? q.candidates[at] : q.tokens[at]),
        p(q.region[at] && q.probability[at] == q.probability[at] ? q.probability[at] : 0.0f),
        values(q.region[at] ? q.confidence + at * q.sizes.confidences : nullptr) {
    token = token < 0 ? 0 : token < q.table_rows ? token : q.table_rows - 1;
  }

  // Number i of the first confidences + 2.
  UNMASK_SET float number(int64_t i, int64_t confidences) const {
    if (i < confidences) return values && values[i] == values[i] ? values[i] : 0.0f;
    return i == confidences ? p : logf(p > 1e-4f ? p : 1e-4f);
  }
  // Logit of p, to which the network's output is added.
  UNMASK_SET float prior() const {
    const float x = p < 1e-4f ? 1e-4f : p > 1.0f - 1e-4f ? 1.0f - 1e-4f : p;
    return logf(x / (1.0f - x));
  }
};

// Where a row stands; the same in all lanes.
struct SetChoice {
  const float risk;
  float level = expf(-risk), spent = 0.0f;
  bool started = false;  // something is picked

  UNMASK_SET SetChoice(float risk_of_row, float sure) : risk(risk_of_row) {
    if (level < sure) level = sure;
  }

  // Picks by p (L), which is read where a position is free. Returns whether the row goes on.
  template <typename Lanes>
  UNMASK_SET bool pick(const Lanes& by, int64_t length, const float* p, uint8_t* state) {
    float most = -1.0f;
    int64_t best = length, others = 0;  // others: free and not certain
    bool certain = false;
    for (int64_t i = by.lane; i < length; i += by.lanes) {
      if (state[i] == kFresh) state[i] = kPicked;
      if (state[i] != kFree) continue;
      if (p[i] > level) {
        state[i] = kFresh;
        certain = true;
        continue;
      }
      others += 1;
      if (p[i] > most) {
        most = p[i];
        best = i;
      }
    }
    certain = by.any(certain);
    by.best(&most, &best);
    const bool first = !started && !certain, exists = best < length;
    const float cost = first ? 0.0f : -logf(most > 1e-6f ? most : 1e-6f);
    const bool takes = exists && (first || spent + cost <= risk);
    started = started || certain || takes;
    if (takes) {
      spent += cost;
      if (best % by.lanes == by.lane) {
        state[best] = kFresh;
        others -= 1;
      }
    }
    return (certain || takes) && by.any(others > 0);
  }
};

}  // namespace unmask
