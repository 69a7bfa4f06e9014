// What a step does, between two products, to units with factors of their own (problem.h). What is carried and what is
// multiplied differ, as may what is written.
#pragma once

#include <device.cuh>

#include "../problem.h"
#include "element.cuh"
#include "epilogues.cuh"
#include "share.cuh"

namespace fused_rin {

template <class Config, class Product, bool kBackward>
class UnitStep {
  using T = typename Config::T;
  using E = Element<T>;
  using Pair = typename E::Pair;
  static constexpr int kPairs = Product::kPairs;

 public:
  const bool outside, current;

  // A barrier has to follow before `apply`.
  __device__ __forceinline__ UnitStep(const Problem& problem, device::SharedMemory shared, uint32_t place,
                                      const Share<Config, Product>& share)
      : outside(problem.form == Form::kOutside),
        current(problem.form == Form::kCurrent),
        shared_(shared),
        share_(share),
        skips_(place),
        gains_(place + 4 * Config::kHidden),
        activation_(problem.activation) {
    const auto copy = [&](const void* factors, uint32_t to) {
      const uint32_t* const own = static_cast<const uint32_t*>(factors) + share.group * share.hidden;
#pragma unroll 1
      for (int i = share.thread; i < Config::kHidden; i += Config::kThreads)
        shared.store<uint32_t>(to + 4 * i, device::load_if(factors && i < share.hidden, own + i));
    };
    copy(problem.skips, skips_);
    copy(problem.gains, gains_);
  }

  // What forward multiplies of a state: itself, or in currents act of it.
  __device__ __forceinline__ Pair multiplied(Pair state) const {
    if (!current) return state;
    float2 value[1] = {E::unpack(state)};
    activation_.apply(value);
    return E::pack(value[0]);
  }

  // For each pair, done(p, what is carried, what is to be multiplied), from sum: x M, plus in where the product starts
  // from it. a: what was carried. first: columns of which a is the gradient of h_n still, which counts once. crosses:
  // a mask a column, 0 where no state crosses into the step; where `product_crosses`, what was multiplied says so
  // already. last: backward, behind the first step in time, `saved` being h0 then. values: of act, where they are kept.
  template <int kColumns, class Done>
  __device__ __forceinline__ void apply(float2 (&sum)[kPairs], Pair (&values)[kPairs], const Pair (&in)[kPairs],
                                        const Pair (&saved)[kPairs], const float2 (&a)[kPairs],
                                        const bool (&first)[kColumns], const uint32_t (&crosses)[kColumns],
                                        bool product_crosses, bool last, const Done& done) const {
    constexpr int kAtOnce = kPairs > 4 ? 2 : kPairs;  // all six of 384 units spilled
    static_assert(kPairs % kAtOnce == 0);
#pragma unroll
    for (int p0 = 0; p0 < kPairs; p0 += kAtOnce) {
      float2 added[kAtOnce], act[kAtOnce];  // added: to act, or backward to the product. act: of what; f of it; or f'
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int p = p0 + i, c = Product::column(p);
        const float2 was = first[c] ? a[p] : scaled(factors(skips_, p), a[p]), here = E::unpack(in[p]);
        added[i] = crosses[c] ? was : float2{0.f, 0.f};
        if (!crosses[c] && !product_crosses) sum[p] = Product::kSumInside ? here : float2{0.f, 0.f};
        if (kBackward) {
          added[i] = plus(added[i], here);
          act[i] = E::unpack(saved[p]);
        } else {
          if (!Product::kSumInside) sum[p] = plus(sum[p], here);
          if (!outside) sum[p] = plus(sum[p], added[i]);
          act[i] = sum[p];
        }
      }
      if (!kBackward || current) activation_.apply(act);
      if (kBackward) activation_.slope(act);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int p = p0 + i;
        if (kBackward && current) {
          const float2 gradient = plus(added[i], scaled(act[i], sum[p]));
          done(p, gradient, gradient);
        } else if (kBackward) {
          const float2 of_state = plus(added[i], sum[p]), of_sum = scaled(act[i], of_state);
          if (outside)
            done(p, of_state, scaled(factors(gains_, p), of_sum));
          else
            done(p, last ? of_state : of_sum, of_sum);
        } else {
          values[p] = E::pack(act[i]);
          if (outside) act[i] = plus(plus(added[i], scaled(factors(gains_, p), act[i])), E::unpack(saved[p]));  // noise
          done(p, current ? sum[p] : act[i], act[i]);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ float2 scaled(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
  __device__ __forceinline__ float2 factors(uint32_t place, int p) const {
    return shared_.template load<float2>(place + 4 * share_.neuron(p));
  }

  device::SharedMemory shared_;
  const Share<Config, Product>& share_;
  uint32_t skips_, gains_;
  UnitActivation<T> activation_;
};

// In the RIN's own kernels.
struct NoUnits {
  static constexpr bool current = false;
  template <class Share>
  __device__ __forceinline__ NoUnits(const Problem&, device::SharedMemory, uint32_t, const Share&) {}
};

}  // namespace fused_rin
