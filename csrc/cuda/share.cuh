// What a thread of a block owns. Offsets are in bytes; pair p of a thread is at `tile + offset(p)` of a time step's
// rows, or of the state. 32 bits hold what is within a tile: 64 rows of at most 2^24 elements (see block.cu).
#pragma once

#include <device.cuh>

#include "../problem.h"
#include "element.cuh"

namespace fused_rin {

template <class Config, class Product>
struct Share {
  using E = Element<typename Config::T>;
  int thread, hidden, live_rows;  // live: of the block's rows, those within the batch
  int64_t row_bytes, group, first_row, tile;
  uint32_t first;

  __device__ __forceinline__ Share(const Problem& problem, uint32_t block, uint32_t thread_)
      : thread(static_cast<int>(thread_)), hidden(static_cast<int>(problem.hidden)) {
    const uint32_t tiles = static_cast<uint32_t>((problem.batch + Config::kRows - 1) / Config::kRows);
    group = block / tiles;
    first_row = int64_t{block % tiles} * Config::kRows;
    live_rows = static_cast<int>(min(problem.batch - first_row, int64_t{Config::kRows}));
    row_bytes = problem.groups * hidden * E::kBytes;
    tile = first_row * row_bytes + group * hidden * E::kBytes;
    first = row(0) * static_cast<uint32_t>(row_bytes) + neuron(0) * E::kBytes;
  }
  __device__ __forceinline__ int row(int p) const { return Product::row(thread) + Product::row_step(p); }
  __device__ __forceinline__ int neuron(int p) const { return Product::neuron(thread) + Product::neuron_step(p); }
  __device__ __forceinline__ uint32_t offset(int p) const { return first + further(p); }
  __device__ __forceinline__ uint32_t further(int p) const {  // from the thread's first
    return Product::row_step(p) * static_cast<uint32_t>(row_bytes) + Product::neuron_step(p) * E::kBytes;
  }
  // In the batch, in the hidden size, and no other lane's.
  __device__ __forceinline__ bool owns(int p) const {
    return Product::owner(thread) && row(p) < live_rows && neuron(p) < hidden;
  }
};

}  // namespace fused_rin
