// Every compiled instance of the `block` plan.
//
// Columns: hidden (D is padded up to it), batch rows, warps, parts of the matrix in registers (the rest is in shared
// memory), steps in the ring forward and backward. Chosen so that nothing spills (tests/cuda_aot keeps the table of
// registers), so that the ring covers the latency of device memory, about 800 cycles and more when all SMs read, and so
// that all but the largest tiles fit the 163 KB of an A100.
// Few fat warps: every warp reads the whole state, and four already feed the four tensor cores. Few rows: with a block
// on every SM even 8 of them ask device memory for all it has (128x8 in bfloat16: 2.4 TB/s on an H100, 223 ns a step
// where a block alone takes 152), so larger tiles would only take registers.
#pragma once

#include "block.cuh"

namespace fused_rin {

// clang-format off
template <class T>
using MmaConfigs = BlockConfigs<false,
    MmaConfig<T, Math::kMma,  64,  8,  4,  4, 8, 8>,
    MmaConfig<T, Math::kMma,  64, 16,  4,  4, 8, 6>,
    MmaConfig<T, Math::kMma, 128,  8,  4,  8, 8, 8>,
    MmaConfig<T, Math::kMma, 128, 16,  4,  8, 6, 6>,
    MmaConfig<T, Math::kMma, 192,  8,  4,  9, 6, 6>,
    MmaConfig<T, Math::kMma, 192, 16, 12, 12, 4, 4>,
    MmaConfig<T, Math::kMma, 256,  8,  8, 16, 6, 6>,
    MmaConfig<T, Math::kMma, 256, 16,  8, 15, 4, 4>,
    MmaConfig<T, Math::kMma, 384,  8,  8, 14, 2, 2>>;

using Tf32Configs = BlockConfigs<false,
    MmaConfig<float, Math::kTf32,  64,  8,  4,  8, 8, 8>,
    MmaConfig<float, Math::kTf32, 128,  8,  8, 16, 6, 6>,
    MmaConfig<float, Math::kTf32, 192,  8, 12, 18, 4, 4>,
    MmaConfig<float, Math::kTf32, 256,  8,  8, 19, 2, 2>>;

// Only where they take less time a row than FMA does: at 128 and 256 they did not (135 and 497 ns against 114 and 620 a
// row on an H100, and the latter only from 1,056 rows on).
using Tf32x3Configs = BlockConfigs<false,
    MmaConfig<float, Math::kTf32x3,  64, 16,  4,  8, 4, 4>,
    MmaConfig<float, Math::kTf32x3, 192,  8, 12, 13, 4, 4>>;

using FmaConfigs = BlockConfigs<false,
    FmaConfig< 64, 1,  4,  4, 8, 8>,
    FmaConfig< 64, 2,  4,  4, 8, 8>,
    FmaConfig< 64, 4,  4,  4, 8, 8>,
    FmaConfig<128, 1,  4,  8, 8, 8>,
    FmaConfig<128, 2,  4,  8, 8, 8>,
    FmaConfig<128, 4,  4,  8, 8, 8>,
    FmaConfig<192, 1, 12, 12, 8, 8>,
    FmaConfig<192, 2, 12, 12, 8, 8>,
    FmaConfig<256, 1,  8,  8, 8, 8>,
    FmaConfig<256, 2,  8,  8, 6, 6>>;

// Of units with factors of their own: some of the above, each with one loop, the general one.
template <class T>
using MmaUnitConfigs = BlockConfigs<true,
    MmaConfig<T, Math::kMma,  64,  8,  4,  4, 8, 8>,
    MmaConfig<T, Math::kMma, 128,  8,  4,  8, 8, 8>,
    MmaConfig<T, Math::kMma, 256,  8,  8, 16, 6, 6>,
    MmaConfig<T, Math::kMma, 384,  8,  8, 14, 2, 2>>;

using FmaUnitConfigs = BlockConfigs<true,
    FmaConfig< 64, 1,  4,  4, 8, 8>,
    FmaConfig< 64, 2,  4,  4, 8, 8>,
    FmaConfig<128, 1,  4,  8, 8, 8>,
    FmaConfig<128, 2,  4,  8, 8, 8>,
    FmaConfig<192, 1, 12, 12, 8, 8>,
    FmaConfig<192, 2, 12, 12, 8, 8>,
    FmaConfig<256, 1,  8,  8, 8, 8>,
    FmaConfig<256, 2,  8,  8, 6, 6>>;
// clang-format on

}  // namespace fused_rin
