// The policy networks on the calling thread: policy_forward and select_set.
#include <cmath>
#include <vector>

#include "cpu/policy_forward_plan.h"

namespace unmask::cpu {

namespace {

// Memory that a thread keeps between calls: a step of decoding allocates nothing once it is warm.
struct ThreadMemory {
  std::vector<char> scratch;
  std::vector<float> rotary;
  int64_t head_size = 0, positions = 0;

  char* scratch_of(int64_t bytes) {
    if (static_cast<int64_t>(scratch.size()) < bytes + 64) scratch.assign(static_cast<size_t>(bytes + 64), 0);
    const auto address = reinterpret_cast<uintptr_t>(scratch.data());
    return scratch.data() + (64 - address % 64) % 64;
  }

  RotaryTable table(int64_t size, int64_t length) {
    length += kMaxLanes;  // a vector of positions may begin at the last
    if (size != head_size || length > positions) {
      head_size = 0;  // nothing valid, should the allocation fail
      const int64_t half = size / 2, stride = round_up(length, kMaxChunk);
      rotary.assign(static_cast<size_t>(2 * half * stride), 0.0f);
      for (int64_t i = 0; i < half; ++i) {
        const double frequency =
            static_cast<float>(std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(size)));
        for (int64_t j = 0; j < stride; ++j) {
          const double angle = static_cast<double>(j) * frequency;
          rotary[static_cast<size_t>(i * stride + j)] = static_cast<float>(std::cos(angle));
          rotary[static_cast<size_t>((half + i) * stride + j)] = static_cast<float>(std::sin(angle));
        }
      }
      head_size = size;
      positions = stride;
    }
    return RotaryTable{rotary.data(), rotary.data() + head_size / 2 * positions, positions};
  }
};

thread_local ThreadMemory thread_memory;

// Asks for all weights at once: the pass over the logits has driven them out of the caches, and the products, which read
// a line here and there, would wait for them one after the other.
void prefetch_weights(const float* weights, int64_t count) {
  constexpr int64_t kFloatsPerLine = 16;
  for (int64_t i = 0; i < count; i += kFloatsPerLine) __builtin_prefetch(weights + i, 0, 2);
}

}  // namespace

void policy_forward(const PolicyForwardParams& params, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const PolicyScratch scratch(params, thread_memory.scratch_of(PolicyScratch(params, nullptr).used));
  prefetch_weights(params.weights, policy_weight_count(params.sizes));
  policy_forward(params, begin, end, scratch,
                 thread_memory.table(params.sizes.hidden / params.sizes.heads, params.length));
}

void select_set(const SelectSetParams& params, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const SetScratch scratch(params, thread_memory.scratch_of(SetScratch(params, nullptr).used));
  prefetch_weights(params.weights, set_weight_count(params.sizes, params.layers));
  select_set(params, begin, end, scratch, thread_memory.table(params.sizes.hidden / params.sizes.heads, params.length));
}

}  // namespace unmask::cpu
