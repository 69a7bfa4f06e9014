// One step from the weights as torch holds them: act(W x + b + U h + skip * h). Compiled once per instruction set.
//
// The sweep packs U so that many steps read it front to back. A single step reads U once, so packing it (a write of
// the whole matrix and a read back) would cost more than the step: here each output is the dot product of a row of W
// and a row of U, as they lie, with the input and the state. Nothing is kept between calls, so nothing can go stale.
#pragma once

#include "factor.h"
#include "sweep.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

template <class S>
S horizontal_sum(typename VecOf<S>::Vec v) {
  constexpr int kLanes = VecOf<S>::kLanes;
  S lanes[kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The last, incomplete vector of a row. It is loaded whole, ending where the row ends, with the numbers that were
// counted already set to zero; bits are cleared, since 0 * Inf would be NaN.
template <class T>
struct Tail {
  using Units = typename VecOf<Factor<T>>::Vec;
  static constexpr int64_t kTerms = VecOf<Factor<T>>::kLanes * UnitOf<Factor<T>>::kTerms;  // in a vector

  explicit Tail(int64_t depth) : depth(depth), count(depth % kTerms) {
    constexpr int64_t kBytes = FUSED_RIN_VECTOR_BYTES / kTerms;
    for (int64_t i = 0; i < FUSED_RIN_VECTOR_BYTES; ++i) keep[i] = i / kBytes >= kTerms - count ? -1 : 0;
  }
  Units load_masked(const T* row) const {
    if (depth < kTerms) return load_units_first(row, depth);
    return bit_cast<Units>(bit_cast<Bytes>(load_units(row + depth - kTerms)) & keep);
  }

  typedef int8_t Bytes __attribute__((vector_size(FUSED_RIN_VECTOR_BYTES)));
  int64_t depth, count;
  Bytes keep;
};

// sum[o] += row o of the matrix times x, for N rows.
template <class T, int N>
inline void add_products(const T* __restrict rows, const T* __restrict x, const Tail<T>& tail, Vec<T>* sum) {
  constexpr int64_t kTerms = Tail<T>::kTerms;
  const int64_t depth = tail.depth;
  int64_t k = 0;
  for (; k + kTerms <= depth; k += kTerms) {
    const auto xs = load_units(x + k);
#pragma GCC unroll 8
    for (int o = 0; o < N; ++o) multiply_add(sum[o], load_units(rows + o * depth + k), xs);
  }
  if (tail.count) {
    const auto xs = tail.load_masked(x);
#pragma GCC unroll 8
    for (int o = 0; o < N; ++o) multiply_add(sum[o], tail.load_masked(rows + o * depth), xs);
  }
}

template <class T, int N>
void step_outputs(const Step& s, int64_t output, const Tail<T>& inputs, const Tail<T>& states) {
  using S = Scalar<T>;
  constexpr int64_t kLanes = VecOf<S>::kLanes;
  const int64_t width = s.groups * s.hidden, group = output / s.hidden;
  const T* w_ih = static_cast<const T*>(s.w_ih) + output * s.inputs;
  const T* w_hh = static_cast<const T*>(s.w_hh) + output * s.hidden;
  for (int64_t b = 0; b < s.batch; ++b) {
    const T* x = static_cast<const T*>(s.x) + b * s.inputs;
    const T* h = s.h ? static_cast<const T*>(s.h) + b * width : nullptr;
    Vec<T> sum[N] = {};
    add_products<T, N>(w_ih, x, inputs, sum);
    if (h) add_products<T, N>(w_hh, h + group * s.hidden, states, sum);
    S a[N <= kLanes ? kLanes : N] = {};
    for (int o = 0; o < N; ++o) a[o] = horizontal_sum<S>(sum[o]);
    for (int64_t i = 0; i < N; i += kLanes) {
      const int64_t count = N - i < kLanes ? N - i : kLanes, at = output + i;
      Vec<T> total = load(a + i);
      if (s.b_ih) total += load_first(static_cast<const T*>(s.b_ih) + at, count);
      if (s.b_hh) total += load_first(static_cast<const T*>(s.b_hh) + at, count);
      if (h && s.skip != 0) total += load_first(h + at, count) * static_cast<S>(s.skip);
      if (s.activation == Activation::kReLU) total = relu(total);
      if (s.activation == Activation::kTanh) total = tanh(total);
      store_first(static_cast<T*>(s.out) + b * width + at, total, count);
      if (s.h_n) store_first(static_cast<T*>(s.h_n) + b * width + at, total, count);
    }
  }
}

// Outputs [begin, end). A compiler may contract the eightfold body and the single one differently, so a part must begin
// at a multiple of kStepOutputs within its recurrence for the bits not to depend on how the work is shared.
template <class T>
void step(const Step& s, int64_t begin, int64_t end) {
  const Tail<T> inputs(s.inputs), states(s.hidden);
  while (begin < end) {
    int64_t group_end = (begin / s.hidden + 1) * s.hidden;
    if (group_end > end) group_end = end;
    for (; begin + kStepOutputs <= group_end; begin += kStepOutputs) {
      step_outputs<T, kStepOutputs>(s, begin, inputs, states);
    }
    for (; begin < group_end; ++begin) step_outputs<T, 1>(s, begin, inputs, states);
  }
}

void step_any(const Step& s, int64_t begin, int64_t end) {
  switch (s.dtype) {
    case DType::kFloat32:
      return step<float>(s, begin, end);
    case DType::kFloat64:
      return step<double>(s, begin, end);
    case DType::kBFloat16:
      return step<BFloat16>(s, begin, end);
    case DType::kFloat16:
      return step<Float16>(s, begin, end);
  }
}

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
