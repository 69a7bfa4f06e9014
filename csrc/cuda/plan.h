// Which kernel of the `block`, the `cluster` or the `grid` plan runs a problem, for processes without Python: what
// fused_rin/cuda_plan.py, where the model and its constants are explained, decides for the others. tests/cuda_on_cpu
// holds the two together.
#pragma once

#include <cstdint>

#include "block.h"

namespace fused_rin {

struct DeviceLimits {
  int major, minor;  // compute capability
  int sms;
  int shared_bytes_per_block;  // that a block may opt in to
  int registers_per_sm;
  int max_cluster_size;  // of the code that runs, too: 1 where it has no clusters
};

// What kernels that were compiled from PTX of this version have of it, the larger ones being empty.
int shared_bytes_of_code(int ptx_version);

struct BlockChoice {
  const BlockInstance* kernel;  // the forward one of the pair
  int tile_rows;                // for problem.h
  int64_t workspace_bytes;      // that it needs, for as many tiles as run at a time
};

// The kernel; `units`: with factors of their own. Throws std::invalid_argument, with the reason, where none fits.
BlockChoice plan_block(int64_t batch, int64_t groups, int64_t hidden, DType dtype, bool allow_tf32,
                       const DeviceLimits& device, bool units = false);

}  // namespace fused_rin
