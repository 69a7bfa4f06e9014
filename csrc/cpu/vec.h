// Vectors of one instruction set, in the compiler's own vector types: no intrinsics, one source for all.
//
// This file is compiled several times with different -m flags into one library. Everything in it therefore lives in
// a namespace named after the instruction set, and nothing from the standard library is inlined here: a std::max
// instantiated in the AVX-512 unit could be the copy the linker keeps for everybody.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define FUSED_RIN_MASKS 1
#endif

#if !defined(FUSED_RIN_ISA)
#error "FUSED_RIN_ISA must name the instruction set"
#endif

// (Given on the command line, a processor without such vectors makes them of several: tests run AVX-512's shapes so.)
#if defined(FUSED_RIN_VECTOR_BYTES)
#elif defined(__AVX512F__)
#define FUSED_RIN_VECTOR_BYTES 64
#define FUSED_RIN_VECTOR_REGISTERS 32
#elif defined(__AVX2__)
#define FUSED_RIN_VECTOR_BYTES 32
#define FUSED_RIN_VECTOR_REGISTERS 16
#elif defined(__aarch64__)
#define FUSED_RIN_VECTOR_BYTES 16
#define FUSED_RIN_VECTOR_REGISTERS 32
#else
#define FUSED_RIN_VECTOR_BYTES 16
#define FUSED_RIN_VECTOR_REGISTERS 16
#endif

namespace fused_rin {
namespace FUSED_RIN_ISA {

// The scalar is the type arithmetic is done in; Bits is its integer twin, what a comparison returns.
template <class Scalar>
struct VecOf;
template <>
struct VecOf<float> {
  static constexpr int kLanes = FUSED_RIN_VECTOR_BYTES / 4;
  typedef float Vec __attribute__((vector_size(FUSED_RIN_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(FUSED_RIN_VECTOR_BYTES)));
  typedef uint32_t UBits __attribute__((vector_size(FUSED_RIN_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  static constexpr int kLanes = FUSED_RIN_VECTOR_BYTES / 8;
  typedef double Vec __attribute__((vector_size(FUSED_RIN_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(FUSED_RIN_VECTOR_BYTES)));
};

using F32 = VecOf<float>::Vec;
using I32 = VecOf<float>::Bits;
using U32 = VecOf<float>::UBits;
using F64 = VecOf<double>::Vec;
using I64 = VecOf<double>::Bits;
typedef uint16_t U16 __attribute__((vector_size(FUSED_RIN_VECTOR_BYTES / 2)));

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of one size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- storage types: what a tensor holds, and the scalar it is computed in ----

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct TiledFloat16 {  // the same where products are by tiles (factor.h)
  uint16_t bits;
};
template <class Storage>
struct ComputeOf {
  using Scalar = Storage;
};
template <>
struct ComputeOf<BFloat16> {
  using Scalar = float;
};
template <>
struct ComputeOf<Float16> {
  using Scalar = float;
};
template <>
struct ComputeOf<TiledFloat16> {
  using Scalar = float;
};
template <class Storage>
using Scalar = typename ComputeOf<Storage>::Scalar;
template <class Storage>
using Vec = typename VecOf<Scalar<Storage>>::Vec;

// bfloat16 is the upper half of a float32.
inline F32 widen(BFloat16, U16 bits) { return bit_cast<F32>(__builtin_convertvector(bits, U32) << 16); }

// Round to nearest even by adding half of the last kept place (less one, plus that place's own bit). A NaN whose
// payload would be cut away is kept a NaN by setting the quiet bit.
inline U16 narrow(BFloat16, F32 value) {
  const U32 bits = bit_cast<U32>(value);
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32 is_nan = bit_cast<U32>(value != value);
  return __builtin_convertvector((is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded), U16);
}

// float16: move the 15 bits to float32's place and add 127 - 15 to the exponent; Inf and NaN get 255. A subnormal
// number is read off the last places of 0.5, which are 2^-24, float16's smallest number. (The moved bits times 2^112
// would do for both, but they are a float32 subnormal then, which is 0 where such numbers are flushed.)
inline F32 widen(Float16, U16 half) {
  const U32 bits = __builtin_convertvector(half, U32);
  const I32 magnitude = bit_cast<I32>(bits & 0x7fff);
  const I32 normal = (magnitude << 13) + (112 << 23);
  const I32 subnormal = bit_cast<I32>(bit_cast<F32>(magnitude | 0x3f000000) - 0.5f);
  const I32 finite = magnitude < 0x400 ? subnormal : normal;
  const I32 value = magnitude >= 0x7c00 ? normal | 0x7f800000 : finite;
  return bit_cast<F32>(bit_cast<U32>(value) | ((bits & 0x8000) << 16));
}

// Round to nearest even in three ranges: Inf/NaN and overflow, subnormal results (adding 0.5f makes the float adder
// shift and round: its last place is 2^-24, float16's smallest number), and the rest by integer rounding.
inline U16 narrow(Float16, F32 value) {
  const U32 bits = bit_cast<U32>(value);
  const U32 sign = (bits >> 16) & 0x8000;
  const U32 magnitude = bits & 0x7fffffff;
  const U32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(magnitude) + 0.5f) - 0x3f000000u;
  const U32 is_small = bit_cast<U32>(magnitude < 0x38800000u);
  const U32 is_huge = bit_cast<U32>(magnitude >= 0x47800000u);
  const U32 is_nan = bit_cast<U32>(magnitude > 0x7f800000u);
  const U32 huge = 0x7c00u | (is_nan & 0x200u);
  const U32 finite = (is_small & subnormal) | (~is_small & normal);
  return __builtin_convertvector(sign | (is_huge & huge) | (~is_huge & finite), U16);
}

inline F32 widen(TiledFloat16, U16 bits) { return widen(Float16{}, bits); }
inline U16 narrow(TiledFloat16, F32 value) { return narrow(Float16{}, value); }

template <class Storage>
inline Vec<Storage> load(const Storage* from) {
  if constexpr (sizeof(Storage) == 2) {
    U16 bits;
    memcpy(&bits, from, sizeof(bits));
    return widen(Storage{}, bits);
  } else {
    Vec<Storage> value;
    memcpy(&value, from, sizeof(value));
    return value;
  }
}

template <class Storage>
inline void store(Storage* to, Vec<Storage> value) {
  if constexpr (sizeof(Storage) == 2) {
    const U16 bits = narrow(Storage{}, value);
    memcpy(to, &bits, sizeof(bits));
  } else {
    memcpy(to, &value, sizeof(value));
  }
}

// The first `count` lanes; the others read as zero and are not written.
template <class Storage>
inline void store_first_bits(Storage* to, U16 bits, int64_t count) {
  static_assert(sizeof(Storage) == 2, "of 16 bits");
#if FUSED_RIN_MASKS
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), bit_cast<__m256i>(bits));
#else
  memcpy(to, &bits, static_cast<size_t>(count) * sizeof(Storage));
#endif
}
template <class Storage>
inline Vec<Storage> load_first(const Storage* from, int64_t count) {
  Storage lanes[VecOf<Scalar<Storage>>::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}
template <class Storage>
inline void store_first(Storage* to, Vec<Storage> value, int64_t count) {
  if constexpr (sizeof(Storage) == 2) {
    store_first_bits(to, narrow(Storage{}, value), count);
  } else {
    Storage lanes[VecOf<Scalar<Storage>>::kLanes];
    store(lanes, value);
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
  }
}

// ---- transposition ----

// Lane i of the result is lane i of a where `kStride` is not in i, else that of b; the lanes in question of a, or of b,
// come from kStride further on, or back, in the other one.
template <int kStride, class V, int... i>
inline void swap_blocks(V& a, V& b, std::integer_sequence<int, i...>) {
  constexpr int kLanes = sizeof...(i);
#if defined(__clang__) || __GNUC__ >= 12
  const V low = __builtin_shufflevector(a, b, ((i & kStride) ? i - kStride + kLanes : i)...);
  b = __builtin_shufflevector(a, b, ((i & kStride) ? i + kLanes : i + kStride)...);
#else
  typedef decltype(a < b) Mask;
  const V low = __builtin_shuffle(a, b, Mask{((i & kStride) ? i - kStride + kLanes : i)...});
  b = __builtin_shuffle(a, b, Mask{((i & kStride) ? i + kLanes : i + kStride)...});
#endif
  a = low;
}

// A square of vectors, rows to columns: blocks of 1, 2, 4, ... lanes across the diagonal change places.
template <class S, int kStride = 1>
inline void transpose(typename VecOf<S>::Vec* rows) {
  constexpr int kLanes = VecOf<S>::kLanes;
  if constexpr (kStride < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & kStride)) {
        swap_blocks<kStride>(rows[i], rows[i + kStride], std::make_integer_sequence<int, kLanes>{});
      }
    }
    transpose<S, kStride * 2>(rows);
  }
}

}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
