// Every compiled instance of the `grid` plan.
//
// Columns as in cluster_configs.h. All of the matrix is in registers, 16 outputs of a block, eight warps with an eighth
// of k each: what a step waits for is the state of all others, so many blocks with little of it each. With 2,048 units
// also half as many blocks with 32 outputs, for devices that have no 128 SMs, and where two tiles run side by side.
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
