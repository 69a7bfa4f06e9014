// The `block` plan: one CTA holds one recurrence's whole matrix and sweeps one tile of its batch. No CTA needs another.
#pragma once

#include <vector>

#include "block.h"
#include "fma_product.cuh"
#include "mma_product.cuh"
#include "sweep.cuh"
#include <launch.h>

namespace fused_rin {

template <class Config, bool kBackward>
__global__ void __launch_bounds__(Config::kThreads, 1) block_sweep(const SweepArguments arguments) {
  sweep<Config, typename Config::template Product<kBackward>, kBackward>(arguments);
}

template <class Config, bool kBackward>
void launch_block_sweep(const Problem& problem, void* stream) {
  using Pair = typename Element<typename Config::T>::Pair;
  uintptr_t bits = 0;
  for (const void* p : {problem.weight, problem.in, problem.saved, problem.state_in,
                        static_cast<const void*>(problem.out), static_cast<const void*>(problem.state_out)})
    bits |= reinterpret_cast<uintptr_t>(p);
  const SweepArguments arguments{problem, problem.hidden % 2 == 0 && bits % sizeof(Pair) == 0};
  const int64_t blocks = problem.groups * ((problem.batch + Config::kRows - 1) / Config::kRows);
  if (blocks == 0 || problem.hidden == 0) return;
  launch_kernel(block_sweep<Config, kBackward>, arguments, blocks, Config::kThreads, Config::kSharedBytes, stream);
}

template <class Config, bool kBackward>
BlockInstance block_instance() {
  return {Element<typename Config::T>::kDType, Config::kMath,           kBackward,
          Config::kHidden, Config::kRows,          Config::kThreads,
          Config::kSharedBytes, &launch_block_sweep<Config, kBackward>};
}

template <class... Configs>
struct BlockConfigs {
  static void append(std::vector<BlockInstance>& instances) {
    (instances.push_back(block_instance<Configs, false>()), ...);
    (instances.push_back(block_instance<Configs, true>()), ...);
  }
};

}  // namespace fused_rin
