// Starts a kernel on CPU fibres; csrc/cuda/launch.h starts it on a GPU. "Device" is the seed of the schedule.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibres.h"

namespace fused_rin {

// What a kernel may touch; set by the tests around a launch.
inline thread_local std::vector<fibres::Tensor> launch_tensors;
inline thread_local uint64_t launch_seed = 0;

inline void zero_memory(void* memory, int64_t bytes, void*) { std::memset(memory, 0, static_cast<size_t>(bytes)); }

template <class Arguments>
void launch_kernel(void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads, int shared_bytes,
                   void*, int group = 1, bool anywhere = false) {
  fibres::run({anywhere    ? "grid_sweep"
               : group > 1 ? "cluster_sweep"
                           : "block_sweep",
               blocks, threads, group, static_cast<size_t>(shared_bytes), launch_seed, launch_tensors},
              [&] { kernel(arguments); });
}

template <class Arguments>
int ptx_version(void (*)(Arguments)) {
  return 90;
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int seed) { launch_seed = static_cast<uint64_t>(seed); }
};

}  // namespace fused_rin
