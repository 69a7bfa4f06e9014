// How a block shares out its shared memory.
#pragma once

#include "exchange.cuh"
#include "schedule.cuh"
#include "state.cuh"

namespace fused_rin {

// Two buffers of the state, what of the matrix is not in registers, the ring, the schedule,
// the factors of the units, sums that the parts of k give each other, the mbarriers of a cluster.
template <class Config, bool kBackward, bool kUnits>
struct Layout {
  static constexpr int kSlots = kBackward ? Config::kSlotsBackward : Config::kSlotsForward;
  // in, and backward saved; of units forward noise
  static constexpr int kTileBytes = State<typename Config::T, Config::kOutputs, Config::kRows>::kBytes;
  static constexpr int kSlotBytes = (kBackward || kUnits ? 2 : 1) * kTileBytes;
  static constexpr int kRing = 2 * Config::kStateBytes + Config::kMatrixBytes;
  static constexpr int kSchedule = kRing + kSlots * kSlotBytes;
  static constexpr int kFactors = kSchedule + Schedule<Config::kRows, kSlots, kBackward>::kBytes;
  static constexpr int kGiven = kFactors + (kUnits ? 8 * Config::kHidden : 0);
  static constexpr int kExchange = kGiven + Config::kGivenBytes;
  static constexpr int kBytes = kExchange + Exchange<Config>::kBytes;
  static_assert(kSlots >= 2, "one that is read, one that is filled");
};

}  // namespace fused_rin
