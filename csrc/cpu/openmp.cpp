#include "openmp.h"

#include <algorithm>
#include <atomic>

#include "sanitize.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace fused_rin {
namespace {

// libgomp's interface, which libomp and libiomp5 offer, too.
struct Runtime {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  bool complete() const { return parallel && thread_num && num_threads && in_parallel; }
};

std::atomic<bool> wanted{true}, forked{false};

#if defined(__linux__)
template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
}

// When this library is loaded, not when the runtime is first asked for, which may be in the child.
[[maybe_unused]] const int watching =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

// As libtorch_cpu sees it: other packages bring runtimes of their own.
Runtime find_runtime() {
  Runtime runtime;
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!torch) return runtime;
  find(torch, "GOMP_parallel", runtime.parallel);
  find(torch, "omp_get_thread_num", runtime.thread_num);
  find(torch, "omp_get_num_threads", runtime.num_threads);
  find(torch, "omp_in_parallel", runtime.in_parallel);
  return runtime;  // `torch` stays open, as it was before
}
#else
Runtime find_runtime() { return {}; }
#endif

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

struct Region {
  const Runtime& runtime;
  int threads;
  const std::function<void(int)>& task;
  bool done;
};

void body(void* data) {
  Region& region = *static_cast<Region*>(data);
  // Every thread of the team sees the same number, so either all of them run or none; those of a team that is too small
  // would wait for each other forever.
  begins_after(data);
  if (region.runtime.num_threads() < region.threads) return;
  const int rank = region.runtime.thread_num();
  if (rank < region.threads) region.task(rank);
  if (rank == 0) region.done = true;
  ends_before(data);
}

}  // namespace

bool has_torchs_threads() {
  // A fork first: another thread may have been looking for the runtime just then, and a child would wait for it for
  // ever.
  return !forked.load(std::memory_order_relaxed) && wanted.load(std::memory_order_relaxed) && runtime().complete();
}

void use_torchs_threads(bool use) { wanted.store(use, std::memory_order_relaxed); }

bool run_on_torchs_threads(int threads, int team, const std::function<void(int)>& task) {
  if (!has_torchs_threads() || runtime().in_parallel()) return false;
  Region region{runtime(), threads, task, false};
  ends_before(&region);
  runtime().parallel(body, &region, static_cast<unsigned>(std::max(team, threads)), 0);
  begins_after(&region);
  return region.done;
}

}  // namespace fused_rin
