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

// What a thread of a block owns. Offsets are in bytes; pair p of a thread is at `mine + offset(p)` of a time step's
// rows, or of the state. 32 bits hold what is within a tile: 64 rows of at most 2^24 elements (see block.cu).
template <class Config, class Product>
struct Share {
  using E = Element<typename Config::T>;
  int thread, hidden, live_rows;  // live: of the block's rows, those within the batch
  int64_t row_bytes, group, first_row, mine;

  __device__ __forceinline__ Share(const Problem& problem, uint32_t block, uint32_t thread_)
      : thread(static_cast<int>(thread_)), hidden(static_cast<int>(problem.hidden)) {
    const uint32_t tiles = static_cast<uint32_t>((problem.batch + Config::kRows - 1) / Config::kRows);
    group = block / tiles;
    first_row = int64_t{block % tiles} * Config::kRows;
    live_rows = static_cast<int>(min(problem.batch - first_row, int64_t{Config::kRows}));
    row_bytes = problem.groups * hidden * E::kBytes;
    mine = (first_row + row(0)) * row_bytes + (group * hidden + neuron(0)) * E::kBytes;
  }
  __device__ __forceinline__ int row(int p) const { return Product::row(thread) + Product::row_step(p); }
  __device__ __forceinline__ int neuron(int p) const { return Product::neuron(thread) + Product::neuron_step(p); }
  __device__ __forceinline__ uint32_t offset(int p) const {
    return Product::row_step(p) * static_cast<uint32_t>(row_bytes) + Product::neuron_step(p) * E::kBytes;
  }
  // In the batch, in the hidden size, and no other lane's.
  __device__ __forceinline__ bool owns(int p) const {
    return Product::owner(thread) && row(p) < live_rows && neuron(p) < hidden;
  }
};

template <class Config, class Product, bool kBackward>
__device__ __forceinline__ void sweep(const Problem& problem) {
  using T = typename Config::T;
  using E = Element<T>;
  using Pair = typename E::Pair;
  using StateT = State<T, Config::kHidden, Config::kRows>;
  constexpr int kPairs = Product::kPairs, kColumns = Product::kColumns;
  constexpr int kAhead = kBackward ? Config::kAheadBackward : Config::kAheadForward;

  // Steps differ by a uniform stride: two adds make an address.
  const uint32_t block = static_cast<uint32_t>(device::block_idx());  // fewer than 2^31: see launch.h
  const Share<Config, Product> share(problem, block, device::thread_idx());
  const int live_rows = share.live_rows;
  const int64_t row_bytes = share.row_bytes, mine = share.mine;
  const bool down = (share.group >= problem.groups - problem.num_reversed) != kBackward;

  const device::SharedMemory shared = device::shared_memory();
  Product product(shared, live_rows);
  const Epilogue<kBackward> epilogue(problem.activation);
  const auto at = [](auto* tensor, int64_t bytes) {
    using Bytes = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(tensor)>>, const char, char>;
    using Pairs = std::conditional_t<std::is_const_v<Bytes>, const Pair, Pair>;
    return reinterpret_cast<Pairs*>(static_cast<Bytes*>(tensor) + bytes);
  };

  // Pair p is active at times t < limit[p]: none past the batch, past the hidden size, or past the row's length.
  const auto length = [&](int row) {  // clamped: values on a device are not checked, that would stall it
    const int64_t steps =
        problem.lengths ? device::load_global(problem.lengths + share.first_row + row) : problem.steps;
    return static_cast<int>(min(max(steps, int64_t{0}), problem.steps));
  };
  uint32_t limit[kPairs];
  int stop = static_cast<int>(problem.steps);  // steps of the block's longest row
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const bool within = share.row(p) < live_rows && share.neuron(p) < share.hidden;
    limit[p] = within ? length(share.row(p)) : 0;
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
      slot.in[p] = device::load_streaming_if(active && read, at(problem.in, slot.bytes + share.offset(p)));
      if constexpr (kBackward)
        slot.saved[p] = device::load_streaming_if(active, at(problem.saved, slot.bytes + share.offset(p)));
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
          slot.cut[c] =
              device::load_global(problem.resets + (row_at(t) + share.first_row + share.row(0)) + Product::row_step(c));
      }
      if (problem.offsets && s + 1 < stop) next = mine + row_at(time(s + 1)) * row_bytes;
    }
  };
#pragma unroll
  for (int slot = 0; slot < kAhead - 1; ++slot) fetch(slot, ring[slot]);

  const int64_t matrix = int64_t{share.hidden} * share.hidden;
  product.load(static_cast<const Pair*>(problem.weight) + share.group * matrix / 2, share.hidden);

  // ---- the state before the first step: h0; backward 0, and the gradient of h_n carried beside it
  const float skip = static_cast<float>(problem.skip);
  const auto skipped = [=](float2 x) {  // 0 * inf must not make a NaN of a network without a skip
    return skip == 0.f ? float2{0.f, 0.f} : float2{skip * x.x, skip * x.y};
  };
  Pair x[kPairs];           // the state as tensors hold it
  float2 residual[kPairs];  // what the next a gets besides in and the product: skip * x, in float32
  const auto store_state = [&](int buffer) {
    if (!Product::owner(share.thread)) return;
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
      shared.template store<Pair>(buffer * Config::kStateBytes + Product::in_state(share.thread, p),
                                  Product::to_state(x[p]));
  };
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair given =
        device::load_streaming_if(problem.state_in && share.owns(p), at(problem.state_in, mine + share.offset(p)));
    x[p] = kBackward ? Pair{} : given;
    residual[p] = kBackward ? E::unpack(given) : skipped(E::unpack(given));
  }
  store_state(0);

  const auto write_back = [&](int s, int64_t bytes) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
      device::store_global_if(time(s) < limit[p] && Product::owner(share.thread),
                              at(problem.out, bytes + share.offset(p)), x[p]);
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

  // ---- h_n, or the gradient of h0; and zeros past the lengths. What the thread owns is found anew: kept through the
  // loop, it took the registers by which some kernels spilled on sm_100 and sm_120.
  const Share<Config, Product> again(problem, device::opaque(block), device::thread_idx_anew());
  if (!kBackward && stop > 0) {
    const uint32_t last = down ? 0 : device::opaque(stop) - 1;
    const int64_t bytes = again.mine + row_at(last) * again.row_bytes;
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
      device::store_global_if(last < limit[p] && Product::owner(again.thread), at(problem.out, bytes + again.offset(p)),
                              x[p]);
  }
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    device::store_global_if(again.owns(p), at(problem.state_out, again.mine + again.offset(p)),
                            kBackward ? E::pack(a[p]) : x[p]);
    if (!problem.lengths || problem.offsets || !again.owns(p)) continue;
#pragma unroll 1
    for (int64_t t = device::opaque(limit[p]); t < problem.steps; ++t)
      device::store_global(at(problem.out, again.mine + t * problem.batch * again.row_bytes + again.offset(p)), Pair{});
  }
}

}  // namespace fused_rin
