// torch.ops.fused_rin.* without Python: the schemas, and the kernels of CPU (and meta) tensors.
//
// On PyTorch's stable ABI: one binary serves every release from 2.10 on. The Python package loads this library too, for
// its schemas; it puts its own functions, which know every backend, before these kernels, which stand behind all
// devices (python/fused_rin/ops.py).
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "../cpu/sweep.h"
#include "sweep.h"

namespace fused_rin::operators {
namespace {

// A wrong offset of a packed batch would be read, and written, outside of the tensors.
void check_offsets(const Problem& p, int64_t rows) {
  int64_t step = 0;  // up to here the last sequence that runs in a step is known
  for (int64_t b = p.batch - 1; b >= 0; --b)
    for (const int64_t end = std::clamp<int64_t>(p.lengths[b], 0, p.steps); step < end; ++step)
      check(p.offsets[step] >= 0 && p.offsets[step] + b < rows, "offsets[", step, "] is ", p.offsets[step],
            " and sequence ", b, " runs in that step, but there are ", rows, " rows");
}

void run(const Problem& p, int64_t rows) {
  if (p.offsets) check_offsets(p, rows);
  static const Kernels& kernels = []() -> const Kernels& {
    const char* name = std::getenv("FUSED_RIN_CPU_ISA");  // as the Python package reads it
    return cpu_kernels(name ? name : "");
  }();
  sweep_cpu(p, nullptr, kernels, static_cast<int>(torch::stable::get_num_threads()));
}

Result sweep_forward(const Tensor& pre, const Tensor& weight, const Optional& h0, const Optional& lengths,
                     const Optional& offsets, const Optional& resets, double skip, const std::string& activation,
                     int64_t num_reversed, const std::string& backend) {
  return sweep({pre, weight, h0, lengths, offsets, resets, skip, activation, num_reversed, backend, nullptr}, "cpu",
               run);
}

Result sweep_backward(const Optional& grad_out, const Optional& grad_h_n, const Tensor& weight, const Tensor& out,
                      const Optional& lengths, const Optional& offsets, const Optional& resets, double skip,
                      const std::string& activation, int64_t num_reversed, const std::string& backend) {
  return sweep({out, weight, grad_h_n, lengths, offsets, resets, skip, activation, num_reversed, backend, &grad_out},
               "cpu", run);
}

}  // namespace
}  // namespace fused_rin::operators

STABLE_TORCH_LIBRARY(fused_rin, m) {
  m.def(
      "sweep_forward(Tensor pre, Tensor weight, Tensor? h0, Tensor? lengths, Tensor? offsets, Tensor? resets, "
      "float skip, str activation, int num_reversed, str backend) -> (Tensor, Tensor)");
  m.def(
      "sweep_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor weight, Tensor out, Tensor? lengths, "
      "Tensor? offsets, Tensor? resets, float skip, str activation, int num_reversed, str backend) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rin, CompositeExplicitAutograd, m) {
  m.impl("sweep_forward", TORCH_BOX(&fused_rin::operators::sweep_forward));
  m.impl("sweep_backward", TORCH_BOX(&fused_rin::operators::sweep_backward));
}
