// The C interface through which tests run the kernels on fibres (tests/cuda_on_cpu/machine.py).
#include <launch.h>

#include <cstdio>

#include "../cuda/block.h"

using namespace fused_rin;

namespace {

struct TensorView {
  const char* name;
  const void* data;
  int64_t bytes;
  int32_t writable;
};

}  // namespace

extern "C" {

// Returns 0, or 1 with a message.
int emulate_block(const Problem* problem, int math, int hidden, int rows, int seed, const TensorView* tensors, int count,
                  char* message, int message_bytes) {
  launch_tensors.clear();
  for (int i = 0; i < count; ++i)
    launch_tensors.push_back({tensors[i].name, tensors[i].data, static_cast<size_t>(tensors[i].bytes),
                              tensors[i].writable != 0});
  try {
    launch_block(*problem, static_cast<Math>(math), hidden, rows, seed, nullptr);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, message_bytes, "%s", error.what());
    return 1;
  }
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
