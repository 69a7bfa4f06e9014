// The inner loops: rows of states times a panel of U, sums in registers. Compiled once per instruction set (vec.h).
#pragma once

#include "factor.h"
#include "sweep.h"
#include "tiles.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

// With 32 registers a tile of 6 x 4 vectors: 24 sums, 4 for the panel, 1 broadcast, and 10 loads per 24 multiply-adds.
// With 16 registers, 6 x 2. A single row takes blocks twice as wide or more, to have 8 independent sums.
constexpr int kNarrow = FUSED_RIN_VECTOR_REGISTERS == 32 ? 4 : 2;
constexpr int kWide = 8;

// A sum of this many units is closed and the next one begun. One sum over 1,024 terms would be off by 4 times what a
// library's blocked product is off by; this costs one load, addition and store per 128 multiply-adds.
constexpr int64_t kUnits = 128;

// acc[r * acc_stride + v] = sum over k of x[r][k] * panel[k][v], in C interleaved partial sums that are added up last.
// Depth and strides of x and panel in units.
template <class F, int R, int V, int C>
void dot(const F* __restrict x, int64_t x_stride, const F* __restrict panel, int64_t depth, Sum<F>* __restrict acc,
         int64_t acc_stride) {
  constexpr int kLanes = VecOf<F>::kLanes;
  int64_t k = 0;
  do {
    const int64_t begin = k, end = depth - k < kUnits ? depth : k + kUnits;
    SumVec<F> sum[C][R][V] = {};
    for (; k + C <= end; k += C) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        typename VecOf<F>::Vec u[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) u[v] = load(panel + ((k + c) * V + v) * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const F xk = x[r * x_stride + k + c];
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) multiply_add<F>(sum[c][r][v], u[v], xk);
        }
      }
    }
    for (; k < end; ++k) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          multiply_add<F>(sum[0][r][v], load(panel + (k * V + v) * kLanes), x[r * x_stride + k]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        SumVec<F> total = sum[0][r][v];
        if constexpr (C == 2) total += sum[1][r][v];
        if constexpr (C == 4) total = (total + sum[1][r][v]) + (sum[2][r][v] + sum[3][r][v]);
        Sum<F>* const to = acc + r * acc_stride + v * kLanes;
        store(to, begin ? load(to) + total : total);
      }
    }
  } while (k < depth);
}

// Of each set of eight lanes, the lanes in it, in order.
struct LanesOf {
  uint16_t lanes[256][8] = {};
  constexpr LanesOf() {
    for (int set = 0; set < 256; ++set) {
      for (int lane = 0, count = 0; lane < 8; ++lane) {
        if (set >> lane & 1) lanes[set][count++] = static_cast<uint16_t>(lane);
      }
    }
  }
};
constexpr LanesOf kLanesOf;

// Lists the units k in [begin, end) of x that are not zero and returns how many they are; writes up to kListSlack
// places more. Eight at a time, without a branch: one at a time this was 15 percent of a step at D = 128.
template <class F>
int64_t list_nonzero(const F* x, int64_t begin, int64_t end, int32_t* to) {
  typedef uint16_t Lanes __attribute__((vector_size(8 * sizeof(uint16_t))));
  typedef int32_t Index __attribute__((vector_size(8 * sizeof(int32_t))));
  static_assert(kListSlack >= 8, "eight are written at a time");
  int64_t count = 0, k = begin;
  for (; k + 8 <= end; k += 8) {
    const unsigned set = nonzero_of_eight(x + k);
    Lanes lanes;
    memcpy(&lanes, kLanesOf.lanes[set], sizeof(lanes));
    const Index index = __builtin_convertvector(lanes, Index) + static_cast<int32_t>(k);
    memcpy(to + count, &index, sizeof(index));
    count += __builtin_popcount(set);
  }
  for (; k < end; ++k) {
    to[count] = static_cast<int32_t>(k);
    count += is_nonzero(x[k]);
  }
  return count;
}

// Which states of a row are not zero, slice by slice.
struct Nonzero {
  int32_t* index;  // [D + kListSlack]
  int64_t begin[kMaxSlices + 1];
  bool worthwhile;  // enough zeros to be worth skipping

  template <class F>
  void find(const F* x, const Layout& l) {
    begin[0] = 0;
    for (int64_t slice = 0; slice < l.slices; ++slice) {
      begin[slice + 1] =
          begin[slice] + list_nonzero(x, l.slice_begin(slice), l.slice_begin(slice + 1), index + begin[slice]);
    }
    worthwhile = begin[l.slices] * 8 <= l.depth * 7;
  }
};

// dot for one row over listed states only. Adding 0 * u leaves a sum as it is, so the bits are those of dot, up to
// kUnits units.
template <class F, int V>
void dot_listed(const F* x, const int32_t* index, int64_t count, const F* __restrict panel, Sum<F>* __restrict acc) {
  constexpr int kLanes = VecOf<F>::kLanes;
  SumVec<F> sum[V] = {};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t k = index[i];
    const F xk = x[k];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) multiply_add<F>(sum[v], load(panel + (k * V + v) * kLanes), xk);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(acc + v * kLanes, sum[v]);
}

// dot for a single row whose matrix exceeds the first-level cache, where reading the matrix is all the time there is.
// Two ways to read less of it, or from nearer by:
// - Rows of U that meet a zero state are passed over: after a ReLU that is about every other one.
// - A cache that evicts what was used longest ago never serves a matrix that is read around and around. So every other
//   step walks it backwards and finds the last 30 KB or so where they were left: the depth is cut into slices with sums
//   of their own, taken in either order and added up in one order, so that the direction does not show in the result.
// `parts` holds the slices' sums meanwhile.
template <class F, int V>
void dot_sliced(const F* __restrict x, const F* __restrict panel, const Layout& l, const Nonzero* nonzero,
                bool descending, Sum<F>* __restrict parts, Sum<F>* __restrict acc) {
  constexpr int kWidth = V * VecOf<F>::kLanes;
  for (int64_t i = 0; i < l.slices; ++i) {
    const int64_t slice = descending ? l.slices - 1 - i : i;
    if (nonzero) {
      const int64_t begin = nonzero->begin[slice], count = nonzero->begin[slice + 1] - begin;
      dot_listed<F, V>(x, nonzero->index + begin, count, panel, parts + slice * kWidth);
    } else {
      const int64_t k = l.slice_begin(slice), depth = l.slice_begin(slice + 1) - k;
      dot<F, 1, V, 1>(x + k, 0, panel + k * kWidth, depth, parts + slice * kWidth, 0);
    }
  }
  for (int64_t i = 0; i < kWidth; i += VecOf<F>::kLanes) {
    auto total = load(parts + i);
    for (int64_t slice = 1; slice < l.slices; ++slice) total += load(parts + slice * kWidth + i);
    store(acc + i, total);
  }
}

template <class F>
using DotSliced = void (*)(const F*, const F*, const Layout&, const Nonzero*, bool, Sum<F>*, Sum<F>*);
template <class F>
constexpr DotSliced<F> kDotSliced[8] = {dot_sliced<F, 1>, dot_sliced<F, 2>, dot_sliced<F, 3>, dot_sliced<F, 4>,
                                        dot_sliced<F, 5>, dot_sliced<F, 6>, dot_sliced<F, 7>, dot_sliced<F, 8>};

template <class F>
using Dot = void (*)(const F*, int64_t, const F*, int64_t, Sum<F>*, int64_t);

// The instances a layout can ask for: [rows - 1][vectors - 1].
template <class F, int C>
Dot<F> find_dot(int64_t rows, int64_t vecs) {
  constexpr int kN = kNarrow < 4 ? 2 : 4;
  static constexpr Dot<F> kOne[8] = {dot<F, 1, 1, C>,
                                     dot<F, 1, 2, C>,
                                     dot<F, 1, 3, C>,
                                     dot<F, 1, 4, C>,
                                     C == 1 ? dot<F, 1, 5, 1> : nullptr,
                                     C == 1 ? dot<F, 1, 6, 1> : nullptr,
                                     C == 1 ? dot<F, 1, 7, 1> : nullptr,
                                     C == 1 ? dot<F, 1, 8, 1> : nullptr};
#define ROW(R)                                                                                   \
  {                                                                                              \
    dot<F, R, 1, C>, dot<F, R, 2, C>, dot < F, R, kN<4 ? 1 : 3, C>, dot < F, R, kN<4 ? 1 : 4, C> \
  }
  static constexpr Dot<F> kFew[2][4] = {ROW(2), ROW(3)};
  if (rows == 1) return kOne[vecs - 1];
  if (rows <= 3) return kFew[rows - 2][vecs - 1];
  if constexpr (C == 1) {
    static constexpr Dot<F> kMany[3][4] = {ROW(4), ROW(5), ROW(6)};
    return kMany[rows - 4][vecs - 1];
  } else {
    return nullptr;
  }
#undef ROW
}

// Rows of x times a block of the matrix, by tiles if it lies so, else with so many chains; plus `bias` unless null.
template <class F, class T>
void multiply_block(Tiles<T>& tiles, const Panels& l, int64_t chains, const F* x, int64_t x_stride, int64_t rows,
                    const F* panel, int64_t vecs, Sum<F>* acc, int64_t acc_stride, const Sum<F>* bias = nullptr) {
  if constexpr (kHasTiles && UnitOf<F>::kTerms == 2) {
    const TileFactors factors{x, x_stride, panel, l.depth};
    if (l.tiles) return tiles.dot(&factors, 1, rows, vecs, acc, acc_stride, {bias ? bias : kZeros, 0});
  }
  const Dot<F> dot = chains == 1   ? find_dot<F, 1>(rows, vecs)
                     : chains == 2 ? find_dot<F, 2>(rows, vecs)
                                   : find_dot<F, 4>(rows, vecs);
  dot(x, x_stride, panel, l.depth, acc, acc_stride);
  if (!bias) return;
  for (int64_t r = 0; r < rows; ++r, acc += acc_stride) {
    for (int64_t i = 0; i < vecs * l.lanes; i += l.lanes) store(acc + i, load(acc + i) + load(bias + i));
  }
}

// Several partial sums per output leave registers for half the rows.
int64_t rows_at_a_time(const Layout& l) { return l.chains == 1 || l.tiles ? max_tile_rows(l) : max_tile_rows(l) / 2; }

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
