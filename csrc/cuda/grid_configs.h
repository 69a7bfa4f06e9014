// Every compiled instance of the `grid` plan.
//
// Columns as in cluster_configs.h. 16 outputs of a block, eight warps with an eighth of k each, the matrix in
// registers: what a step waits for is the state of all others, so many blocks with little to multiply. With 2,048 units
// also half as many blocks with 32 outputs, a quarter of their matrix in shared memory: for devices that have no 128
// SMs, and where two tiles run side by side. In float32 four rows of 2,048 units spilled with all of it in registers.
#pragma once

#include "block.cuh"

namespace fused_rin {

// clang-format off
template <class T>
using MmaGridConfigs = BlockConfigs<false,
    MmaConfig<T, Math::kMma,  512,  8,  8,  4, 8, 8,  32, 8, true>,
    MmaConfig<T, Math::kMma, 1024,  8,  8,  8, 8, 8,  64, 8, true>,
    MmaConfig<T, Math::kMma, 2048,  8,  8, 12, 8, 8,  64, 8, true>,
    MmaConfig<T, Math::kMma, 2048,  8,  8, 16, 8, 8, 128, 8, true>>;

using FmaGridConfigs = BlockConfigs<false,
    FmaConfig< 512, 1,  8,  4, 8, 8,  32, 8, true>,
    FmaConfig< 512, 4,  8,  4, 8, 8,  32, 8, true>,
    FmaConfig<1024, 1,  8,  8, 8, 8,  64, 8, true>,
    FmaConfig<1024, 4,  8,  8, 8, 8,  64, 8, true>,
    FmaConfig<2048, 1,  8, 16, 8, 8, 128, 8, true>,
    FmaConfig<2048, 4,  8, 15, 8, 8, 128, 8, true>>;
// clang-format on

}  // namespace fused_rin
