// What csrc/cpu/openmp.cpp asks of the OpenMP runtime of torch, on plain threads: a libtorch_cpu.so for programs
// without torch, which a sanitizer can be built into.

#include <thread>
#include <vector>

namespace {

thread_local int rank = 0, team = 1;

}  // namespace

extern "C" {

// The threads are new each time. A real runtime keeps them, but gives no stronger order than their start and their end.
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  const int size = static_cast<int>(threads);
  for (int i = 1; i < size; ++i) {
    others.emplace_back([=] {
      rank = i, team = size;
      body(data);
    });
  }
  team = size;
  body(data);
  team = 1;
  for (std::thread& other : others) other.join();
}

int omp_get_thread_num() { return rank; }
int omp_get_num_threads() { return team; }
int omp_in_parallel() { return team > 1; }
}
