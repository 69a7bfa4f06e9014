// Which rows run at which step, and where they lie. Compiled once per instruction set (vec.h).
#pragma once

#include "sweep.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

// How many of the rows, the first ones, have a step t.
inline int64_t rows_at(const Problem& p, const RowList& rows, int64_t t) {
  if (!rows.lengths) return t < p.steps ? rows.count : 0;
  int64_t low = 0, high = rows.count;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (rows.lengths[mid] > t) {
      low = mid + 1;
    } else {
      high = mid;
    }
  }
  return low;
}

inline int64_t row_of(const Problem& p, int64_t t, int64_t b) { return (p.offsets ? p.offsets[t] : t * p.batch) + b; }

// A sweep goes through its steps 0, 1, ... in this direction of time.
inline bool is_ascending(const Problem& p, int64_t group) { return (group < p.groups - p.num_reversed) != p.backward; }
inline int64_t time_of(const Problem& p, bool ascending, int64_t step) { return ascending ? step : p.steps - 1 - step; }

// Steps [begin, end) of a sweep and the rows that run then, one after the other: the row r of step i is number
// base[i - begin] + r, in its transition k number k * rows() + that.
struct Chunk {
  int64_t begin = 0, end = 0;
  int64_t base[kMaxChunkSteps + 1];

  int64_t rows() const { return base[end - begin]; }

  // The next steps, as many as have `most` rows together, but at least one. False when there are none left.
  bool advance(const Problem& p, const RowList& rows, bool ascending, int64_t most) {
    begin = end;
    base[0] = 0;
    while (end < p.steps && end - begin < kMaxChunkSteps) {
      const int64_t count = base[end - begin] + rows_at(p, rows, time_of(p, ascending, end));
      if (end > begin && count > most) break;
      base[++end - begin] = count;
    }
    return end > begin;
  }
};

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
