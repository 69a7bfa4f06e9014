// How the tile of a step, [rows][outputs of the block] of one recurrence, travels between device memory and shared
// memory, where it lies as the state does (state.cuh). It is cut into pieces of 16 bytes, neighbouring lanes along a
// row, whoever owns the elements; a thread carries the same ones in every step. The load-store unit takes a copy of 4
// bytes as long as one of 16: on an H100 a step of 128 units x 8 rows in bfloat16 took 398 cycles where each thread
// carried its own pairs, and 286 this way.
#pragma once

#include "element.cuh"
#include "share.cuh"
#include "state.cuh"

namespace fused_rin {

template <class Config, class Product>
class Carrier {
  static constexpr int kElementBytes = Element<typename Config::T>::kBytes;
  using Tile = State<typename Config::T, Config::kOutputs, Config::kRows>;
  using StateT = State<typename Config::T, Config::kHidden, Config::kRows>;
  static constexpr int kPerRow = Config::kOutputs * kElementBytes / 16, kAll = Config::kRows * kPerRow;
  static constexpr int kTurn = Config::kThreads / kPerRow;  // rows from one piece of a thread to its next

 public:
  static constexpr int kPieces = (kAll + Config::kThreads - 1) / Config::kThreads;

  __device__ __forceinline__ explicit Carrier(const Share<Config, Product>& share) : share_(share) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool regular = i && kRegular;
      in_tile_[i] = regular ? in_tile_[0] + i * (kTurn / 8) * Tile::kEightRows : Tile::row(row(i)) + column(i);
      offset_[i] = regular ? offset_[0] + i * kTurn * static_cast<uint32_t>(share.row_bytes)
                           : row(i) * static_cast<uint32_t>(share.row_bytes) + first_column() + column(i);
    }
  }

  // Whether the thread has a piece i at all, and whether it is in device memory too.
  __device__ __forceinline__ bool has(int i) const {
    return (i + 1) * Config::kThreads <= kAll || share_.thread + i * Config::kThreads < kAll;
  }
  __device__ __forceinline__ bool exists(int i) const {
    return has(i) && row(i) < share_.live_rows && first_column() + column(i) < share_.hidden * kElementBytes;
  }
  __device__ __forceinline__ int row(int i) const { return (share_.thread + i * Config::kThreads) / kPerRow; }
  __device__ __forceinline__ uint32_t in_tile(int i) const { return in_tile_[i]; }
  __device__ __forceinline__ uint32_t in_state(int i) const {
    return Config::kCtas == 1 ? in_tile_[i] : StateT::row(row(i)) + first_column() + column(i);
  }
  // Bytes from the tile's first, and from the thread's.
  __device__ __forceinline__ uint32_t offset(int i) const { return offset_[i]; }
  __device__ __forceinline__ uint32_t further(int i) const { return i ? offset_[i] - offset_[0] : 0; }

 private:
  __device__ __forceinline__ int first_column() const { return share_.first_neuron() * kElementBytes; }  // bytes
  // Whole eights of rows further is a constant in shared memory.
  static constexpr bool kRegular = Config::kThreads % kPerRow == 0 && kTurn % 8 == 0;
  __device__ __forceinline__ int column(int i) const {  // bytes
    return (share_.thread + i * Config::kThreads) % kPerRow * 16;
  }

  const Share<Config, Product>& share_;
  uint32_t in_tile_[kPieces], offset_[kPieces];
};

}  // namespace fused_rin
