// The CPU backend: picks an instruction set and a plan, packs the matrix, runs the sweep.
#pragma once

#include <string>
#include <vector>

#include "../problem.h"
#include "kernels.h"

namespace fused_rin {

// Instruction sets this library holds and this processor has, best first.
const std::vector<const Kernels*>& cpu_kernels();
// By name, "" for the best; throws std::invalid_argument that lists what there is.
const Kernels& cpu_kernels(const std::string& name);

struct CpuPlan {
  int threads;
  bool team;  // the threads share every row and meet once a step; otherwise each has rows of its own
  Layout layout;
  double cycles_per_step;  // what the cost model expects
};

CpuPlan plan_cpu(const Problem&, const Kernels&, int max_threads);

void sweep_cpu(const Problem&, const Kernels&, int max_threads);
void step_cpu(const Step&, const Kernels&, int max_threads);

}  // namespace fused_rin
