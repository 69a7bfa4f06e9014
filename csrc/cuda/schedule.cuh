// What a block reads of the sequences' layout while it runs: where a packed step begins, and which rows start an
// episode. Staged in shared memory ahead of time, so that no step waits for device memory.
#pragma once

#include <device.cuh>

#include "../problem.h"

namespace fused_rin {

template <int kRows, int kSlots>
class Schedule {
  static constexpr int kSteps = 4 * kSlots;  // of which the first row is kept: from the one written to 2 rings ahead
  static constexpr int kCuts = kSteps * 8;   // offset: behind the first rows

 public:
  static constexpr int kBytes = kCuts + (kSlots * kRows * 4 + 15) / 16 * 16;

  __device__ __forceinline__ Schedule(device::SharedMemory shared, uint32_t place, const Problem& problem,
                                      int64_t first_row, int thread)
      : shared_(shared), place_(place), problem_(problem), first_row_(first_row), thread_(thread) {}

  // ---- packed sequences: the first row of a step
  template <class Time>
  __device__ __forceinline__ void begin(int stop, const Time& time) const {
    if (thread_ < 2 * kSlots && thread_ < stop)
      shared_.store<int64_t>(place_ + thread_ * 8, device::load_global(problem_.offsets + time(thread_)));
  }
  // In step s: of the step 2 * kSlots ahead, which is asked for in kSlots steps' time.
  template <class Time>
  __device__ __forceinline__ void fetch_row(int s, int stop, const Time& time) const {
    const int next = s + 2 * kSlots;
    if (thread_ == 0 && next < stop)
      device::cp_async<8>(shared_, place_ + next % kSteps * 8, problem_.offsets + time(next), true);
  }
  __device__ __forceinline__ int64_t row(int s) const { return shared_.load<int64_t>(place_ + s % kSteps * 8); }

  // ---- resets: a byte a row, of which cp.async copies the whole word that it lies in; thread r copies row r's.
  // `step_row`: the first row of the step whose resets they are.
  __device__ __forceinline__ void fetch_cut(int slot, int64_t step_row, bool wanted) const {
    if (thread_ >= kRows) return;
    const int64_t byte = wanted ? step_row + first_row_ + thread_ : 0;
    device::cp_async<4>(shared_, cut_place(slot, thread_), problem_.resets + (byte & ~int64_t{3}), wanted);
  }
  template <class StepRow>
  __device__ __forceinline__ bool cut(int slot, int row, const StepRow& step_row) const {
    const uint32_t word = shared_.load<uint32_t>(cut_place(slot, row));
    return word && (word >> static_cast<int>((step_row() + first_row_ + row) & 3) * 8 & 0xff);
  }

 private:
  __device__ __forceinline__ uint32_t cut_place(int slot, int row) const {
    return place_ + kCuts + (slot * kRows + row) * 4;
  }

  device::SharedMemory shared_;
  uint32_t place_;
  const Problem& problem_;
  int64_t first_row_;
  int thread_;
};

}  // namespace fused_rin
