// The Python module fused_rin._native: raw addresses and sizes in, exceptions out. Callers have checked everything.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/openmp.h"
#include "cpu/run.h"
#include "python_problem.h"
#include "without_gil.h"

namespace py = pybind11;
using namespace fused_rin;

namespace {

void run(const Problem& p, const Layer* layer, int max_threads, const std::string& isa) {
  const Kernels& kernels = cpu_kernels(isa);
  const WithoutGil released;
  sweep_cpu(p, layer, kernels, max_threads);
}

void sweep(const Sizes& sizes, const Rule& rule, const RowAddresses& rows, const SweepAddresses& tensors,
           int max_threads, const std::string& isa) {
  run(make_problem(sizes, rule, rows, tensors), nullptr, max_threads, isa);
}

void sweep_of_units(const Sizes& sizes, const Rule& rule, const RowAddresses& rows, const SweepAddresses& tensors,
                    const UnitAddresses& units, int max_threads, const std::string& isa) {
  run(with_units(make_problem(sizes, rule, rows, tensors), units), nullptr, max_threads, isa);
}

// A layer's forward pass: the input product and the sweep. Of `tensors`, state_in is h0, state_out h_n, and `in` is
// added to the product.
using InputAddresses = std::tuple<int64_t, Address, Address, Address, Address>;  // I, x, w_ih, b_ih, b_hh

Layer make_layer(const InputAddresses& input) {
  const auto& [inputs, x, w_ih, b_ih, b_hh] = input;
  Layer layer{};
  layer.inputs = inputs;
  layer.x = pointer<const void>(x);
  layer.w_ih = pointer<const void>(w_ih);
  layer.b_ih = pointer<const void>(b_ih);
  layer.b_hh = pointer<const void>(b_hh);
  return layer;
}

void layer_forward(const Sizes& sizes, const Rule& rule, const RowAddresses& rows, const SweepAddresses& tensors,
                   const InputAddresses& input, int max_threads, const std::string& isa) {
  const Layer layer = make_layer(input);
  run(make_problem(sizes, rule, rows, tensors), &layer, max_threads, isa);
}

void layer_forward_of_units(const Sizes& sizes, const Rule& rule, const RowAddresses& rows,
                            const SweepAddresses& tensors, const UnitAddresses& units, const InputAddresses& input,
                            int max_threads, const std::string& isa) {
  const Layer layer = make_layer(input);
  run(with_units(make_problem(sizes, rule, rows, tensors), units), &layer, max_threads, isa);
}

// A layer's backward pass, of one recurrence: all gradients from the output and the input. Of `tensors`, `in` is the
// gradient of the output, state_in that of h_n, state_out that of h0, and there is no `out`.
using GradientAddresses = std::tuple<Address, Address, Address, Address, Address>;  // of x, w_ih, w_hh, b_ih, b_hh

Layer make_layer(const InputAddresses& input, Address h0, const void* states, const GradientAddresses& gradients) {
  const auto& [grad_x, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh] = gradients;
  Layer layer = make_layer(input);
  layer.h0 = pointer<const void>(h0);
  layer.states = states;
  layer.grad_x = pointer<void>(grad_x);
  layer.grad_w_ih = pointer<void>(grad_w_ih);
  layer.grad_w_hh = pointer<void>(grad_w_hh);
  layer.grad_b_ih = pointer<void>(grad_b_ih);
  layer.grad_b_hh = pointer<void>(grad_b_hh);
  return layer;
}

void layer_backward(const Sizes& sizes, const Rule& rule, const RowAddresses& rows, const SweepAddresses& tensors,
                    const InputAddresses& input, Address h0, const GradientAddresses& gradients, int max_threads,
                    const std::string& isa) {
  const Problem p = make_problem(sizes, rule, rows, tensors);
  const Layer layer = make_layer(input, h0, p.saved, gradients);
  run(p, &layer, max_threads, isa);
}

void layer_backward_of_units(const Sizes& sizes, const Rule& rule, const RowAddresses& rows,
                             const SweepAddresses& tensors, const UnitAddresses& units, const InputAddresses& input,
                             Address h0, Address states, const GradientAddresses& gradients, Address grad_skips,
                             Address grad_gains, int max_threads, const std::string& isa) {
  const Problem p = with_units(make_problem(sizes, rule, rows, tensors), units);
  Layer layer = make_layer(input, h0, pointer<const void>(states), gradients);
  layer.grad_skips = pointer<void>(grad_skips);
  layer.grad_gains = pointer<void>(grad_gains);
  run(p, &layer, max_threads, isa);
}

// Some steps of a layer: states come and go as scalars, and weight gradients are added up over several calls.
void layer_forward_of_span(const Sizes& sizes, const Rule& rule, const RowAddresses& rows,
                           const SweepAddresses& tensors, const UnitAddresses& units, const InputAddresses& input,
                           int max_threads, const std::string& isa) {
  Problem p = with_units(make_problem(sizes, rule, rows, tensors), units);
  p.scalar_states = true;
  const Layer layer = make_layer(input);
  run(p, &layer, max_threads, isa);
}

// Deep transitions: K, the rows of a plane, the planes, and the biases of all but the first or their gradients.
using DeepAddresses = std::tuple<int64_t, int64_t, Address, Address>;

Problem with_transitions(Problem p, const DeepAddresses& deep) {
  p.transitions = std::get<0>(deep);
  p.plane = std::get<1>(deep);
  p.inner = pointer<void>(std::get<2>(deep));
  return p;
}

void layer_forward_deep(const Sizes& sizes, const Rule& rule, const RowAddresses& rows, const SweepAddresses& tensors,
                        const InputAddresses& input, const DeepAddresses& deep, int max_threads,
                        const std::string& isa) {
  const Problem p = with_transitions(make_problem(sizes, rule, rows, tensors), deep);
  Layer layer = make_layer(input);
  layer.b_deep = pointer<const void>(std::get<3>(deep));
  run(p, &layer, max_threads, isa);
}

void layer_backward_deep(const Sizes& sizes, const Rule& rule, const RowAddresses& rows, const SweepAddresses& tensors,
                         const InputAddresses& input, Address h0, const GradientAddresses& gradients,
                         const DeepAddresses& deep, int max_threads, const std::string& isa) {
  const Problem p = with_transitions(make_problem(sizes, rule, rows, tensors), deep);
  Layer layer = make_layer(input, h0, p.saved, gradients);
  layer.grad_b_deep = pointer<void>(std::get<3>(deep));
  run(p, &layer, max_threads, isa);
}

using SumAddresses = std::tuple<Address, Address, bool, bool>;  // memory, blocks, continues, goes_on

void layer_backward_of_span(const Sizes& sizes, const Rule& rule, const RowAddresses& rows,
                            const SweepAddresses& tensors, const UnitAddresses& units, const InputAddresses& input,
                            Address h0, Address states, const GradientAddresses& gradients, Address grad_skips,
                            Address grad_gains, const SumAddresses& sums, int max_threads, const std::string& isa) {
  Problem p = with_units(make_problem(sizes, rule, rows, tensors), units);
  p.scalar_states = true;
  Layer layer = make_layer(input, h0, pointer<const void>(states), gradients);
  layer.grad_skips = pointer<void>(grad_skips);
  layer.grad_gains = pointer<void>(grad_gains);
  const auto& [memory, blocks, continues, goes_on] = sums;
  layer.sums = {pointer<void>(memory), pointer<int64_t>(blocks), continues, goes_on};
  run(p, &layer, max_threads, isa);
}

// Scalars behind the first address of SumAddresses.
int64_t sums_of_spans(const Sizes& sizes, int64_t inputs, int dtype, const std::string& isa) {
  Layer layer{};
  layer.inputs = inputs;
  return sums_size(make_problem(sizes, Rule(dtype, 0, true, 1.0, 0), RowAddresses(), SweepAddresses()), layer,
                   cpu_kernels(isa));
}

// Ends of spans of at least `least` steps, counted from the end of the recurrence.
std::vector<int64_t> spans(const Sizes& sizes, const Rule& rule, const RowAddresses& rows, int64_t least) {
  return spans_cpu(make_problem(sizes, rule, rows, SweepAddresses()), 0, least);
}

using StepSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // T, B, I, G, D
using StepRule = std::tuple<int, int, double>;                              // dtype, activation, skip
using WeightAddresses = std::tuple<Address, Address, Address, Address>;     // w_ih, w_hh, b_ih, b_hh

// A few steps of a layer from the weights as they lie. x [T, B, I], out [T, B, G * D]; h and h_n [B, G * D], h_n may be
// null.
void step(const StepSizes& sizes, const StepRule& rule, const WeightAddresses& weights, Address x, Address h,
          Address out, Address h_n, int max_threads, const std::string& isa) {
  const auto& [steps, batch, inputs, groups, hidden] = sizes;
  const auto& [dtype, activation, skip] = rule;
  const auto& [w_ih, w_hh, b_ih, b_hh] = weights;
  Step s{};
  s.batch = batch;
  s.inputs = inputs;
  s.groups = groups;
  s.hidden = hidden;
  s.dtype = static_cast<DType>(dtype);
  s.activation = static_cast<Activation>(activation);
  s.skip = skip;
  s.w_ih = pointer<const void>(w_ih);
  s.w_hh = pointer<const void>(w_hh);
  s.b_ih = pointer<const void>(b_ih);
  s.b_hh = pointer<const void>(b_hh);
  s.h = pointer<const void>(h);
  const int64_t size = s.dtype == DType::kFloat64 ? 8 : s.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t x_bytes = batch * inputs * size;
  const int64_t out_bytes = batch * groups * hidden * size;
  const Kernels& kernels = cpu_kernels(isa);
  const WithoutGil released;
  for (int64_t t = 0; t < steps; ++t) {
    s.x = pointer<const void>(x + t * x_bytes);
    s.out = pointer<void>(out + t * out_bytes);
    if (t + 1 == steps) s.h_n = pointer<void>(h_n);
    step_cpu(s, kernels, max_threads);
    s.h = s.out;
  }
}

// `inputs` is that of a layer, or 0 for the bare recurrence.
py::dict plan(const Sizes& sizes, int64_t inputs, int dtype, int max_threads, const std::string& isa) {
  const Problem p = make_problem(sizes, Rule(dtype, 0, false, 1.0, 0), RowAddresses(), SweepAddresses());
  Layer layer{};
  layer.inputs = inputs;
  const Kernels& kernels = cpu_kernels(isa);
  const Company company = company_of(max_threads);
  const CpuPlan plan = plan_cpu(p, inputs ? &layer : nullptr, kernels, company);
  static constexpr const char* kSharing[] = {"nothing", "rows", "outputs"};
  py::dict result;
  result["isa"] = kernels.name;
  result["threads"] = plan.threads;
  result["processors"] = company.threads;
  result["crowded"] = company.crowded;
  result["torchs"] = company.torchs != 0 && has_torchs_threads();
  result["sharing"] = kSharing[static_cast<int>(plan.sharing)];
  result["lanes"] = plan.layout.lanes;
  result["terms"] = kernels.unit_terms(p.dtype, plan.layout.tiles);
  result["tiles"] = plan.layout.tiles;
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
  m.doc() = "CPU sweeps of fused_rin; see fused_rin/_native.pyi for the arguments, csrc/problem.h for their meaning.";
  m.attr("MAX_STEP_ROWS") = kMaxStepRows;
  m.def("sweep", &sweep);
  m.def("layer_forward", &layer_forward);
  m.def("layer_backward", &layer_backward);
  m.def("sweep_of_units", &sweep_of_units);
  m.def("layer_forward_of_units", &layer_forward_of_units);
  m.def("layer_backward_of_units", &layer_backward_of_units);
  m.def("layer_forward_deep", &layer_forward_deep);
  m.def("layer_backward_deep", &layer_backward_deep);
  m.def("layer_forward_of_span", &layer_forward_of_span);
  m.def("layer_backward_of_span", &layer_backward_of_span);
  m.def("sums_of_spans", &sums_of_spans);
  m.def("spans", &spans);
  m.def("step", &step);
  m.def("plan", &plan);
  m.def("prefer_huge_pages", [](Address memory, size_t bytes) { prefer_huge_pages(pointer<void>(memory), bytes); });
  m.def("has_torchs_threads", &has_torchs_threads);
  m.def("use_torchs_threads", &use_torchs_threads);
  m.def("processor_quota", &processor_quota);
  m.def("assume_processors", &assume_processors);
  m.def("found_crowded", &found_crowded);
  m.def("forget_crowds", &forget_crowds);
  m.def("end_teams_at", &end_teams_at);
  m.def("isas", &isas, "Instruction sets built in and usable on this processor, best first.");
}
