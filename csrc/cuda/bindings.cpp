// The Python module fused_rin._cuda: raw addresses, sizes and a stream in, exceptions out. Callers have checked.

#include <pybind11/pybind11.h>

#include "block.h"

namespace py = pybind11;
using namespace fused_rin;

namespace {

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// One plain call without keywords: it stands on the path of every step of a streaming model.
void sweep_block(int64_t steps, int64_t batch, int64_t groups, int64_t hidden, int64_t num_reversed, int dtype,
                 int activation, bool backward, double skip, uintptr_t lengths, uintptr_t offsets, uintptr_t resets,
                 uintptr_t weight, uintptr_t in, uintptr_t saved, uintptr_t state_in, uintptr_t out,
                 uintptr_t state_out, int math, int padded_hidden, int rows, int device, uintptr_t stream) {
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
  p.lengths = address<const int64_t>(lengths);
  p.offsets = address<const int64_t>(offsets);
  p.resets = address<const uint8_t>(resets);
  p.weight = address<const void>(weight);
  p.in = address<const void>(in);
  p.saved = address<const void>(saved);
  p.state_in = address<const void>(state_in);
  p.out = address<void>(out);
  p.state_out = address<void>(state_out);
  launch_block(p, static_cast<Math>(math), padded_hidden, rows, device, address<void>(stream));
}

py::list instances() {
  py::list list;
  for (const BlockInstance& i : block_instances())
    list.append(py::make_tuple(static_cast<int>(i.dtype), static_cast<int>(i.math), static_cast<int>(i.backward),
                               i.hidden, i.rows, i.threads, i.shared_bytes));
  return list;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA sweeps of fused_rin; see csrc/problem.h for the meaning of the arguments.";
  m.def("sweep_block", &sweep_block);
  m.def("instances", &instances, "(dtype, math, backward, hidden, rows, threads, shared bytes) of every kernel.");
}
