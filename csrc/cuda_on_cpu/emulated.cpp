// The C interface through which tests run the kernels on fibres (tests/cuda_on_cpu/machine.py).
#include "emulated.h"

#include "../cuda/block.h"

using namespace fused_rin;

extern "C" {

int emulate_block(const Problem* problem, int math, int hidden, int rows, int seed, const TensorView* tensors,
                  int count, char* message, int message_bytes) {
  return emulate(tensors, count, message, message_bytes,
                 [&] { launch_block(*problem, static_cast<Math>(math), hidden, rows, seed, nullptr); });
}

// Seven integers per instance: dtype, math, backward, hidden, rows, threads, shared bytes. Returns their number.
int emulated_instances(int32_t* values, int capacity) {
  int n = 0;
  for (const BlockInstance& i : block_instances()) {
    if (n++ >= capacity) continue;
    for (const int value : {static_cast<int>(i.dtype), static_cast<int>(i.math), static_cast<int>(i.backward), i.hidden,
                            i.rows, i.threads, i.shared_bytes})
      *values++ = value;
  }
  return n;
}
}
