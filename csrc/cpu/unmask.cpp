// unmask_ on the CPU: a few hundred positions per row, so plain scalar code, one row after the other.
#include <algorithm>
#include <vector>

#include "ops/unmask_row.h"

namespace unmask::cpu {
namespace {

// A block of one thread.
struct Alone {
  static constexpr int64_t thread = 0, threads = 1;
  double* times;
  std::vector<int64_t>* order;

  void barrier() const {}
  bool all(bool x) const { return x; }
  template <typename T>
  T min(T x) const {
    return x;
  }
  int64_t sum(int64_t x) const { return x; }
  void rank_arrivals(const UnmaskRow& row, const double* at, int64_t winner, double stop) const {
    order->clear();
    for (int64_t i = row.begin; i < row.end; ++i) {
      if (at[i] < stop || i == winner) order->push_back(i);
    }
    std::sort(order->begin(), order->end(),
              [at](int64_t a, int64_t b) { return at[a] < at[b] || (at[a] == at[b] && a < b); });
    for (size_t n = 0; n < order->size(); ++n) row.rank[(*order)[n]] = static_cast<int32_t>(n);
  }
};

}  // namespace

void unmask(const UnmaskParams& params, int64_t begin, int64_t end) {
  const int64_t block = params.block_length < params.length ? params.block_length : params.length;
  std::vector<double> times(params.mode == ActionMode::kDpls ? static_cast<size_t>(block) : 0);
  std::vector<int64_t> order;
  for (int64_t b = begin; b < end; ++b) unmask_row(params, b, Alone{times.data(), &order});
}

}  // namespace unmask::cpu
