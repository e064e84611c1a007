// unmask_ on the CPU: a few hundred positions per row, so plain scalar code, one row after the other.
#include "cpu/alone.h"
#include "ops/unmask_row.h"

namespace unmask::cpu {

void unmask(const UnmaskParams& params, int64_t begin, int64_t end) {
  const int64_t block = params.block_length < params.length ? params.block_length : params.length;
  std::vector<double> times(params.mode == ActionMode::kDpls ? static_cast<size_t>(block) : 0);
  std::vector<int64_t> order;
  for (int64_t b = begin; b < end; ++b) unmask_row(params, b, Alone{times.data(), &order});
}

}  // namespace unmask::cpu
