// What happens to a sum once it is complete: skip, input, activation. Compiled once per instruction set (vec.h).
#pragma once

#include "factor.h"
#include "sweep.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

// One row's columns of one block, in one step.
template <class T>
struct Columns {
  const Scalar<T>* carry;  // x U^T, or the carry a sequence starts from
  const Scalar<T>* x;      // this step's state, to be scaled by skip and added; null: nothing to add
  Scalar<T> skip;
  const T* in;           // null: zero
  const Scalar<T>* pre;  // added likewise; null: zero
  const T* saved;        // backward only
  T* out;                // the result; null: not wanted
  Scalar<T>* next;       // the result, unrounded; null: not wanted
  Scalar<T>* kept;       // and once more
  // The result as a product takes it, where that is not as it is (factor.h), for the next step and to be kept.
  FactorRow<T>*factor, *kept_factor;
  int64_t count;

  // `op(vector of carry + skip * x + in, vector of saved)` over all columns. The last vector overlaps the one before
  // it instead of being cut; only a row shorter than a vector is copied through a buffer. `out` may be `in`: what the
  // last vector needs of it is fetched before anything is written.
  template <class Op>
  void apply(Op op) const {
    constexpr int64_t kLanes = VecOf<Scalar<T>>::kLanes;
    const bool whole = count >= kLanes;
    const int64_t last = whole ? count - kLanes : 0;
    auto fetch = [&](const T* from, int64_t i) {
      return !from ? Vec<T>{} : whole ? load(from + i) : load_first(from, count);
    };
    auto finish = [&](int64_t i, Vec<T> streamed) {
      Vec<T> a = load(carry + i);
      if (x) a += load(x + i) * skip;
      if (in) a += streamed;
      if (pre) a += load(pre + i);
      a = op(a, fetch(saved, i));
      if (next) store(next + i, a);
      if (kept) store(kept + i, a);
      put(out, i, a, whole);
      if constexpr (kPaired<T>) {
        put(factor, i, a, whole);
        put(kept_factor, i, a, whole);
      }
    };
    const Vec<T> last_in = fetch(in, last);
    for (int64_t i = 0; i < last; i += kLanes) finish(i, fetch(in, i));
    finish(last, last_in);
  }

  template <class To>
  void put(To* to, int64_t i, Vec<T> value, bool whole) const {
    if (!to) return;
    if (whole) {
      store(to + i, value);
    } else {
      store_first(to, value, count);
    }
  }
};

template <class T>
void epilogue(const Problem& p, const Columns<T>& columns) {
  using V = Vec<T>;
  if (!p.backward) {
    switch (p.activation) {
      case Activation::kNone:
        return columns.apply([](V a, V) { return a; });
      case Activation::kReLU:
        return columns.apply([](V a, V) { return relu(a); });
      case Activation::kTanh:
        return columns.apply([](V a, V) { return tanh(a); });
    }
  } else {
    switch (p.activation) {
      case Activation::kNone:
        return columns.apply([](V a, V) { return a; });
      case Activation::kReLU:
        return columns.apply([](V a, V h) { return h <= 0 ? V{} : a; });
      case Activation::kTanh:
        return columns.apply([](V a, V h) { return a * (1 - h * h); });
    }
  }
}

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
