// A sweep as an operator of torch sees it: tensors in, tensors out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

// Checks all arguments, which in Python the callers have done: here anyone may call, from C++ or from a graph that was
// saved elsewhere. Throws std::runtime_error that names the argument, what was got and what was expected, before
// anything is written. On meta tensors it answers with shapes alone.
// `device` is what `backend` may name beside "auto"; `run` gets a problem of contiguous tensors.
Result sweep(const Sweep&, const char* device, void (*run)(const Problem&, int64_t rows));

}  // namespace fused_rin::operators
