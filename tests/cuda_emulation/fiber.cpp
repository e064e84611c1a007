#include "fiber.h"

#include <stdint.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

#ifdef EMULATOR_ASAN
// The scheduler's stack, learnt when a fiber is first entered from it.
const void* g_main_stack = nullptr;
size_t g_main_bytes = 0;
#endif

#if defined(__x86_64__)
// Saves the registers that calls preserve, exchanges stack pointers, restores. A system call less than swapcontext.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#endif

}  // namespace

void make_fiber(Context* context, void* stack, size_t stack_bytes, void (*entry)()) {
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(stack, stack_bytes);
#endif
  context->stack = stack;
  context->stack_bytes = stack_bytes;
#if defined(__x86_64__)
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~static_cast<uintptr_t>(15);
  void** frame = reinterpret_cast<void**>(top) - 8;
  memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(entry);  // where `ret` goes; the stack is then 8 off alignment, as after a call
  context->state = frame;
#else
  ucontext_t* state = context->state ? static_cast<ucontext_t*>(context->state) : new ucontext_t;
  getcontext(state);
  state->uc_stack.ss_sp = stack;
  state->uc_stack.ss_size = stack_bytes;
  state->uc_link = nullptr;
  makecontext(state, entry, 0);
  context->state = state;
#endif
}

void switch_fiber(Context* from, Context* to, bool last) {
#ifdef EMULATOR_ASAN
  void* fake = nullptr;
  const void* bottom = to->stack ? to->stack : g_main_stack;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, bottom, to->stack ? to->stack_bytes : g_main_bytes);
#else
  (void)last;
#endif
#if defined(__x86_64__)
  emulator_switch(&from->state, to->state);
#else
  if (!from->state) from->state = new ucontext_t;  // the scheduler's, once per process
  swapcontext(static_cast<ucontext_t*>(from->state), static_cast<ucontext_t*>(to->state));
#endif
#ifdef EMULATOR_ASAN
  const void* left = nullptr;
  size_t left_bytes = 0;
  __sanitizer_finish_switch_fiber(fake, &left, &left_bytes);
  if (from->stack) {
    g_main_stack = left;
    g_main_bytes = left_bytes;
  }
#endif
}

void enter_fiber() {
#ifdef EMULATOR_ASAN
  const void* left = nullptr;
  size_t left_bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &left, &left_bytes);
  g_main_stack = left;
  g_main_bytes = left_bytes;
#endif
}

}  // namespace emulator
