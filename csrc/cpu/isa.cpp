#include "cpu/isa.h"

#if UNMASK_HAVE_X86_ISAS
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace unmask {
namespace cpu {

bool isa_supported(Isa isa) {
#if UNMASK_HAVE_X86_ISAS
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  // __builtin_cpu_supports knows "f16c" in newer compilers only.
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kPortable;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

namespace {

Isa choose() {
  constexpr Isa kBestFirst[] = {Isa::kAvx512, Isa::kAvx2, Isa::kPortable};
  const char* forced = std::getenv("UNMASK_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    for (Isa isa : kBestFirst) {
      if (isa_supported(isa)) return isa;
    }
    return Isa::kPortable;
  }
  for (Isa isa : kBestFirst) {
    if (std::string(forced) != isa_name(isa)) continue;
    if (!isa_supported(isa)) {
      throw std::runtime_error(std::string("UNMASK_CPU_ISA=") + forced + ": this processor does not support it");
    }
    return isa;
  }
  throw std::runtime_error(std::string("UNMASK_CPU_ISA=") + forced + ": expected portable, avx2 or avx512");
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace cpu
}  // namespace unmask
