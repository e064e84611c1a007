// Closes what isa_begin.h opened.
#if UNMASK_HAVE_X86_ISAS && UNMASK_ISA_LEVEL > 0
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#undef UNMASK_ISA
#undef UNMASK_ISA_LEVEL
#undef UNMASK_LANES
