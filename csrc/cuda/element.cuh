// Storage types of the tensors. Kernels move pairs of neighbouring elements: the smallest unit that a thread
// owns. So D is even and every tensor aligned to a pair; the host pads an odd D.
#pragma once

#include <device.cuh>
#include <type_traits>

#include "../problem.h"

namespace fused_rin {

template <class T>
struct Element {  // 16-bit types
  using Scalar = uint16_t;
  using Pair = uint32_t;
  static constexpr int kBytes = 2;
  static constexpr DType kDType = std::is_same_v<T, device::BFloat16> ? DType::kBFloat16 : DType::kFloat16;

  static __device__ __forceinline__ Pair pair(Scalar low, Scalar high) {
    return low | static_cast<uint32_t>(high) << 16;
  }
  static __device__ __forceinline__ Scalar low(Pair pair) { return static_cast<Scalar>(pair); }
  static __device__ __forceinline__ Scalar high(Pair pair) { return static_cast<Scalar>(pair >> 16); }
  static __device__ __forceinline__ Pair pack(float2 value) { return device::pack(T{}, value.x, value.y); }
  static __device__ __forceinline__ Pair pack_relu(float2 value) { return device::pack_relu(T{}, value.x, value.y); }
  static __device__ __forceinline__ float2 unpack(Pair pair) { return device::unpack(T{}, pair); }
  // Masks of a pair: all ones where the element is wanted.
  static __device__ __forceinline__ Pair mask(bool low, bool high) {
    return (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u);
  }
  static __device__ __forceinline__ Pair both(Pair a, Pair b) { return a & b; }
  static __device__ __forceinline__ Pair all(uint32_t mask) { return mask; }
  // Where the value of a ReLU is not zero: in each half, adding 0x7fff sets the sign of all but 0.
  static __device__ __forceinline__ Pair not_zero(Pair h) {
    return device::spread_signs((h & 0x7fff7fffu) + 0x7fff7fffu);
  }
  static __device__ __forceinline__ bool low_of(Pair mask) { return (mask & 1) != 0; }
  static __device__ __forceinline__ bool high_of(Pair mask) { return static_cast<int32_t>(mask) < 0; }
};

template <>
struct Element<float> {
  using Scalar = uint32_t;
  using Pair = uint2;
  static constexpr int kBytes = 4;
  static constexpr DType kDType = DType::kFloat32;

  static __device__ __forceinline__ Pair pair(Scalar low, Scalar high) { return {low, high}; }
  static __device__ __forceinline__ Scalar low(Pair pair) { return pair.x; }
  static __device__ __forceinline__ Scalar high(Pair pair) { return pair.y; }
  static __device__ __forceinline__ Pair pack(float2 value) {
    return {device::as_word(value.x), device::as_word(value.y)};
  }
  static __device__ __forceinline__ float2 unpack(Pair pair) {
    return {device::as_float(pair.x), device::as_float(pair.y)};
  }
  static __device__ __forceinline__ Pair pack_relu(float2 value) {
    return pack({device::max_nan(value.x, 0.f), device::max_nan(value.y, 0.f)});
  }
  static __device__ __forceinline__ Pair mask(bool low, bool high) { return {low ? ~0u : 0u, high ? ~0u : 0u}; }
  static __device__ __forceinline__ Pair both(Pair a, Pair b) { return {a.x & b.x, a.y & b.y}; }
  static __device__ __forceinline__ Pair all(uint32_t mask) { return {mask, mask}; }
  static __device__ __forceinline__ Pair not_zero(Pair h) {
    return mask(device::as_float(h.x) != 0.f, device::as_float(h.y) != 0.f);
  }
  static __device__ __forceinline__ bool low_of(Pair mask) { return mask.x != 0; }
  static __device__ __forceinline__ bool high_of(Pair mask) { return mask.y != 0; }
};

// Flags that several values share, as masks: all ones or nothing. A thread has seven predicates, and one flag too many
// comes out of a register into the one that is free, 13 cycles each time; a mask takes one instruction a value.
__device__ __forceinline__ uint32_t mask(bool wanted) { return wanted ? ~0u : 0u; }
// Of a < b, whose difference is an int. By its sign: of a comparison's the compiler makes selects with predicates.
__device__ __forceinline__ uint32_t mask_less(int a, int b) { return static_cast<uint32_t>((a - b) >> 31); }
__device__ __forceinline__ float2 both(uint32_t mask, float2 value) {
  return {device::as_float(mask & device::as_word(value.x)), device::as_float(mask & device::as_word(value.y))};
}
__device__ __forceinline__ float select(uint32_t mask, float a, float b) {
  return device::as_float((mask & device::as_word(a)) | (~mask & device::as_word(b)));
}
__device__ __forceinline__ float2 select(uint32_t mask, float2 a, float2 b) {
  return {select(mask, a.x, b.x), select(mask, a.y, b.y)};
}

__device__ __forceinline__ float2 plus(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float4 plus(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// A block of U, [2 outputs][K inputs], as every product loads it: outputs `neuron` and `neuron + 1`, inputs from
// `k + more` on, `more` known when compiled; zero past `hidden`. Forward multiplies by U (output = row), backward by
// its transpose; pairs run along memory.
template <class T, bool kBackward, int K>
__device__ __forceinline__ void load_weight_block(typename Element<T>::Scalar (&block)[2][K],
                                                  const typename Element<T>::Pair* weight, int neuron, int k, int more,
                                                  int hidden) {
  using E = Element<T>;
#pragma unroll
  for (int i = 0; i < K; ++i) {  // K pairs
    const int row = kBackward ? k + more + i : neuron + i / (K / 2);
    const int column = kBackward ? neuron : k;
    const int further = kBackward ? 0 : more + i % (K / 2) * 2;
    // Signed and in bytes, opaque: then a row has one address, and the columns are immediate offsets from it. With an
    // address for each of them some kernels spilled.
    const char* const bytes = device::opaque(reinterpret_cast<const char*>(weight) + int64_t{row * hidden} * E::kBytes +
                                             int64_t{column} * E::kBytes);
    const typename E::Pair pair =
        device::load_if(row < hidden && column + further < hidden,
                        reinterpret_cast<const typename E::Pair*>(bytes + further * E::kBytes));
    if (kBackward) {
      block[0][i] = E::low(pair), block[1][i] = E::high(pair);
    } else {
      block[i / (K / 2)][i % (K / 2) * 2] = E::low(pair), block[i / (K / 2)][i % (K / 2) * 2 + 1] = E::high(pair);
    }
  }
}

}  // namespace fused_rin
