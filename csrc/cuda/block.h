// The compiled instances of the `block`, the `cluster` and the `grid` plan and their launch; plain data, so that the
// planner and the tests read it.
#pragma once

#include <cstdint>
#include <vector>

#include "../problem.h"

namespace fused_rin {

enum class Math : int { kMma = 0, kTf32 = 1, kTf32x3 = 2, kFma = 3 };

struct BlockInstance {
  DType dtype;
  Math math;
  bool backward;
  bool units;  // with factors of their own: problem.skips is given
  int hidden;  // compiled size; any smaller D runs in it
  int rows;    // batch rows of a tile
  int ctas;    // that share a tile: 1, or a cluster of so many, or a grid
  int parts;   // of k, each with warps of its own
  int threads;
  int shared_bytes;         // dynamic
  int matrix_bytes;         // of them: what of the matrix is not in registers
  int64_t workspace_bytes;  // of a tile, in device memory; 0 but of a grid
  void (*launch)(const Problem& problem, void* stream);
  int (*ptx_version)();  // what its code on the current device was compiled from, 90 for compute_90
};

// Every instance, in a fixed order.
const std::vector<BlockInstance>& block_instances();

// Runs `problem` with the instance of exactly this math, hidden, rows and ctas. D must be even and every tensor aligned
// to two elements. `device` is a CUDA ordinal, `stream` a cudaStream_t. Throws std::invalid_argument for what the plan
// cannot do, std::runtime_error with CUDA's own words.
void launch_block(const Problem& problem, Math math, int hidden, int rows, int ctas, int device, void* stream);

}  // namespace fused_rin
