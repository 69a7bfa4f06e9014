#include "team.h"

#include <sched.h>

namespace fused_rin {

void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void yield_cpu() { sched_yield(); }

void Team::start(int threads) {
  threads_ = threads;
  for (int i = 0; i < threads; ++i) flags_[i].epoch.store(0, std::memory_order_relaxed);
}

void Team::meet(int rank) {
  const uint64_t epoch = flags_[rank].epoch.load(std::memory_order_relaxed) + 1;
  flags_[rank].epoch.store(epoch, std::memory_order_release);
  for (int i = 0; i < threads_; ++i) {
    wait_until([&] { return flags_[i].epoch.load(std::memory_order_acquire) >= epoch; });
  }
}

}  // namespace fused_rin
