// Python's lock, let go for the time of a call.
#pragma once

#include <Python.h>

#include <chrono>
#include <thread>

namespace fused_rin {

// As pybind11::gil_scoped_release, but for a thread that comes back while the interpreter ends: up to Python 3.13 such
// a thread is made to exit by an unwinding of its stack, which no destructor lets pass, so that a process whose daemon
// thread was in a call ended with "terminate called without an active exception" (20 of 20 tries). As in Python 3.14 it
// waits for the process to end.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // it is C and throws nothing: what comes is the unwinding
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace fused_rin
