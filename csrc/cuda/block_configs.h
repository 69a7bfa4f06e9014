// Every compiled instance of the `block` plan.
//
// Columns: hidden (D is padded up to it), batch rows, warps, parts of the matrix in registers (the rest is in shared
// memory), steps read ahead forward and backward. Chosen so that nothing spills (tests/cuda_aot keeps the table of
// registers) and so that reading ahead covers the latency of device memory, about 800 cycles.
// Few fat warps: every warp reads the whole state, and four already feed the four tensor cores.
#pragma once

#include "block.cuh"

namespace fused_rin {

// clang-format off
template <class T>
using MmaConfigs = BlockConfigs<
    MmaConfig<T, Math::kMma,  64,  8,  4,  4, 4, 4>,
    MmaConfig<T, Math::kMma,  64, 32,  4,  4, 2, 2>,
    MmaConfig<T, Math::kMma, 128,  8,  4,  8, 4, 4>,
    MmaConfig<T, Math::kMma, 128, 16,  4,  8, 2, 2>,
    MmaConfig<T, Math::kMma, 128, 32,  8,  8, 2, 2>,
    MmaConfig<T, Math::kMma, 128, 64,  8,  8, 1, 1>,
    MmaConfig<T, Math::kMma, 192,  8,  4,  9, 2, 2>,
    MmaConfig<T, Math::kMma, 192, 16, 12, 12, 2, 2>,
    MmaConfig<T, Math::kMma, 192, 32, 12, 10, 1, 1>,
    MmaConfig<T, Math::kMma, 256,  8,  8, 16, 4, 4>,
    MmaConfig<T, Math::kMma, 256, 16,  8, 15, 1, 1>,
    MmaConfig<T, Math::kMma, 256, 32,  8,  7, 1, 1>,
    MmaConfig<T, Math::kMma, 384,  8,  8, 12, 1, 1>,
    MmaConfig<T, Math::kMma, 384, 16,  8,  8, 1, 1>>;

using Tf32Configs = BlockConfigs<
    MmaConfig<float, Math::kTf32,  64,  8,  4,  8, 4, 4>,
    MmaConfig<float, Math::kTf32,  64, 32,  4,  8, 1, 1>,
    MmaConfig<float, Math::kTf32, 128,  8,  8, 16, 4, 4>,
    MmaConfig<float, Math::kTf32, 128, 32,  8, 12, 1, 1>,
    MmaConfig<float, Math::kTf32, 192,  8, 12, 18, 2, 2>,
    MmaConfig<float, Math::kTf32, 192, 16, 12, 14, 1, 1>,
    MmaConfig<float, Math::kTf32, 256,  8,  8, 14, 2, 2>>;

// For few rows FMA is as fast and exact, so these begin where it ends.
using Tf32x3Configs = BlockConfigs<
    MmaConfig<float, Math::kTf32x3,  64, 16,  4,  8, 2, 2>,
    MmaConfig<float, Math::kTf32x3, 128, 16,  8, 14, 1, 1>,
    MmaConfig<float, Math::kTf32x3, 192, 16, 12,  6, 1, 1>,
    MmaConfig<float, Math::kTf32x3, 256,  8,  8,  6, 1, 1>>;

using FmaConfigs = BlockConfigs<
    FmaConfig< 64, 1,  4,  4, 4, 4>,
    FmaConfig< 64, 2,  4,  4, 4, 4>,
    FmaConfig< 64, 4,  4,  4, 4, 4>,
    FmaConfig<128, 1,  4,  8, 4, 4>,
    FmaConfig<128, 2,  4,  8, 4, 4>,
    FmaConfig<128, 4,  4,  8, 2, 2>,
    FmaConfig<192, 1, 12, 12, 3, 3>,
    FmaConfig<192, 2, 12, 12, 2, 2>,
    FmaConfig<256, 1,  8,  8, 2, 2>,
    FmaConfig<256, 2,  8,  8, 2, 2>>;
// clang-format on

}  // namespace fused_rin
