// The sweep: one loop for both directions, whoever computes the product (see problem.h for the two recurrences).
//
//   a = in_t + skip * x + x M      M: U^T forward, U backward; x: the state, in float32 in its owner's registers
//   x = epilogue(a)                h = act(a) forward, d = a * act'(saved_t) backward
//
// A block owns kRows batch rows of one recurrence. Per step it meets at one barrier: the rounded state is written to
// the buffer that the *previous* step's product did not read, so a warp that is a step ahead overwrites nothing.
//
//   critical path   barrier, load state, product, + in and skip term, epilogue, store state
//   behind the      out: the state of the step before, from shared memory; the ring: ask for in_t some steps ahead
//     products      (where blocks share a tile: behind the store, while the state travels)
//   behind the      load what the next step gets from the ring; look up where it reads and writes, and what is cut
//     store
//
// in_t is read ahead by cp.async into a ring in shared memory. Read ahead into registers it was not ahead at all: loads
// share a scoreboard, a wait for one is a wait for all that share it, and every step stood for the latency of device
// memory (on an H100 30% of the step of 128 units x 8 rows; benchmarks/NOTES-cuda.md).
//
// The skip term is added in float32, not fed to the tensor core as its accumulator: that one truncates, once per
// k-step, an error of the size of x's last bit that would all go in one direction.
//
// Units with factors of their own (kUnits; problem.h): what is multiplied, x, and what is carried, a, differ then, as
// may what is written. The loop is the general one; out is written from registers.
//
// All rows of a block share the time t. A row that is past its length, or running down not yet within it, holds what
// it has: the state, or backward the gradient of the state.
#pragma once

#include "../problem.h"
#include "carrier.cuh"
#include "element.cuh"
#include "epilogues.cuh"
#include "exchange.cuh"
#include "layout.cuh"
#include "schedule.cuh"
#include "share.cuh"
#include "state.cuh"
#include "units.cuh"

namespace fused_rin {

template <class Config, class Product, bool kBackward, bool kUnits>
__device__ __forceinline__ void sweep(const Problem& problem) {
  using T = typename Config::T;
  using E = Element<T>;
  using Pair = typename E::Pair;
  using Places = Layout<Config, kBackward, kUnits>;
  constexpr int kPairs = Product::kPairs, kColumns = Product::kColumns, kTogether = Product::kTogether;
  constexpr int kSlots = Places::kSlots;
  using StateT = State<T, Config::kHidden, Config::kRows>;
  using Tile = State<T, Config::kOutputs, Config::kRows>;
  constexpr bool kTileIsOutput = Product::kStateIsOutput && !kUnits;
  using UnitsOrNone = std::conditional_t<kUnits, UnitStep<Config, Product, kBackward>, NoUnits>;
  using Group = Pairs<Pair, kTogether>;
  constexpr bool kCarries = E::kBytes == 2 && !kUnits;  // what is carried has more bits than its copy in memory

  const uint32_t block = static_cast<uint32_t>(device::block_idx());  // fewer than 2^31: see launch.h
  const Share<Config, Product> share(problem, block, device::thread_idx());
  const int live_rows = share.live_rows;
  const int64_t row_bytes = share.row_bytes;
  const bool down = (share.group >= problem.groups - problem.num_reversed) != kBackward;

  const device::SharedMemory shared = device::shared_memory();
  Product product(shared, Places::kGiven, live_rows);
  Exchange<Config> exchange(shared, Places::kExchange, share, problem);
  const auto at = [](auto* tensor, int64_t bytes) {
    using Bytes = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(tensor)>>, const char, char>;
    using Wanted = std::conditional_t<std::is_const_v<Bytes>, const Pair, Pair>;
    return reinterpret_cast<Wanted*>(static_cast<Bytes*>(tensor) + bytes);
  };

  const auto carried = [](auto* scalars, const auto& of, int p) {
    using Wanted = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(scalars)>>, const float2, float2>;
    return reinterpret_cast<Wanted*>(scalars + (of.tile + of.offset(p)) / E::kBytes);
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
  const Steps steps(stop, down);
  const auto time = [&](int s) { return steps.time(s); };

  const auto without_padding = [&](int p, Pair pair) {
    const int units = share.hidden - static_cast<int>(problem.padding);
    return E::both(pair, E::mask(share.neuron(p) < units, share.neuron(p) + 1 < units));
  };
  const auto initial = [&](int p) {
    return device::load_if(problem.initial && share.owns(p), at(problem.initial, share.tile + share.offset(p)));
  };

  // ---- the state before the first step: h0; backward 0, and the gradient of h_n carried beside it
  const float given_skip = static_cast<float>(problem.skip);
  const float skip = Config::kCtas == 1 ? given_skip : device::as_float(device::opaque(device::as_word(given_skip)));
  Pair x[kPairs];    // the state as tensors hold it
  float2 a[kPairs];  // the same in float32; backward with ReLU before the mask, if the loop is plain
  // What lies past the hidden size stays 0 there: infinite states would make NaN of it, and the next product of all.
  const auto store_state = [&](uint32_t place, bool everywhere = false) {
#pragma unroll
    for (int p = 0; p < kPairs; p += kTogether) {
      Group group;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) group.pair[i] = Product::to_state(x[p + i]);
      if (Product::owner(share.thread) && (everywhere || share.neuron(p) < share.hidden))
        shared.store(place + Product::template place_step<StateT>(p), group);
    }
  };
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair given = device::load_streaming_if(problem.state_in && share.owns(p),
                                                 at(problem.state_in, share.tile + share.offset(p)));
    x[p] = kBackward ? Pair{} : given;
    a[p] = E::unpack(given);
    if constexpr (kCarries) {
      if (problem.carried_in && share.owns(p)) a[p] = device::load_global(carried(problem.carried_in, share, p));
    }
  }
  const UnitsOrNone units(problem, shared, Places::kFactors, share);
  Pair values[kUnits ? kPairs : 1] = {};  // of act in the last step
  if constexpr (kUnits && !kBackward) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) x[p] = without_padding(p, units.multiplied(x[p]));
  }
  // What is written of the last step, and beside it.
  const auto written = [&](int p) { return kUnits && !kBackward && units.current ? E::pack(a[p]) : x[p]; };
  const auto beside = [&](int p) { return kBackward ? E::pack(a[p]) : values[kUnits ? p : 0]; };
  const auto in_state = [&](int thread) {
    return Product::template place<StateT>(thread) + static_cast<uint32_t>(share.first_neuron() * E::kBytes);
  };
  if constexpr (Config::kCtas == 1) {
    store_state(in_state(share.thread), true);
    store_state(in_state(share.thread) + Config::kStateBytes, true);
  } else {
    exchange.begin(share, kBackward ? nullptr : problem.state_in);
  }

  // ---- the loop. Plain: whole sequences of one length, nothing padded. Backward, one more product than there are
  // steps makes the gradient of h0.
  const auto run = [&](auto plain_, auto tanh_) {
    constexpr bool kPlain = decltype(plain_)::value, kTanh = decltype(tanh_)::value;  // of what is not plain: unknown
    constexpr int kPieces = Carrier<Config, Product>::kPieces;
    const Carrier<Config, Product> carry(share);
    uint32_t piece_limit[kPieces];  // a piece is active at times t < its limit; plain: in steps before it
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece_limit[i] = carry.exists(i) ? length(carry.row(i)) : 0;
    uint32_t limit[kColumns];  // and so is a column's row
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = share.row(c * kTogether);
      limit[c] = row < live_rows ? length(row) : 0;
    }
    const Epilogue<T, kBackward> epilogue(problem.activation);
    const uint32_t own_limit = share.thread < live_rows ? length(share.thread) : 0;
    const Schedule<Config::kRows, kSlots, kBackward> schedule(shared, Places::kSchedule, problem, steps,
                                                              share.first_row, share.thread, own_limit);
    const bool packed = !kPlain && problem.offsets, cuts = !kPlain && problem.resets;

    // Where the first of what the thread carries is in the rows of the step to fetch, and of the step to write.
    const int64_t step_bytes = device::opaque(problem.batch * row_bytes), stride = down ? -step_bytes : step_bytes;
    const int64_t first_in = share.tile + carry.offset(0);
    const int64_t first_out = kTileIsOutput ? first_in : share.tile + share.offset(0);
    // Here of the step before the first; packed, see advance.
    const int64_t start = steps.first_time * step_bytes - stride;
    int64_t read_at = first_in + start, write_at = first_out + start - stride;
    const auto fetch = [&](int s, uint32_t slot) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (!carry.has(i)) continue;
        const bool active = (kPlain ? static_cast<uint32_t>(s) : time(s)) < piece_limit[i];
        const uint32_t to = Places::kRing + slot + carry.in_tile(i);
        device::cp_async<16>(shared, to, static_cast<const char*>(problem.in) + read_at + carry.further(i),
                             active && (!kBackward || problem.in));
        if constexpr (kBackward || kUnits) {
          const void* const second = kBackward ? problem.saved : problem.noise;
          device::cp_async<16>(shared, to + Places::kTileBytes,
                               static_cast<const char*>(second) + read_at + carry.further(i),
                               active && (kBackward || second));
        }
      }
      device::cp_async_commit();
    };
    if (packed) schedule.begin();
#pragma unroll 1
    for (int s = 0; s < kSlots; ++s) {
      read_at = packed ? first_in + (s < stop ? schedule.row_now(s) * row_bytes : 0) : read_at + stride;
      if (cuts) schedule.template fetch_cut<false>(s);
      fetch(s, s * Places::kSlotBytes);
    }
    const int64_t matrix = int64_t{share.hidden} * share.hidden;
    product.load(static_cast<const Pair*>(problem.weight) + share.group * matrix / 2, share.first_neuron(),
                 share.hidden);
    const uint32_t own = device::opaque(in_state(device::thread_idx_anew()));
    const uint32_t own_in_tile =
        Config::kCtas == 1 ? own : device::opaque(Product::template place<Tile>(device::thread_idx_anew()));
    // What a step gets from the ring, the thread loads a step ahead: behind the state's loads it would come too late.
    Pair next_in[kPairs], next_saved[kPairs];
    uint32_t crosses[kColumns];  // masks: whether the row's state crosses into the next step, or it starts anew
#pragma unroll
    for (int c = 0; c < kColumns; ++c) crosses[c] = mask(true);
    const auto look = [&](uint32_t slot) {
      const uint32_t here = Places::kRing + slot + own_in_tile;
#pragma unroll
      for (int p = 0; p < kPairs; p += kTogether) {
        const uint32_t place = here + Product::template place_step<Tile>(p);
        const Group in = shared.template load<Group>(place);
        const Group was = kBackward || kUnits ? shared.template load<Group>(place + Places::kTileBytes) : Group{};
#pragma unroll
        for (int i = 0; i < kTogether; ++i) next_in[p + i] = in.pair[i], next_saved[p + i] = was.pair[i];
      }
    };
    // Where step s writes and reads; of packed sequences as rows, see carry_on. Late, just before: where time is enough
    // for it, or registers are few.
    constexpr bool kAdvanceLate = Config::kCtas > 1 || kUnits || Config::kMath == Math::kTf32x3;
    const auto advance = [&](int s) {
      write_at += stride;
      read_at += stride;
      if (packed) {
        write_at = schedule.row(max(s - 1, 0));
        read_at = schedule.row(min(s + kSlots, stop - 1));
        schedule.fetch_row(s);
      }
    };
    // Behind the store of step s - 1, where nothing else goes on: branches behind the products parted the code there,
    // and its loads waited.
    const auto look_up = [&](int s) {
      if (!kAdvanceLate) advance(s);
      if (cuts) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) crosses[c] = mask(schedule.crosses(s, share.row(c * kTogether)));
        schedule.template fetch_cut<true>(s + kSlots);
      }
    };
    device::cp_async_wait<kSlots - 2>();
    device::sync_block();
    look(0);
    if (stop > 0) look_up(0);
    exchange.arrive();
    // A state that does not cross into the next step is 0: where act of it is multiplied, that is act(0), and has to be
    // there before the product.
    [[maybe_unused]] const bool drops = kUnits && !kBackward && units.current && cuts;
    const auto drop_states = [&] {
      if constexpr (kUnits && !kBackward) {
        const Pair of_zero = units.multiplied(Pair{});
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          if (drops && !crosses[Product::column(p)]) x[p] = without_padding(p, of_zero);
        }
      }
    };
    if constexpr (kUnits) {
      if (stop > 0) drop_states();
      if (drops) store_state(own);
    }

    // a = in + factor * state + x M. Backward the first state is the gradient of h_n, which counts once: until a row's
    // first step. Where all rows begin at once there is one factor.
    float factor = kBackward ? 1.f : skip;
    // Not plain, masks of the rows that this step is one of, and of those of it or a step before.
    uint32_t active[kColumns] = {}, begun[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) begun[c] = mask(!kBackward);
    Pair of_units[kPairs];  // masks: without the padding
#pragma unroll
    for (int p = 0; p < kPairs; ++p) of_units[p] = without_padding(p, E::mask(true, true));
    Pair slope[kPairs];  // plain ReLU, backward: masks of the state, in place of 0
#pragma unroll
    for (int p = 0; p < kPairs; ++p) slope[p] = E::mask(true, true);
    const auto with_skip = [&](int p, float2 sum) {
      constexpr bool kMasked = kBackward && kPlain && !kTanh;
      const int c = Product::column(p);
      const float times = kBackward && !kPlain ? select(begun[c], skip, 1.f) : factor;
      const bool crossed = kPlain || Product::kSumInside || crosses[c];
      const bool adds = crossed && times != 0.f;  // 0 * inf must not make a NaN of a network without a skip
      if (adds && (!kMasked || E::low_of(slope[p]))) sum.x = fmaf(times, a[p].x, sum.x);
      if (adds && (!kMasked || E::high_of(slope[p]))) sum.y = fmaf(times, a[p].y, sum.y);
      return sum;
    };
    uint32_t buffer = 0, slot = 0;
#pragma unroll 1
    for (int s = 0; kBackward || s < stop; ++s) {
      exchange.wait();
      float2 sum[kPairs];
      constexpr bool kActiveLate = kUnits || Product::kSumInside;  // wanted behind the product alone
      const auto find_active = [&] {
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          active[c] = mask_less(static_cast<int>(time(s)), static_cast<int>(limit[c])) |
                      (kBackward ? mask_less(stop - 1, s) : 0);  // all that a gradient of h0 is made of
      };
      const auto prepare = [&] {
        if (!kPlain && !kActiveLate) find_active();
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          const int c = Product::column(p);
          if (Product::kSumInside)
            sum[p] = E::unpack(next_in[p]);
          else if (kPlain)
            a[p] = with_skip(p, E::unpack(next_in[p]));
          else if (!kUnits && active[c])
            a[p] = with_skip(p, E::unpack(next_in[p]));
          if (kPlain && kBackward) slope[p] = E::not_zero(next_saved[p]);
        }
      };
      const auto write = [&] {
        if (packed) write_at = first_out + write_at * row_bytes;
        if constexpr (kTileIsOutput) {
#pragma unroll
          for (int i = 0; i < kPieces; ++i) {
            if (!carry.has(i)) continue;
            device::store_global_if(
                (kPlain ? static_cast<uint32_t>(s - 1) : time(s - 1)) < piece_limit[i],
                reinterpret_cast<uint4*>(static_cast<char*>(problem.out) + write_at + carry.further(i)),
                shared.template load<uint4>(buffer + carry.in_state(i)));
          }
        } else {
#pragma unroll
          for (int p = 0; p < kPairs; ++p) {
            const bool wanted = time(s - 1) < limit[Product::column(p)] && share.owns(p);
            const int64_t here = write_at + share.further(p);
            device::store_global_if(wanted, reinterpret_cast<Pair*>(static_cast<char*>(problem.out) + here),
                                    written(p));
            if constexpr (kUnits)
              device::store_global_if(wanted && problem.aside,
                                      reinterpret_cast<Pair*>(static_cast<char*>(problem.aside) + here), beside(p));
          }
        }
      };
      const auto carry_on = [&] {
        if (kAdvanceLate) advance(s);
        write();
        if (packed) read_at = first_in + read_at * row_bytes;
        fetch(s + kSlots, slot);
        if (kSlots > 2) device::cp_async_wait<kSlots - 2>();
        slot = slot == (kSlots - 1) * Places::kSlotBytes ? 0 : slot + Places::kSlotBytes;
      };
      // With two slots there is no time to lose: what is asked for in this step is for the next but one.
      if constexpr (Config::kCtas > 1)
        product.multiply(buffer, sum, prepare, [] {});
      else if constexpr (kSlots > 2)
        product.multiply(buffer, sum, prepare, carry_on);
      else
        product.multiply(buffer, sum, [&] { prepare(), carry_on(); }, [] {});
      if (!kPlain && kActiveLate) find_active();

      if constexpr (kUnits) {
        const bool last = kBackward && s == stop;
        if (last && units.current) {
#pragma unroll
          for (int p = 0; p < kPairs; ++p) next_saved[p] = initial(p);
        }
        bool first[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          first[c] = !begun[c];
          begun[c] |= active[c];
        }
        units.apply(sum, values, next_in, next_saved, a, first, crosses, drops, last,
                    [&](int p, float2 carried, float2 times) {
                      if (active[Product::column(p)]) a[p] = carried, x[p] = without_padding(p, E::pack(times));
                    });
        if (last) return;
        look(slot);
        look_up(s + 1);
        if (s + 1 < stop) drop_states();
        buffer ^= Config::kStateBytes;
        store_state(buffer + own);
        if (kSlots == 2) device::cp_async_wait<0>();
        continue;
      }
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int c = Product::column(p);
        if (!Product::kSumInside) {
          sum[p] = plus(kPlain ? sum[p] : both(crosses[c], sum[p]), a[p]);
        } else {
          sum[p] = with_skip(p, sum[p]);
          if (!kPlain && !crosses[c]) sum[p] = E::unpack(next_in[p]);  // a mask would keep it unpacked: registers
        }
      }
      if (kBackward && s == stop) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) a[p] = sum[p];
        if constexpr (Config::kCtas > 1) advance(s), write();
        return;
      }
      if (kBackward && kPlain) factor = skip;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) begun[c] |= active[c];
      float2 h[kPairs];
#pragma unroll
      for (int p = 0; p < kPairs; ++p) h[p] = E::unpack(next_saved[p]);
      if constexpr (kPlain) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          a[p] = kTanh ? kBackward ? Tanh<T>::gradient(sum[p], h[p]) : Tanh<T>::of(sum[p]) : sum[p];
          x[p] = kTanh ? E::pack(a[p]) : kBackward ? E::both(E::pack(a[p]), slope[p]) : E::pack_relu(a[p]);
          if (!kTanh && !kBackward) a[p] = relu(a[p]);
        }
      } else {
        epilogue.apply(sum, h);
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          const int c = Product::column(p);
          a[p] = select(active[c], sum[p], a[p]);
          x[p] = E::both(E::pack(a[p]), E::all(begun[c]));
        }
        // The padding stays 0: an infinite state would make NaN of it. Of few pairs a branch would take longer.
        if (kPairs <= 2 || problem.padding) {
#pragma unroll
          for (int p = 0; p < kPairs; ++p) x[p] = kPairs <= 2 ? E::both(x[p], of_units[p]) : without_padding(p, x[p]);
        }
      }
      store_state((buffer ^ Config::kStateBytes) + own);
      exchange.push(buffer ^ Config::kStateBytes);
      if constexpr (Config::kCtas > 1) carry_on();
      buffer ^= Config::kStateBytes;
      look(slot);
      look_up(s + 1);
      if (kSlots == 2) device::cp_async_wait<0>();
      exchange.arrive();
    }
  };
  const bool plain =
      !kUnits && problem.activation != Activation::kNone && !problem.lengths && !problem.resets && !problem.padding;
  if constexpr (kUnits)
    run(std::false_type{}, std::false_type{});
  else if (plain && problem.activation == Activation::kReLU)
    run(std::true_type{}, std::false_type{});
  else if (plain)
    run(std::true_type{}, std::true_type{});
  else
    run(std::false_type{}, std::false_type{});

  exchange.finish(kBackward ? 0 : stop);

  // ---- h_n, or the gradient of h0; and zeros past the lengths. What the thread owns is found anew: kept through the
  // loop, it took the registers by which some kernels spilled on sm_100 and sm_120.
  const Share<Config, Product> again(problem, device::opaque(block), device::thread_idx_anew());
  const uint32_t last = down ? 0 : device::opaque(static_cast<uint32_t>(stop)) - 1;
  const int64_t last_row =
      problem.offsets && stop > 0 ? device::load_global(problem.offsets + last) : last * problem.batch;
  const int64_t last_bytes = again.tile + last_row * again.row_bytes;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    if (!again.owns(p)) continue;
    const uint32_t own_steps = length(again.row(p));
    const bool writes = !kBackward && stop > 0 && last < own_steps;
    if (writes) device::store_global(at(problem.out, last_bytes + again.offset(p)), written(p));
    if constexpr (kUnits) {
      if (writes && problem.aside) device::store_global(at(problem.aside, last_bytes + again.offset(p)), beside(p));
    }
    device::store_global(at(problem.state_out, again.tile + again.offset(p)),
                         kBackward || kUnits ? E::pack(a[p]) : x[p]);
    if constexpr (kCarries) {
      if (problem.carried_out) device::store_global(carried(problem.carried_out, again, p), a[p]);
    }
    if (!problem.lengths || problem.offsets) continue;
#pragma unroll 1
    for (int64_t t = own_steps; t < problem.steps; ++t) {
      const int64_t here = again.tile + t * problem.batch * again.row_bytes + again.offset(p);
      device::store_global(at(problem.out, here), Pair{});
      if (kUnits && problem.aside) device::store_global(at(problem.aside, here), Pair{});
    }
  }
}

}  // namespace fused_rin
