// One step from the weights as torch holds them: act(W x + b + U h + skip * h). Compiled once per instruction set.
//
// The sweep packs U so that many steps read it front to back. A single step reads U once, so packing it (a write of
// the whole matrix and a read back) would cost more than the step: here each output is the dot product of a row of W
// and a row of U, as they lie, with the input and the state. Nothing is kept between calls, so nothing can go stale.
#pragma once

#include "kernels.h"
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

// The last, incomplete vector of a row. It is loaded whole, ending where the row ends, with the lanes that were
// counted already set to zero; bits are cleared, since 0 * Inf would be NaN.
template <class T>
struct Tail {
  using S = Scalar<T>;
  static constexpr int64_t kLanes = VecOf<S>::kLanes;

  explicit Tail(int64_t depth) : depth(depth), count(depth % kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) keep[i] = i >= kLanes - count ? -1 : 0;
  }
  Vec<T> load_masked(const T* row) const {
    if (depth < kLanes) return load_first(row, depth);
    return bit_cast<Vec<T>>(bit_cast<typename VecOf<S>::Bits>(load(row + depth - kLanes)) & keep);
  }

  int64_t depth, count;
  typename VecOf<S>::Bits keep;
};

// sum[o] += row o of the matrix times x, for N rows.
template <class T, int N>
inline void add_products(const T* __restrict rows, const T* __restrict x, const Tail<T>& tail, Vec<T>* sum) {
  constexpr int64_t kLanes = Tail<T>::kLanes;
  const int64_t depth = tail.depth;
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    const Vec<T> xs = load(x + k);
#pragma GCC unroll 8
    for (int o = 0; o < N; ++o) sum[o] += load(rows + o * depth + k) * xs;
  }
  if (tail.count) {
    const Vec<T> xs = tail.load_masked(x);
#pragma GCC unroll 8
    for (int o = 0; o < N; ++o) sum[o] += tail.load_masked(rows + o * depth) * xs;
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

// ---- backward ----

// A matrix of the step, [rows][columns], and what runs through it: d [B][rows] is the gradient of the sums it makes, v
// [B][columns] what it was multiplied with. Adds d times the matrix to sums [B][columns], and writes the matrix's own
// gradient, d x v. One pass over both, for some of the columns: what a step costs is reading them.
template <class T, int B>
struct MatrixBack {
  using S = Scalar<T>;
  static constexpr int64_t kLanes = VecOf<S>::kLanes;

  const T* matrix;
  int64_t columns;  // of a whole row
  const S* d;
  int64_t d_stride;
  const T* v;  // null: zero
  int64_t v_stride;
  S* sums;  // null: not wanted
  int64_t sums_stride;
  T* gradient;  // null: not wanted

  void run(int64_t rows, int64_t begin, int64_t end) const {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) some_rows<4>(row, begin, end);
    for (; row < rows; ++row) some_rows<1>(row, begin, end);
  }

  template <int N>
  void some_rows(int64_t row, int64_t begin, int64_t end) const {
    S factor[B][N];
    for (int b = 0; b < B; ++b) {
      for (int r = 0; r < N; ++r) factor[b][r] = d[b * d_stride + row + r];
    }
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) vector<N, true>(row, i, kLanes, factor);
    if (i < end) vector<N, false>(row, i, end - i, factor);
  }

  template <int N, bool kWhole>
  void vector(int64_t row, int64_t i, int64_t count, const S (&factor)[B][N]) const {
    const auto fetch = [&](const T* from) { return kWhole ? load(from) : load_first(from, count); };
    if (sums) {
      Vec<T> m[N];
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) m[r] = fetch(matrix + (row + r) * columns + i);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        Vec<T> sum = load(sums + b * sums_stride + i);
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) sum += m[r] * factor[b][r];
        store(sums + b * sums_stride + i, sum);
      }
    }
    if (!gradient) return;
    Vec<T> g[N] = {};
    if (v) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const Vec<T> x = fetch(v + b * v_stride + i);
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) g[r] += x * factor[b][r];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) {
      T* to = gradient + (row + r) * columns + i;
      if (kWhole) {
        store(to, g[r]);
      } else {
        store_first(to, g[r], count);
      }
    }
  }
};

template <class T, int B>
class StepBack {
  using S = Scalar<T>;
  static constexpr int64_t kLanes = VecOf<S>::kLanes;

 public:
  StepBack(const Step& s, const StepGradients& g, S* scratch)
      : s_(s), g_(g), outputs_(s.groups * s.hidden), d_(scratch), sums_(scratch + B * (outputs_ + kLanes)) {}

  void run(int64_t begin, int64_t end) {
    find_d();
    if (begin == 0) write_biases();
    if (begin < s_.inputs) {
      const MatrixBack<T, B> w{at(s_.w_ih),   s_.inputs,  d_, d_stride(), at(s_.x), s_.inputs, g_.x ? sums_ : nullptr,
                               sums_stride(), to(g_.w_ih)};
      const int64_t last = end < s_.inputs ? end : s_.inputs;
      clear(begin, last);
      w.run(outputs_, begin, last);
      if (g_.x) write_sums(begin, last, 0, to(g_.x), s_.inputs, 0);
    }
    if (end <= s_.inputs) return;
    const int64_t first = begin > s_.inputs ? begin - s_.inputs : 0, last = end - s_.inputs, D = s_.hidden;
    for (int64_t group = 0; group < s_.groups; ++group) {
      const int64_t row = group * D;
      const MatrixBack<T, B> u{at(s_.w_hh) + row * D,
                               D,
                               d_ + row,
                               d_stride(),
                               s_.h ? at(s_.h) + row : nullptr,
                               outputs_,
                               g_.h ? sums_ : nullptr,
                               sums_stride(),
                               g_.w_hh ? to(g_.w_hh) + row * D : nullptr};
      clear(first, last);
      u.run(D, first, last);
      if (g_.h) write_sums(first, last, row, to(g_.h) + row, outputs_, static_cast<S>(s_.skip));
    }
  }

 private:
  static const T* at(const void* p) { return static_cast<const T*>(p); }
  static T* to(void* p) { return static_cast<T*>(p); }
  int64_t d_stride() const { return outputs_ + kLanes; }
  int64_t sums_stride() const { return (s_.inputs > s_.hidden ? s_.inputs : s_.hidden) + kLanes; }

  // body(i, count) over vectors of `count` columns.
  template <class Body>
  static void for_vectors(int64_t begin, int64_t end, Body body) {
    for (int64_t i = begin; i < end; i += kLanes) body(i, end - i < kLanes ? end - i : kLanes);
  }

  // d = (grad_out + grad_h_n) * act'(out)
  void find_d() {
    for (int b = 0; b < B; ++b) {
      const int64_t row = b * outputs_;
      for_vectors(0, outputs_, [&](int64_t i, int64_t count) {
        Vec<T> a{};
        if (g_.out) a += load_first(at(g_.out) + row + i, count);
        if (g_.h_n) a += load_first(at(g_.h_n) + row + i, count);
        const Vec<T> h = load_first(at(s_.out) + row + i, count);
        if (s_.activation == Activation::kReLU) a = h <= 0 ? Vec<T>{} : a;
        if (s_.activation == Activation::kTanh) a = a * (1 - h * h);
        store(d_ + b * d_stride() + i, a);
      });
    }
  }

  void write_biases() const {
    if (!g_.b_ih && !g_.b_hh) return;
    for_vectors(0, outputs_, [&](int64_t i, int64_t count) {
      Vec<T> sum{};
      for (int b = 0; b < B; ++b) sum += load(d_ + b * d_stride() + i);
      if (g_.b_ih) store_first(to(g_.b_ih) + i, sum, count);
      if (g_.b_hh) store_first(to(g_.b_hh) + i, sum, count);
    });
  }

  void clear(int64_t begin, int64_t end) {
    for (int b = 0; b < B; ++b) {
      for_vectors(begin, end, [&](int64_t i, int64_t) { store(sums_ + b * sums_stride() + i, Vec<T>{}); });
    }
  }

  void write_sums(int64_t begin, int64_t end, int64_t d_column, T* out, int64_t stride, S skip) const {
    for (int b = 0; b < B; ++b) {
      for_vectors(begin, end, [&](int64_t i, int64_t count) {
        Vec<T> sum = load(sums_ + b * sums_stride() + i);
        if (skip != 0) sum += load_first(d_ + b * d_stride() + d_column + i, count) * skip;
        store_first(out + b * stride + i, sum, count);
      });
    }
  }

  const Step& s_;
  const StepGradients& g_;
  const int64_t outputs_;
  S *d_, *sums_;
};

template <class T>
void step_backward(const Step& s, const StepGradients& g, int64_t begin, int64_t end, void* scratch) {
  auto* const own = static_cast<Scalar<T>*>(scratch);
  switch (s.batch) {
    case 1:
      return StepBack<T, 1>(s, g, own).run(begin, end);
    case 2:
      return StepBack<T, 2>(s, g, own).run(begin, end);
    case 3:
      return StepBack<T, 3>(s, g, own).run(begin, end);
    case 4:
      return StepBack<T, 4>(s, g, own).run(begin, end);
  }
}
static_assert(kMaxStepRows == 4, "step_backward has instances of 1 to 4 rows");

void step_backward_any(const Step& s, const StepGradients& g, int64_t begin, int64_t end, void* scratch) {
  switch (s.dtype) {
    case DType::kFloat32:
      return step_backward<float>(s, g, begin, end, scratch);
    case DType::kFloat64:
      return step_backward<double>(s, g, begin, end, scratch);
    case DType::kBFloat16:
      return step_backward<BFloat16>(s, g, begin, end, scratch);
    case DType::kFloat16:
      return step_backward<Float16>(s, g, begin, end, scratch);
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
