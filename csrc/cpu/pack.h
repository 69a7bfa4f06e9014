// A matrix as torch has it -> panels for `dot`. Compiled once per instruction set (vec.h).
#pragma once

#include "sweep.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

// Panel [k][i] from a matrix [depth, outputs]: rows are copied.
template <class T>
void pack_transposed(const T* m, const Panels& l, int64_t block, Scalar<T>* panel) {
  const int64_t column = l.first_column(block), width = l.first_column(block + 1) - column;
  const int64_t valid = l.end_column(block) - column;
  for (int64_t k = 0; k < l.depth; ++k) {
    const T* from = m + k * l.outputs + column;
    Scalar<T>* to = panel + k * width;
    for (int64_t i = 0; i < width; i += l.lanes) {
      store(to + i, i + l.lanes <= valid ? load(from + i) : load_first(from + i, valid > i ? valid - i : int64_t{0}));
    }
  }
}

// From a matrix [outputs, depth], by squares of `lanes` outputs and `lanes` of the depth.
template <class T>
void pack_straight(const T* m, const Panels& l, int64_t block, Scalar<T>* panel) {
  constexpr int64_t kLanes = VecOf<Scalar<T>>::kLanes;
  const int64_t column = l.first_column(block), width = l.first_column(block + 1) - column;
  const int64_t valid = l.end_column(block) - column;
  for (int64_t i = 0; i < width; i += kLanes) {
    for (int64_t k = 0; k < l.depth; k += kLanes) {
      const int64_t depth = k + kLanes <= l.depth ? kLanes : l.depth - k;
      const T* from = m + (column + i) * l.depth + k;
      Scalar<T>* to = panel + k * width + i;
      Vec<T> square[kLanes] = {};
      if (depth == kLanes && i + kLanes <= valid) {  // in registers, not by way of an array
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) square[r] = load(from + r * l.depth);
        transpose<Scalar<T>>(square);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(to + j * width, square[j]);
        continue;
      }
      for (int64_t r = 0; r < kLanes && i + r < valid; ++r) square[r] = load_first(from + r * l.depth, depth);
      transpose<Scalar<T>>(square);
      for (int64_t j = 0; j < depth; ++j) store(to + j * width, square[j]);
    }
  }
}

template <class T>
bool pack(const void* matrix, bool transposed, const Panels& l, int64_t begin, int64_t end, void* panels) {
  using S = Scalar<T>;
  const T* m = static_cast<const T*>(matrix);
  Vec<T> zero{};  // sum of 0 * u: NaN where a u is not finite
  for (int64_t block = begin; block < end; ++block) {
    S* panel = static_cast<S*>(panels) + l.first_column(block) * l.depth;
    if (transposed) {
      pack_transposed(m, l, block, panel);
    } else {
      pack_straight(m, l, block, panel);
    }
    const int64_t scalars = (l.first_column(block + 1) - l.first_column(block)) * l.depth;
    for (int64_t i = 0; i < scalars; i += l.lanes) zero += load(panel + i) * 0;
  }
  for (int64_t lane = 0; lane < l.lanes; ++lane) {
    if (zero[lane] != 0) return false;
  }
  return true;
}

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
