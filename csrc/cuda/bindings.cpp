// The Python module fused_rin._cuda: raw addresses, sizes and a stream in, exceptions out. Callers have checked.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "../python_problem.h"
#include "block.h"

namespace py = pybind11;
using namespace fused_rin;

namespace {

// Math, hidden, rows and ctas of the instance; rows of a tile, or 0; how much of D is padding; the workspace's address
// and bytes.
using KernelId = std::tuple<int, int, int, int, int64_t, int64_t, Address, int64_t>;
using CarriedAddresses = std::tuple<Address, Address>;  // carried_in, carried_out

void launch(Problem p, const KernelId& kernel, int device, Address stream) {
  const auto& [math, hidden, rows, ctas, tile_rows, padding, workspace, workspace_bytes] = kernel;
  p.tile_rows = tile_rows;
  p.padding = padding;
  p.workspace = pointer<void>(workspace);
  p.workspace_bytes = workspace_bytes;
  launch_block(p, static_cast<Math>(math), hidden, rows, ctas, device, pointer<void>(stream));
}

void sweep_block(const Sizes& sizes, const Rule& rule, const RowAddresses& rows, const SweepAddresses& tensors,
                 const KernelId& kernel, int device, Address stream) {
  launch(make_problem(sizes, rule, rows, tensors), kernel, device, stream);
}

// Some steps of a recurrence: the state comes and goes as it is carried.
void sweep_block_of_span(const Sizes& sizes, const Rule& rule, const RowAddresses& rows, const SweepAddresses& tensors,
                         const CarriedAddresses& carried, const KernelId& kernel, int device, Address stream) {
  Problem p = make_problem(sizes, rule, rows, tensors);
  p.carried_in = pointer<const float>(std::get<0>(carried));
  p.carried_out = pointer<float>(std::get<1>(carried));
  launch(p, kernel, device, stream);
}

void sweep_block_of_units(const Sizes& sizes, const Rule& rule, const RowAddresses& rows, const SweepAddresses& tensors,
                          const UnitAddresses& units, const KernelId& kernel, int device, Address stream) {
  launch(with_units(make_problem(sizes, rule, rows, tensors), units), kernel, device, stream);
}

py::list instances() {
  py::list list;
  for (const BlockInstance& i : block_instances())
    list.append(py::make_tuple(static_cast<int>(i.dtype), static_cast<int>(i.math), static_cast<int>(i.backward),
                               static_cast<int>(i.units), i.hidden, i.rows, i.ctas, i.threads, i.shared_bytes,
                               i.workspace_bytes));
  return list;
}

// CUDA versions as 1000 * major + 10 * minor: the newest that the driver supports (0 without one), and the module's
// own.
std::tuple<int, int> versions() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = 0;
  return {driver, runtime};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA sweeps of fused_rin; see csrc/problem.h for the meaning of the arguments.";
  m.def("sweep_block", &sweep_block);
  m.def("sweep_block_of_span", &sweep_block_of_span);
  m.def("sweep_block_of_units", &sweep_block_of_units);
  m.def("instances", &instances,
        "(dtype, math, backward, units, hidden, rows, ctas, threads, shared bytes, workspace bytes of a tile) of every "
        "kernel.");
  m.def("versions", &versions, "(driver, runtime) in CUDA's numbers, 12040 for 12.4.");
  m.attr("architectures") = FUSED_RIN_CUDA_ARCHS;  // that there is machine code for, such as "80 90a"
  m.attr("ptx") = FUSED_RIN_CUDA_PTX;              // and PTX, for what comes after them
}
