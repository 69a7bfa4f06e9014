// What happens to a sum once it is complete: skip, input, activation. Compiled once per instruction set (vec.h).
#pragma once

#include <cstddef>
#include <type_traits>

#include "activation.h"
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
  int64_t ahead = 0;  // numbers from this row of the output to the next step's

  // `op(vector of carry + skip * x + in, vector of saved)` over all columns. The last vector overlaps the one before
  // it instead of being cut; only a row shorter than a vector is copied through a buffer. `out` may be `in` and `next`
  // `x`: what the last vector needs of them is fetched before anything is written.
  template <class Op>
  void apply(Op op) const {
    constexpr int64_t kLanes = VecOf<Scalar<T>>::kLanes;
    const bool whole = count >= kLanes;
    // A layer's, as a rule; without the questions, and with pointers that no store can have changed.
    if (whole && x && next && out && pre && !in && !saved && !kept && !kept_factor) {
      fetch_ahead();
      return apply_to(op, carry, x, pre, nullptr, nullptr, next, out, factor, nullptr, skip, count);
    }
    if (kPaired<T> && whole && x && next && out && !pre && !in && !saved && !kept && !kept_factor) {
      return apply_to(op, carry, x, nullptr, nullptr, nullptr, next, out, factor, nullptr, skip, count);
    }
    if (whole && x && next && kept && in && saved && !out && !pre) {
      return apply_to(op, carry, x, nullptr, in, saved, next, kept, factor, kept_factor, skip, count);
    }
    const int64_t last = whole ? count - kLanes : 0;
    auto fetch = [&](const T* from, int64_t i) {
      return !from ? Vec<T>{} : whole ? load(from + i) : load_first(from, count);
    };
    auto finish = [&](int64_t i, Vec<T> state, Vec<T> streamed) {
      Vec<T> a = load(carry + i);
      if (x) a += state * skip;
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
    const auto before = [&](int64_t i) { return x ? load(x + i) : Vec<T>{}; };
    const Vec<T> last_in = fetch(in, last), last_x = before(last);
    for (int64_t i = 0; i < last; i += kLanes) finish(i, before(i), fetch(in, i));
    finish(last, last_x, last_in);
  }

  template <class Op, class Pre, class In, class Saved, class Out, class Kept>
  static void apply_to(Op op, const Scalar<T>* carry, const Scalar<T>* x, Pre pre, In in, Saved saved, Scalar<T>* next,
                       Out out, FactorRow<T>* factor, Kept kept_factor, Scalar<T> skip, int64_t count) {
    constexpr int64_t kLanes = VecOf<Scalar<T>>::kLanes;
    const int64_t last = count - kLanes;
    const Vec<T> last_x = load(x + last);
    for (int64_t i = 0;; i += kLanes) {
      if (i > last) {
        if (i >= count) return;
        i = last;
      }
      const Vec<T> state = kPaired<T> && i == last ? last_x : load(x + i);  // only of those `next` is `x` (run.cpp)
      Vec<T> a = load(carry + i) + state * skip, h{};
      if constexpr (!std::is_same_v<Pre, std::nullptr_t>) a += load(pre + i);
      if constexpr (!std::is_same_v<In, std::nullptr_t>) a += load(in + i);
      if constexpr (!std::is_same_v<Saved, std::nullptr_t>) h = load(saved + i);
      a = op(a, h);
      store(next + i, a);
      if constexpr (kPaired<T>) {
        // Once for all who want it; each for itself, that was a quarter of a step of 64 rows x 128 units.
        const auto rounded = narrow(T{}, a);
        memcpy(factor + i, &rounded, sizeof(rounded));
        if constexpr (!std::is_same_v<Kept, std::nullptr_t>) memcpy(kept_factor + i, &rounded, sizeof(rounded));
        if constexpr (std::is_same_v<Out, T*>) memcpy(out + i, &rounded, sizeof(rounded));
      }
      if constexpr (!kPaired<T> || !std::is_same_v<Out, T*>) store(out + i, a);
    }
  }

  // What a step writes comes from afar, and its stores wait for it: into the second-level cache by then (1.02 to 1.05
  // of a step of 16 rows and more).
  void fetch_ahead() const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(out + ahead + i, 1, 2);
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
  const auto apply = [&](auto f) {
    if (p.backward) {
      columns.apply([f](V a, V h) { return f.back(a, h); });
    } else {
      columns.apply([f](V a, V) { return f.of(a); });
    }
  };
  switch (p.activation) {
    case Activation::kNone:
      return apply(Identity{});
    case Activation::kReLU:
      return apply(Relu{});
    case Activation::kTanh:
      return apply(Tanh{});
    default:
      return apply(AnyActivation{p.activation});
  }
}

// The same where units have factors of their own (problem.h). `carry` may be null: zero.
template <class T>
struct UnitColumns : Columns<T> {
  const Scalar<T>*skips = nullptr, *gains = nullptr;  // of these units
  Scalar<T>* carried = nullptr;     // what the skip is of, where `next` is not: read as `x`, written here
  const T* noise = nullptr;         // null: none
  T* aside = nullptr;               // null: not wanted
  Scalar<T>* kept_aside = nullptr;  // and once more, unrounded

  template <Form kForm, bool kBackward, class F>
  void apply_units(F f) const {
    using V = Vec<T>;
    constexpr int64_t kLanes = VecOf<Scalar<T>>::kLanes;
    const Columns<T>& c = *this;
    const bool whole = c.count >= kLanes;
    const int64_t last = whole ? c.count - kLanes : 0;
    const auto fetch = [&](const auto* from, int64_t i) {
      return !from ? V{} : whole ? load(from + i) : load_first(from, c.count);
    };
    const auto finish = [&](int64_t i, V streamed, V x) {
      V sum = c.carry ? load(c.carry + i) : V{};
      const V saved = fetch(c.saved, i);
      if (kForm == Form::kCurrent && kBackward && c.carry) sum = f.back_at(sum, saved);
      // Before the input, so that a sweep may end here and another one start from the sum (a Span's).
      const V skipped = fetch(skips, i) * x;
      if (c.x && (kForm != Form::kOutside || kBackward)) sum += skipped;
      if (c.in) sum += streamed;
      if (c.pre) sum += load(c.pre + i);
      // From here on `sum` is what is carried, `factor` what is multiplied.
      V factor = sum;
      if constexpr (kForm == Form::kInside) {
        sum = factor = kBackward ? f.back(sum, saved) : f.of(sum);
      } else if constexpr (kForm == Form::kCurrent) {
        if (!kBackward) factor = f.of(sum);
      } else if constexpr (kBackward) {
        factor = f.back(sum * fetch(gains, i), saved);
        c.put(aside, i, sum, whole);
        if (kept_aside) store(kept_aside + i, sum);
      } else {
        const V z = f.of(sum);
        c.put(aside, i, z, whole);
        sum = z * fetch(gains, i);
        if (c.x) sum += skipped;
        if (noise) sum += fetch(noise, i);
        factor = sum;
      }
      if (c.next) store(c.next + i, factor);
      if (carried) store(carried + i, sum);
      if (c.kept) store(c.kept + i, factor);
      c.put(c.out, i, kBackward ? factor : sum, whole);
      if constexpr (kPaired<T>) {
        c.put(c.factor, i, factor, whole);
        c.put(c.kept_factor, i, factor, whole);
      }
    };
    const auto before = [&](int64_t i) { return c.x ? load(c.x + i) : V{}; };
    const V last_in = fetch(c.in, last), last_x = before(last);  // `out` may be `in`, `carried` is `x`
    for (int64_t i = 0; i < last; i += kLanes) finish(i, fetch(c.in, i), before(i));
    finish(last, last_in, last_x);
  }
};

// One instance for all activations: with six the library was larger by a third, and no faster.
template <class T>
void epilogue(const Problem& p, const UnitColumns<T>& columns) {
  const AnyActivation f{p.activation};
  const auto with_form = [&](auto form) {
    if (p.backward) {
      columns.template apply_units<form(), true>(f);
    } else {
      columns.template apply_units<form(), false>(f);
    }
  };
  switch (p.form) {
    case Form::kInside:
      return with_form(std::integral_constant<Form, Form::kInside>{});
    case Form::kOutside:
      return with_form(std::integral_constant<Form, Form::kOutside>{});
    case Form::kCurrent:
      return with_form(std::integral_constant<Form, Form::kCurrent>{});
  }
}

// A backward sweep's last product, the gradient of h0: no activation is left to pass, but in currents, f(h0)'s.
template <class T>
void epilogue_of_start(const Problem& p, const UnitColumns<T>& columns) {
  if (p.form == Form::kCurrent) return columns.template apply_units<Form::kCurrent, true>(AnyActivation{p.activation});
  columns.template apply_units<Form::kInside, true>(AnyActivation{Activation::kNone});
}

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
