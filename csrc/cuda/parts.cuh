// k in parts, each with warps of its own: a warp then reads less of the state for the outputs that it multiplies. The
// warps of the first part own the sums, and the others give them theirs.
#pragma once

#include <device.cuh>

#include "element.cuh"

namespace fused_rin {

template <class Config>
class Parts {
  static constexpr int kParts = Config::kParts, kThreads = Config::kThreads / kParts;  // of a part

 public:
  static __device__ __forceinline__ int part() { return kParts == 1 ? 0 : device::thread_idx() / kThreads; }
  static __device__ __forceinline__ int in_part(int thread) { return kParts == 1 ? thread : thread % kThreads; }
  static __device__ __forceinline__ bool owner(int thread) { return kParts == 1 || thread < kThreads; }

  // Adds up the parts' sums, in order, in the threads of the first part; `given` is shared memory for those of the
  // others. It is free again when the next step begins: who reads it has published a state by then.
  template <class Sum, int n>
  static __device__ __forceinline__ void meet(const device::SharedMemory& shared, uint32_t given, Sum (&sums)[n]) {
    const int own = in_part(device::thread_idx()), barrier = 1 + own / 32, from = part();
    const auto place = [&](int part, int i) { return given + (((part - 1) * n + i) * kThreads + own) * sizeof(Sum); };
    if (from) {
#pragma unroll
      for (int i = 0; i < n; ++i) shared.store(place(from, i), sums[i]);
      device::named_barrier_arrive(barrier, 32 * kParts);
      return;
    }
    device::named_barrier_sync(barrier, 32 * kParts);
#pragma unroll
    for (int other = 1; other < kParts; ++other) {
#pragma unroll
      for (int i = 0; i < n; ++i) sums[i] = plus(sums[i], shared.load<Sum>(place(other, i)));
    }
  }
};

}  // namespace fused_rin
