// Every compiled instance of the `cluster` plan (sm_90+).
//
// Columns as in block_configs.h, then the CTAs of a cluster and the parts of k. All of the matrix is in registers.
//
// What a step's product waits for is the state: each warp reads all of its part of k, 128 bytes a cycle and SM. With
// 1,024 units that is 64 KB a step where eight warps have a tile of outputs and half of k each, 512 cycles, and 32 KB
// where they have two tiles and a quarter of it; the tensor cores take 400. By the step model 1,330 and 1,252 cycles,
// 450 of them for the exchange (backward 1,364 and 1,337). With 512 units two parts gain nothing: the sums would have
// to meet first (979 for 970). Nor do 16 rows: twice as many bytes arrive in a step, and those bound it.
#pragma once

#include "block.cuh"

namespace fused_rin {

// clang-format off
template <class T>
using MmaClusterConfigs = BlockConfigs<false,
    MmaConfig<T, Math::kMma,  512,  8,  4, 32, 8, 8,  8, 1>,
    MmaConfig<T, Math::kMma, 1024,  8,  8, 16, 8, 8, 16, 4>>;

using FmaClusterConfigs = BlockConfigs<false,
    FmaConfig<512, 1,  8, 16, 8, 8,  8, 2>,
    FmaConfig<512, 2,  8, 16, 8, 8,  8, 2>>;
// clang-format on

}  // namespace fused_rin
