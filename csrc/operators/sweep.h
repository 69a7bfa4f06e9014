// A sweep as an operator of torch sees it: tensors in, tensors out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../problem.h"

namespace fused_rin::operators {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Result = std::tuple<Tensor, Tensor>;
using UnitsResult = std::tuple<Tensor, Tensor, Tensor>;

// STD_TORCH_CHECK says it with a file and a line of this source, which means nothing to who reads it.
template <class... Parts>
void check(bool right, const Parts&... parts) {
  if (right) return;
  std::ostringstream message;
  (message << "fused_rin: " << ... << parts);
  throw std::runtime_error(message.str());
}

// Shapes and meaning as in problem.h. `states`, whose shape the result takes: pre of a forward sweep, out of a backward
// one, [T, B, G, D], [T, B, G * D] or, packed, [rows, ...].
struct Sweep {
  const Tensor& states;
  const Tensor& weight;
  const Optional& state_in;
  const Optional& lengths;
  const Optional& offsets;
  const Optional& resets;
  double skip;
  const std::string& activation;
  int64_t num_reversed;
  const std::string& backend;
  const Optional* grad_out;  // null: it is a forward sweep
};

// Units with factors of their own. h0 of a backward sweep.
struct Units {
  const Tensor& skip;
  const Optional& gain;
  const Optional* noise;
  const Optional* h0;
  const std::string& form;
};

// Memory that lives until the sweep has run: so many bytes, aligned as torch's tensors are. To be asked once.
using Workspace = std::function<void*(int64_t)>;

// Where the sweep runs.
struct Device {
  const char* name;  // what `backend` may be beside "auto"
  bool (*is_mine)(const Tensor&);
  int64_t row_bytes;  // a multiple of which each row of D units takes, and is aligned to; other rows are padded
  void (*run)(const Problem&, int64_t rows, int index, const Workspace&);  // contiguous tensors; index: of the device
};

// Checks all arguments, which in Python the callers have done: here anyone may call, from C++ or from a graph that was
// saved elsewhere. Throws std::runtime_error that names the argument, what was got and what was expected, before
// anything is written. On meta tensors it answers with shapes alone.
//
// The third is what the form "outside" has aside (problem.h), else nothing.
UnitsResult sweep(const Sweep&, const Units*, const Device&);

// Defines the operators in `library`, see fused_rin/library.py.
template <class Library>
void define_sweeps(Library& library) {
  library.def(
      "sweep_forward(Tensor pre, Tensor weight, Tensor? h0, Tensor? lengths, Tensor? offsets, Tensor? resets, "
      "float skip, str activation, int num_reversed, str backend) -> (Tensor, Tensor)");
  library.def(
      "sweep_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor weight, Tensor out, Tensor? lengths, "
      "Tensor? offsets, Tensor? resets, float skip, str activation, int num_reversed, str backend) "
      "-> (Tensor, Tensor)");
  library.def(
      "units_forward(Tensor pre, Tensor weight, Tensor? h0, Tensor? lengths, Tensor? offsets, Tensor? resets, "
      "Tensor skip, Tensor? gain, Tensor? noise, str form, str activation, int num_reversed, str backend) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "units_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor weight, Tensor saved, Tensor? h0, Tensor? lengths, "
      "Tensor? offsets, Tensor? resets, Tensor skip, Tensor? gain, str form, str activation, int num_reversed, "
      "str backend) -> (Tensor, Tensor, Tensor)");
}

inline Result first_two(const UnitsResult& all) { return {std::get<0>(all), std::get<1>(all)}; }

template <const Device& device>
Result sweep_forward(const Tensor& pre, const Tensor& weight, const Optional& h0, const Optional& lengths,
                     const Optional& offsets, const Optional& resets, double skip, const std::string& activation,
                     int64_t num_reversed, const std::string& backend) {
  return first_two(sweep({pre, weight, h0, lengths, offsets, resets, skip, activation, num_reversed, backend, nullptr},
                         nullptr, device));
}

template <const Device& device>
Result sweep_backward(const Optional& grad_out, const Optional& grad_h_n, const Tensor& weight, const Tensor& out,
                      const Optional& lengths, const Optional& offsets, const Optional& resets, double skip,
                      const std::string& activation, int64_t num_reversed, const std::string& backend) {
  return first_two(
      sweep({out, weight, grad_h_n, lengths, offsets, resets, skip, activation, num_reversed, backend, &grad_out},
            nullptr, device));
}

template <const Device& device>
UnitsResult units_forward(const Tensor& pre, const Tensor& weight, const Optional& h0, const Optional& lengths,
                          const Optional& offsets, const Optional& resets, const Tensor& skip, const Optional& gain,
                          const Optional& noise, const std::string& form, const std::string& activation,
                          int64_t num_reversed, const std::string& backend) {
  const Units units{skip, gain, &noise, nullptr, form};
  return sweep({pre, weight, h0, lengths, offsets, resets, 1.0, activation, num_reversed, backend, nullptr}, &units,
               device);
}

template <const Device& device>
UnitsResult units_backward(const Optional& grad_out, const Optional& grad_h_n, const Tensor& weight,
                           const Tensor& saved, const Optional& h0, const Optional& lengths, const Optional& offsets,
                           const Optional& resets, const Tensor& skip, const Optional& gain, const std::string& form,
                           const std::string& activation, int64_t num_reversed, const std::string& backend) {
  const Units units{skip, gain, nullptr, &h0, form};
  return sweep({saved, weight, grad_h_n, lengths, offsets, resets, 1.0, activation, num_reversed, backend, &grad_out},
               &units, device);
}

template <const Device& device, class Library>
void implement_sweeps(Library& library) {
  library.impl("sweep_forward", TORCH_BOX(&sweep_forward<device>));
  library.impl("sweep_backward", TORCH_BOX(&sweep_backward<device>));
}

template <const Device& device, class Library>
void implement_units(Library& library) {
  library.impl("units_forward", TORCH_BOX(&units_forward<device>));
  library.impl("units_backward", TORCH_BOX(&units_backward<device>));
}

}  // namespace fused_rin::operators
