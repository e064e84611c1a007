// The CPU kernels for each instruction set, and the choice among them.
#include <math.h>
#include <stdint.h>

#include "cpu/isa.h"
#include "cpu/policy_forward_plan.h"
#include "ops/calm.h"
#include "ops/random.h"
#include "ops/select_set_row.h"
#include "ops/topk_confidence.h"

#define UNMASK_ISA portable
#define UNMASK_LANES 4
#include "cpu/isa_kernels.h"

#if UNMASK_HAVE_X86_ISAS
#define UNMASK_PRAGMA(pragma) _Pragma(#pragma)
#if defined(__clang__)
#define UNMASK_BEGIN_TARGET(isas) \
  UNMASK_PRAGMA(clang attribute push(__attribute__((target(isas))), apply_to = function))
#define UNMASK_END_TARGET _Pragma("clang attribute pop")
#else
#define UNMASK_BEGIN_TARGET(isas) _Pragma("GCC push_options") UNMASK_PRAGMA(GCC target(isas))
#define UNMASK_END_TARGET _Pragma("GCC pop_options")
#endif

UNMASK_BEGIN_TARGET("avx2,fma,f16c")
#define UNMASK_ISA avx2
#define UNMASK_LANES 8
#include "cpu/isa_kernels.h"
UNMASK_END_TARGET

UNMASK_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define UNMASK_ISA avx512
#define UNMASK_LANES 16
#include "cpu/isa_kernels.h"
UNMASK_END_TARGET
#endif

namespace unmask::cpu {

#if !UNMASK_HAVE_X86_ISAS
namespace avx2 = portable;
namespace avx512 = portable;
#endif

template <typename Function>
static Function* pick(Function* for_portable, Function* for_avx2, Function* for_avx512) {
  if (active_isa() == Isa::kAvx512) return for_avx512;
  return active_isa() == Isa::kAvx2 ? for_avx2 : for_portable;
}

void topk_confidence(const TopkConfidenceParams& params, int64_t begin, int64_t end) {
  pick(portable::topk_confidence, avx2::topk_confidence, avx512::topk_confidence)(params, begin, end);
}

float divergence_and_copy(const CalmParams& params, int64_t place) {
  return pick(portable::divergence_and_copy, avx2::divergence_and_copy, avx512::divergence_and_copy)(params, place);
}

void policy_forward(const PolicyForwardParams& params, int64_t begin, int64_t end, const PolicyScratch& scratch,
                    const SinusoidTable& rotary) {
  pick(portable::policy_forward, avx2::policy_forward, avx512::policy_forward)(params, begin, end, scratch, rotary);
}

void select_set(const SelectSetParams& params, int64_t begin, int64_t end, const SetScratch& scratch,
                const SinusoidTable& rotary, const SinusoidTable& places) {
  pick(portable::select_set, avx2::select_set, avx512::select_set)(params, begin, end, scratch, rotary, places);
}

}  // namespace unmask::cpu
