// What the sweep of one instruction set looks like from outside.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "team.h"

namespace fused_rin {

// How the matrix lies in memory while the sweep runs: cut into blocks of a few vectors of outputs, each block a panel
// [k][outputs of the block], so that the inner loop reads it front to back, and padded to whole vectors.
struct Layout {
  int64_t hidden;  // D
  int64_t lanes;   // scalars in a vector
  int64_t vecs;    // vectors that hold D scalars
  int64_t blocks;  // panels; block b starts at vector b * vecs / blocks, so widths differ by at most one
  int64_t chains;  // independent sums per output; depends on D alone, so that no result depends on the batch
  int64_t chunks;  // parts of the depth with sums of their own; more than one only for a batch of one row
  int64_t padded() const { return vecs * lanes; }
  int64_t first_vec(int64_t block) const { return block * vecs / blocks; }
};

// What one thread does: some rows of one recurrence, all outputs or (in a team) some blocks of them.
struct Part {
  int64_t group;
  int64_t num_rows;
  const int64_t* order;    // [num_rows] batch index of each row, longest sequence first
  const int64_t* lengths;  // [num_rows] in that order, each within [0, T]; null: all have T
  int64_t block_begin, block_end;
  const void* panels;  // packed U of this recurrence
  bool finite;         // no Inf and no NaN in it: a zero state may be skipped
  void* state[2];      // each [num_rows, padded], scalars; shared by the team
  void* scratch;       // kScratchScalars scalars of this thread's own
  int32_t* index;      // [hidden] likewise
  Team* team;          // null when no other thread works on these rows
  int rank;
};

// Rows of a matrix a step reads side by side: sums enough to hide the latency of a multiply-add.
constexpr int64_t kStepOutputs = 8;

// One step of a layer for inference, from the weights as torch holds them (step.h). All contiguous.
struct Step {
  int64_t batch, inputs, groups, hidden;
  DType dtype;
  Activation activation;
  double skip;
  const void *w_ih, *w_hh, *b_ih, *b_hh;  // [G * D, inputs], [G, D, D], [G * D] or null
  const void *x, *h;                      // [B, inputs], [B, G * D] or null: zero
  void *out, *h_n;                        // [B, G * D], and the same once more or null
};

struct Kernels {
  const char* name;
  int64_t vector_bytes;
  int64_t narrow_block;  // vectors in a block when several rows share a tile
  int64_t wide_block;    // vectors in a block for a single row
  // Writes panels [block_begin, block_end) of one recurrence; returns whether all they hold is finite.
  bool (*pack)(const Problem&, const Layout&, int64_t group, int64_t block_begin, int64_t block_end, void* panels);
  void (*sweep)(const Problem&, const Layout&, const Part&);
  void (*step)(const Step&, int64_t output_begin, int64_t output_end);
};

constexpr int64_t kMaxTileRows = 6;
constexpr int64_t kMaxChunks = 8;
constexpr int64_t kScratchScalars = kMaxChunks * 8 * 16;  // rows or chunks x widest block x most lanes

// One per build of kernels.cpp; which of them there are, CMakeLists.txt knows by the processor's family.
const Kernels* kernels_neon();
const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

}  // namespace fused_rin
