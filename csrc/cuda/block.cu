// The table of instances and the launch. The instances themselves are compiled side by side, a file per element type.
#include <launch.h>

#include <stdexcept>
#include <string>

#include "block.h"

namespace fused_rin {

void append_bfloat16_instances(std::vector<BlockInstance>& instances);
void append_float16_instances(std::vector<BlockInstance>& instances);
void append_float32_fma_instances(std::vector<BlockInstance>& instances);
void append_float32_tf32x3_instances(std::vector<BlockInstance>& instances);
void append_float32_tf32_instances(std::vector<BlockInstance>& instances);
void append_bfloat16_unit_instances(std::vector<BlockInstance>& instances);
void append_float16_unit_instances(std::vector<BlockInstance>& instances);
void append_float32_unit_instances(std::vector<BlockInstance>& instances);
void append_bfloat16_cluster_instances(std::vector<BlockInstance>& instances);
void append_float16_cluster_instances(std::vector<BlockInstance>& instances);
void append_float32_cluster_instances(std::vector<BlockInstance>& instances);
void append_bfloat16_grid_instances(std::vector<BlockInstance>& instances);
void append_float16_grid_instances(std::vector<BlockInstance>& instances);
void append_float32_grid_instances(std::vector<BlockInstance>& instances);

const std::vector<BlockInstance>& block_instances() {
  static const std::vector<BlockInstance> instances = [] {
    std::vector<BlockInstance> all;
    append_bfloat16_instances(all);
    append_float16_instances(all);
    append_float32_fma_instances(all);
    append_float32_tf32x3_instances(all);
    append_float32_tf32_instances(all);
    append_bfloat16_unit_instances(all);
    append_float16_unit_instances(all);
    append_float32_unit_instances(all);
    append_bfloat16_cluster_instances(all);
    append_float16_cluster_instances(all);
    append_float32_cluster_instances(all);
    append_bfloat16_grid_instances(all);
    append_float16_grid_instances(all);
    append_float32_grid_instances(all);
    return all;
  }();
  return instances;
}

void launch_block(const Problem& problem, Math math, int hidden, int rows, int ctas, int device, void* stream) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (problem.steps >= kMost || problem.batch >= kMost)
    throw std::invalid_argument("steps and batch must be below 2^31, got " + std::to_string(problem.steps) + " and " +
                                std::to_string(problem.batch));
  // The rows of a tile are found by 32-bit offsets from its first.
  if (problem.groups * problem.hidden > int64_t{1} << 24)
    throw std::invalid_argument("groups x hidden must be at most 2^24, got " + std::to_string(problem.groups) + " x " +
                                std::to_string(problem.hidden));
  const auto bits = [](auto... tensors) { return (reinterpret_cast<uintptr_t>(tensors) | ...); };
  const int64_t row_bytes = problem.hidden * (problem.dtype == DType::kFloat32 ? 4 : 2);
  if ((bits(problem.weight, problem.in, problem.saved, problem.state_in, problem.out, problem.state_out,
            problem.initial, problem.noise, problem.aside, problem.carried_in, problem.carried_out) |
       row_bytes) %
      16)
    throw std::invalid_argument("the block kernels need rows of whole 16 bytes, and tensors aligned to them");
  if (problem.batch == 0 || problem.groups == 0 || problem.hidden == 0) return;
  for (const BlockInstance& instance : block_instances()) {
    if (instance.dtype != problem.dtype || instance.math != math || instance.backward != problem.backward ||
        instance.units != (problem.skips != nullptr) || instance.hidden != hidden || instance.rows != rows ||
        instance.ctas != ctas)
      continue;
    if (problem.hidden > hidden)
      throw std::invalid_argument("hidden size " + std::to_string(problem.hidden) +
                                  " does not fit the instance compiled for " + std::to_string(hidden));
    if (problem.tile_rows < 0 || problem.tile_rows > rows || (problem.tile_rows && ctas == 1))
      throw std::invalid_argument("a tile of " + std::to_string(problem.tile_rows) +
                                  " rows does not suit a kernel of " + std::to_string(rows) + " rows and " +
                                  std::to_string(ctas) + " CTAs");
    if (instance.workspace_bytes &&
        (problem.workspace_bytes < instance.workspace_bytes || bits(problem.workspace) % 16 || !problem.workspace))
      throw std::invalid_argument("a tile needs " + std::to_string(instance.workspace_bytes) +
                                  " bytes of workspace, aligned to 16, got " + std::to_string(problem.workspace_bytes));
    const DeviceGuard guard(device);
    instance.launch(problem, stream);
    return;
  }
  throw std::invalid_argument("no compiled block kernel for hidden " + std::to_string(hidden) + ", rows " +
                              std::to_string(rows) + ", ctas " + std::to_string(ctas) + ", math " +
                              std::to_string(static_cast<int>(math)) + ", dtype " +
                              std::to_string(static_cast<int>(problem.dtype)));
}

}  // namespace fused_rin
