// The `block` plan: one CTA holds one recurrence's whole matrix and sweeps one tile of its batch. No CTA needs another.
//
// To read, in this order:
//   problem.h            the two recurrences, and that they are one loop
//   device.cuh           what a GPU has, by name: barriers, copies, products; cuda_on_cpu/device.cuh is its other face
//   element.cuh          element types, and pairs of them
//   state.cuh            how the state of some rows lies in shared memory
//   share.cuh            what a thread owns
//   mma_product.cuh      state times matrix on tensor cores; fma_product.cuh on the FMA pipe
//   parts.cuh            where warps share out k: how their sums meet
//   carrier.cuh          how a step's tile travels between device memory and shared memory
//   schedule.cuh         where a packed step begins and which rows start anew, staged
//   epilogues.cuh        activation and slope
//   units.cuh            the same of units with factors of their own: leaky networks
//   exchange.cuh         who is met once a step: the block, or the blocks of a cluster that share a tile
//   grid_exchange.cuh    ... or blocks anywhere on the device
//   layout.cuh           how a block shares out its shared memory
//   sweep.cuh            the loop
//   block_configs.h      the sizes that are compiled; block.cu launches one, plan.cpp and cuda_plan.py choose it
#pragma once

#include <launch.h>

#include <algorithm>
#include <vector>

#include "block.h"
#include "fma_product.cuh"
#include "mma_product.cuh"
#include "sweep.cuh"

namespace fused_rin {

template <class Config, bool kBackward, bool kUnits>
__global__ void __launch_bounds__(Config::kThreads, 1) block_sweep(const Problem problem) {
  // Where a block cannot have the shared memory, nothing is compiled: no launch gets here (launch.h asks for it first).
  if constexpr (Layout<Config, kBackward, kUnits>::kBytes <= device::kMaxSharedBytes)
    sweep<Config, typename Config::template Product<kBackward>, kBackward, kUnits>(problem);
  else
    device::trap();
}

// The same of one tile shared by a cluster: see exchange.cuh.
template <class Config, bool kBackward>
__global__ void __launch_bounds__(Config::kThreads, 1) cluster_sweep(const Problem problem) {
  if constexpr (device::kHasClusters)
    sweep<Config, typename Config::template Product<kBackward>, kBackward, false>(problem);
  else
    device::trap();
}

// The same of one tile shared by blocks anywhere on the device, all of which run: see grid_exchange.cuh.
template <class Config, bool kBackward>
__global__ void __launch_bounds__(Config::kThreads, 1) grid_sweep(const Problem problem) {
  if constexpr (Layout<Config, kBackward, false>::kBytes <= device::kMaxSharedBytes)
    sweep<Config, typename Config::template Product<kBackward>, kBackward, false>(problem);
  else
    device::trap();
}

template <class Config, bool kBackward, bool kUnits>
constexpr auto kernel_of() {
  if constexpr (Config::kCtas == 1)
    return &block_sweep<Config, kBackward, kUnits>;
  else if constexpr (Config::kGrid)
    return &grid_sweep<Config, kBackward>;
  else
    return &cluster_sweep<Config, kBackward>;
}

template <class Config, bool kBackward, bool kUnits>
void launch_block_sweep(const Problem& problem, void* stream) {
  const int64_t rows = rows_of_tile<Config>(problem);
  const int64_t tiles = problem.groups * ((problem.batch + rows - 1) / rows);
  constexpr auto kKernel = kernel_of<Config, kBackward, kUnits>();
  constexpr int kShared = Layout<Config, kBackward, kUnits>::kBytes;
  if constexpr (!Config::kGrid) {
    launch_kernel(kKernel, problem, tiles * Config::kCtas, Config::kThreads, kShared, stream, Config::kCtas);
  } else {
    constexpr int64_t kTileBytes = Exchange<Config>::kWorkspaceBytes;
    const int64_t at_a_time = std::min(tiles, problem.workspace_bytes / kTileBytes);
    Problem part = problem;
    for (part.first_tile = 0; part.first_tile < tiles; part.first_tile += at_a_time) {
      const int64_t now = std::min(at_a_time, tiles - part.first_tile);
      zero_memory(part.workspace, now * kTileBytes, stream);  // no number of an earlier sweep's steps
      launch_kernel(kKernel, part, now * Config::kCtas, Config::kThreads, kShared, stream, Config::kCtas, true);
    }
  }
}

template <class Config, bool kBackward, bool kUnits>
BlockInstance block_instance() {
  return {Element<typename Config::T>::kDType,
          Config::kMath,
          kBackward,
          kUnits,
          Config::kHidden,
          Config::kRows,
          Config::kCtas,
          Config::kParts,
          Config::kThreads,
          Layout<Config, kBackward, kUnits>::kBytes,
          Config::kMatrixBytes,
          Exchange<Config>::kWorkspaceBytes,
          &launch_block_sweep<Config, kBackward, kUnits>,
          [] { return ptx_version(kernel_of<Config, kBackward, kUnits>()); }};
}

template <bool kUnits, class... Configs>
struct BlockConfigs {
  static void append(std::vector<BlockInstance>& instances) {
    (instances.push_back(block_instance<Configs, false, kUnits>()), ...);
    (instances.push_back(block_instance<Configs, true, kUnits>()), ...);
  }
};

}  // namespace fused_rin
