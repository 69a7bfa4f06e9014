// How the state gets to blocks that share a tile and lie anywhere on the device: through its L2, in packets.
//
// A packet is 16 bytes, three words of the state and the number of the step that it is of, stored and loaded whole. Who
// finds the number has the words: no fence, no flag beside it, no barrier but the block's own (NCCL's LL protocol has a
// flag for every four bytes, Persistent RNN a number in every line). A quarter of what travels is numbers.
//
// The warps that own outputs publish their part in all live rows; each block's threads poll for everybody's, all their
// packets at a time: one after another they would wait for the L2, some 600 cycles, again and again (128 blocks with
// 256 bytes each: 2,200 cycles where 1,024 threads polled on an H100, 4,190 with 256).
//
// Two buffers suffice: a block publishes a step's state after all its threads had that of the step before, and so
// overwrites what everybody has read. Blocks poll from their own rank on, so that not all ask for the same line at
// once.
#pragma once

#include <device.cuh>

#include "element.cuh"
#include "state.cuh"

namespace fused_rin {

template <class Config>
class GridExchange {
  using E = Element<typename Config::T>;
  using StateT = State<typename Config::T, Config::kHidden, Config::kRows>;
  static constexpr int kOwners = Config::kWarps / Config::kParts;              // warps that own outputs
  static constexpr int kSources = Config::kCtas * kOwners;                     // of all blocks
  static constexpr int kSourceBytes = Config::kHidden / kSources * E::kBytes;  // of a row
  static constexpr int kWordsARow = kSourceBytes / 4, kWords = Config::kRows * kWordsARow;
  static constexpr int kData = 3, kPackets = (kWords + kData - 1) / kData;  // words of a packet; packets of a source
  static constexpr int kAtATime = Config::kThreads / kPackets;              // sources that the threads poll for
  static constexpr int kTurns = (kSources - kOwners + kAtATime - 1) / kAtATime;
  static constexpr int kBuffer = 2 * kSources * kPackets;  // packets; see publish
  static_assert((kSources & (kSources - 1)) == 0, "a source is found by a mask");
  static_assert(kAtATime > 0, "a thread has one place in the packets of every source");

 public:
  static constexpr int kBytes = 0;
  static constexpr int64_t kWorkspaceBytes = int64_t{2} * kBuffer * 16;  // of a tile; zeros at first

  template <class Share>
  __device__ __forceinline__ GridExchange(device::SharedMemory shared, uint32_t, const Share& share,
                                          const Problem& problem)
      : shared_(shared) {
    packets_ = (share.live_rows * kWordsARow + kData - 1) / kData;
    const int place = share.thread % kPackets, at = share.thread / kPackets, own = share.rank * kOwners;
    first_source_ = own + kOwners + at;
    polls_ = place < packets_ && at < kAtATime;
    polls_last_ = (kTurns - 1) * kAtATime + at < kSources - kOwners;
    uint4* const workspace =
        static_cast<uint4*>(problem.workspace) + device::block_idx() / Config::kCtas * (kWorkspaceBytes / 16);
    own_column_ = (own + device::warp_idx()) * kSourceBytes;
    publish_ = workspace + (own + device::warp_idx()) * kPackets + device::lane_idx();
    poll_ = workspace + first_source_ * kPackets + place;
#pragma unroll
    for (int j = 0; j < kData; ++j) {
      to_[j] = in_state(kData * place + j);
      // Opaque, or it is found anew in every step, between the state and its publishing.
      own_[j] = device::opaque(own_column_ + in_state(kData * device::lane_idx() + j));
    }
  }

  template <class Share>
  __device__ __forceinline__ void begin(const Share& share, const void* initial) const {
    fill_states<Config>(shared_, share, initial);
  }

  __device__ __forceinline__ void wait() {
    if (steps_) receive();
    ++steps_;
    device::sync_block();
  }

  // `state`: the buffer of the new state, whose part of this warp has been written. Published twice, one round of all
  // sources behind the other: so that everybody polls straight on from its own, and all ask for another line at a time.
  __device__ __forceinline__ void push(uint32_t state) const {
    if (Config::kParts > 1 && device::warp_idx() >= kOwners) return;
    device::sync_warp();
#pragma unroll
    for (int first = 0; first < kPackets; first += 32) {
      if (first + device::lane_idx() >= packets_) continue;
      const auto word = [&](int j) {
        const uint32_t place = first ? own_column_ + in_state(kData * (first + device::lane_idx()) + j) : own_[j];
        return shared_.load<uint32_t>(state + place);
      };
      const uint4 packet{word(0), word(1), word(2), steps_};
      uint4* const to = publish_ + (steps_ & 1) * kBuffer + first;
      device::store_packet(to, packet);
      device::store_packet(to + kSources * kPackets, packet);
    }
  }

  __device__ __forceinline__ void arrive() const {}
  __device__ __forceinline__ void finish(int) {}

 private:
  // Of a source's word, from its first. Behind the last one it comes again.
  static __device__ __forceinline__ uint32_t in_state(int word) {
    if (word >= kWords) word = kWords - 1;
    return StateT::row(word / kWordsARow) + word % kWordsARow * 4;
  }
  __device__ __forceinline__ int source(int i) const { return (first_source_ + i * kAtATime) & (kSources - 1); }

  __device__ __forceinline__ void receive() const {
    if (!polls_) return;
    const uint4* const from = poll_ + (steps_ & 1) * kBuffer;
    const auto polls = [&](int i) { return i < kTurns - 1 || polls_last_; };
    uint4 packet[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      packet[i].w = steps_;
      device::load_packet_if(polls(i), from + i * (kAtATime * kPackets), packet[i]);
    }
#pragma unroll 1
    for (int tries = 0;; ++tries) {
      uint32_t missing = 0;
#pragma unroll
      for (int i = 0; i < kTurns; ++i) missing |= packet[i].w ^ steps_;
      if (!missing) break;
      device::poll_again(tries);
#pragma unroll
      for (int i = 0; i < kTurns; ++i)
        device::load_packet_if(packet[i].w != steps_, from + i * (kAtATime * kPackets), packet[i]);
    }
    const uint32_t state = (steps_ & 1) * Config::kStateBytes;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      if (!polls(i)) continue;
      const uint32_t there = state + source(i) * kSourceBytes;
      shared_.store(there + to_[0], packet[i].x);
      shared_.store(there + to_[1], packet[i].y);
      shared_.store(there + to_[2], packet[i].z);
    }
  }

  device::SharedMemory shared_;
  int first_source_;         // that the thread polls for
  int packets_;              // of a source, in live rows
  bool polls_, polls_last_;  // at all; in the last turn
  uint32_t own_column_;      // of this warp, in bytes
  uint32_t own_[kData];      // of the words of its first packets, in the state
  uint32_t to_[kData];       // the same of what the thread polls for, from a source's first
  uint4* publish_;
  const uint4* poll_;
  uint32_t steps_ = 0;  // that were waited for: the number of the state that is made
};

}  // namespace fused_rin
