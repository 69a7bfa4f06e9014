// What a product multiplies: numbers of the type they are summed in or, where the processor has a unit for that, pairs
// of bfloat16. Compiled once per instruction set (vec.h).
//
// AVX512-BF16's vdpbf16ps multiplies two bfloat16 a lane and adds them to a float32, in the time of one multiply-add,
// and reads half the bytes: at D = 512 a step is twice as fast. What it multiplies is rounded, the state too; the sums,
// the state that is carried and the skip stay float32. A *unit* of a product's depth is what one instruction takes of
// it in a lane: one number, or the numbers k and k + 1.
//
// AMX-FP16's tdpfp16ps does the same with pairs of float16, by tiles alone (tiles.h). So where products are by tiles
// float16 is a type of its own, and where they are not, a single row or one of few terms, it is widened to float32.
#pragma once

#include "vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#define FUSED_RIN_PAIRS 1
#endif

namespace fused_rin {
namespace FUSED_RIN_ISA {

// In memory two bfloat16 of a row, wherever they lie.
struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t bits;
};
template <>
struct VecOf<Pair> {
  static constexpr int kLanes = FUSED_RIN_VECTOR_BYTES / 4;
  typedef U32 Vec;
};

template <class Storage>
struct FactorOf {
  using Factor = Scalar<Storage>;  // what is multiplied,
  using Row = Scalar<Storage>;     // and how a row of such numbers is stored
};
#if FUSED_RIN_PAIRS
template <>
struct FactorOf<BFloat16> {
  using Factor = Pair;
  using Row = BFloat16;
};
#endif
template <>
struct FactorOf<TiledFloat16> {
  using Factor = Pair;
  using Row = TiledFloat16;
};
template <class Storage>
using Factor = typename FactorOf<Storage>::Factor;
template <class Storage>
using FactorRow = typename FactorOf<Storage>::Row;

template <class F>
struct UnitOf {
  using Sum = F;
  static constexpr int64_t kTerms = 1;
};
template <>
struct UnitOf<Pair> {
  using Sum = float;
  static constexpr int64_t kTerms = 2;
};
template <class F>
using Sum = typename UnitOf<F>::Sum;
template <class F>
using SumVec = typename VecOf<Sum<F>>::Vec;
template <class Storage>
constexpr bool kPaired = UnitOf<Factor<Storage>>::kTerms == 2;

// What vdpbf16ps adds, the upper numbers first, each sum rounded; a product of two bfloat16 is exact. (The instruction
// also takes subnormal numbers for zero and leaves none.) Held against the instruction by tests/cpu_native.
inline F32 sum_of_pairs(F32 sum, U32 u, U32 x) {
  sum += bit_cast<F32>(u & 0xffff0000u) * bit_cast<F32>(x & 0xffff0000u);
  sum += bit_cast<F32>(u << 16) * bit_cast<F32>(x << 16);
  return sum;
}

// sum[i] += u[i] * x[i]
template <class V>
inline void multiply_add(V& sum, V u, V x) {
  sum += u * x;
}
inline void multiply_add(F32& sum, U32 u, U32 x) {
#if defined(__AVX512BF16__)
  sum = bit_cast<F32>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(u), bit_cast<__m512bh>(x)));
#else
  sum = sum_of_pairs(sum, u, x);  // where tests ask for pairs
#endif
}
// sum[i] += u[i] * x
template <class F>
inline void multiply_add(SumVec<F>& sum, typename VecOf<F>::Vec u, F x) {
  if constexpr (UnitOf<F>::kTerms == 1) {
    sum += u * x;
  } else {
    multiply_add(sum, u, U32{} + x.bits);
  }
}
// 0 in every lane that holds finite numbers, else NaN.
template <class V>
inline V zero_if_finite(V u) {
  return u * 0;
}
// Of pairs.
inline F32 zero_if_finite(BFloat16, U32 u) { return bit_cast<F32>(u & 0xffff0000u) * 0 + bit_cast<F32>(u << 16) * 0; }
inline F32 zero_if_finite(TiledFloat16 as, U32 u) {
  return widen(as, __builtin_convertvector(u >> 16, U16)) * 0 +
         widen(as, __builtin_convertvector(u & 0xffffu, U16)) * 0;
}

// Units side by side in a row.
template <class Storage>
inline typename VecOf<Factor<Storage>>::Vec load_units(const Storage* from) {
  if constexpr (kPaired<Storage>) {
    return load(reinterpret_cast<const Pair*>(from));
  } else {
    return load(from);
  }
}
// The first `terms` numbers of them; the others are zero.
template <class Storage>
inline typename VecOf<Factor<Storage>>::Vec load_units_first(const Storage* from, int64_t terms) {
  if constexpr (kPaired<Storage>) {
    Storage lanes[2 * VecOf<Pair>::kLanes] = {};
    for (int64_t i = 0; i < terms; ++i) lanes[i] = from[i];
    return load_units(lanes);
  } else {
    return load_first(from, terms);
  }
}

template <class Half>
inline U32 load_halves(const Half* from, int64_t count) {
  U16 bits{};
  if (count >= VecOf<Pair>::kLanes) {
    memcpy(&bits, from, sizeof(bits));
  } else {
    memcpy(&bits, from, static_cast<size_t>(count) * sizeof(Half));
  }
  return __builtin_convertvector(bits, U32);
}
// Units across rows: lane i has number i of the first row and, in a pair, number i of the second; the first `count`
// lanes, or all if it is more. A row that is null is zero.
template <class Storage>
inline typename VecOf<Factor<Storage>>::Vec load_across(const Storage* first, const Storage* second, int64_t count) {
  typename VecOf<Factor<Storage>>::Vec units{};
  if constexpr (kPaired<Storage>) {
    if (first) units = load_halves(first, count);
    if (second) units |= load_halves(second, count) << 16;
  } else if (first) {
    units = count >= VecOf<Scalar<Storage>>::kLanes ? load(first) : load_first(first, count);
  }
  return units;
}

// ---- sets of lanes ----

// Bit i: unit i is not zero. The one place beside vdpbf16ps that names an instruction: compilers do not find it by
// themselves.
#if defined(__AVX__)
typedef float EightFloats __attribute__((vector_size(32)));
typedef int32_t EightInts __attribute__((vector_size(32)));
inline unsigned signs_of_eight(EightInts mask) {
  return static_cast<unsigned>(__builtin_ia32_movmskps256(bit_cast<EightFloats>(mask)));
}
#endif
inline unsigned nonzero_of_eight(const float* from) {
#if defined(__AVX__)
  EightFloats eight;
  memcpy(&eight, from, sizeof(eight));
  return signs_of_eight(bit_cast<EightInts>(eight != 0));
#elif defined(__SSE2__)
  typedef float Four __attribute__((vector_size(16)));
  Four four[2];
  memcpy(four, from, sizeof(four));
  return static_cast<unsigned>(__builtin_ia32_movmskps(bit_cast<Four>(four[0] != 0)) |
                               __builtin_ia32_movmskps(bit_cast<Four>(four[1] != 0)) << 4);
#else
  unsigned set = 0;
  for (int i = 0; i < 8; ++i) set |= static_cast<unsigned>(from[i] != 0) << i;
  return set;
#endif
}
inline unsigned nonzero_of_eight(const double* from) {
  unsigned set = 0;
  for (int i = 0; i < 8; ++i) set |= static_cast<unsigned>(from[i] != 0) << i;
  return set;
}
inline unsigned nonzero_of_eight(const Pair* from) {
#if defined(__AVX__)
  EightInts eight;
  memcpy(&eight, from, sizeof(eight));
  return signs_of_eight(eight != 0);
#else
  unsigned set = 0;
  for (int i = 0; i < 8; ++i) set |= static_cast<unsigned>(from[i].bits != 0) << i;
  return set;
#endif
}
inline bool is_nonzero(Pair x) { return x.bits != 0; }
template <class S>
inline bool is_nonzero(S x) {
  return x != 0;
}

}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
