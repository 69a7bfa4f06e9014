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

// The activations of units with factors of their own, and their slopes.
template <class T>
class UnitActivation {
 public:
  __device__ __forceinline__ explicit UnitActivation(Activation activation) : activation_(activation) {}

  // a = f(a)
  template <int n>
  __device__ __forceinline__ void apply(float2 (&a)[n]) const {
    choose(
        a, [](float x) { return x; }, [](float x) { return device::max_nan(x, 0.f); },
        [](float x) { return Tanh<T>::of(x); }, [](float x) { return device::reciprocal(1.f + exp(-x)); }, &softplus,
        [](float x) { return x < 0.f ? 0.01f * x : x; });
  }

  // h = f'(a), from h = f(a) alone.
  template <int n>
  __device__ __forceinline__ void slope(float2 (&h)[n]) const {
    choose(
        h, [](float) { return 1.f; }, [](float y) { return y <= 0.f ? 0.f : 1.f; },
        [](float y) { return fmaf(-y, y, 1.f); }, [](float y) { return y - y * y; }, &minus_expm1_of_minus,
        [](float y) { return y <= 0.f ? 0.01f : 1.f; });
  }

 private:
  static __device__ __forceinline__ float exp(float x) { return device::exp2(1.44269504f * x); }

  // max(x, 0) + log(1 + e), e = exp(-|x|). In float32 1 + e loses e's last digits; log(u) * e / (u - 1) of what u
  // became has them (Kahan's, as in Goldberg 1991, doi 10.1145/103162.103163, theorem 4).
  static __device__ __forceinline__ float softplus(float x) {
    const float e = exp(-fabsf(x)), u = 1.f + e;
    const float log = u == 1.f ? e : 0.693147181f * device::log2(u) * (e * device::reciprocal(u - 1.f));
    return device::max_nan(x, 0.f) + log;
  }

  // 1 - exp(-y) for y >= 0; of small ones by its series, whose rest is 2^-24 of it.
  static __device__ __forceinline__ float minus_expm1_of_minus(float y) {
    float p = fmaf(y, -1.f / 6, 1.f);
    p = fmaf(y * p, -1.f / 5, 1.f);
    p = fmaf(y * p, -1.f / 4, 1.f);
    p = fmaf(y * p, -1.f / 3, 1.f);
    p = fmaf(y * p, -1.f / 2, 1.f);
    return y < 0.25f ? y * p : 1.f - exp(-y);
  }

  template <int n, class None, class Relu, class Tanh_, class Sigmoid, class Softplus, class Leaky>
  __device__ __forceinline__ void choose(float2 (&a)[n], const None& none, const Relu& relu_, const Tanh_& tanh,
                                         const Sigmoid& sigmoid, const Softplus& softplus_, const Leaky& leaky) const {
    const auto each = [&](const auto& f) {
#pragma unroll
      for (int p = 0; p < n; ++p) a[p] = {f(a[p].x), f(a[p].y)};
    };
    switch (activation_) {
      case Activation::kNone:
        return each(none);
      case Activation::kReLU:
        return each(relu_);
      case Activation::kTanh:
        return each(tanh);
      case Activation::kSigmoid:
        return each(sigmoid);
      case Activation::kSoftplus:
        return each(softplus_);
      case Activation::kLeakyReLU:
        return each(leaky);
    }
  }

  Activation activation_;
};

}  // namespace fused_rin
