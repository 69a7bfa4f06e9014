#include "team.h"

#include <sched.h>

#include "crowd.h"

namespace fused_rin {
namespace {

std::atomic<uint64_t> forced_end{0};

template <class Condition>
bool spin(int turns, Condition done) {
  for (int i = 0; i < turns; ++i) {
    if (done()) return true;
    pause_cpu();
  }
  return false;
}

// Others come late when a step took them, beside the time that a step takes, as much as a barrier and more: no
// difference between cores, and no interrupt (2 to 10 us).
constexpr int64_t kLateNs = 20000;
constexpr int kLateMeetings = 3;
constexpr int kGlances = 64;  // at a flag, before the clock is looked at: about 1 us

}  // namespace

void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void yield_cpu() { sched_yield(); }

void end_teams_at(uint64_t meeting) { forced_end.store(meeting, std::memory_order_relaxed); }

void Team::start(int threads, bool may_end) {
  threads_ = threads;
  may_end_ = may_end;
  started_ = now_ns();
  end_.store(0, std::memory_order_relaxed);
  for (int i = 0; i < threads; ++i) {
    flags_[i].epoch.store(0, std::memory_order_relaxed);
    flags_[i].waits_in_vain.store(false, std::memory_order_relaxed);
    flags_[i].ended = false;
    flags_[i].late = 0;
    flags_[i].waited = 0;
  }
}

bool Team::meet(int rank) {
  Flag& own = flags_[rank];
  const uint64_t epoch = own.epoch.load(std::memory_order_relaxed) + 1;
  if (rank == 0 && may_end_) {
    bool end = epoch == forced_end.load(std::memory_order_relaxed);
    for (int i = 0; i < threads_ && !are_assumed(); ++i) {
      end |= flags_[i].waits_in_vain.load(std::memory_order_relaxed);
    }
    if (end) end_.store(epoch, std::memory_order_relaxed);
  }
  own.epoch.store(epoch, std::memory_order_release);
  for (int i = 0; i < threads_; ++i) {
    const auto is_here = [&] { return flags_[i].epoch.load(std::memory_order_acquire) >= epoch; };
    if (spin(kGlances, is_here)) continue;
    const int64_t begin = now_ns();
    wait_until(is_here);
    const int64_t end = now_ns(), worked = begin - started_ - own.waited;
    // The first meeting is where they wake up.
    if (epoch == 1 || end - begin < kLateNs + worked / static_cast<int64_t>(epoch)) continue;
    own.waited += end - begin;
    if (++own.late >= kLateMeetings && own.waited > worked) own.waits_in_vain.store(true, std::memory_order_relaxed);
  }
  own.ended = end_.load(std::memory_order_relaxed) == epoch;
  return own.ended;
}

}  // namespace fused_rin
