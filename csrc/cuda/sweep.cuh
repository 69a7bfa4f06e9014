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
// All rows of a block share the time t. A row that is past its length, or running down not yet within it, holds what
// it has: the state, or backward the gradient of the state.
#pragma once

#include "../problem.h"
#include "element.cuh"
#include "epilogues.cuh"
#include "state.cuh"

namespace fused_rin {

template <class Config, class Product, bool kBackward>
__device__ __forceinline__ void sweep(const Problem& problem) {
  using T = typename Config::T;
  using E = Element<T>;
  using Pair = typename E::Pair;
  using StateT = State<T, Config::kHidden, Config::kRows>;
  constexpr int kPairs = Product::kPairs, kColumns = Product::kColumns;
  constexpr int kAhead = kBackward ? Config::kAheadBackward : Config::kAheadForward;

  // ---- what this block, and this thread, owns. Offsets are in bytes; pair p of a thread is at `offset(p)` from the
  // thread's place in a (time, batch) row, and steps differ by a uniform stride: two adds make an address.
  const int hidden = static_cast<int>(problem.hidden);
  const int64_t tiles = (problem.batch + Config::kRows - 1) / Config::kRows;
  const int64_t group = device::block_idx() / tiles;
  const int64_t first_row = device::block_idx() % tiles * Config::kRows;
  const int live_rows = static_cast<int>(min(problem.batch - first_row, int64_t{Config::kRows}));
  const bool down = (group >= problem.groups - problem.num_reversed) != kBackward;

  const device::SharedMemory shared = device::shared_memory();
  Product product(shared, live_rows);
  const Epilogue<kBackward> epilogue(problem.activation);

  const int64_t row_bytes = problem.groups * hidden * E::kBytes;
  const int64_t my_row = first_row + product.row(0);
  const int64_t mine = my_row * row_bytes + (group * hidden + product.neuron(0)) * E::kBytes;
  const auto offset = [&](int p) {
    return (product.row(p % kColumns) - product.row(0)) * row_bytes +
           (product.neuron(p) - product.neuron(0)) * E::kBytes;
  };
  const auto at = [](auto* tensor, int64_t bytes) {
    using Bytes = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(tensor)>>, const char, char>;
    using Pairs = std::conditional_t<std::is_const_v<Bytes>, const Pair, Pair>;
    return reinterpret_cast<Pairs*>(static_cast<Bytes*>(tensor) + bytes);
  };

  // Pair p is active at times t < limit[p]: none past the batch, past the hidden size, or past the row's length.
  const auto length = [&](int row) {  // clamped: values on a device are not checked, that would stall it
    const int64_t steps = problem.lengths ? device::load_global(problem.lengths + first_row + row) : problem.steps;
    return static_cast<int>(min(max(steps, int64_t{0}), problem.steps));
  };
  uint32_t limit[kPairs];
  int stop = static_cast<int>(problem.steps);  // steps of the block's longest row
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int row = product.row(p % kColumns);
    limit[p] = row < live_rows && product.neuron(p) < hidden ? length(row) : 0;
  }
  if (problem.lengths) {
    stop = 0;
    for (int row = 0; row < live_rows; ++row) stop = max(stop, length(row));
  }
  const int first_time = down ? stop - 1 : 0, direction = down ? -1 : 1;
  // As unsigned, so that the times before the first and after the last step are at no limit's left.
  const auto time = [&](int s) { return static_cast<uint32_t>(first_time + direction * s); };

  // ---- reading ahead
  struct Fetched {
    Pair in[kPairs];
    Pair saved[kBackward ? kPairs : 1];
    uint32_t cut[kColumns];  // an episode starts: nothing crosses into this step
    int64_t bytes;           // this thread's place in the rows of this step
  } ring[kAhead] = {};
  const int64_t stride = direction * problem.batch * row_bytes;
  const auto row_at = [&](uint32_t t) {
    return problem.offsets ? device::load_global(problem.offsets + t) : t * problem.batch;
  };
  int64_t next = mine + (stop > 0 ? row_at(time(0)) * row_bytes : 0);
  const bool read = problem.in, irregular = problem.offsets || problem.resets;
  const auto fetch = [&](int s, Fetched& slot) {
    slot.bytes = next;
    next += stride;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const bool active = time(s) < limit[p];
      slot.in[p] = device::load_streaming_if(active && read, at(problem.in, slot.bytes + offset(p)));
      if constexpr (kBackward)
        slot.saved[p] = device::load_streaming_if(active, at(problem.saved, slot.bytes + offset(p)));
    }
    if (irregular) {
      // The boundary between two steps belongs to the later one in time. Running down that is the step before, and at
      // s == stop the boundary that the gradient of h0 crosses.
      const uint32_t t = down ? time(s - 1) : time(s);
      const bool crosses = problem.resets && s <= stop && (s > 0 || !(down || kBackward));
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        slot.cut[c] = 0;
        if (crosses && t < limit[c])
          slot.cut[c] = device::load_global(problem.resets + (row_at(t) + my_row) + (product.row(c) - product.row(0)));
      }
      if (problem.offsets && s + 1 < stop) next = mine + row_at(time(s + 1)) * row_bytes;
    }
  };
#pragma unroll
  for (int slot = 0; slot < kAhead - 1; ++slot) fetch(slot, ring[slot]);

  product.load(static_cast<const Pair*>(problem.weight) + group * hidden * hidden / 2, hidden);

  // ---- the state before the first step: h0; backward 0, and the gradient of h_n carried beside it
  const float skip = static_cast<float>(problem.skip);
  const auto skipped = [=](float2 x) {  // 0 * inf must not make a NaN of a network without a skip
    return skip == 0.f ? float2{0.f, 0.f} : float2{skip * x.x, skip * x.y};
  };
  Pair x[kPairs];           // the state as tensors hold it
  float2 residual[kPairs];  // what the next a gets besides in and the product: skip * x, in float32
  const auto store_state = [&](int buffer) {
    if (!product.owner()) return;
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
      shared.template store<Pair>(
          buffer * Config::kStateBytes + StateT::row(product.row(p % kColumns)) + product.neuron(p) * E::kBytes,
          Product::to_state(x[p]));
  };
  const auto is_mine = [&](int p) {  // in the batch, in the hidden size, and no other lane's
    return product.owner() && product.row(p % kColumns) < live_rows && product.neuron(p) < hidden;
  };
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair given =
        device::load_streaming_if(problem.state_in && is_mine(p), at(problem.state_in, mine + offset(p)));
    x[p] = kBackward ? Pair{} : given;
    residual[p] = kBackward ? E::unpack(given) : skipped(E::unpack(given));
  }
  store_state(0);

  const auto write_back = [&](int s, int64_t bytes) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
      device::store_global_if(time(s) < limit[p] && product.owner(), at(problem.out, bytes + offset(p)), x[p]);
  };

  // ---- the loop: step s, in slot s % kAhead; unrolled so that the ring stays in registers. Backward, one more product
  // than there are steps makes the gradient of h0.
  float2 a[kPairs] = {};
  const auto run = [&] {
    for (int first = 0;; first += kAhead) {
#pragma unroll
      for (int slot = 0; slot < kAhead; ++slot) {
        const int s = first + slot;
        if (!kBackward && s == stop) return;
        device::sync_block();
        float2 sum[kPairs];
        product.multiply((kAhead % 2 ? s : slot) % 2 * Config::kStateBytes, sum, [&] {
          const uint32_t before = time(s - 1);
#pragma unroll
          for (int p = 0; p < kPairs; ++p) {
            if (kBackward) {
              if (before < limit[p]) residual[p] = skipped(a[p]);
            } else if (before < limit[p] && skip != 0.f) {
              residual[p] = {skip * a[p].x, skip * a[p].y};
            }
          }
          Fetched& spent = ring[(slot + kAhead - 1) % kAhead];
          write_back(s - 1, spent.bytes);
          fetch(s - 1 + kAhead, spent);
        });
        const Fetched& now = ring[slot];
        float2 h[kPairs];
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          a[p] = E::unpack(now.in[p]);
          if constexpr (kBackward) h[p] = E::unpack(now.saved[p]);
          if (!now.cut[p % kColumns]) a[p] = {a[p].x + residual[p].x + sum[p].x, a[p].y + residual[p].y + sum[p].y};
        }
        if (kBackward && s == stop) return;
        epilogue.apply(a, h);
#pragma unroll
        for (int p = 0; p < kPairs; ++p)
          if (time(s) < limit[p]) x[p] = E::pack(a[p]);
        store_state((kAhead % 2 ? s + 1 : slot + 1) % 2);
      }
    }
  };
  run();
  if (!kBackward && stop > 0) write_back(stop - 1, mine + row_at(time(stop - 1)) * row_bytes);

  // ---- h_n, or the gradient of h0; and zeros past the lengths
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    device::store_global_if(is_mine(p), at(problem.state_out, mine + offset(p)), kBackward ? E::pack(a[p]) : x[p]);
    if (!problem.lengths || problem.offsets || !is_mine(p)) continue;
    for (int64_t t = limit[p]; t < problem.steps; ++t)
      device::store_global(at(problem.out, mine + t * problem.batch * row_bytes + offset(p)), Pair{});
  }
}

}  // namespace fused_rin
