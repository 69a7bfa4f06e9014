// torch.ops.fused_rin.* without Python: the schemas, and the kernels of CPU (and meta) tensors.
//
// On PyTorch's stable ABI: one binary serves every release from 2.10 on. The Python package loads this library too, for
// its schemas; it puts its own functions, which know every backend, before these kernels, which stand behind all
// devices (python/fused_rin/ops.py).
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/run.h"
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

void run(const Problem& p, int64_t rows, int, const Workspace&) {
  if (p.offsets) check_offsets(p, rows);
  // Whoever comes first looks; nobody waits, so a fork from another thread's call can leave nothing locked.
  static std::atomic<const Kernels*> chosen{nullptr};
  const Kernels* kernels = chosen.load(std::memory_order_relaxed);
  if (!kernels) {
    const char* name = std::getenv("FUSED_RIN_CPU_ISA");  // as the Python package reads it
    try {
      kernels = &cpu_kernels(name ? name : "");
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("FUSED_RIN_CPU_ISA: ") + error.what());
    }
    chosen.store(kernels, std::memory_order_relaxed);
  }
  sweep_cpu(p, nullptr, *kernels, static_cast<int>(torch::stable::get_num_threads()));
}

}  // namespace

constexpr Device kCpu{"cpu", [](const Tensor& tensor) { return tensor.is_cpu(); }, 1, run};

}  // namespace fused_rin::operators

STABLE_TORCH_LIBRARY(fused_rin, library) { fused_rin::operators::define_sweeps(library); }

STABLE_TORCH_LIBRARY_IMPL(fused_rin, CompositeExplicitAutograd, library) {
  fused_rin::operators::implement_sweeps<fused_rin::operators::kCpu>(library);
  fused_rin::operators::implement_units<fused_rin::operators::kCpu>(library);
}
