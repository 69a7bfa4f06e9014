// Sums of outer products, for weight gradients: c[i][j] += sum over k of a[k][i] * b[k][j]. Compiled once per
// instruction set (vec.h).
#pragma once

#include "factor.h"
#include "sweep.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

// Rows of a tile: with kOuterVecs = 3 vectors, 12 or 24 sums, 3 of b and one broadcast fit 16 or 32 registers. A
// divisor of the lanes, in whose groups a is stored.
template <class F>
constexpr int kOuterRows = VecOf<F>::kLanes >= 8 && FUSED_RIN_VECTOR_REGISTERS == 32 ? 8
                           : VecOf<F>::kLanes >= 4                                   ? 4
                                                                                     : VecOf<F>::kLanes;

// a: [depth][lanes], of which the first R are meant; b: [depth][V vectors]; depth in units. `far`: the sums are fetched
// while the products are made, since no near cache holds them (3 to 6 percent of a backward pass at D = 512, where they
// are 2 MB; at D = 256 a loss of 1 percent).
template <class F, int V>
void outer(const F* __restrict a, const F* __restrict b, int64_t depth, Sum<F>* __restrict c, int64_t c_stride,
           bool far) {
  constexpr int kLanes = VecOf<F>::kLanes, R = kOuterRows<F>;
  SumVec<F> sum[R][V] = {};
  if (far) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) __builtin_prefetch(c + r * c_stride + v * kLanes, 1);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename VecOf<F>::Vec row[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) row[v] = load(b + (k * V + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F x = a[k * kLanes + r];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) multiply_add<F>(sum[r][v], row[v], x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      Sum<F>* to = c + r * c_stride + v * kLanes;
      store(to, load(to) + sum[r][v]);
    }
  }
}

template <class F>
void outer(int64_t vecs, const F* a, const F* b, int64_t depth, Sum<F>* c, int64_t c_stride, bool far) {
  switch (vecs) {
    case 1:
      return outer<F, 1>(a, b, depth, c, c_stride, far);
    case 2:
      return outer<F, 2>(a, b, depth, c, c_stride, far);
    default:
      return outer<F, 3>(a, b, depth, c, c_stride, far);
  }
}
static_assert(kOuterVecs == 3, "outer has instances of 1, 2 and 3 vectors");

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
