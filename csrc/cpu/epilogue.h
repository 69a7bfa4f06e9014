// What happens to a sum once it is complete: skip, input, activation. Compiled once per instruction set (vec.h).
#pragma once

#include "kernels.h"
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
  const T* in;     // null: zero
  const T* saved;  // backward only
  T* out;
  Scalar<T>* next;  // null: out is the only result
  int64_t count;

  // `op(vector of carry + skip * x + in, vector of saved)` over all columns. The last vector overlaps the one before
  // it instead of being cut; only a row shorter than a vector is copied through a buffer.
  template <class Op>
  void apply(Op op) const {
    constexpr int64_t kLanes = VecOf<Scalar<T>>::kLanes;
    const bool whole = count >= kLanes;
    for (int64_t i = 0; i < count; i += kLanes) {
      if (whole && i + kLanes > count) i = count - kLanes;
      auto fetch = [&](const T* from) { return whole ? load(from + i) : load_first(from, count); };
      Vec<T> a = load(carry + i);
      if (x) a += load(x + i) * skip;
      if (in) a += fetch(in);
      a = op(a, saved ? fetch(saved) : Vec<T>{});
      if (next) store(next + i, a);
      if (whole) {
        store(out + i, a);
      } else {
        store_first(out, a, count);
      }
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
