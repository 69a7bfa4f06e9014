// The sweep: one loop for both directions, whoever computes the product (see problem.h for the two recurrences).
//
//   a = in_t + skip * x + x M      M: U^T forward, U backward; x: the state, in float32 in its owner's registers
//   x = epilogue(a)                h = act(a) forward, d = a * act'(saved_t) backward
//
// A block owns kRows batch rows of one recurrence. Per step it meets at one barrier: the rounded state is written to
// the buffer that the *previous* step's product did not read, so a warp that is a step ahead overwrites nothing.
//
//   critical path   barrier, load state, product, + base, epilogue, store state
//   before the      the base of this step: in_t from the ring, the skip term
//     products
//   behind them     out: the state of the step before, from shared memory; the ring: ask for in_t some steps ahead
//
// in_t is read ahead by cp.async into a ring in shared memory. Read ahead into registers it was not ahead at all: loads
// share a scoreboard, a wait for one is a wait for all that share it, and every step stood for the latency of device
// memory (on an H100 30% of the step of 128 units x 8 rows; benchmarks/NOTES-cuda.md).
//
// The skip term is added in float32 after the product rather than fed to the tensor core as its accumulator: that one
// truncates, once per k-step, an error of the size of x's last bit that would all go in one direction.
//
// All rows of a block share the time t. A row that is past its length, or running down not yet within it, holds what
// it has: the state, or backward the gradient of the state.
#pragma once

#include "../problem.h"
#include "carrier.cuh"
#include "element.cuh"
#include "epilogues.cuh"
#include "schedule.cuh"
#include "share.cuh"
#include "state.cuh"

namespace fused_rin {

// A block's shared memory: two buffers of the state, what of the matrix is not in registers, the ring, the schedule.
template <class Config, bool kBackward>
struct Layout {
  static constexpr int kSlots = kBackward ? Config::kSlotsBackward : Config::kSlotsForward;
  static constexpr int kSlotBytes = (kBackward ? 2 : 1) * Config::kStateBytes;  // in, and backward saved
  static constexpr int kRing = 2 * Config::kStateBytes + Config::kMatrixBytes;
  static constexpr int kSchedule = kRing + kSlots * kSlotBytes;
  static constexpr int kBytes = kSchedule + Schedule<Config::kRows, kSlots>::kBytes;
  static_assert(kSlots >= 2, "one that is read, one that is filled");
};

template <class Config, class Product, bool kBackward>
__device__ __forceinline__ void sweep(const Problem& problem) {
  using T = typename Config::T;
  using E = Element<T>;
  using Pair = typename E::Pair;
  using Places = Layout<Config, kBackward>;
  constexpr int kPairs = Product::kPairs, kColumns = Product::kColumns, kSlots = Places::kSlots;

  const uint32_t block = static_cast<uint32_t>(device::block_idx());  // fewer than 2^31: see launch.h
  const Share<Config, Product> share(problem, block, device::thread_idx());
  const int live_rows = share.live_rows;
  const int64_t row_bytes = share.row_bytes;
  const bool down = (share.group >= problem.groups - problem.num_reversed) != kBackward;

  const device::SharedMemory shared = device::shared_memory();
  Product product(shared, live_rows);
  const auto at = [](auto* tensor, int64_t bytes) {
    using Bytes = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(tensor)>>, const char, char>;
    using Pairs = std::conditional_t<std::is_const_v<Bytes>, const Pair, Pair>;
    return reinterpret_cast<Pairs*>(static_cast<Bytes*>(tensor) + bytes);
  };

  const auto length = [&](int row) {  // clamped: values on a device are not checked, that would stall it
    const int64_t steps =
        problem.lengths ? device::load_global(problem.lengths + share.first_row + row) : problem.steps;
    return static_cast<uint32_t>(min(max(steps, int64_t{0}), problem.steps));
  };
  int stop = static_cast<int>(problem.steps);  // steps of the block's longest row
  if (problem.lengths) {
    stop = 0;
    for (int row = 0; row < live_rows; ++row) stop = max(stop, static_cast<int>(length(row)));
  }
  const int first_time = down ? stop - 1 : 0, direction = down ? -1 : 1;
  // As unsigned, so that the times before the first and after the last step are at no limit's left.
  const auto time = [&](int s) { return static_cast<uint32_t>(first_time + direction * s); };
  const auto row_at = [&](uint32_t t) {
    return problem.offsets ? device::load_global(problem.offsets + t) : t * problem.batch;
  };

  // ---- the state before the first step: h0; backward 0, and the gradient of h_n carried beside it
  const float skip = static_cast<float>(problem.skip);
  const auto skipped = [=](float2 x) {  // 0 * inf must not make a NaN of a network without a skip
    return skip == 0.f ? float2{0.f, 0.f} : float2{skip * x.x, skip * x.y};
  };
  Pair x[kPairs];           // the state as tensors hold it
  float2 a[kPairs] = {};    // forward it in float32, too; backward before the mask
  float2 residual[kPairs];  // what the next a gets besides in and the product: skip * x, in float32
  const auto store_state = [&](uint32_t buffer) {
    if (!Product::owner(share.thread)) return;
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
      shared.template store<Pair>(buffer + Product::in_state(share.thread, p), Product::to_state(x[p]));
  };
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair given = device::load_streaming_if(problem.state_in && share.owns(p),
                                                 at(problem.state_in, share.mine + share.offset(p)));
    x[p] = kBackward ? Pair{} : given;
    residual[p] = kBackward ? E::unpack(given) : skipped(E::unpack(given));
  }
  store_state(0);

  // Ones where a neuron exists. What lies past the hidden size must stay 0: infinite states would make NaN of it, and
  // the next product of everything.
  Pair exists[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int units = share.hidden - static_cast<int>(problem.padding);
    exists[p] = E::mask(share.neuron(p) < units, share.neuron(p) + 1 < units);
  }

  // ---- the loop. Plain: ReLU over whole sequences of one length. Backward, one more product than there are steps
  // makes the gradient of h0.
  const auto run = [&](auto plain, auto wide) {
    constexpr bool kPlain = decltype(plain)::value;
    using Carry = Carrier<Config, Product, decltype(wide)::value>;
    constexpr bool kCopiesState = decltype(wide)::value && Product::kStateIsOutput;
    const Carry carry(share);
    uint32_t piece_limit[Carry::kPieces];  // a piece is active at times t < its limit
#pragma unroll
    for (int i = 0; i < Carry::kPieces; ++i) piece_limit[i] = carry.exists(i) ? length(carry.row(i)) : 0;
    uint32_t limit[kPairs];  // and so is a pair
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
      limit[p] = share.row(p) < live_rows && share.neuron(p) < share.hidden ? length(share.row(p)) : 0;
    const Epilogue<kBackward> epilogue(problem.activation);
    Schedule<Config::kRows, kSlots> schedule(shared, Places::kSchedule, problem, share.first_row, share.thread);
    const bool packed = !kPlain && problem.offsets, cuts = !kPlain && problem.resets;
    const auto staged_row = [&](int s) { return packed ? schedule.row(s) : time(s) * problem.batch; };
    const uint32_t own_limit = share.thread < live_rows ? length(share.thread) : 0;  // of the row whose cuts it copies

    const int64_t stride = direction * problem.batch * row_bytes;
    int64_t ahead = share.tile + (stop > 0 ? row_at(time(0)) * row_bytes : 0), behind = ahead - stride;
    const auto fetch = [&](int s, uint32_t slot, int64_t bytes, const auto& row_of) {
#pragma unroll
      for (int i = 0; i < Carry::kPieces; ++i) {
        if (!carry.has(i)) continue;
        const bool active = time(s) < piece_limit[i];
        const uint32_t to = Places::kRing + slot + carry.in_tile(i);
        device::cp_async<Carry::kBytes>(shared, to, at(problem.in, bytes + carry.offset(i)), active && problem.in);
        if constexpr (kBackward)
          device::cp_async<Carry::kBytes>(shared, to + Config::kStateBytes, at(problem.saved, bytes + carry.offset(i)),
                                          active);
      }
      if (cuts) {
        // The boundary between two steps belongs to the later one in time. Running down that is the step before, and
        // at s == stop the boundary that the gradient of h0 crosses.
        const int owner = down ? s - 1 : s;
        const bool crosses = s <= stop && (s > 0 || !(down || kBackward)) && time(owner) < own_limit;
        schedule.fetch_cut(slot / Places::kSlotBytes, crosses ? row_of(owner) : 0, crosses);
      }
      device::cp_async_commit();
    };
    if (packed) schedule.begin(stop, time);
#pragma unroll 1
    for (int s = 0; s < kSlots - 1; ++s) {
      if (packed) ahead = share.tile + (s < stop ? row_at(time(s)) * row_bytes : 0);
      fetch(s, s * Places::kSlotBytes, ahead, [&](int step) { return row_at(time(step)); });
      ahead += stride;
    }
    const int64_t matrix = int64_t{share.hidden} * share.hidden;
    product.load(static_cast<const Pair*>(problem.weight) + share.group * matrix / 2, share.hidden);
    device::cp_async_wait<kSlots - 2>();

    uint32_t buffer = 0, slot = 0, spent = (kSlots - 1) * Places::kSlotBytes;
    Pair mask[kPairs];  // plain and backward: of x, ones where the unit was not off
#pragma unroll
    for (int p = 0; p < kPairs; ++p) mask[p] = exists[p];
#pragma unroll 1
    for (int s = 0; kBackward || s < stop; ++s) {
      device::sync_block();
      float2 sum[kPairs], base[kPairs], h[kPairs];
      bool cut[kColumns] = {};
      const auto prepare = [&] {
        const uint32_t before = time(s - 1);
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          const float2 state = kPlain ? (kBackward ? E::masked(a[p], mask[p]) : relu(a[p])) : a[p];
          if (kPlain ? s > 0 : before < limit[p]) {
            if (kBackward)
              residual[p] = skipped(state);
            else if (skip != 0.f)  // else it is 0 from the beginning
              residual[p] = {skip * state.x, skip * state.y};
          }
        }
        const uint32_t here = Places::kRing + slot;
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          const uint32_t place = Product::in_state(share.thread, p);
          base[p] = E::unpack(shared.template load<Pair>(here + place));
          if constexpr (kBackward) {
            const Pair saved = shared.template load<Pair>(here + Config::kStateBytes + place);
            if constexpr (kPlain)
              mask[p] = E::both(relu_passes<E>(saved), exists[p]);
            else
              h[p] = E::unpack(saved);
          }
          if constexpr (kPlain) base[p] = {base[p].x + residual[p].x, base[p].y + residual[p].y};
        }
        if (cuts) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            cut[c] = schedule.cut(slot / Places::kSlotBytes, share.row(c), [&] { return staged_row(down ? s - 1 : s); });
        }
      };
      const auto carry_on = [&] {
        if (packed) behind = share.tile + (s > 0 ? schedule.row(s - 1) * row_bytes : 0);
        if constexpr (kCopiesState) {
#pragma unroll
          for (int i = 0; i < Carry::kPieces; ++i) {
            if (!carry.has(i)) continue;
            device::store_global_if(time(s - 1) < piece_limit[i],
                                    reinterpret_cast<uint4*>(at(problem.out, behind + carry.offset(i))),
                                    shared.template load<uint4>(buffer + carry.in_tile(i)));
          }
        } else {
#pragma unroll
          for (int p = 0; p < kPairs; ++p)
            device::store_global_if(time(s - 1) < limit[p] && Product::owner(share.thread),
                                    at(problem.out, behind + (share.mine - share.tile) + share.offset(p)), x[p]);
        }
        behind += stride;
        const int next = s + kSlots - 1;
        if (packed) {
          ahead = share.tile + (next < stop ? schedule.row(next) * row_bytes : 0);
          schedule.fetch_row(s, stop, time);
        }
        fetch(next, spent, ahead, staged_row);
        ahead += stride;
      };
      product.multiply(buffer, sum, prepare, carry_on);
      device::cp_async_wait<kSlots - 2>();
      spent = slot;
      slot = slot == (kSlots - 1) * Places::kSlotBytes ? 0 : slot + Places::kSlotBytes;
      buffer ^= Config::kStateBytes;

#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        if constexpr (kPlain) {
          a[p] = {base[p].x + sum[p].x, base[p].y + sum[p].y};
        } else {
          a[p] = base[p];
          if (!cut[p % kColumns]) a[p] = {a[p].x + residual[p].x + sum[p].x, a[p].y + residual[p].y + sum[p].y};
        }
      }
      if (kBackward && s == stop) return;
      if constexpr (kPlain) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p)
          x[p] = E::both(kBackward ? E::pack(a[p]) : E::pack_relu(a[p]), kBackward ? mask[p] : exists[p]);
      } else {
        epilogue.apply(a, h);
#pragma unroll
        for (int p = 0; p < kPairs; ++p)
          if (time(s) < limit[p]) x[p] = E::both(E::pack(a[p]), exists[p]);
      }
      store_state(buffer);
    }
  };
  const bool simple = problem.activation == Activation::kReLU && !problem.lengths && !problem.resets;
  if (problem.wide && simple)
    run(std::true_type{}, std::true_type{});
  else if (problem.wide)
    run(std::false_type{}, std::true_type{});
  else
    run(std::false_type{}, std::false_type{});

  // ---- h_n, or the gradient of h0; and zeros past the lengths. What the thread owns is found anew: kept through the
  // loop, it took the registers by which some kernels spilled on sm_100 and sm_120.
  const Share<Config, Product> again(problem, device::opaque(block), device::thread_idx_anew());
  const uint32_t last = down ? 0 : device::opaque(stop) - 1;
  const int64_t last_bytes = !kBackward && stop > 0 ? again.mine + row_at(last) * again.row_bytes : 0;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    if (!again.owns(p)) continue;
    const uint32_t steps = length(again.row(p));
    if (!kBackward && stop > 0 && last < steps)
      device::store_global(at(problem.out, last_bytes + again.offset(p)), x[p]);
    device::store_global(at(problem.state_out, again.mine + again.offset(p)), kBackward ? E::pack(a[p]) : x[p]);
    if (!problem.lengths || problem.offsets) continue;
#pragma unroll 1
    for (int64_t t = steps; t < problem.steps; ++t)
      device::store_global(at(problem.out, again.mine + t * problem.batch * again.row_bytes + again.offset(p)), Pair{});
  }
}

}  // namespace fused_rin
