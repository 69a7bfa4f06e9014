// Sums of outer products, for weight gradients: c[i][j] += sum over k of a[k][i] * b[k][j]. Compiled once per
// instruction set (vec.h).
#pragma once

#include "sweep.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

// Rows of a tile: with kOuterVecs = 3 vectors, 12 or 24 sums, 3 of b and one broadcast fit 16 or 32 registers. A
// divisor of the lanes, in whose groups a is stored.
template <class S>
constexpr int kOuterRows = VecOf<S>::kLanes >= 8 && FUSED_RIN_VECTOR_REGISTERS == 32 ? 8
                           : VecOf<S>::kLanes >= 4                                   ? 4
                                                                                     : VecOf<S>::kLanes;

// a: [depth][lanes], of which the first R are meant; b: [depth][V vectors].
template <class S, int V>
void outer(const S* __restrict a, const S* __restrict b, int64_t depth, S* __restrict c, int64_t c_stride) {
  using Vec = typename VecOf<S>::Vec;
  constexpr int kLanes = VecOf<S>::kLanes, R = kOuterRows<S>;
  Vec sum[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) row[v] = load(b + (k * V + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const S x = a[k * kLanes + r];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[r][v] += row[v] * x;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      S* to = c + r * c_stride + v * kLanes;
      store(to, load(to) + sum[r][v]);
    }
  }
}

template <class S>
void outer(int64_t vecs, const S* a, const S* b, int64_t depth, S* c, int64_t c_stride) {
  switch (vecs) {
    case 1:
      return outer<S, 1>(a, b, depth, c, c_stride);
    case 2:
      return outer<S, 2>(a, b, depth, c, c_stride);
    default:
      return outer<S, 3>(a, b, depth, c, c_stride);
  }
}
static_assert(kOuterVecs == 3, "outer has instances of 1, 2 and 3 vectors");

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
