// What a block reads of the sequences' layout while it runs: where a packed step begins, and which rows start an
// episode. Staged in shared memory ahead of time, so that no step waits for device memory.
#pragma once

#include <device.cuh>

#include "../problem.h"

namespace fused_rin {

// A step s is at time first_time + direction * s, and the block's longest row has `stop` of them.
struct Steps {
  int stop, first_time, direction;
  bool down;

  __device__ __forceinline__ Steps(int stop_, bool down_)
      : stop(stop_), first_time(down_ ? stop_ - 1 : 0), direction(down_ ? -1 : 1), down(down_) {}
  // As unsigned, so that the times before the first and after the last step are at no limit's left.
  __device__ __forceinline__ uint32_t time(int s) const { return static_cast<uint32_t>(first_time + direction * s); }
};

template <int kRows, int kSlots, bool kBackward>
class Schedule {
  static constexpr int kSteps = 4 * kSlots;     // of which the first row is kept: from the one written to 2 rings ahead
  static constexpr int kCutSteps = 2 * kSlots;  // of which the cuts are: one is asked for while another is looked at
  static constexpr int kCuts = kSteps * 8;      // offset: behind the first rows

 public:
  static constexpr int kBytes = kCuts + (kCutSteps * kRows * 4 + 15) / 16 * 16;

  // `own_limit`: steps of the row whose cuts this thread copies, 0 if there is none.
  __device__ __forceinline__ Schedule(device::SharedMemory shared, uint32_t place, const Problem& problem,
                                      const Steps& steps, int64_t first_row, int thread, uint32_t own_limit)
      : shared_(shared),
        place_(place),
        problem_(problem),
        steps_(steps),
        first_row_(first_row),
        thread_(thread),
        own_limit_(own_limit) {}

  // The first row of a step, before any is staged.
  __device__ __forceinline__ int64_t row_now(int s) const {
    const uint32_t t = steps_.time(s);
    return problem_.offsets ? device::load_global(problem_.offsets + t) : t * problem_.batch;
  }

  // ---- packed sequences: the first row of a step
  __device__ __forceinline__ void begin() const {
    if (thread_ < 2 * kSlots && thread_ < steps_.stop)
      shared_.store<int64_t>(place_ + thread_ * 8, device::load_global(problem_.offsets + steps_.time(thread_)));
  }
  // Before step s: of the step 2 * kSlots ahead, which is read kSlots steps later.
  __device__ __forceinline__ void fetch_row(int s) const {
    const int next = s + 2 * kSlots;
    if (thread_ == 0 && next < steps_.stop)
      device::cp_async<8>(shared_, place_ + next % kSteps * 8, problem_.offsets + steps_.time(next), true);
  }
  __device__ __forceinline__ int64_t row(int s) const { return shared_.load<int64_t>(place_ + s % kSteps * 8); }

  // ---- resets: a byte a row, of which cp.async copies the whole word that it lies in; thread r copies row r's.
  // The boundary between two steps belongs to the later one in time. Running down that is the step before, and at
  // s == stop the boundary that the gradient of h0 crosses.
  template <bool kStaged>
  __device__ __forceinline__ void fetch_cut(int s) const {
    const int owner = steps_.down ? s - 1 : s;
    const bool wanted = s <= steps_.stop && (s > 0 || !(steps_.down || kBackward)) && steps_.time(owner) < own_limit_;
    if (thread_ >= kRows) return;
    const int64_t byte = wanted ? row_of<kStaged>(owner) + first_row_ + thread_ : 0;
    device::cp_async<4>(shared_, cut_place(s, thread_), problem_.resets + (byte & ~int64_t{3}), wanted);
  }
  // Whether the state of a row crosses into step s.
  __device__ __forceinline__ bool crosses(int s, int row) const {
    const uint32_t word = shared_.load<uint32_t>(cut_place(s, row));
    const int owner = steps_.down ? s - 1 : s;
    return !word || !(word >> static_cast<int>((row_of<true>(owner) + first_row_ + row) & 3) * 8 & 0xff);
  }

 private:
  template <bool kStaged>
  __device__ __forceinline__ int64_t row_of(int s) const {
    return !kStaged ? row_now(s) : problem_.offsets ? row(s) : steps_.time(s) * problem_.batch;
  }
  __device__ __forceinline__ uint32_t cut_place(int s, int row) const {
    return place_ + kCuts + (s % kCutSteps * kRows + row) * 4;
  }

  device::SharedMemory shared_;
  uint32_t place_;
  const Problem& problem_;
  const Steps& steps_;
  int64_t first_row_;
  int thread_;
  uint32_t own_limit_;
};

}  // namespace fused_rin
