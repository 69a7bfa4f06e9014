// Where a long layer may be cut, so that its gradients do not tell: a backward sweep adds up its weight gradients chunk
// after chunk (rows.h), and each span is a number of whole ones.

#include <algorithm>
#include <functional>

#define FUSED_RIN_ISA spans  // of the steps alone: the same for every instruction set
#include "rows.h"
#include "run.h"

namespace fused_rin {

std::vector<int64_t> spans_cpu(const Problem& p, int64_t group, int64_t least) {
  std::vector<int64_t> lengths;
  for (int64_t b = 0; p.lengths && b < p.batch; ++b) lengths.push_back(std::clamp<int64_t>(p.lengths[b], 0, p.steps));
  std::sort(lengths.begin(), lengths.end(), std::greater<>());
  const RowList rows{p.batch, nullptr, p.lengths ? lengths.data() : nullptr};
  std::vector<int64_t> ends;
  int64_t begin = 0;
  for (spans::Chunk chunk; chunk.advance(p, rows, spans::is_ascending(p, group), kOuterDepth);) {
    if (chunk.end - begin < least && chunk.end < p.steps) continue;
    ends.push_back(begin = chunk.end);
  }
  return ends;
}

}  // namespace fused_rin
