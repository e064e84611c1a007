// The policy networks on the calling thread: policy_forward and select_set.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/policy_forward_plan.h"

namespace unmask::cpu {

namespace {

constexpr int64_t kMaxPairs = 128;  // of channels of a head

// Memory that a thread keeps between calls: a step of decoding allocates nothing once it is warm.
struct Sinusoids {
  std::vector<float> frequencies, values;
  int64_t positions = 0;

  SinusoidTable of(const float* wanted, int64_t count, int64_t length) {
    if (!std::equal(wanted, wanted + count, frequencies.begin(), frequencies.end()) || length > positions) {
      positions = 0;                                                   // nothing valid, should an allocation fail
      const int64_t stride = round_up(length, kMaxChunk) + kMaxLanes;  // a vector may begin at the last position
      frequencies.assign(wanted, wanted + count);
      values.assign(static_cast<size_t>(2 * count * stride), 0.0f);
      for (int64_t i = 0; i < count * stride; ++i) {
        const double angle = static_cast<double>(i % stride) * static_cast<double>(wanted[i / stride]);
        values[static_cast<size_t>(i)] = static_cast<float>(std::cos(angle));
        values[static_cast<size_t>(count * stride + i)] = static_cast<float>(std::sin(angle));
      }
      positions = stride - kMaxLanes;
    }
    const int64_t stride = positions + kMaxLanes;
    return SinusoidTable{values.data(), values.data() + count * stride, stride};
  }
};

struct ThreadMemory {
  std::vector<char> scratch;
  Sinusoids rotary, places;

  char* scratch_of(int64_t bytes) {
    if (static_cast<int64_t>(scratch.size()) < bytes + 64) scratch.assign(static_cast<size_t>(bytes + 64), 0);
    const auto address = reinterpret_cast<uintptr_t>(scratch.data());
    return scratch.data() + (64 - address % 64) % 64;
  }

  SinusoidTable rotary_of(const PolicySizes& sizes, int64_t length) {
    const int64_t head = sizes.hidden / sizes.heads;
    float frequencies[kMaxPairs];
    for (int64_t i = 0; i < head / 2; ++i) {
      frequencies[i] = static_cast<float>(std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(head)));
    }
    return rotary.of(frequencies, head / 2, length);
  }
};

thread_local ThreadMemory memory;

// Asks for all weights at once: the pass over the logits has driven them out of the caches, and the products, which read
// a line here and there, would wait for them one after the other.
void prefetch_weights(const float* weights, int64_t count) {
  constexpr int64_t kFloatsPerLine = 16;
  for (int64_t i = 0; i < count; i += kFloatsPerLine) __builtin_prefetch(weights + i, 0, 2);
}

}  // namespace

void policy_forward(const PolicyForwardParams& params, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const PolicyScratch scratch(params, memory.scratch_of(PolicyScratch(params, nullptr).used));
  prefetch_weights(params.weights, policy_weight_count(params.sizes));
  policy_forward(params, begin, end, scratch, memory.rotary_of(params.sizes, params.length));
}

void select_set(const SelectSetParams& params, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const SetScratch scratch(params, memory.scratch_of(SetScratch(params, nullptr).used));
  prefetch_weights(params.weights, set_weight_count(params.sizes, params.layers));
  const float* frequencies = SetWeightView(params.weights, params.sizes, params.layers).frequencies;
  select_set(params, begin, end, scratch, memory.rotary_of(params.sizes, params.length),
             memory.places.of(frequencies, kSetPeriods, params.length));
}

}  // namespace unmask::cpu
