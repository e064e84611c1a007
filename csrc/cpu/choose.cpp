// choose on the CPU: plain scalar code, one row after the other.
#include "cpu/alone.h"
#include "ops/choose_row.h"

namespace unmask::cpu {

void choose(const ChooseParams& params, int64_t begin, int64_t end) {
  std::vector<int32_t> memory(static_cast<size_t>(params.length * ChooseScratch::kBytes / 4 + 1));
  std::vector<int64_t> order;
  const ChooseScratch scratch(memory.data(), params.length);
  for (int64_t b = begin; b < end; ++b) choose_row(params, b, Alone{nullptr, &order}, scratch);
}

}  // namespace unmask::cpu
