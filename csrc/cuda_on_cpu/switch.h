// How one processor has many threads: each with a stack of its own, the scheduler goes on with one until it waits.
//
// A fibre begins by setcontext, which alone gives it its stack, and goes on by longjmp: swapcontext asks the system for
// the signals' mask every time, two thirds of what a switch takes.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>

namespace fused_rin::fibres {

class Fibre {
 public:
  // `enter` has to end with `leave`.
  void prepare(char* stack, size_t bytes, void (*enter)()) {
    getcontext(&first_);
    first_.uc_stack.ss_sp = stack;
    first_.uc_stack.ss_size = bytes;
    first_.uc_link = nullptr;
    makecontext(&first_, enter, 0);
  }

  // Called by the scheduler: returns when the fibre waits or has left. Not inlined, like `wait`, so that nothing in
  // the frame of a caller lives past a jump.
  __attribute__((noinline)) void resume(jmp_buf& scheduler) {
    if (_setjmp(scheduler)) return;
    if (begun_) _longjmp(place_, 1);
    begun_ = true;
    setcontext(&first_);
  }

  // Called by the fibre itself: returns when it is its turn again.
  __attribute__((noinline)) void wait(jmp_buf& scheduler) {
    if (!_setjmp(place_)) _longjmp(scheduler, 1);
  }
  [[noreturn]] static void leave(jmp_buf& scheduler) { _longjmp(scheduler, 1); }

 private:
  ucontext_t first_;
  jmp_buf place_;
  bool begun_ = false;
};

// Memory for stacks, kept from launch to launch: to have its pages from the system anew takes a twentieth of all the
// time.
class Stacks {
 public:
  ~Stacks() { release(); }

  char* have(size_t bytes) {
    if (bytes <= bytes_) return memory_;
    release();
    void* const all = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    bytes_ = bytes;
    return memory_ = static_cast<char*>(all);
  }

 private:
  void release() {
    if (memory_) munmap(memory_, bytes_);
    memory_ = nullptr, bytes_ = 0;
  }

  char* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace fused_rin::fibres
