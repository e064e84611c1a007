#include "ops/topk_confidence.h"

#include "cpu/isa.h"

namespace unmask {
namespace cpu {

UNMASK_DECLARE_ISAS(void topk_confidence(const TopkConfidenceParams& params, int64_t begin, int64_t end))

void topk_confidence(const TopkConfidenceParams& params, int64_t begin, int64_t end) {
  static const auto kernel = pick_isa(portable::topk_confidence, avx2::topk_confidence, avx512::topk_confidence);
  kernel(params, begin, end);
}

}  // namespace cpu
}  // namespace unmask
