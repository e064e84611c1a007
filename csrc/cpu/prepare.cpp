// prepare on the CPU: plain scalar code, one row after the other.
#include "cpu/alone.h"
#include "ops/prepare.h"

namespace unmask::cpu {

void prepare(const PrepareParams& params, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) prepare_row(params, b, Alone{nullptr, nullptr});
}

}  // namespace unmask::cpu
