// The threads that torch already has. Compiled without OpenMP: its runtime is looked up in the process.
#pragma once

#include <functional>

namespace fused_rin {

// torch runs its operators on the threads of an OpenMP runtime, which spin for some milliseconds after each of them. A
// second pool finds the cores taken for that long: at B = 64, D = 128, two threads on two cores, a call between torch's
// took 68 us a step on threads of our own and 42 without the spinning. On the same threads there is nothing to wait
// for, neither the core nor the wake-up.
//
// Calls task(0 .. threads - 1) at the same time on a team of `team` threads (at least `threads`; the others return at
// once), rank 0 on the caller's thread, and returns when all are done. `team` should be what torch uses: a runtime ends
// the threads that a smaller team has no use for, and makes them anew for the next larger one. Returns false, having
// done nothing, where there is no such runtime (torch was built with another one, or is not there), in a parallel
// region, after a fork (the runtime's threads do not exist in the child), or when it gives fewer threads. The task must
// not throw.
bool run_on_torchs_threads(int threads, int team, const std::function<void(int rank)>& task);

// Whether there is such a runtime, and it is to be used; tests turn it off.
bool has_torchs_threads();
void use_torchs_threads(bool use);

}  // namespace fused_rin
