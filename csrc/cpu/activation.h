// Activations f, and how a gradient passes through each. Compiled once per instruction set (vec.h).
#pragma once

#include "../problem.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

// max(a, 0) that lets NaN through, as torch.relu does: the comparison is false for NaN.
template <class V>
inline V relu(V a) {
  return a <= 0 ? V{} : a;
}

// e^x for |x| <= 87 (708 in double): x = n ln 2 + r, |r| <= ln 2 / 2, e^r by Cephes' polynomial, 2^n through the
// exponent bits.
inline F32 exp_bounded(F32 x) {
  const F32 shifted = x * 1.44269504088896341f + 0x1.8p23f;  // the integer n stands in the low mantissa bits
  const F32 n = shifted - 0x1.8p23f;
  const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * bit_cast<F32>((bit_cast<I32>(shifted) - 0x4b400000 + 127) << 23);
}
inline F64 exp_bounded(F64 x) {
  const F64 shifted = x * 1.4426950408889634073599 + 0x1.8p52;
  const F64 n = shifted - 0x1.8p52;
  const F64 r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  const F64 z = r * r;
  const F64 p = r * ((z * 1.26177193074810590878e-4 + 3.02994407707441961300e-2) * z + 1.0);
  const F64 q = ((z * 3.00198505138664455042e-6 + 2.52448340349684104192e-3) * z + 2.27265548208155028766e-1) * z + 2.0;
  const F64 e = 1.0 + 2.0 * (p / (q - p));
  return e * bit_cast<F64>((bit_cast<I64>(shifted) - 0x4338000000000000 + 1023) << 52);
}

// Odd polynomial below 0.625, where 1 - 2 / (e^2x + 1) would cancel (Cephes' coefficients).
inline F32 tanh_small(F32 x, F32 z) {
  F32 p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return p * z * x + x;
}
inline F64 tanh_small(F64 x, F64 z) {
  const F64 p = (z * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  const F64 q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  return x * z * (p / q) + x;
}
inline I32 sign_mask(F32) { return I32{} + INT32_MIN; }
inline I64 sign_mask(F64) { return I64{} + INT64_MIN; }

// Kept out of line: inlined into every epilogue it would only make them long.
template <class V>
__attribute__((noinline)) V tanh(V x) {
  using Bits = decltype(sign_mask(x));
  const Bits sign = bit_cast<Bits>(x) & sign_mask(x);
  V magnitude = bit_cast<V>(bit_cast<Bits>(x) & ~sign_mask(x));
  magnitude = magnitude > 20 ? V{} + 20 : magnitude;  // tanh(20) rounds to 1 in double too; NaN stays NaN
  const V large = 1 - 2 / (exp_bounded(2 * magnitude) + 1);
  const V result = magnitude < 0.625f ? tanh_small(magnitude, magnitude * magnitude) : large;
  return bit_cast<V>(bit_cast<Bits>(result) | sign);
}

inline F32 exp_floor(F32) { return F32{} - 87; }
inline F64 exp_floor(F64) { return F64{} - 708; }
// e^-|x|; what would be a subnormal number or less is 0.
template <class V>
inline V exp_of_minus_abs(V x) {
  const V minus = x > 0 ? -x : x;
  return minus < exp_floor(x) ? V{} : exp_bounded(minus);
}

// log(1 + x) for |x| <= sqrt(2) - 1 (Cephes' coefficients).
inline F32 log1p_small(F32 x) {
  F32 p = x * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  return (p * x - 0.5f) * (x * x) + x;
}
inline F64 log1p_small(F64 x) {
  F64 p = x * 1.01875663804580931796e-4 + 4.97494994976747001425e-1;
  p = p * x + 4.70579119878881725854;
  p = p * x + 1.44989225341610930846e1;
  p = p * x + 1.79368678507819816313e1;
  p = p * x + 7.70838733755885391666;
  F64 q = x + 1.12873587189167450590e1;
  q = q * x + 4.52279145837532221105e1;
  q = q * x + 8.29875266912776603211e1;
  q = q * x + 7.11544750618563894466e1;
  q = q * x + 2.31251620126765340583e1;
  return (p / q * x - 0.5) * (x * x) + x;
}

// 1 / (1 + e^-x), with all its digits where it is small.
template <class V>
__attribute__((noinline)) V sigmoid(V x) {
  const V e = exp_of_minus_abs(x);
  return (x < 0 ? e : V{} + 1) / (1 + e);
}

// log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x| <= 1; where 1 + e exceeds sqrt(2) half of it is taken, exactly.
template <class V>
__attribute__((noinline)) V softplus(V x) {
  const V e = exp_of_minus_abs(x);
  const auto large = e > 0.41421356f;
  const V log = log1p_small(large ? (e - 1) / 2 : e);
  constexpr decltype(x[0] + 0) kLog2 = 0.69314718055994530942;
  return relu(x) + (large ? log + kLog2 : log);
}

// ---- activations as the epilogues take them ----

// of(a) is f(a); of a gradient g of f(a), back(g, y) is that of a, from y = f(a), and back_at(g, a) from a itself. A
// stopped ReLU stops NaN and Inf too, as torch's does.
struct Identity {
  template <class V>
  static V of(V a) {
    return a;
  }
  template <class V>
  static V back(V g, V) {
    return g;
  }
  template <class V>
  static V back_at(V g, V) {
    return g;
  }
};

struct Relu {
  template <class V>
  static V of(V a) {
    return relu(a);
  }
  template <class V>
  static V back(V g, V y) {
    return y <= 0 ? V{} : g;
  }
  template <class V>
  static V back_at(V g, V a) {
    return back(g, a);
  }
};

struct Tanh {
  template <class V>
  static V of(V a) {
    return tanh(a);
  }
  template <class V>
  static V back(V g, V y) {
    return g * (1 - y * y);
  }
  template <class V>
  static V back_at(V g, V a) {
    return back(g, of(a));
  }
};

struct Sigmoid {
  template <class V>
  static V of(V a) {
    return sigmoid(a);
  }
  template <class V>
  static V back(V g, V y) {
    return g * (y * (1 - y));
  }
  template <class V>
  static V back_at(V g, V a) {
    return back(g, of(a));
  }
};

// f' = sigmoid(a) = 1 - e^-y, and with t = tanh(y / 2) that is 2 t / (1 + t), where nothing cancels.
struct Softplus {
  template <class V>
  static V of(V a) {
    return softplus(a);
  }
  template <class V>
  static V back(V g, V y) {
    const V t = tanh(y / 2);
    return g * (2 * t / (1 + t));
  }
  template <class V>
  static V back_at(V g, V a) {
    return g * sigmoid(a);
  }
};

// With torch's default slope.
struct LeakyRelu {
  template <class V>
  static auto slope(V v) -> decltype(v[0] + 0) {
    return 0.01;
  }
  template <class V>
  static V of(V a) {
    return a > 0 ? a : a * slope(a);
  }
  template <class V>
  static V back(V g, V y) {
    return y > 0 ? g : g * slope(g);
  }
  template <class V>
  static V back_at(V g, V a) {
    return back(g, a);
  }
};

template <class Body>
inline auto with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::kNone:
      return body(Identity{});
    case Activation::kReLU:
      return body(Relu{});
    case Activation::kTanh:
      return body(Tanh{});
    case Activation::kSigmoid:
      return body(Sigmoid{});
    case Activation::kSoftplus:
      return body(Softplus{});
    case Activation::kLeakyReLU:
      return body(LeakyRelu{});
  }
  return body(Identity{});
}

// One that is looked up for every vector.
struct AnyActivation {
  Activation activation;
  template <class V>
  V of(V a) const {
    return with_activation(activation, [&](auto f) { return f.of(a); });
  }
  template <class V>
  V back(V g, V y) const {
    return with_activation(activation, [&](auto f) { return f.back(g, y); });
  }
  template <class V>
  V back_at(V g, V a) const {
    return with_activation(activation, [&](auto f) { return f.back_at(g, a); });
  }
};

// f(0).
template <class S>
inline S at_rest(Activation activation) {
  return AnyActivation{activation}.of(typename VecOf<S>::Vec{})[0];
}

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
