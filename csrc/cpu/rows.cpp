// calm_, choose, prepare and unmask_ on the CPU: plain scalar code, one row after the other, but for calm_'s pass over the
// logits. A thread is a block of one.
#include "ops/calm.h"
#include "ops/choose_row.h"
#include "ops/prepare.h"

#include <algorithm>
#include <vector>

namespace unmask::cpu {

float divergence_and_copy(const CalmParams& params, int64_t place);  // kernels.cpp

namespace {

struct Alone {
  static constexpr int64_t thread = 0, threads = 1;
  double* times = nullptr;
  std::vector<int64_t>* order = nullptr;

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

}  // namespace

void calm(const CalmParams& params, int64_t begin, int64_t end) {
  for (int64_t place = begin; place < end; ++place) {
    calm_place(params, place, Alone(), [&] { return divergence_and_copy(params, place); });
  }
}

void choose(const ChooseParams& params, int64_t begin, int64_t end) {
  std::vector<int32_t> memory(static_cast<size_t>(params.length * ChooseScratch::kBytes / 4 + 1));
  std::vector<int64_t> order;
  const ChooseScratch scratch(memory.data(), params.length);
  for (int64_t b = begin; b < end; ++b) choose_row(params, b, Alone{nullptr, &order}, scratch);
}

void prepare(const PrepareParams& params, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) prepare_row(params, b, Alone());
}

void unmask(const UnmaskParams& params, int64_t begin, int64_t end) {
  const int64_t block = params.block_length < params.length ? params.block_length : params.length;
  std::vector<double> times(params.mode == ActionMode::kDpls ? static_cast<size_t>(block) : 0);
  std::vector<int64_t> order;
  for (int64_t b = begin; b < end; ++b) unmask_row(params, b, Alone{times.data(), &order});
}

}  // namespace unmask::cpu
