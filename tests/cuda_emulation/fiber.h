// Fibers: functions with a stack of their own that hand control to and fro on one thread.
#pragma once
#include <cstddef>

namespace emulator {

// A saved stack pointer (or, without hand-written switching, a ucontext).
struct Context {
  void* state = nullptr;
  void* stack = nullptr;  // lowest address; null for the scheduler's own
  size_t stack_bytes = 0;
};

// Prepares `context` so that the first switch to it calls entry(); entry must never return.
void make_fiber(Context* context, void* stack, size_t stack_bytes, void (*entry)());
// Leaves `from` and continues `to`; `last` says that `from` will not be continued.
void switch_fiber(Context* from, Context* to, bool last);
// To be called first thing in a fiber's entry function.
void enter_fiber();

}  // namespace emulator
