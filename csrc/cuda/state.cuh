// The state in shared memory: [batch row][neuron], what every warp reads whole, once a step.
//
// A product reads 64 bytes of a row at a time: lane 4g + q takes the q-th 16-byte chunk of row g with one 128-bit
// load, so one load feeds two k-steps of an mma (or four FFMAs per output). That permutes k, which costs nothing: the
// matrix is permuted alike when it is loaded. Against ldmatrix.x4 (always 4 wavefronts) a load here touches only the
// rows that exist: one wavefront for a batch of 1 or 2.
//
// Rows start at (g & 1) * 64 + (g >> 1) * 32 modulo 128 bytes. Then the 8 lanes of a 128-bit phase (2 rows x 64 bytes)
// meet no bank twice, and neither do the lanes of an epilogue, which store 32 bytes of rows 0, 2, 4, 6 (or 1, 3, 5, 7).
// And from an even row to those after it is a constant.
#pragma once

#include <device.cuh>

#include "element.cuh"

namespace fused_rin {

// Neighbouring pairs, moved as one.
template <class Pair, int n>
struct alignas(n * sizeof(Pair)) Pairs {
  Pair pair[n];
};

template <class T, int kHidden, int kRows>
struct State {
  static constexpr int kElementBytes = Element<T>::kBytes;
  static constexpr int kStride = kHidden * kElementBytes + 64;
  static constexpr int kEightRows = 8 * kStride + 4 * 32;
  static constexpr int kBytes = kRows * kStride + kRows / 2 * 32;  // of one of the two buffers
  static_assert(kHidden * kElementBytes % 32 == 0,
                "rows begin at whole chunks; where they are no whole bank lines, a "
                "few threads read little of them");

  static __device__ __forceinline__ constexpr uint32_t row(int n) { return n * kStride + (n >> 1) * 32; }
};

// The buffers of the state where several blocks share a tile: the first with `initial` (or zeros), the other zeros.
template <class Config, class Share>
__device__ __forceinline__ void fill_states(const device::SharedMemory& shared, const Share& share,
                                            const void* initial) {
  using StateT = State<typename Config::T, Config::kHidden, Config::kRows>;
  constexpr int kBytes = Element<typename Config::T>::kBytes, kPerRow = Config::kHidden * kBytes / 16;
  const int64_t first = share.tile;
#pragma unroll 1
  for (int i = share.thread; i < Config::kRows * kPerRow; i += Config::kThreads) {
    const int row = i / kPerRow, column = i % kPerRow * 16;
    const bool there = initial && row < share.live_rows && column < share.hidden * kBytes;
    const char* const from = static_cast<const char*>(initial) + first + row * share.row_bytes + column;
    const uint32_t to = StateT::row(row) + column;
    shared.store(to, there ? device::load_global(reinterpret_cast<const uint4*>(from)) : uint4{});
    shared.store(to + Config::kStateBytes, uint4{});
  }
}

}  // namespace fused_rin
