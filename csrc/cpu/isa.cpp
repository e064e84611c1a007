#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace unmask::cpu {

bool isa_supported(Isa isa) {
#if UNMASK_HAVE_X86_ISAS
  // Every processor with these two has F16C, which __builtin_cpu_supports knows in newer compilers only.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kPortable;
}

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512"};
  return kNames[static_cast<int>(isa)];
}

static Isa choose() {
  const char* variable = std::getenv("UNMASK_CPU_ISA");
  const std::string forced = variable ? variable : "";
  for (const Isa isa : kBestFirst) {
    if (!forced.empty() && forced != isa_name(isa)) continue;
    if (isa_supported(isa)) return isa;
    if (!forced.empty()) throw std::runtime_error("UNMASK_CPU_ISA=" + forced + ": this processor does not support it");
  }
  throw std::runtime_error("UNMASK_CPU_ISA=" + forced + ": expected portable, avx2 or avx512");
}

Isa& active_isa() {
  static Isa isa = choose();
  return isa;
}

}  // namespace unmask::cpu
