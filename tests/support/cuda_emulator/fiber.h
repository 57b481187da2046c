// A CUDA thread as a fiber: a stack of its own, switched to and from by a few instructions. The sanitizers are told.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace cuda_emulator {
// Under ThreadSanitizer every CUDA thread is a thread, and only CUDA's synchronisation orders their accesses: it
// becomes a race checker for kernels. What the emulator itself reads and writes is hidden from it.
struct Quiet {
#ifdef __SANITIZE_THREAD__
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Quiet() {}
#endif
  Quiet(const Quiet&) = delete;
};

// What is done before a release of `mark` is ordered before what follows an acquire of it.
inline void release([[maybe_unused]] void* mark) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(mark);
#endif
}
inline void acquire([[maybe_unused]] void* mark) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(mark);
#endif
}

constexpr size_t kStackBytes = 128 * 1024;

// A stack to continue on, the scheduler's own included.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = kStackBytes;
  void* tsan_fiber = nullptr;
  void* asan_stack = nullptr;
};

// Pushes the registers that a call preserves, exchanges the stacks, pops them again.
extern "C" void cuda_emulator_switch(void** save, void* load);
#if defined(__x86_64__)
__asm__(
    ".text\n.weak cuda_emulator_switch\n.type cuda_emulator_switch,@function\ncuda_emulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size cuda_emulator_switch,.-cuda_emulator_switch\n");
#elif defined(__aarch64__)
__asm__(
    ".text\n.weak cuda_emulator_switch\n.type cuda_emulator_switch,%function\ncuda_emulator_switch:\n"
    "sub sp,sp,#160\nstp x19,x20,[sp,#0]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\n"
    "stp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\n"
    "stp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\nmov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp,#0]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\n"
    "ldp x27,x28,[sp,#64]\nldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\n"
    "ldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\nadd sp,sp,#160\nret\n"
    ".size cuda_emulator_switch,.-cuda_emulator_switch\n");
#else
#error "the CUDA emulator knows how to switch stacks on x86-64 and aarch64 only"
#endif

// Makes `context` begin in `entry` when it is switched to for the first time.
inline void prepare(Context& context, char* stack, void (*entry)()) {
  context.stack = stack;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 16);
  *--top = nullptr;  // the alignment that a function expects at its entry
  *--top = reinterpret_cast<void*>(entry);
  for (int r = 0; r < 6; ++r) *--top = nullptr;
#else
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 160 - 16);
  for (int r = 0; r < 20; ++r) top[r] = nullptr;
  top[11] = reinterpret_cast<void*>(entry);
#endif
  context.stack_pointer = top;
}

// Leaves `from` for `to`; returns when something switches back. A context that ends never comes back.
__attribute__((no_sanitize("thread"))) inline void switch_to(Context& from, Context& to, [[maybe_unused]] bool ends) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.asan_stack, to.stack, to.stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  cuda_emulator_switch(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.asan_stack, nullptr, nullptr);
#endif
}

// The first thing that a new fiber does: reports its arrival to the sanitizer, which returns the scheduler's stack.
inline void arrive([[maybe_unused]] Context& scheduler) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
}
}  // namespace cuda_emulator
