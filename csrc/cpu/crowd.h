// How many processors there are for a sweep, and whether threads that should meet find them.
#pragma once

#include <cstdint>
#include <string>

namespace fused_rin {

// Processors that the calling thread may run on, and that the quota of its cgroup leaves, rounded up; at least one.
// torch counts neither a quota nor an affinity that was set after it was loaded, and a thread without a processor of
// its own keeps all others waiting at every step: 8 on 2 took 39 ms for 200 steps of 256 units, one thread 0.08.
int usable_processors();

// The quota alone, in processors, 0 where there is none: of cgroup v2 or v1, the least of the group's and those above
// it. `root` stands before /proc and /sys.
double processor_quota(const std::string& root);

// Other work may take a processor from under a team. Who waited far longer than the work takes says so, and for a
// while, the longer the more often it happens, sweeps are not divided into parts that meet.
bool is_crowded();
void found_crowded();
void forget_crowds();  // for tests

// What threads a call may have.
struct Company {
  int threads = 1;
  int torchs = 0;        // how many torch uses, if these are among them; 0: they are to be others
  bool crowded = false;  // they had better not meet
};
// For a call that torch would give `wanted` threads.
Company company_of(int wanted);

// As if there were so many processors, and always free; 0: as it is. For tests.
void assume_processors(int count);
bool are_assumed();

// Nanoseconds of a steady clock; 20 to 30 ns a look.
int64_t now_ns();

}  // namespace fused_rin
