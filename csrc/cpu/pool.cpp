#include "pool.h"

#include <pthread.h>

#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "crowd.h"
#include "openmp.h"
#include "team.h"

namespace fused_rin {

namespace {

constexpr int64_t kLateNs = 200000;  // waking up takes 10 to 50 us

// Never destroyed: its threads sleep until the process ends. Made when this library is loaded: a child forked while
// another thread made it would wait for that thread for ever.
Pool* pool = nullptr;

[[maybe_unused]] const int watching = [] {
  pool = new Pool;
  return pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
}();

// How a thread rounds, and whether denormal numbers are zero to it (torch.set_flush_denormal). Every thread has a
// setting of its own; for the time of a task it takes the caller's, so that no bit depends on who has which rows.
using FloatMode = uint64_t;

FloatMode float_mode() {
#if defined(__x86_64__)
  return _mm_getcsr() & ~uint64_t{_MM_EXCEPT_MASK};
#elif defined(__aarch64__)
  FloatMode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

void set_float_mode(FloatMode mode) {
  if (mode == float_mode()) return;
#if defined(__x86_64__)
  _mm_setcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

}  // namespace

Pool& Pool::instance() { return *pool; }

bool Pool::try_run(int threads, int torchs, const std::function<void(int)>& task) {
  std::unique_lock<std::mutex> use(in_use_, std::try_to_lock);
  if (!use) return false;
  const FloatMode callers = float_mode();
  const int64_t began = now_ns();
  int64_t own_end = began;
  const std::function<void(int)> alike = [&](int rank) {
    const FloatMode own = float_mode();
    set_float_mode(callers);
    task(rank);
    set_float_mode(own);
    if (rank == 0) own_end = now_ns();
  };
  if (!run(threads, torchs, alike)) return false;
  // Parts are about equal: who waited longer for the others than it worked had a processor, and they had none.
  if (now_ns() - own_end > kLateNs + (own_end - began)) found_crowded();
  return true;
}

bool Pool::run(int threads, int torchs, const std::function<void(int)>& task) {
  if (torchs && run_on_torchs_threads(threads, torchs, task)) return true;
  while (workers_ < threads - 1) {
    if (!start_worker(workers_ + 1)) return false;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    task_ = &task;
    threads_ = threads;
    running_.store(threads - 1, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  task(0);
  wait_until([this] { return running_.load(std::memory_order_acquire) == 0; });
  return true;
}

bool Pool::start_worker(int rank) {
  try {
    std::thread(&Pool::work, this, rank, round_.load()).detach();
  } catch (const std::system_error&) {  // a limit of the process, its user or its cgroup, or no memory for a stack
    return false;
  }
  workers_ = rank;
  return true;
}

void Pool::work(int rank, uint64_t seen) {
  for (;;) {
    // A short spin first: in a training step the backward sweep follows the forward one closely.
    for (int spins = 0; spins < 500 && round_.load(std::memory_order_acquire) == seen; ++spins) pause_cpu();
    const std::function<void(int)>* task;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
      seen = round_.load(std::memory_order_relaxed);
      task = rank < threads_ ? task_ : nullptr;
    }
    if (task) {
      (*task)(rank);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }
}

}  // namespace fused_rin
