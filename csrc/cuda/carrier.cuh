// How the tile of a step, [rows][hidden] of one recurrence, travels between device memory and shared memory, where it
// lies as the state does (state.cuh). A tile is cut into pieces; a thread carries the same ones in every step.
//
// Wide: 16 bytes a lane, neighbouring lanes along a row, whoever owns the elements. Needs rows of whole 16 bytes.
// Otherwise: each thread carries the pairs that it owns. The load-store unit takes a 4-byte copy as long as a 16-byte
// one: on an H100 a step of 128 units x 8 rows in bfloat16 took 286 cycles one way and 398 the other.
#pragma once

#include "element.cuh"
#include "share.cuh"
#include "state.cuh"

namespace fused_rin {

template <class Config, class Product, bool kWide>
class Carrier {
  using E = Element<typename Config::T>;
  using StateT = State<typename Config::T, Config::kHidden, Config::kRows>;
  static constexpr int kPerRow = Config::kHidden * E::kBytes / 16, kAll = Config::kRows * kPerRow;
  static constexpr int kTurn = Config::kThreads / kPerRow;  // rows from one piece of a thread to its next

 public:
  static constexpr int kBytes = kWide ? 16 : 2 * E::kBytes;
  static constexpr int kPieces = kWide ? (kAll + Config::kThreads - 1) / Config::kThreads : Product::kPairs;

  __device__ __forceinline__ explicit Carrier(const Share<Config, Product>& share) : share_(share) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if constexpr (kWide) {
        in_tile_[i] = i && kRegular ? in_tile_[0] + i * (kTurn / 8) * StateT::kEightRows : StateT::row(row(i)) + column(i);
        offset_[i] = i && kRegular ? offset_[0] + i * kTurn * static_cast<uint32_t>(share.row_bytes)
                                   : row(i) * static_cast<uint32_t>(share.row_bytes) + column(i);
      } else {
        in_tile_[i] = Product::in_state(share.thread) + Product::in_state_step(i);
        offset_[i] = share.row(i) * static_cast<uint32_t>(share.row_bytes) + share.neuron(i) * E::kBytes;
      }
    }
  }

  // Whether the thread has a piece i at all, and whether anything of it exists in device memory.
  __device__ __forceinline__ bool has(int i) const {
    if constexpr (!kWide) return Product::owner(share_.thread);
    return (i + 1) * Config::kThreads <= kAll || share_.thread + i * Config::kThreads < kAll;
  }
  __device__ __forceinline__ bool exists(int i) const {
    if constexpr (!kWide) return share_.owns(i);
    return has(i) && row(i) < share_.live_rows && column(i) < share_.hidden * E::kBytes;
  }
  __device__ __forceinline__ int row(int i) const {  // of the tile
    if constexpr (!kWide) return share_.row(i);
    return (share_.thread + i * Config::kThreads) / kPerRow;
  }
  __device__ __forceinline__ uint32_t in_tile(int i) const { return in_tile_[i]; }
  __device__ __forceinline__ uint32_t offset(int i) const { return offset_[i]; }  // bytes, from the tile's first

 private:
  // Whole eights of rows further is a constant in shared memory.
  static constexpr bool kRegular = kWide && Config::kThreads % kPerRow == 0 && kTurn % 8 == 0;
  __device__ __forceinline__ int column(int i) const {  // bytes
    return (share_.thread + i * Config::kThreads) % kPerRow * 16;
  }

  const Share<Config, Product>& share_;
  uint32_t in_tile_[kPieces], offset_[kPieces];
};

}  // namespace fused_rin
