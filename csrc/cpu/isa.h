// Instruction sets of the CPU kernels: one source, compiled once per instruction set, chosen at run time.
//
// kernels.cpp includes isa_kernels.h once per instruction set, with UNMASK_ISA (its namespace) and UNMASK_LANES (32-bit
// numbers per vector) defined. What isa_kernels.h includes has no include guard, lies in unmask::cpu::UNMASK_ISA, and
// includes nothing itself. Other headers come before it: an inline function compiled for AVX2 could otherwise be the copy
// that the linker keeps for everybody. For the same reason a kernel must not instantiate std:: templates.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define UNMASK_HAVE_X86_ISAS 1
// GCC's own header starts some variables with their own undefined value, and then warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#define UNMASK_HAVE_X86_ISAS 0
#endif

namespace unmask::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };
constexpr Isa kBestFirst[] = {Isa::kAvx512, Isa::kAvx2, Isa::kPortable};

// The instruction set in use: at first the best of this processor, or the one that the environment variable
// UNMASK_CPU_ISA names (throws std::runtime_error if it is unknown or not supported). Only tests assign it.
Isa& active_isa();
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

}  // namespace unmask::cpu
