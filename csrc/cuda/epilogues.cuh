// What is done to an element between two products; the only difference between the forward and the backward sweep.
#pragma once

#include <cmath>
#include <device.cuh>

#include "../problem.h"
#include "element.cuh"

namespace fused_rin {

// ReLU of a pair; a NaN stays one.
__device__ __forceinline__ float2 relu(float2 a) { return {device::max_nan(a.x, 0.f), device::max_nan(a.y, 0.f)}; }

// tanh without a branch: 1 - 2 / (exp(2 |x|) + 1), whose error is an absolute one, and where |x| is small x + x^3
// q(x^2). q is a least-squares fit of the relative error: 2^-24 in float32, 2^-18 for 16 bits.
template <class T>
struct Tanh {
  static __device__ __forceinline__ float of(float x) {
    constexpr bool kWhole = Element<T>::kBytes == 4;
    const float size = fabsf(x), square = x * x;
    const float large = fmaf(-2.f, device::reciprocal(device::exp2(2.88539008f * size) + 1.f), 1.f);
    float q;
    if (kWhole)
      q = fmaf(fmaf(fmaf(0.01643201f, square, -0.05266803f), square, 0.13320643f), square, -0.33332941f);
    else
      q = fmaf(0.12456907f, square, -0.33300394f);
    const float small = fmaf(x * square, q, x);
    return size < (kWhole ? 0.55f : 0.35f) ? small : copysignf(large, x);
  }
  static __device__ __forceinline__ float2 of(float2 a) { return {of(a.x), of(a.y)}; }
  // g * tanh'(a), from h = tanh(a) alone
  static __device__ __forceinline__ float2 gradient(float2 g, float2 h) {
    return {g.x * fmaf(-h.x, h.x, 1.f), g.y * fmaf(-h.y, h.y, 1.f)};
  }
};

// Any activation: a = act(a), backward a * act'(a) from h = act(a). ReLU and none share a path without a branch:
// forward a maximum with 0 or -inf, backward a comparison with 0 or NaN.
template <class T, bool kBackward>
class Epilogue {
 public:
  __device__ __forceinline__ explicit Epilogue(Activation activation)
      : tanh_(activation == Activation::kTanh),
        floor_(device::as_float(device::opaque(activation == Activation::kReLU ? 0u
                                               : kBackward                     ? 0x7fffffffu
                                                                               : 0xff800000u))) {}

  template <int n>
  __device__ __forceinline__ void apply(float2 (&a)[n], const float2 (&h)[n]) const {
    if (__builtin_expect(tanh_, 0)) {
#pragma unroll
      for (int p = 0; p < n; ++p) a[p] = kBackward ? Tanh<T>::gradient(a[p], h[p]) : Tanh<T>::of(a[p]);
    } else {
#pragma unroll
      for (int p = 0; p < n; ++p) {
        if (kBackward)
          a[p] = {h[p].x <= floor_ ? 0.f : a[p].x, h[p].y <= floor_ ? 0.f : a[p].y};
        else
          a[p] = {device::max_nan(a[p].x, floor_), device::max_nan(a[p].y, floor_)};
      }
    }
  }

 private:
  bool tanh_;
  float floor_;
};

}  // namespace fused_rin
