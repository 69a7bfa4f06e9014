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
//     products
//   behind the      load what the next step gets from the ring
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
#include "schedule.cuh"
#include "share.cuh"
#include "state.cuh"
#include "units.cuh"

namespace fused_rin {

// A block's shared memory: two buffers of the state, what of the matrix is not in registers, the ring, the schedule,
// the factors of the units, sums that the parts of k give each other, the mbarriers of a cluster.
template <class Config, bool kBackward, bool kUnits>
struct Layout {
  static constexpr int kSlots = kBackward ? Config::kSlotsBackward : Config::kSlotsForward;
  // in, and backward saved; of units forward noise
  static constexpr int kTileBytes = State<typename Config::T, Config::kOutputs, Config::kRows>::kBytes;
  static constexpr int kSlotBytes = (kBackward || kUnits ? 2 : 1) * kTileBytes;
  static constexpr int kRing = 2 * Config::kStateBytes + Config::kMatrixBytes;
  static constexpr int kSchedule = kRing + kSlots * kSlotBytes;
  static constexpr int kFactors = kSchedule + Schedule<Config::kRows, kSlots>::kBytes;
  static constexpr int kGiven = kFactors + (kUnits ? 8 * Config::kHidden : 0);
  static constexpr int kExchange = kGiven + Config::kGivenBytes;
  static constexpr int kBytes = kExchange + Exchange<Config>::kBytes;
  static_assert(kSlots >= 2, "one that is read, one that is filled");
};

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
  const int first_time = down ? stop - 1 : 0, direction = down ? -1 : 1;
  // As unsigned, so that the times before the first and after the last step are at no limit's left.
  const auto time = [&](int s) { return static_cast<uint32_t>(first_time + direction * s); };
  const auto row_at = [&](uint32_t t) {
    return problem.offsets ? device::load_global(problem.offsets + t) : t * problem.batch;
  };

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
    Schedule<Config::kRows, kSlots> schedule(shared, Places::kSchedule, problem, share.first_row, share.thread);
    const bool packed = !kPlain && problem.offsets, cuts = !kPlain && problem.resets;
    const auto staged_row = [&](int s) { return packed ? schedule.row(s) : time(s) * problem.batch; };
    const uint32_t own_limit = share.thread < live_rows ? length(share.thread) : 0;  // of the row whose cuts it copies

    // Where the first of what the thread carries is in the rows of the step to fetch, and of the step to write.
    const int64_t step_bytes = device::opaque(problem.batch * row_bytes), stride = down ? -step_bytes : step_bytes;
    const int64_t first_in = share.tile + carry.offset(0);
    const int64_t first_out = kTileIsOutput ? first_in : share.tile + share.offset(0);
    const int64_t start = stop > 0 ? row_at(time(0)) * row_bytes : 0;
    int64_t read_at = first_in + start, write_at = first_out + start - stride;
    const auto fetch = [&](int s, uint32_t slot, const auto& row_of) {
      if (packed) read_at = first_in + (s < stop ? row_of(s) * row_bytes : 0);
      if (cuts) {
        // The boundary between two steps belongs to the later one in time. Running down that is the step before, and
        // at s == stop the boundary that the gradient of h0 crosses.
        const int owner = down ? s - 1 : s;
        const bool crosses = s <= stop && (s > 0 || !(down || kBackward)) && time(owner) < own_limit;
        schedule.fetch_cut(slot / Places::kSlotBytes, crosses ? row_of(owner) : 0, crosses);
      }
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
      read_at += stride;
      device::cp_async_commit();
    };
    if (packed) schedule.begin(stop, time);
#pragma unroll 1
    for (int s = 0; s < kSlots; ++s) fetch(s, s * Places::kSlotBytes, [&](int step) { return row_at(time(step)); });
    const int64_t matrix = int64_t{share.hidden} * share.hidden;
    product.load(static_cast<const Pair*>(problem.weight) + share.group * matrix / 2, share.first_neuron(),
                 share.hidden);
    const uint32_t own = device::opaque(in_state(device::thread_idx_anew()));
    const uint32_t own_in_tile =
        Config::kCtas == 1 ? own : device::opaque(Product::template place<Tile>(device::thread_idx_anew()));
    // What a step gets from the ring, the thread loads a step ahead: behind the state's loads it would come too late.
    Pair next_in[kPairs], next_saved[kPairs];
    bool next_cut[kColumns] = {};
    const auto look = [&](int s, uint32_t slot) {
      const uint32_t here = Places::kRing + slot + own_in_tile;
#pragma unroll
      for (int p = 0; p < kPairs; p += kTogether) {
        const uint32_t place = here + Product::template place_step<Tile>(p);
        const Group in = shared.template load<Group>(place);
        const Group was = kBackward || kUnits ? shared.template load<Group>(place + Places::kTileBytes) : Group{};
#pragma unroll
        for (int i = 0; i < kTogether; ++i) next_in[p + i] = in.pair[i], next_saved[p + i] = was.pair[i];
      }
      if (cuts) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          next_cut[c] = schedule.cut(slot / Places::kSlotBytes, share.row(c * kTogether),
                                     [&] { return staged_row(down ? s - 1 : s); });
      }
    };
    device::cp_async_wait<kSlots - 2>();
    device::sync_block();
    look(0, 0);
    exchange.arrive();
    // A state that does not cross into the next step is 0: where act of it is multiplied, that is act(0), and has to be
    // there before the product.
    [[maybe_unused]] const bool drops = kUnits && !kBackward && units.current && cuts;
    const auto drop_states = [&] {
      if constexpr (kUnits && !kBackward) {
        const Pair of_zero = units.multiplied(Pair{});
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          if (drops && next_cut[Product::column(p)]) x[p] = without_padding(p, of_zero);
        }
      }
    };
    if constexpr (kUnits) {
      if (stop > 0) drop_states();
      if (drops) store_state(own);
    }

    // a = in + factor * state + x M. Backward the first state is the gradient of h_n, which counts once: until a row's
    // first step. Where all rows begin at once there is one factor.
    constexpr int kFactors = kPlain ? 1 : kColumns;
    bool begun[kFactors];
    float factor[kFactors];
#pragma unroll
    for (int c = 0; c < kFactors; ++c) begun[c] = !kBackward, factor[c] = kBackward ? 1.f : skip;
    Pair mask[kPairs];  // plain ReLU, backward: of the state, in place of 0
#pragma unroll
    for (int p = 0; p < kPairs; ++p) mask[p] = E::mask(true, true);
    const auto with_skip = [&](int p, float2 sum) {
      constexpr bool kMasked = kBackward && kPlain && !kTanh;
      const int c = kPlain ? 0 : Product::column(p);
      const bool adds = !begun[c] || skip != 0.f;  // 0 * inf must not make a NaN of a network without a skip
      if (adds && (!kMasked || E::low_of(mask[p]))) sum.x = fmaf(factor[c], a[p].x, sum.x);
      if (adds && (!kMasked || E::high_of(mask[p]))) sum.y = fmaf(factor[c], a[p].y, sum.y);
      return sum;
    };
    uint32_t buffer = 0, slot = 0;
#pragma unroll 1
    for (int s = 0; kBackward || s < stop; ++s) {
      exchange.wait();
      float2 sum[kPairs];
      const auto prepare = [&] {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          if (Product::kSumInside) sum[p] = E::unpack(next_in[p]);
          if (kPlain && !Product::kSumInside) a[p] = with_skip(p, E::unpack(next_in[p]));
          if (kPlain && kBackward) mask[p] = E::not_zero(next_saved[p]);
        }
      };
      const auto carry_on = [&] {
        if (packed) {
          write_at = first_out + (s > 0 ? schedule.row(s - 1) * row_bytes : 0);
          schedule.fetch_row(s, stop, time);
        }
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
        write_at += stride;
        fetch(s + kSlots, slot, staged_row);
        if (kSlots > 2) device::cp_async_wait<kSlots - 2>();
        slot = slot == (kSlots - 1) * Places::kSlotBytes ? 0 : slot + Places::kSlotBytes;
      };
      // With two slots there is no time to lose: what is asked for in this step is for the next but one.
      if constexpr (kSlots > 2)
        product.multiply(buffer, sum, prepare, carry_on);
      else
        product.multiply(buffer, sum, [&] { prepare(), carry_on(); }, [] {});

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
          begun[c] = begun[c] || last || time(s) < limit[c];
        }
        units.apply(sum, values, next_in, next_saved, a, first, next_cut, drops, last,
                    [&](int p, float2 carried, float2 times) {
                      if (last || time(s) < limit[Product::column(p)])
                        a[p] = carried, x[p] = without_padding(p, E::pack(times));
                    });
        if (last) return;
        look(s + 1, slot);
        if (s + 1 < stop) drop_states();
        buffer ^= Config::kStateBytes;
        store_state(buffer + own);
        if (kSlots == 2) device::cp_async_wait<0>();
        continue;
      }
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        if (Product::kSumInside)
          sum[p] = with_skip(p, sum[p]);
        else
          sum[p] = plus(sum[p], kPlain ? a[p] : with_skip(p, E::unpack(next_in[p])));
        if (!kPlain && next_cut[Product::column(p)]) sum[p] = E::unpack(next_in[p]);
      }
      if (kBackward && s == stop) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) a[p] = sum[p];
        return;
      }
#pragma unroll
      for (int c = 0; c < kFactors; ++c)
        if (kBackward && (kPlain || time(s) < limit[c])) begun[c] = true, factor[c] = skip;
      float2 h[kPairs];
#pragma unroll
      for (int p = 0; p < kPairs; ++p) h[p] = E::unpack(next_saved[p]);
      if constexpr (kPlain) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          a[p] = kTanh ? kBackward ? Tanh<T>::gradient(sum[p], h[p]) : Tanh<T>::of(sum[p]) : sum[p];
          x[p] = kTanh ? E::pack(a[p]) : kBackward ? E::both(E::pack(a[p]), mask[p]) : E::pack_relu(a[p]);
          if (!kTanh && !kBackward) a[p] = relu(a[p]);
        }
      } else {
        epilogue.apply(sum, h);
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          a[p] = time(s) < limit[Product::column(p)] ? sum[p] : a[p];
          x[p] = begun[Product::column(p)] ? E::pack(a[p]) : Pair{};
        }
        if (problem.padding) {  // stays 0: an infinite state would make NaN of it
#pragma unroll
          for (int p = 0; p < kPairs; ++p) x[p] = without_padding(p, x[p]);
        }
      }
      buffer ^= Config::kStateBytes;
      store_state(buffer + own);
      exchange.push(buffer);
      look(s + 1, slot);
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
  const int64_t last_bytes = !kBackward && stop > 0 ? again.tile + row_at(last) * again.row_bytes : 0;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    if (!again.owns(p)) continue;
    const uint32_t steps = length(again.row(p));
    const bool writes = !kBackward && stop > 0 && last < steps;
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
    for (int64_t t = steps; t < problem.steps; ++t) {
      const int64_t here = again.tile + t * problem.batch * again.row_bytes + again.offset(p);
      device::store_global(at(problem.out, here), Pair{});
      if (kUnits && problem.aside) device::store_global(at(problem.aside, here), Pair{});
    }
  }
}

}  // namespace fused_rin
