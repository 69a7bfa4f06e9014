// How Python hands a problem over: four tuples, or five, each a named group of problem.h's fields. Both native modules
// speak it; fused_rin/_native.pyi says the same to a type checker. Tuples and not keywords: pybind11 looks keywords up
// one by one, 0.1 us each, in a call that a streaming model makes for every sample.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "problem.h"

namespace fused_rin {

using Address = uintptr_t;  // of a tensor's numbers; 0: there is none

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // T, B, G, D
using Rule = std::tuple<int, int, bool, double, int64_t>;      // dtype, activation, backward, skip, num_reversed
using RowAddresses = std::tuple<Address, Address, Address>;    // lengths, offsets, resets
using SweepAddresses = std::tuple<Address, Address, Address, Address, Address, Address>;
//                                weight,  in,      saved,   state_in, out,    state_out
using UnitAddresses = std::tuple<int, Address, Address, Address, Address, Address>;
//                               form, skips,  gains,   initial, noise,   aside

inline Problem make_problem(const Sizes& sizes, const Rule& rule, const RowAddresses& rows,
                            const SweepAddresses& tensors) {
  const auto& [steps, batch, groups, hidden] = sizes;
  const auto& [dtype, activation, backward, skip, num_reversed] = rule;
  const auto& [lengths, offsets, resets] = rows;
  const auto& [weight, in, saved, state_in, out, state_out] = tensors;
  Problem p{};
  p.steps = steps;
  p.batch = batch;
  p.groups = groups;
  p.hidden = hidden;
  p.num_reversed = num_reversed;
  p.dtype = static_cast<DType>(dtype);
  p.activation = static_cast<Activation>(activation);
  p.backward = backward;
  p.skip = skip;
  p.lengths = pointer<const int64_t>(lengths);
  p.offsets = pointer<const int64_t>(offsets);
  p.resets = pointer<const uint8_t>(resets);
  p.weight = pointer<const void>(weight);
  p.in = pointer<const void>(in);
  p.saved = pointer<const void>(saved);
  p.state_in = pointer<const void>(state_in);
  p.out = pointer<void>(out);
  p.state_out = pointer<void>(state_out);
  return p;
}

inline Problem with_units(Problem p, const UnitAddresses& units) {
  const auto& [form, skips, gains, initial, noise, aside] = units;
  p.form = static_cast<Form>(form);
  p.skips = pointer<const void>(skips);
  p.gains = pointer<const void>(gains);
  p.initial = pointer<const void>(initial);
  p.noise = pointer<const void>(noise);
  p.aside = pointer<void>(aside);
  return p;
}

}  // namespace fused_rin
