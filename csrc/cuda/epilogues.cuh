// What is done to an element between two products; the only difference between the forward and the backward sweep.
#pragma once

#include <cmath>
#include <device.cuh>

#include "../problem.h"

namespace fused_rin {

// ReLU and none share a path without a branch: forward a maximum with 0 or -inf, backward a comparison that is
// combined with a predicate.
template <bool kBackward>
class Epilogue;

template <>
class Epilogue<false> {
 public:
  __device__ __forceinline__ explicit Epilogue(Activation activation)
      : tanh_(activation == Activation::kTanh),
        floor_(activation == Activation::kReLU ? 0.f : device::as_float(0xff800000u)) {}

  // x = act(a)
  template <int n>
  __device__ __forceinline__ void apply(float2 (&a)[n], const float2 (&)[n]) const {
    if (__builtin_expect(tanh_, 0)) {
#pragma unroll
      for (int p = 0; p < n; ++p) a[p] = {::tanhf(a[p].x), ::tanhf(a[p].y)};
    } else {
#pragma unroll
      for (int p = 0; p < n; ++p) a[p] = {device::max_nan(a[p].x, floor_), device::max_nan(a[p].y, floor_)};
    }
  }

 private:
  bool tanh_;
  float floor_;
};

template <>
class Epilogue<true> {
 public:
  __device__ __forceinline__ explicit Epilogue(Activation activation)
      : tanh_(activation == Activation::kTanh), relu_(activation == Activation::kReLU) {}

  // x = g * act'(h), from h = act(a) alone
  template <int n>
  __device__ __forceinline__ void apply(float2 (&g)[n], const float2 (&h)[n]) const {
    if (__builtin_expect(tanh_, 0)) {
#pragma unroll
      for (int p = 0; p < n; ++p) g[p] = {g[p].x * (1.f - h[p].x * h[p].x), g[p].y * (1.f - h[p].y * h[p].y)};
    } else {
#pragma unroll
      for (int p = 0; p < n; ++p)
        g[p] = {relu_ & (h[p].x <= 0.f) ? 0.f : g[p].x, relu_ & (h[p].y <= 0.f) ? 0.f : g[p].y};
    }
  }

 private:
  bool tanh_, relu_;
};

}  // namespace fused_rin
