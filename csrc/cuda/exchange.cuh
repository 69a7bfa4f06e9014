// Who is met once a step, and how the state gets to them: the block, a cluster, a grid. The loop (sweep.cuh) keeps this
// order:
//
//   wait       the state of the step before is here, whole; everybody has read the one before that
//   (product, output, epilogue; the block's part of the new state is stored in its other buffer)
//   push       ... and sent to those who share the tile
//   (what is read of the ring)
//   arrive     all that this warp reads and writes in this step is done
#pragma once

#include <device.cuh>
#include <type_traits>

#include "element.cuh"
#include "grid_exchange.cuh"
#include "state.cuh"

namespace fused_rin {

// The block alone: one barrier.
template <class Config>
class BlockExchange {
 public:
  static constexpr int kBytes = 0, kWorkspaceBytes = 0;
  template <class Share>
  __device__ __forceinline__ BlockExchange(device::SharedMemory, uint32_t, const Share&, const Problem&) {}
  __device__ __forceinline__ void wait() { device::sync_block(); }
  __device__ __forceinline__ void push(uint32_t) const {}
  __device__ __forceinline__ void arrive() const {}
  __device__ __forceinline__ void finish(int) {}
};

// A cluster (sm_90+): kCtas blocks share a tile, each owns kOutputs of its neurons. A warp writes its part of the state
// into the block's own buffer, reads it back in chunks of 16 bytes, and sends each to all blocks by st.async: to its
// own too, or some lanes would have one to send less than others, and st.async cannot be predicated. Each buffer has an
// mbarrier: it waits for the bytes of all blocks and for the block's own warps.
//
// Two buffers suffice: a block has the whole state of a step only after every warp of every peer has read the state of
// the step before; so what is sent next, into that buffer, overwrites nothing that is still wanted.
template <class Config>
class ClusterExchange {
  using E = Element<typename Config::T>;
  using StateT = State<typename Config::T, Config::kHidden, Config::kRows>;
  static constexpr int kCtas = Config::kCtas, kOwners = Config::kWarps / Config::kParts;  // warps that own outputs
  static constexpr int kWarpBytes = Config::kOutputs / kOwners * E::kBytes;               // of a row
  static constexpr int kChunksARow = kWarpBytes / 16, kChunks = Config::kRows * kChunksARow;
  static constexpr int kLanes = kChunks < 32 ? kChunks : 32;  // with a chunk each; the others share out the peers
  static constexpr int kStride = 32 / kLanes < kCtas ? 32 / kLanes : kCtas, kSends = kCtas / kStride;
  static_assert(kChunks == kLanes || kLanes / kChunksARow % 2 == 0, "a turn further is a constant in the state");
  static_assert(kWarpBytes % 16 == 0 && 32 % kLanes == 0 && kChunks % kLanes == 0 && kCtas % kStride == 0,
                "whole chunks, evenly shared");

 public:
  static constexpr int kBytes = 16;  // two mbarriers
  static constexpr int kWorkspaceBytes = 0;

  template <class Share>
  __device__ __forceinline__ ClusterExchange(device::SharedMemory shared, uint32_t place, const Share& share,
                                             const Problem&)
      : shared_(shared), barriers_(place), live_rows_(share.live_rows) {
    const int lane = device::lane_idx(), chunk = lane % kLanes, rank = share.rank;
    row_ = lane < kLanes * kStride ? chunk / kChunksARow : Config::kRows;  // or it has nothing to send
    // Opaque, or they are found anew in every step, between the state and its sending.
    place_ = device::opaque(rank * (Config::kOutputs * E::kBytes) + device::warp_idx() * kWarpBytes +
                            StateT::row(chunk / kChunksARow) + chunk % kChunksARow * 16);
#pragma unroll
    for (int i = 0; i < kSends; ++i) peers_[i] = device::peer(shared, (rank + distance(i)) % kCtas);
  }

  // Fills the buffers, the first one with `initial` (or zeros), and meets the peers.
  template <class Share>
  __device__ __forceinline__ void begin(const Share& share, const void* initial) const {
    fill_states<Config>(shared_, share, initial);
    if (share.thread == 0) {
      device::mbarrier_init(shared_, barriers_, Config::kWarps);
      device::mbarrier_init(shared_, barriers_ + 8, Config::kWarps);
    }
    device::sync_cluster();
  }

  __device__ __forceinline__ void wait() {
    const uint32_t buffer = steps_ & 1;
    device::mbarrier_wait(shared_, barriers_ + 8 * buffer, steps_ >> 1 & 1);
    ++steps_;
  }

  // `state`: the buffer of the new state, whose part of this warp has been written.
  __device__ __forceinline__ void push(uint32_t state) const {
    if (Config::kParts > 1 && device::warp_idx() >= kOwners) return;
    device::sync_warp();
    const uint32_t barrier = barriers_ + 8 * (steps_ & 1);
    constexpr int kTurns = kChunks / kLanes, kTurnRows = kLanes / kChunksARow;
    uint4 values[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn)
      values[turn] = shared_.load<uint4>(state + place_ + StateT::row(turn * kTurnRows));
    device::sync_warp();  // another lane reads the chunk that this one sends to its own block
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (row_ + turn * kTurnRows >= live_rows_) continue;
#pragma unroll
      for (int i = 0; i < kSends; ++i)
        device::st_async(peers_[i], state + place_ + StateT::row(turn * kTurnRows), values[turn], barrier);
    }
  }

  // Before the first step there is nothing to expect.
  __device__ __forceinline__ void arrive() const {
    device::sync_warp();
    if (device::lane_idx()) return;
    const uint32_t barrier = barriers_ + 8 * (steps_ & 1);
    if (device::warp_idx() == 0 && steps_)
      device::mbarrier_arrive_expect(shared_, barrier, live_rows_ * (Config::kHidden * E::kBytes));
    else
      device::mbarrier_arrive(shared_, barrier);
  }

  // A block may end when nothing is under way to it any more: after the last step's state has come, which nobody reads.
  __device__ __forceinline__ void finish(int steps) {
    if (steps > 0) wait();
  }

 private:
  // Of a lane's peer i, from the own rank on: so that not all blocks send to the same one at once.
  static __device__ __forceinline__ int distance(int i) { return 1 + device::lane_idx() / kLanes + i * kStride; }

  device::SharedMemory shared_;
  uint32_t barriers_, steps_ = 0;  // steps that were waited for; the next one's state is in buffer steps_ & 1
  uint32_t place_;                 // of the lane's first chunk in a buffer
  int row_, live_rows_;
  device::Peer peers_[kSends];
};

template <class Config>
using Exchange = std::conditional_t<Config::kCtas == 1, BlockExchange<Config>,
                                    std::conditional_t<Config::kGrid, GridExchange<Config>, ClusterExchange<Config>>>;

}  // namespace fused_rin
