// unmask_ on the CPU: a few hundred positions per row, so plain scalar code, one row after the other.
#include <vector>

#include "ops/unmask_row.h"

namespace unmask {
namespace cpu {
namespace {

// A block of one thread.
struct Alone {
  static constexpr int64_t thread = 0, threads = 1;
  double* times;

  void barrier() const {}
  template <typename T>
  T min(T x) const {
    return x;
  }
  int64_t sum(int64_t x) const { return x; }
};

}  // namespace

void unmask(const UnmaskParams& params, int64_t begin, int64_t end) {
  const int64_t block = params.block_length < params.length ? params.block_length : params.length;
  std::vector<double> times(params.mode == ActionMode::kDpls ? static_cast<size_t>(block) : 0);
  for (int64_t b = begin; b < end; ++b) unmask_row(params, b, Alone{times.data()});
}

}  // namespace cpu
}  // namespace unmask
