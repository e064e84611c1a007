// Opens the code of one instruction set; UNMASK_ISA_LEVEL is 0 (portable), 1 (AVX2 + FMA + F16C) or 2 (AVX-512).
// Where the compiler or the machine has no such instructions, the levels above 0 compile the portable code.
// Not guarded: a thin file includes it once. See isa.h.
#include "cpu/isa.h"

#ifndef UNMASK_ISA_LEVEL
#error "define UNMASK_ISA_LEVEL before isa_begin.h"
#endif

#if UNMASK_ISA_LEVEL == 2
#define UNMASK_ISA avx512
#elif UNMASK_ISA_LEVEL == 1
#define UNMASK_ISA avx2
#else
#define UNMASK_ISA portable
#endif

#if UNMASK_HAVE_X86_ISAS && UNMASK_ISA_LEVEL == 2
#define UNMASK_LANES 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#elif UNMASK_HAVE_X86_ISAS && UNMASK_ISA_LEVEL == 1
#define UNMASK_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#else
#define UNMASK_LANES 4
#endif

#include "cpu/simd.h"
