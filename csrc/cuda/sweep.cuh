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
  float2 a[kPairs];         // the same in float32; backward before the mask
  float2 residual[kPairs];  // general: what the next a gets besides in and the product: skip * x, in float32
  const uint32_t own = device::opaque(Product::in_state(share.thread));
  // What lies past the hidden size stays 0 there: infinite states would make NaN of it, and the next product of all.
  const auto store_state = [&](uint32_t buffer, bool everywhere = false) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
      if (Product::owner(share.thread) && (everywhere || share.neuron(p) < share.hidden))
        shared.template store<Pair>(buffer + own + Product::in_state_step(p), Product::to_state(x[p]));
  };
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair given = device::load_streaming_if(problem.state_in && share.owns(p),
                                                 at(problem.state_in, share.mine + share.offset(p)));
    x[p] = kBackward ? Pair{} : given;
    a[p] = E::unpack(given);
    residual[p] = kBackward ? a[p] : skipped(a[p]);
  }
  store_state(0, true);
  store_state(Config::kStateBytes, true);

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
    Pair exists[kPairs];     // ones where it is not padding
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const int units = share.hidden - static_cast<int>(problem.padding);
      limit[p] = share.row(p) < live_rows && share.neuron(p) < share.hidden ? length(share.row(p)) : 0;
      exists[p] = E::mask(share.neuron(p) < units, share.neuron(p) + 1 < units);
    }
    const Epilogue<kBackward> epilogue(problem.activation);
    Schedule<Config::kRows, kSlots> schedule(shared, Places::kSchedule, problem, share.first_row, share.thread);
    const bool packed = !kPlain && problem.offsets, cuts = !kPlain && problem.resets;
    const auto staged_row = [&](int s) { return packed ? schedule.row(s) : time(s) * problem.batch; };
    const uint32_t own_limit = share.thread < live_rows ? length(share.thread) : 0;  // of the row whose cuts it copies

    // Where the thread's first piece is in the rows of the step to fetch, and in those of the step to write.
    const int64_t stride = direction * problem.batch * row_bytes, first_piece = share.tile + carry.offset(0);
    int64_t start = first_piece + (stop > 0 ? row_at(time(0)) * row_bytes : 0);
    const char* in = static_cast<const char*>(problem.in) + start;
    const char* saved = static_cast<const char*>(problem.saved) + start;
    char* out = static_cast<char*>(problem.out) + (kCopiesState ? start : start - first_piece + share.mine) - stride;
    const auto further = [&](int i) { return carry.offset(i) - carry.offset(0); };
    const auto fetch = [&](int s, uint32_t slot, const auto& row_of) {
      if (packed) {
        start = first_piece + (s < stop ? row_of(s) * row_bytes : 0);
        in = static_cast<const char*>(problem.in) + start;
        saved = static_cast<const char*>(problem.saved) + start;
      }
#pragma unroll
      for (int i = 0; i < Carry::kPieces; ++i) {
        if (!carry.has(i)) continue;
        const bool active = kPlain ? s < stop && carry.exists(i) : time(s) < piece_limit[i];
        const uint32_t to = Places::kRing + slot + carry.in_tile(i);
        device::cp_async<Carry::kBytes>(shared, to, in + further(i), active && problem.in);
        if constexpr (kBackward)
          device::cp_async<Carry::kBytes>(shared, to + Config::kStateBytes, saved + further(i), active);
      }
      in += stride;
      saved += stride;
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
    for (int s = 0; s < kSlots; ++s)
      fetch(s, s * Places::kSlotBytes, [&](int step) { return row_at(time(step)); });
    const int64_t matrix = int64_t{share.hidden} * share.hidden;
    product.load(static_cast<const Pair*>(problem.weight) + share.group * matrix / 2, share.hidden);
    // What a step gets from the ring, the thread loads a step ahead: behind the state's loads it would come too late.
    Pair next_in[kPairs], next_saved[kPairs];
    bool next_cut[kColumns] = {};
    const auto look = [&](int s, uint32_t slot) {
      const uint32_t here = Places::kRing + slot + own;
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        next_in[p] = shared.template load<Pair>(here + Product::in_state_step(p));
        if (kBackward)
          next_saved[p] = shared.template load<Pair>(here + Config::kStateBytes + Product::in_state_step(p));
      }
      if (!cuts) return;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        next_cut[c] =
            schedule.cut(slot / Places::kSlotBytes, share.row(c), [&] { return staged_row(down ? s - 1 : s); });
    };
    device::cp_async_wait<kSlots - 2>();
    device::sync_block();
    look(0, 0);

    // Plain: a step's base is in + factor * max(a, floor), or * a where the mask has ones. Of the first step's a, h0 or
    // the gradient of h_n, everything counts, and of the latter once.
    float factor = kBackward ? 1.f : skip, floor = device::as_float(0xff800000u);
    uint32_t on = factor == 0.f ? 0u : ~0u;  // 0 * inf must not make a NaN of a network without a skip
    Pair mask[kPairs];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) mask[p] = E::mask(true, true);
    uint32_t slot = 0;

    // Step s: true if it was the last.
    const auto step = [&](int s, uint32_t buffer) {
      if (!kBackward && s == stop) return true;
      device::sync_block();
      float2 sum[kPairs], base[kPairs], h[kPairs];
      bool cut[kColumns];
      const auto prepare = [&] {
        const uint32_t before = time(s - 1);
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          base[p] = E::unpack(next_in[p]);
          if constexpr (kPlain) {
            const float2 state = kBackward ? a[p] : at_least(a[p], floor);
            if (E::low_of(mask[p], on)) base[p].x = fmaf(factor, state.x, base[p].x);
            if (E::high_of(mask[p], on)) base[p].y = fmaf(factor, state.y, base[p].y);
            if (kBackward) mask[p] = E::not_zero(next_saved[p]);
          } else {
            if (kBackward) h[p] = E::unpack(next_saved[p]);
            if (before < limit[p]) residual[p] = skipped(a[p]);
          }
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) cut[c] = next_cut[c];
      };
      const auto carry_on = [&] {
        if (packed) {
          const int64_t rows = (s > 0 ? schedule.row(s - 1) * row_bytes : 0);
          out = static_cast<char*>(problem.out) + rows + (kCopiesState ? first_piece : share.mine);
        }
        if constexpr (kCopiesState) {
#pragma unroll
          for (int i = 0; i < Carry::kPieces; ++i) {
            if (!carry.has(i)) continue;
            device::store_global_if(kPlain ? s > 0 && carry.exists(i) : time(s - 1) < piece_limit[i],
                                    reinterpret_cast<uint4*>(out + further(i)),
                                    shared.template load<uint4>(buffer + carry.in_tile(i)));
          }
        } else {
#pragma unroll
          for (int p = 0; p < kPairs; ++p)
            device::store_global_if(time(s - 1) < limit[p] && Product::owner(share.thread),
                                    reinterpret_cast<Pair*>(out + share.offset(p)), x[p]);
        }
        out += stride;
        if (packed) schedule.fetch_row(s, stop, time);
        fetch(s + kSlots, slot, staged_row);
        if (kSlots > 2) device::cp_async_wait<kSlots - 2>();
        slot = slot == (kSlots - 1) * Places::kSlotBytes ? 0 : slot + Places::kSlotBytes;
        look(s + 1, slot);
      };
      // With two slots there is no time to lose: what is asked for in this step is for the next but one.
      if constexpr (kSlots > 2)
        product.multiply(buffer, sum, prepare, carry_on);
      else
        product.multiply(buffer, sum, [&] { prepare(), carry_on(); }, [] {});
      factor = skip, floor = 0.f, on = skip == 0.f ? 0u : ~0u;

#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        if constexpr (kPlain) {
          a[p] = {base[p].x + sum[p].x, base[p].y + sum[p].y};
        } else {
          a[p] = base[p];
          if (!cut[p % kColumns]) a[p] = {a[p].x + residual[p].x + sum[p].x, a[p].y + residual[p].y + sum[p].y};
        }
      }
      if (kBackward && s == stop) return true;
      if constexpr (kPlain) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) x[p] = kBackward ? E::both(E::pack(a[p]), mask[p]) : E::pack_relu(a[p]);
      } else {
        epilogue.apply(a, h);
#pragma unroll
        for (int p = 0; p < kPairs; ++p)
          if (time(s) < limit[p]) x[p] = E::both(E::pack(a[p]), exists[p]);
      }
      store_state(buffer ^ Config::kStateBytes);
      if (kSlots == 2) device::cp_async_wait<0>();
      return false;
    };
#pragma unroll 1
    for (int s = 0; !step(s, 0) && !step(s + 1, Config::kStateBytes); s += 2) {
    }
  };
  const bool simple =
      problem.activation == Activation::kReLU && !problem.lengths && !problem.resets && !problem.padding;
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
