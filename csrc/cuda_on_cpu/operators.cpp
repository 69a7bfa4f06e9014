// torch.ops.fused_rin_fibres: what csrc/operators/cuda.cpp does with CUDA tensors, for CPU tensors and on fibres.
#include <launch.h>

#include <numeric>

#include "../cuda/plan.h"
#include "../operators/sweep.h"

namespace fused_rin::operators {
namespace {

constexpr DeviceLimits kH200{9, 0, 132, 227 * 1024, 65536, 16};

void run(const Problem& p, int64_t rows, int, const Workspace& workspace) {
  const int64_t size = p.dtype == DType::kFloat32 ? 4 : 2, row = p.groups * p.hidden * size;
  const auto bytes = [](int64_t count) { return static_cast<size_t>(count); };
  launch_tensors = {
      {"lengths", p.lengths, bytes(p.batch * 8), false},
      {"offsets", p.offsets, bytes(p.steps * 8), false},
      {"resets", p.resets, bytes((rows + 3) / 4 * 4), false},
      {"weight", p.weight, bytes(row * p.hidden), false},
      {"in", p.in, bytes(rows * row), false},
      {"saved", p.saved, bytes(rows * row), false},
      {"state_in", p.state_in, bytes(p.batch * row), false},
      {"out", p.out, bytes(rows * row), true},
      {"state_out", p.state_out, bytes(p.batch * row), true},
      {"skips", p.skips, bytes(p.groups * p.hidden * 4), false},
      {"gains", p.gains, bytes(p.groups * p.hidden * 4), false},
      {"initial", p.initial, bytes(p.batch * row), false},
      {"noise", p.noise, bytes(rows * row), false},
      {"aside", p.aside, bytes(rows * row), true},
  };
  const BlockChoice chosen =
      plan_block(p.batch, p.groups, p.hidden - p.padding, p.dtype, false, kH200, p.skips != nullptr);
  Problem problem = p;
  problem.tile_rows = chosen.tile_rows;
  problem.workspace_bytes = chosen.workspace_bytes;
  if (chosen.workspace_bytes) problem.workspace = workspace(chosen.workspace_bytes);
  launch_tensors.push_back({"workspace", problem.workspace, bytes(chosen.workspace_bytes), true});
  const BlockInstance& kernel = *chosen.kernel;
  launch_block(problem, kernel.math, kernel.hidden, kernel.rows, kernel.ctas, 0, nullptr);
}

}  // namespace

constexpr Device kFibres{"cuda", [](const Tensor& tensor) { return tensor.is_cpu(); }, 16, run};

}  // namespace fused_rin::operators

STABLE_TORCH_LIBRARY(fused_rin_fibres, library) { fused_rin::operators::define_sweeps(library); }

STABLE_TORCH_LIBRARY_IMPL(fused_rin_fibres, CompositeExplicitAutograd, library) {
  fused_rin::operators::implement_sweeps<fused_rin::operators::kFibres>(library);
  fused_rin::operators::implement_units<fused_rin::operators::kFibres>(library);
}
