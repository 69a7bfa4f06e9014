// A matrix as torch has it -> panels for `dot`. Compiled once per instruction set (vec.h).
#pragma once

#include "factor.h"
#include "sweep.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

// Panel [k][i] from a matrix [terms, outputs]: rows are copied, in pairs two of them side by side.
template <class T>
void pack_transposed(const T* m, const Panels& l, int64_t block, Factor<T>* panel) {
  constexpr int64_t kTerms = UnitOf<Factor<T>>::kTerms;
  const int64_t column = l.first_column(block), width = l.first_column(block + 1) - column;
  const int64_t valid = l.end_column(block) - column;
  for (int64_t k = 0; k < l.depth; ++k) {
    const T* const from = m + k * kTerms * l.outputs + column;
    const int64_t left = l.terms - k * kTerms;
    Factor<T>* to = panel + k * l.stride_in(width);
    for (int64_t i = 0; i < width; i += l.lanes) {
      const T *first = left > 0 ? from + i : nullptr, *second = left > 1 ? from + i + l.outputs : nullptr;
      store(to + l.begin_of(i / l.lanes), load_across(first, second, valid > i ? valid - i : int64_t{0}));
    }
  }
}

// From a matrix [outputs, terms], by squares of `lanes` outputs and `lanes` units of the depth.
template <class T>
void pack_straight(const T* m, const Panels& l, int64_t block, Factor<T>* panel) {
  using Units = typename VecOf<Factor<T>>::Vec;
  constexpr int64_t kLanes = VecOf<Factor<T>>::kLanes, kTerms = UnitOf<Factor<T>>::kTerms;
  const int64_t column = l.first_column(block), width = l.first_column(block + 1) - column;
  const int64_t valid = l.end_column(block) - column, stride = l.stride_in(width);
  for (int64_t i = 0; i < width; i += kLanes) {
    for (int64_t k = 0; k < l.depth; k += kLanes) {
      const int64_t depth = k + kLanes <= l.depth ? kLanes : l.depth - k;
      const int64_t left = l.terms - k * kTerms, terms = left > 0 ? left : 0;
      const T* from = m + (column + i) * l.terms + k * kTerms;
      Factor<T>* to = panel + l.begin_of(i / kLanes) + k * stride;
      Units square[kLanes] = {};
      if (terms >= kLanes * kTerms && i + kLanes <= valid) {  // in registers, not by way of an array
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) square[r] = load_units(from + r * l.terms);
        transpose<Factor<T>>(square);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(to + j * stride, square[j]);
        continue;
      }
      const int64_t count = terms < kLanes * kTerms ? terms : kLanes * kTerms;
      for (int64_t r = 0; r < kLanes && i + r < valid; ++r) square[r] = load_units_first(from + r * l.terms, count);
      transpose<Factor<T>>(square);
      for (int64_t j = 0; j < depth; ++j) store(to + j * stride, square[j]);
    }
  }
}

template <class T>
bool pack(const void* matrix, bool transposed, const Panels& l, int64_t begin, int64_t end, void* panels) {
  using F = Factor<T>;
  const T* m = static_cast<const T*>(matrix);
  Vec<T> zero{};  // sum of 0 * u: NaN where a u is not finite
  for (int64_t block = begin; block < end; ++block) {
    F* panel = static_cast<F*>(panels) + l.first_column(block) * l.depth;
    if (transposed) {
      pack_transposed(m, l, block, panel);
    } else {
      pack_straight(m, l, block, panel);
    }
    const int64_t units = (l.first_column(block + 1) - l.first_column(block)) * l.depth;
    for (int64_t i = 0; i < units; i += l.lanes) {
      if constexpr (kPaired<T>) {
        zero += zero_if_finite(T{}, load(panel + i));
      } else {
        zero += zero_if_finite(load(panel + i));
      }
    }
  }
  for (int64_t lane = 0; lane < l.lanes; ++lane) {
    if (zero[lane] != 0) return false;
  }
  return true;
}

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
