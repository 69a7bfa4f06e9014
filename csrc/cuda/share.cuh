// What a thread of a block owns. kCtas blocks in a row share a tile, each with its part of the neurons; those of a grid
// come as many tiles at a time as there is room for. Offsets are in
// bytes; pair p of a thread is at `tile + offset(p)` of a time step's rows, or of the state. 32 bits hold what is
// within a tile: 64 rows of at most 2^24 elements (see block.cu).
#pragma once

#include <device.cuh>

#include "../problem.h"
#include "element.cuh"

namespace fused_rin {

// Batch rows of a tile. A cluster may take fewer than fit: it sends the fewer bytes a step.
template <class Config>
__device__ __host__ __forceinline__ int64_t rows_of_tile(const Problem& problem) {
  return Config::kCtas > 1 && problem.tile_rows ? problem.tile_rows : Config::kRows;
}

template <class Config, class Product>
struct Share {
  using E = Element<typename Config::T>;
  int thread, hidden, live_rows;  // live: of the block's rows, those within the batch
  int64_t row_bytes, group, first_row, tile;
  uint32_t first;
  int rank;  // of the block, among those of its tile

  __device__ __forceinline__ Share(const Problem& problem, uint32_t block, uint32_t thread_)
      : thread(static_cast<int>(thread_)), hidden(static_cast<int>(problem.hidden)) {
    const int64_t rows = rows_of_tile<Config>(problem);
    const uint32_t tiles = static_cast<uint32_t>((problem.batch + rows - 1) / rows);
    const uint32_t first_tile = Config::kGrid ? static_cast<uint32_t>(problem.first_tile) : 0;
    const uint32_t index = Config::kCtas == 1 ? block : first_tile + block / Config::kCtas;
    rank = Config::kCtas == 1 ? 0 : static_cast<int>(block % Config::kCtas);
    group = index / tiles;
    first_row = int64_t{index % tiles} * rows;
    live_rows = static_cast<int>(min(problem.batch - first_row, rows));
    row_bytes = problem.groups * hidden * E::kBytes;
    tile = first_row * row_bytes + group * hidden * E::kBytes;
    first = row(0) * static_cast<uint32_t>(row_bytes) + neuron(0) * E::kBytes;
  }
  __device__ __forceinline__ int first_neuron() const { return Config::kCtas == 1 ? 0 : rank * Config::kOutputs; }
  __device__ __forceinline__ int row(int p) const { return Product::row(thread) + Product::row_step(p); }
  __device__ __forceinline__ int neuron(int p) const {
    const int in_block = Product::neuron(thread) + Product::neuron_step(p);
    return Config::kCtas == 1 ? in_block : first_neuron() + in_block;
  }
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
