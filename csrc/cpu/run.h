// The CPU backend: picks an instruction set and a plan, packs the matrix, runs the sweep.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../problem.h"
#include "crowd.h"
#include "sweep.h"

namespace fused_rin {

// Instruction sets this library holds and this processor has, best first.
const std::vector<const Kernels*>& cpu_kernels();
// By name, "" for the best; throws std::invalid_argument that lists what there is.
const Kernels& cpu_kernels(const std::string& name);

// What several threads divide among them.
enum class Sharing {
  kNothing,  // there is one
  kRows,     // each has rows of its own
  kOutputs,  // each has outputs of its own, of all rows; they meet once a step
};

struct CpuPlan {
  int threads;
  Sharing sharing;
  Layout layout;
  double cycles_per_step;  // what the cost model expects
};

// `layer` is null for the bare recurrence.
CpuPlan plan_cpu(const Problem&, const Layer* layer, const Kernels&, const Company&);

void sweep_cpu(const Problem&, const Layer* layer, const Kernels&, int max_threads);
// Scalars that a layer's backward sweep in several calls keeps its sums in (Sums).
int64_t sums_size(const Problem&, const Layer&, const Kernels&);
// The ends of spans of at least so many steps each but the last, counted as a backward sweep of this recurrence walks.
std::vector<int64_t> spans_cpu(const Problem&, int64_t group, int64_t least);

// Asks the system to back fresh memory by huge pages: 20 page faults for 40 MB instead of 9,800, which took as long as
// the forward pass that writes them. Does nothing where there are none.
void prefer_huge_pages(void* memory, size_t bytes);

void step_cpu(const Step&, const Kernels&, int max_threads);

}  // namespace fused_rin
