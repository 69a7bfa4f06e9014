// A barrier for threads that meet once a step.
#pragma once

#include <atomic>
#include <cstdint>

namespace fused_rin {

// Each thread raises a flag on a cache line of its own and waits for the others': one store and n - 1 loads, no
// read-modify-write. Whoever waits long gives up its time slice, so that a machine with more runnable threads than
// cores gets slow, not stuck.
class Team {
 public:
  static constexpr int kMaxThreads = 64;

  void start(int threads);
  void meet(int rank);

 private:
  struct alignas(64) Flag {
    std::atomic<uint64_t> epoch{0};
  };
  int threads_ = 0;
  Flag flags_[kMaxThreads];
};

void pause_cpu();  // between looks at what another thread writes
void yield_cpu();  // gives the time slice away

// Spins, then gives the time slice away at each further turn.
template <class Condition>
void wait_until(Condition done) {
  constexpr int kSpins = 2000;
  for (int spins = 0; !done(); ++spins) spins < kSpins ? pause_cpu() : yield_cpu();
}

}  // namespace fused_rin
