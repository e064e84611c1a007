// A block of one thread, for what is written for blocks: ops/unmask_row.h and ops/choose_row.h.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace unmask::cpu {

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
  int64_t before(int64_t) const { return 0; }
  template <typename Taken, typename Earlier, typename Give>
  void rank(int64_t n, const Taken& taken, const Earlier& earlier, const Give& give) const {
    order->clear();
    for (int64_t i = 0; i < n; ++i) {
      if (taken(i)) order->push_back(i);
    }
    std::sort(order->begin(), order->end(), earlier);
    for (size_t r = 0; r < order->size(); ++r) give((*order)[r], static_cast<int32_t>(r));
  }
};

}  // namespace unmask::cpu
