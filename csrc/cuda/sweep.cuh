// The sweep: one loop for both directions, whoever computes the product (see problem.h for the two recurrences).
//
//   a = in_t + skip * x + x M      M: U^T forward, U backward; x: the state, in float32 in its owner's registers
//   x = epilogue(a)                h = act(a) forward, d = a * act'(saved_t) backward
//
// A block owns kRows batch rows of one recurrence. Per step it meets at one barrier: the rounded state is written to
// the buffer that the *previous* step's product did not read, so a warp that is a step ahead overwrites nothing.
//
//   critical path   barrier, load state, product, + base, epilogue, store state
//   beside it       write x of the step before, start reading in_t several steps ahead (`meanwhile`)
//
// The skip term is added in float32 after the product rather than fed to the tensor core as its accumulator: that one
// truncates, once per k-step, an error of the size of x's last bit that would all go in one direction.
//
// A row lives in its own time: its step s is t = s, or t = length - 1 - s where the sweep runs down. So all rows start
// together, whatever their lengths, and a block stops at its longest row.
#pragma once

#include "../problem.h"
#include "element.cuh"
#include "epilogues.cuh"
#include "state.cuh"

namespace fused_rin {

struct SweepArguments {
  Problem problem;
  bool paired;  // hidden is even and every tensor aligned to two elements
};

// Where the rows of one block are, step by step.
class Rows {
 public:
  __device__ __forceinline__ Rows(const Problem& problem, int64_t group)
      : problem_(problem),
        row_elements_(problem.groups * problem.hidden),
        first_(group * problem.hidden),
        down_((group >= problem.groups - problem.num_reversed) != problem.backward) {}

  __device__ __forceinline__ bool down() const { return down_; }
  __device__ __forceinline__ int length(int64_t row) const {
    if (row >= problem_.batch) return 0;
    return static_cast<int>(problem_.lengths ? device::load_global(problem_.lengths + row) : problem_.steps);
  }
  // The (time, batch) row of step s < length.
  __device__ __forceinline__ int64_t at(int s, int length, int64_t row) const {
    const int t = down_ ? length - 1 - s : s;
    return (problem_.offsets ? device::load_global(problem_.offsets + t) : t * problem_.batch) + row;
  }
  // Elements from a tensor's start to this recurrence's values in a row.
  __device__ __forceinline__ int64_t element(int64_t row) const { return row * row_elements_ + first_; }

 private:
  const Problem& problem_;
  int64_t row_elements_, first_;
  bool down_;
};

template <class Config, class Product, bool kBackward>
__device__ __forceinline__ void sweep(const SweepArguments& arguments) {
  using T = typename Config::T;
  using E = Element<T>;
  using Scalar = typename E::Scalar;
  using Pair = typename E::Pair;
  using StateT = State<T, Config::kHidden, Config::kRows>;
  constexpr int kPairs = Product::kPairs, kColumns = Product::kColumns;
  constexpr int kAhead = kBackward ? Config::kAheadBackward : Config::kAheadForward;

  const Problem& problem = arguments.problem;
  const bool paired = arguments.paired;
  const int hidden = static_cast<int>(problem.hidden);
  const int64_t tiles = (problem.batch + Config::kRows - 1) / Config::kRows;
  const int64_t group = device::block_idx() / tiles;
  const int64_t first_row = device::block_idx() % tiles * Config::kRows;
  const int64_t live_rows = problem.batch - first_row;
  const float skip = static_cast<float>(problem.skip);
  const auto skipped = [=](float2 x) {  // 0 * inf must not make a NaN of a network without a skip
    return skip == 0.f ? float2{0.f, 0.f} : float2{skip * x.x, skip * x.y};
  };
  const Scalar* const in = static_cast<const Scalar*>(problem.in);
  const Scalar* const saved = static_cast<const Scalar*>(problem.saved);
  const Scalar* const state_in = static_cast<const Scalar*>(problem.state_in);
  Scalar* const out = static_cast<Scalar*>(problem.out);
  Scalar* const state_out = static_cast<Scalar*>(problem.state_out);

  const device::SharedMemory shared = device::shared_memory();
  Product product(shared, static_cast<int>(live_rows < Config::kRows ? live_rows : Config::kRows));
  const Epilogue<kBackward> epilogue(problem.activation);
  const Rows rows(problem, group);

  int length[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) length[c] = rows.length(first_row + product.row(c));
  int stop = 0;  // steps of the block's longest row
  for (int n = 0; n < Config::kRows; ++n) {
    const int steps = rows.length(first_row + n);
    stop = steps > stop ? steps : stop;
    if (!problem.lengths) break;
  }

  // ---- reading ahead
  struct Fetched {
    Pair in[kPairs];
    Pair saved[kBackward ? kPairs : 1];
    uint32_t reset[kColumns];
  } ring[kAhead];
  const auto fetch = [&](int s, Fetched& slot) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const bool active = s < length[c];
      const int64_t row = active ? rows.at(s, length[c], first_row + product.row(c)) : 0;
      const int64_t element = rows.element(row);
      slot.reset[c] = active && problem.resets ? device::load_global(problem.resets + row) : 0;
#pragma unroll
      for (int p = c; p < kPairs; p += kColumns) {
        slot.in[p] = Pair{};
        if (active && in) slot.in[p] = load_pair<T, Cache::kStream>(in + element, product.neuron(p), hidden, paired);
        if constexpr (kBackward) {
          slot.saved[p] = Pair{};
          if (active) slot.saved[p] = load_pair<T, Cache::kStream>(saved + element, product.neuron(p), hidden, paired);
        }
      }
    }
  };
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) fetch(slot, ring[slot]);

  product.load(reinterpret_cast<const Scalar*>(problem.weight) + group * hidden * hidden, hidden, paired);

  // ---- the state before the first step: h0, or the gradient of h_n
  float2 residual[kPairs];  // what the next a gets besides in and the product: skip * x
  Pair rounded[kPairs];
  const auto store_state = [&](const float2(&x)[kPairs], int buffer) {
    if (!product.owner()) return;
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
      shared.template store<Pair>(buffer * Config::kStateBytes + StateT::row(product.row(p % kColumns)) +
                                      product.neuron(p) * E::kBytes,
                                  Product::to_state(x[p], rounded[p]));
  };
  const auto row_of_state = [&](int c) { return rows.element(first_row + product.row(c)); };
  const auto write_final_state = [&](int c) {
    if (!product.owner()) return;
#pragma unroll
    for (int p = c; p < kPairs; p += kColumns)
      store_pair<T>(state_out + row_of_state(c), product.neuron(p), hidden, paired, rounded[p]);
  };
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    rounded[p] = Pair{};
    const int c = p % kColumns;
    if (state_in && product.row(c) < live_rows)
      rounded[p] = load_pair<T, Cache::kReuse>(state_in + row_of_state(c), product.neuron(p), hidden, paired);
    residual[p] = E::unpack(rounded[p]);
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    if (!kBackward && length[c] == 0 && product.row(c) < live_rows) write_final_state(c);
  const bool multiply_first = !kBackward && state_in;
  if (multiply_first) {
    store_state(residual, 0);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) residual[p] = skipped(residual[p]);
  }

  const auto write_back = [&](int s) {  // what step s computed; x is in `rounded`
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (s >= length[c] || !product.owner()) continue;
      Scalar* const row = out + rows.element(rows.at(s, length[c], first_row + product.row(c)));
#pragma unroll
      for (int p = c; p < kPairs; p += kColumns) store_pair<T>(row, product.neuron(p), hidden, paired, rounded[p]);
      if (!kBackward && s + 1 == length[c]) write_final_state(c);
    }
  };

  // ---- the loop: step s, in slot s % kAhead; unrolled so that the ring stays in registers
  uint32_t leaving[kColumns] = {};  // running down, a reset at the last row cuts what leaves it
  const int end = kBackward ? stop + 1 : stop;  // backward, one more product makes the gradient of h0
  for (int first = 0; first < end; first += kAhead) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
      const int s = first + slot;
      if (s >= end) break;
      float2 sum[kPairs] = {};
      if (s > 0 || multiply_first) {
        device::sync_block();
        product.multiply((s & 1) * Config::kStateBytes, sum, [&] {
          if (s == 0) return;
          write_back(s - 1);
          fetch(s - 1 + kAhead, ring[(slot + kAhead - 1) % kAhead]);
        });
      }
      const Fetched& now = ring[slot];
      float2 x[kPairs], h[kPairs];
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int c = p % kColumns;
        const bool cut = rows.down() ? leaving[c] : now.reset[c] && (s > 0 || !kBackward);
        x[p] = E::unpack(now.in[p]);
        if constexpr (kBackward) h[p] = E::unpack(now.saved[p]);
        if (!cut) x[p] = {x[p].x + residual[p].x + sum[p].x, x[p].y + residual[p].y + sum[p].y};
      }
      if constexpr (kBackward) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (s != length[c] || product.row(c) >= live_rows || !product.owner()) continue;
#pragma unroll
          for (int p = c; p < kPairs; p += kColumns)
            store_pair<T>(state_out + row_of_state(c), product.neuron(p), hidden, paired, E::pack(x[p]));
        }
      }
      epilogue.apply(x, h);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        rounded[p] = E::pack(x[p]);
        residual[p] = skipped(x[p]);
      }
      store_state(x, (s + 1) & 1);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) leaving[c] = now.reset[c];
    }
  }
  if (!kBackward && stop > 0) write_back(stop - 1);

  // ---- rows past a length are zero
  if (problem.lengths && !problem.offsets && product.owner()) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t row = first_row + product.row(c);
      for (int64_t t = length[c]; t < problem.steps && row < problem.batch; ++t) {
#pragma unroll
        for (int p = c; p < kPairs; p += kColumns)
          store_pair<T>(out + rows.element(t * problem.batch + row), product.neuron(p), hidden, paired, Pair{});
      }
    }
  }
}

}  // namespace fused_rin
