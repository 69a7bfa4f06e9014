// The Python module fused_rin._native: raw addresses and sizes in, exceptions out. Callers have checked everything.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/openmp.h"
#include "cpu/sweep.h"

namespace py = pybind11;
using namespace fused_rin;

namespace {

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

Problem make_problem(int64_t steps, int64_t batch, int64_t groups, int64_t hidden, int64_t num_reversed, int dtype,
                     int activation, bool backward, double skip) {
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
  return p;
}

// One plain call, no default arguments and no keywords: it stands on the path of every step of a streaming model.
void sweep(int64_t steps, int64_t batch, int64_t groups, int64_t hidden, int64_t num_reversed, int dtype,
           int activation, bool backward, double skip, uintptr_t lengths, uintptr_t offsets, uintptr_t resets,
           uintptr_t weight, uintptr_t in, uintptr_t saved, uintptr_t state_in, uintptr_t out, uintptr_t state_out,
           int max_threads, const std::string& isa) {
  Problem p = make_problem(steps, batch, groups, hidden, num_reversed, dtype, activation, backward, skip);
  p.lengths = address<const int64_t>(lengths);
  p.offsets = address<const int64_t>(offsets);
  p.resets = address<const uint8_t>(resets);
  p.weight = address<const void>(weight);
  p.in = address<const void>(in);
  p.saved = address<const void>(saved);
  p.state_in = address<const void>(state_in);
  p.out = address<void>(out);
  p.state_out = address<void>(state_out);
  const Kernels& kernels = cpu_kernels(isa);
  py::gil_scoped_release release;
  sweep_cpu(p, nullptr, kernels, max_threads);
}

// A layer's forward pass: the input product and the sweep. h_n is state_out, h0 state_in.
void layer_forward(int64_t steps, int64_t batch, int64_t groups, int64_t hidden, int64_t num_reversed, int dtype,
                   int activation, double skip, uintptr_t lengths, uintptr_t offsets, uintptr_t resets, int64_t inputs,
                   uintptr_t x, uintptr_t w_ih, uintptr_t w_hh, uintptr_t b_ih, uintptr_t b_hh, uintptr_t h0,
                   uintptr_t out, uintptr_t h_n, int max_threads, const std::string& isa) {
  Problem p = make_problem(steps, batch, groups, hidden, num_reversed, dtype, activation, false, skip);
  p.lengths = address<const int64_t>(lengths);
  p.offsets = address<const int64_t>(offsets);
  p.resets = address<const uint8_t>(resets);
  p.weight = address<const void>(w_hh);
  p.state_in = address<const void>(h0);
  p.out = address<void>(out);
  p.state_out = address<void>(h_n);
  Layer layer{};
  layer.inputs = inputs;
  layer.x = address<const void>(x);
  layer.w_ih = address<const void>(w_ih);
  layer.b_ih = address<const void>(b_ih);
  layer.b_hh = address<const void>(b_hh);
  const Kernels& kernels = cpu_kernels(isa);
  py::gil_scoped_release release;
  sweep_cpu(p, &layer, kernels, max_threads);
}

// A layer's backward pass, of one recurrence: all gradients from the output and the input.
void layer_backward(int64_t steps, int64_t batch, int64_t hidden, int64_t num_reversed, int dtype, int activation,
                    double skip, uintptr_t lengths, uintptr_t offsets, uintptr_t resets, int64_t inputs, uintptr_t x,
                    uintptr_t w_ih, uintptr_t w_hh, uintptr_t h0, uintptr_t out, uintptr_t grad_out, uintptr_t grad_h_n,
                    uintptr_t grad_x, uintptr_t grad_w_ih, uintptr_t grad_w_hh, uintptr_t grad_bias, uintptr_t grad_h0,
                    int max_threads, const std::string& isa) {
  Problem p = make_problem(steps, batch, 1, hidden, num_reversed, dtype, activation, true, skip);
  p.lengths = address<const int64_t>(lengths);
  p.offsets = address<const int64_t>(offsets);
  p.resets = address<const uint8_t>(resets);
  p.weight = address<const void>(w_hh);
  p.in = address<const void>(grad_out);
  p.saved = address<const void>(out);
  p.state_in = address<const void>(grad_h_n);
  p.state_out = address<void>(grad_h0);
  Layer layer{};
  layer.inputs = inputs;
  layer.x = address<const void>(x);
  layer.w_ih = address<const void>(w_ih);
  layer.h0 = address<const void>(h0);
  layer.grad_x = address<void>(grad_x);
  layer.grad_w_ih = address<void>(grad_w_ih);
  layer.grad_w_hh = address<void>(grad_w_hh);
  layer.grad_bias = address<void>(grad_bias);
  const Kernels& kernels = cpu_kernels(isa);
  py::gil_scoped_release release;
  sweep_cpu(p, &layer, kernels, max_threads);
}

// A few steps of a layer for inference; called once per arriving sample, so it is as plain as sweep().
// x [T, B, inputs], out [T, B, G * D]; h and h_n [B, G * D], h_n may be null.
void step(int64_t steps, int64_t batch, int64_t inputs, int64_t groups, int64_t hidden, int dtype, int activation,
          double skip, uintptr_t w_ih, uintptr_t w_hh, uintptr_t b_ih, uintptr_t b_hh, uintptr_t x, uintptr_t h,
          uintptr_t out, uintptr_t h_n, int max_threads, const std::string& isa) {
  Step s{batch,
         inputs,
         groups,
         hidden,
         static_cast<DType>(dtype),
         static_cast<Activation>(activation),
         skip,
         address<const void>(w_ih),
         address<const void>(w_hh),
         address<const void>(b_ih),
         address<const void>(b_hh),
         nullptr,
         address<const void>(h),
         nullptr,
         nullptr};
  const int64_t size = s.dtype == DType::kFloat64 ? 8 : s.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t x_bytes = batch * inputs * size;
  const int64_t out_bytes = batch * groups * hidden * size;
  const Kernels& kernels = cpu_kernels(isa);
  py::gil_scoped_release release;
  for (int64_t t = 0; t < steps; ++t) {
    s.x = address<const void>(x + t * x_bytes);
    s.out = address<void>(out + t * out_bytes);
    if (t + 1 == steps) s.h_n = address<void>(h_n);
    step_cpu(s, kernels, max_threads);
    s.h = s.out;
  }
}

// `inputs` is that of a layer, or 0 for the bare recurrence.
py::dict plan(int64_t steps, int64_t batch, int64_t groups, int64_t hidden, int64_t inputs, int dtype, int max_threads,
              const std::string& isa) {
  const Problem p = make_problem(steps, batch, groups, hidden, 0, dtype, 0, false, 1);
  Layer layer{};
  layer.inputs = inputs;
  const Kernels& kernels = cpu_kernels(isa);
  const CpuPlan plan = plan_cpu(p, inputs ? &layer : nullptr, kernels, max_threads);
  static constexpr const char* kSharing[] = {"nothing", "rows", "outputs"};
  py::dict result;
  result["isa"] = kernels.name;
  result["threads"] = plan.threads;
  result["sharing"] = kSharing[static_cast<int>(plan.sharing)];
  result["lanes"] = plan.layout.lanes;
  result["vectors"] = plan.layout.vecs;
  result["blocks"] = plan.layout.blocks;
  result["chains"] = plan.layout.chains;
  return result;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : cpu_kernels()) names.push_back(kernels->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU sweeps of fused_rin; see csrc/problem.h for the meaning of the arguments.";
  m.def("sweep", &sweep);
  m.def("prefer_huge_pages", [](uintptr_t memory, size_t bytes) { prefer_huge_pages(address<void>(memory), bytes); });
  m.def("layer_forward", &layer_forward);
  m.def("layer_backward", &layer_backward);
  m.def("step", &step);
  m.def("plan", &plan, py::arg("steps"), py::arg("batch"), py::arg("groups"), py::arg("hidden"), py::arg("inputs"),
        py::arg("dtype"), py::arg("max_threads"), py::arg("isa"));
  m.def("has_torchs_threads", &has_torchs_threads);
  m.def("use_torchs_threads", &use_torchs_threads);
  m.def("isas", &isas, "Instruction sets built in and usable on this processor, best first.");
}
