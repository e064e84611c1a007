// calm_ on the CPU, but for the pass over the logits: one place after the other.
#include "ops/calm.h"

#include "cpu/alone.h"

namespace unmask::cpu {

float divergence_and_copy(const CalmParams& params, int64_t place);  // kernels.cpp

void calm(const CalmParams& params, int64_t begin, int64_t end) {
  for (int64_t place = begin; place < end; ++place) {
    calm_place(params, place, Alone{nullptr, nullptr}, [&] { return divergence_and_copy(params, place); });
  }
}

}  // namespace unmask::cpu
