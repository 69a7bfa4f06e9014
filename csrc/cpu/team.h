// A barrier for threads that meet once a step.
#pragma once

#include <atomic>
#include <cstdint>

namespace fused_rin {

// Each thread raises a flag on a cache line of its own and waits for the others': one store and n - 1 loads, no
// read-modify-write. Whoever waits long gives up its time slice, so that a machine with more runnable threads than
// cores gets slow, not stuck; and a team that may end does, where its members waited longer for each other than they
// worked: rank 0 then goes on alone.
class Team {
 public:
  static constexpr int kMaxThreads = 64;

  void start(int threads, bool may_end);
  // Returns whether the team has ended with this meeting: all have done their part of the work before it, and none but
  // rank 0 does any after it.
  bool meet(int rank);
  // Whether a thread has come from that meeting; the others may not have reached it yet.
  bool has_ended(int rank) const { return flags_[rank].ended; }

 private:
  struct alignas(64) Flag {
    std::atomic<uint64_t> epoch{0};
    std::atomic<bool> waits_in_vain{false};
    bool ended = false;
    int late = 0;        // meetings to which another one came late,
    int64_t waited = 0;  // and ns that were waited there
  };

  int threads_ = 0;
  bool may_end_ = false;
  int64_t started_ = 0;
  std::atomic<uint64_t> end_{0};  // the meeting with which it ended; written by rank 0 before it raises its flag
  Flag flags_[kMaxThreads];
};

// A team ends at this meeting, whatever the time: for tests. 0: none.
void end_teams_at(uint64_t meeting);

void pause_cpu();  // between looks at what another thread writes
void yield_cpu();  // gives the time slice away

// Spins, then gives the time slice away at each further turn.
template <class Condition>
void wait_until(Condition done) {
  constexpr int kSpins = 2000;
  for (int spins = 0; !done(); ++spins) spins < kSpins ? pause_cpu() : yield_cpu();
}

}  // namespace fused_rin
