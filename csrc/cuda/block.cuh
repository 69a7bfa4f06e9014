// The `block` plan: one CTA holds one recurrence's whole matrix and sweeps one tile of its batch. No CTA needs another.
#pragma once

#include <launch.h>

#include <vector>

#include "block.h"
#include "fma_product.cuh"
#include "mma_product.cuh"
#include "sweep.cuh"

namespace fused_rin {

template <class Config, bool kBackward>
__global__ void __launch_bounds__(Config::kThreads, 1) block_sweep(const Problem problem) {
  // Where a block cannot have the shared memory, nothing is compiled: no launch gets here (launch.h asks for it first).
  if constexpr (Layout<Config, kBackward>::kBytes <= device::kMaxSharedBytes)
    sweep<Config, typename Config::template Product<kBackward>, kBackward>(problem);
  else
    device::trap();
}

template <class Config, bool kBackward>
void launch_block_sweep(const Problem& problem, void* stream) {
  const int64_t blocks = problem.groups * ((problem.batch + Config::kRows - 1) / Config::kRows);
  launch_kernel(block_sweep<Config, kBackward>, problem, blocks, Config::kThreads, Layout<Config, kBackward>::kBytes,
                stream);
}

template <class Config, bool kBackward>
BlockInstance block_instance() {
  return {Element<typename Config::T>::kDType,
          Config::kMath,
          kBackward,
          Config::kHidden,
          Config::kRows,
          Config::kThreads,
          Layout<Config, kBackward>::kBytes,
          Config::kMatrixBytes,
          &launch_block_sweep<Config, kBackward>,
          [] { return ptx_version(block_sweep<Config, kBackward>); }};
}

template <class... Configs>
struct BlockConfigs {
  static void append(std::vector<BlockInstance>& instances) {
    (instances.push_back(block_instance<Configs, false>()), ...);
    (instances.push_back(block_instance<Configs, true>()), ...);
  }
};

}  // namespace fused_rin
