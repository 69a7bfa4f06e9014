// A few small blocks that share a tile, which fibres run in no time: the `cluster` and the `grid` plan with every way
// to multiply, number of CTAs, warps that own outputs and parts of k.
#include <launch.h>

#include <stdexcept>

#include "../../csrc/cuda/block.cuh"
#include "../../csrc/cuda_on_cpu/emulated.h"

using namespace fused_rin;

namespace {

// clang-format off
template <class T>
using Small16 = BlockConfigs<false,
    MmaConfig<T, Math::kMma, 128,  8, 4, 8, 4, 4, 2, 1>,
    MmaConfig<T, Math::kMma, 256, 16, 4, 9, 2, 2, 4, 1>,
    MmaConfig<T, Math::kMma, 256,  8, 8, 8, 4, 4, 2, 2>,
    MmaConfig<T, Math::kMma, 128,  8, 4, 2, 4, 4, 8, 4, true>,
    MmaConfig<T, Math::kMma, 128,  8, 4, 4, 4, 4, 4, 2, true>,
    MmaConfig<T, Math::kMma, 256, 16, 4, 2, 2, 2, 8, 4, true>>;
using Small32 = BlockConfigs<false,
    FmaConfig<64, 1, 4, 2, 4, 4, 2, 2>,
    FmaConfig<128, 2, 4, 4, 4, 4, 4, 2>,
    FmaConfig<64, 1, 4, 1, 4, 4, 4, 4, true>,
    FmaConfig<128, 4, 4, 1, 4, 4, 8, 4, true>>;
// clang-format on

const std::vector<BlockInstance>& small_instances() {
  static const std::vector<BlockInstance> instances = [] {
    std::vector<BlockInstance> all;
    Small16<device::BFloat16>::append(all);
    Small16<device::Float16>::append(all);
    Small32::append(all);
    return all;
  }();
  return instances;
}

}  // namespace

extern "C" int emulate_small(const Problem* problem, int math, int hidden, int rows, int ctas, int seed,
                             const TensorView* tensors, int count, char* message, int message_bytes) {
  launch_seed = static_cast<uint64_t>(seed);
  return emulate(tensors, count, message, message_bytes, [&] {
    for (const BlockInstance& i : small_instances())
      if (i.dtype == problem->dtype && i.math == static_cast<Math>(math) && i.backward == problem->backward &&
          i.hidden == hidden && i.rows == rows && i.ctas == ctas)
        return i.launch(*problem, nullptr);
    throw std::invalid_argument("no such small kernel");
  });
}
