// Instruction sets of the CPU kernels: one source, compiled once per instruction set, chosen at run time.
//
// A kernel `foo` consists of
//   foo_kernel.h     the code, inside `namespace unmask::cpu::UNMASK_ISA`, written against simd.h; no include guard, and
//                    no #include but of such files (other headers go into the thin files, before isa_begin.h)
//   foo_portable.cpp, foo_avx2.cpp, foo_avx512.cpp
//                    thin files: standard headers, then `#define UNMASK_ISA_LEVEL n`, isa_begin.h, foo_kernel.h,
//                    isa_end.h
//   foo.cpp          declares the function in each namespace and calls `pick_isa(portable::foo, avx2::foo, avx512::foo)`
// Standard headers must come before isa_begin.h: an inline function compiled for AVX2 could otherwise be the copy that
// the linker keeps for everybody. For the same reason a kernel must not instantiate std:: templates.
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

namespace unmask {
namespace cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set of this processor, or the one forced by the environment variable UNMASK_CPU_ISA
// (portable, avx2 or avx512; throws std::runtime_error if unknown or not supported). Decided at the first call.
Isa active_isa();
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

template <typename Function>
Function* pick_isa(Function* portable, Function* avx2, Function* avx512, Isa isa) {
  if (isa == Isa::kAvx512) return avx512;
  if (isa == Isa::kAvx2) return avx2;
  return portable;
}

template <typename Function>
Function* pick_isa(Function* portable, Function* avx2, Function* avx512) {
  return pick_isa(portable, avx2, avx512, active_isa());
}

}  // namespace cpu
}  // namespace unmask

// UNMASK_DECLARE_ISAS(void foo(int)) declares foo in the namespace of each instruction set.
#define UNMASK_DECLARE_ISAS(declaration) \
  namespace portable {                   \
  declaration;                           \
  }                                      \
  namespace avx2 {                       \
  declaration;                           \
  }                                      \
  namespace avx512 {                     \
  declaration;                           \
  }
