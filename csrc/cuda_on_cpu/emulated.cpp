// The C interface through which tests run the kernels on fibres (tests/cuda_on_cpu/machine.py).
#include "emulated.h"

#include <stdexcept>

#include "../cuda/plan.h"

using namespace fused_rin;

extern "C" {

int emulate_block(const Problem* problem, int math, int hidden, int rows, int ctas, int seed, const TensorView* tensors,
                  int count, char* message, int message_bytes) {
  return emulate(tensors, count, message, message_bytes,
                 [&] { launch_block(*problem, static_cast<Math>(math), hidden, rows, ctas, seed, nullptr); });
}

// Ten integers per instance: dtype, math, backward, units, hidden, rows, ctas, threads, shared bytes, workspace bytes
// of a tile. Returns their number.
int emulated_instances(int32_t* values, int capacity) {
  int n = 0;
  for (const BlockInstance& i : block_instances()) {
    if (n++ >= capacity) continue;
    for (const int value :
         {static_cast<int>(i.dtype), static_cast<int>(i.math), static_cast<int>(i.backward), static_cast<int>(i.units),
          i.hidden, i.rows, i.ctas, i.threads, i.shared_bytes, static_cast<int>(i.workspace_bytes)})
      *values++ = value;
  }
  return n;
}

// The plan for processes without Python. `device`: capability's two numbers, SMs, shared bytes of a block, registers of
// an SM, CTAs of a cluster. Fills in math, hidden, rows, ctas, rows of a tile and bytes of workspace and returns 0, or
// 1 where there is no plan.
int emulated_plan(int64_t batch, int64_t groups, int64_t hidden, int dtype, int allow_tf32, int units,
                  const int32_t* device, int32_t* chosen) {
  try {
    const BlockChoice choice =
        plan_block(batch, groups, hidden, static_cast<DType>(dtype), allow_tf32 != 0,
                   {device[0], device[1], device[2], device[3], device[4], device[5]}, units != 0);
    const BlockInstance& kernel = *choice.kernel;
    chosen[0] = static_cast<int>(kernel.math);
    chosen[1] = kernel.hidden;
    chosen[2] = kernel.rows;
    chosen[3] = kernel.ctas;
    chosen[4] = choice.tile_rows;
    chosen[5] = static_cast<int32_t>(choice.workspace_bytes);
    return 0;
  } catch (const std::invalid_argument&) {
    return 1;
  }
}

int emulated_shared_bytes_of_code(int ptx_version) { return shared_bytes_of_code(ptx_version); }
}
