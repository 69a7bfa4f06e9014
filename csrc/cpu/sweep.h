// What the sweep of one instruction set looks like from outside.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "team.h"

namespace fused_rin {

// Rows of a tile of AMX, and units in one of them.
constexpr int64_t kTileUnits = 16;

// How a matrix lies in memory for `dot`: cut into blocks of a few vectors of outputs, each block a panel
// [k][outputs of the block], so that the inner loop reads it front to back, and padded to whole vectors.
struct Panels {
  int64_t terms;    // of each sum
  int64_t depth;    // units of them, one or two terms (factor.h), k; for tiles filled up with zeros
  bool tiles;       // laid out for products by tiles (tiles.h)
  int64_t outputs;  // sums
  int64_t lanes;    // scalars in a vector
  int64_t vecs;     // vectors that hold the outputs
  int64_t blocks;   // of `width` vectors, the first `wider` of them of one more
  int64_t width, wider;
  void cut(int64_t into) {
    blocks = into;
    width = vecs / into;
    wider = vecs % into;
  }
  int64_t padded() const { return vecs * lanes; }
  // Numbers from one row of such a matrix's outputs, rounded to 16 bits, to the next: a multiple of 64 bytes.
  int64_t halves() const { return (padded() + 31) / 32 * 32; }
  void set_depth(int64_t numbers, int64_t unit, bool by_tiles) {
    terms = numbers;
    tiles = by_tiles;
    depth = (terms + unit - 1) / unit;
    if (tiles) depth = (depth + kTileUnits - 1) / kTileUnits * kTileUnits;
  }
  int64_t scalars() const { return padded() * depth; }
  // Of vector v of a block of `width` numbers: where it begins in the panel, and from one unit of the depth to the
  // next. Tiles lie each in one piece, not over 16 lines that are 256 bytes apart (1 to 3 percent of a step).
  int64_t begin_of(int64_t vec) const { return vec * lanes * (tiles ? depth : 1); }
  int64_t stride_in(int64_t width) const { return tiles ? lanes : width; }
  // No division: a step asks a dozen times, and at D = 128 divisions were 5 percent of it.
  int64_t first_vec(int64_t block) const { return block * width + (block < wider ? block : wider); }
  int64_t first_column(int64_t block) const { return first_vec(block) * lanes; }
  int64_t end_column(int64_t block) const {
    const int64_t end = first_column(block + 1);
    return end < outputs ? end : outputs;
  }
};

// U's panels (terms = outputs = D), and how sums over it are made.
struct Layout : Panels {
  int64_t chains;  // independent sums per output; depends on D alone, so that no result depends on the batch
  // Parts of the depth with sums of their own, of `slice_depth` but for the last; more than one only for a batch of one
  // row.
  int64_t slices, slice_depth;
  int64_t slice_begin(int64_t slice) const {
    const int64_t begin = slice * slice_depth;
    return begin < depth ? begin : depth;
  }
};

// Whether a sweep carries something else than what it multiplies (problem.h).
inline bool splits(const Problem& p) { return p.form == (p.backward ? Form::kOutside : Form::kCurrent); }

// Some rows of the batch, longest sequence first.
struct RowList {
  int64_t count;
  const int64_t* order;    // [count] batch index
  const int64_t* lengths;  // [count], each within [0, T]; null: all have T
};

// Of a layer's backward sweep in several calls, from the last steps to the first ones: what weight gradients have
// summed up so far. All zero: there is one call.
struct Sums {
  void* memory;     // sums_size() scalars, or null: this call's own
  int64_t* blocks;  // how many blocks of kBiasBlock rows they hold
  bool continues;   // they hold what an earlier call has left
  bool goes_on;     // and a later call will write the gradients
};

// What a layer has beside the recurrence (layer.h): the product of its input, made just before the steps that need it,
// and in a backward sweep the gradients of its weights and of its input, added up just after the steps that give them.
struct Layer {
  int64_t inputs;                 // I
  const void* x;                  // [rows, I]
  const void* w_ih;               // [G * D, I]
  const void *b_ih, *b_hh;        // [G * D] or null; forward
  const void* b_deep;             // of the transitions after the first, [K - 1, D] or null; forward
  const void* h0;                 // backward: [B, D] or null, zero
  const void* states;             // backward: [rows, D], the output
  void* grad_x;                   // backward: [rows, I] or null, not wanted
  void *grad_w_ih, *grad_w_hh;    // backward: [D, I] and [K, D, D], or both null
  void *grad_b_ih, *grad_b_hh;    // backward: [D], or both null
  void* grad_b_deep;              // backward: [K - 1, D], or null
  void *grad_skips, *grad_gains;  // backward, where units have factors of their own: [D] scalars or null, gains outside
  Sums sums;
};

// What one thread does: some rows of one recurrence, all outputs or (in a team) some blocks of them.
struct Part {
  int64_t group;
  RowList rows;
  int64_t block_begin, block_end;
  const void* panels;  // packed U of this recurrence, one after the other those of its K transitions
  bool finite;         // no Inf and no NaN in it: a zero state may be skipped
  void* state[2];      // each [rows, padded], scalars; shared by a team; one place for both unless others read it
  void* factors[2];    // each [rows, halves], the states as a product takes them, if that is not as they are (factor.h)
  void* carried;       // [rows, padded] scalars, what the skip is of, where that is not the state (splits)
  void* scratch;       // [a tile's or a band's rows, padded], or [1, padded] and kSliceScalars, scalars, its own
  int32_t* index;      // [D + kListSlack] likewise
  Team* team;          // null when there is one thread
  bool meets;          // threads share these rows: they meet once a step, until the team ends
  int rank, threads;

  // Of a layer.
  const Layer* layer;        // null: the bare recurrence
  RowList all;               // the rows of all threads
  int64_t position, stride;  // row r of this thread is row position + r * stride of all
  const Panels* input;       // W
  const void* input_panels;  // packed W of this recurrence
  void* bias;                // [K, padded] scalars of this thread's own
  void* gathered;            // this thread's own: input of a chunk; backward: what entered its steps (WeightGradient)
  void* chunk_rows[2];       // [max_chunk_rows, padded] scalars: what the sums start from, or gradients of pre
  void* chunk_factors[2];  // [max_chunk_rows, halves], backward: those gradients as a product takes them, like factors
  void* chunk_aside[2];    // backward, outside, with gradients of s or a: the gradients of the state, like chunk_rows
  void* panel;             // backward: [kOuterDepth, kOuterVecs vectors] of this thread's own
  void* gradient;          // backward: sums of all weight gradients
  int64_t* sources;        // backward: [2, max_chunk_rows] of this thread's own
  int64_t max_chunk_rows;
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

// More rows than these are faster as a matrix product than as a dot product each (measured: at 4 rows a step is ahead
// of torch.nn.RNNCell at every D from 8 to 1,024, at 16 rows behind it from D = 512 on).
constexpr int64_t kMaxStepRows = 4;

struct Kernels {
  const char* name;
  int64_t vector_bytes;
  int64_t bfloat16_terms;  // in a unit of a product of bfloat16 (factor.h)
  int64_t narrow_block;    // vectors in a block when several rows share a tile
  int64_t wide_block;      // vectors in a block for a single row
  // Writes panels [block_begin, block_end); returns whether all they hold is finite. The matrix is [outputs, depth], or
  // [depth, outputs] if `transposed`.
  bool (*pack)(DType, const void* matrix, bool transposed, const Panels&, int64_t block_begin, int64_t block_end,
               void* panels);
  void (*sweep)(const Problem&, const Layout&, const Part&);
  void (*step)(const Step&, int64_t output_begin, int64_t output_end);
  // Null, or whether its tiles of bfloat16, and of float16, give the sums that they should.
  bool (*tiles)();
  bool (*half_tiles)();  // no processor that has them was at hand
  int64_t unit_terms(DType dtype, bool by_tiles) const {
    return dtype == DType::kBFloat16 ? bfloat16_terms : dtype == DType::kFloat16 && by_tiles ? 2 : 1;
  }
  // A product of few terms is not worth filling up.
  bool takes_tiles(DType dtype, int64_t terms) const {
    if (terms < 2 * kTileUnits) return false;
    return (tiles && dtype == DType::kBFloat16) || (half_tiles && dtype == DType::kFloat16);
  }
};

constexpr int64_t kMaxTileRows = 6;
constexpr int64_t kMaxRowsByTiles = 32;
constexpr int64_t max_tile_rows(const Panels& l) { return l.tiles ? kMaxRowsByTiles : kMaxTileRows; }
constexpr int64_t kMaxSlices = 8;
constexpr int64_t kListSlack = 8;                       // entries that may be written after a list of nonzero states
constexpr int64_t kSliceScalars = kMaxSlices * 8 * 16;  // slices x widest block x most lanes

// Steps are taken together, as many as make kInputRows rows for an input product (tiles of 6 rows; the result is still
// in the second-level cache when the steps read it) or kOuterDepth for the weight gradients (the longer, the less often
// their sums are loaded and stored), but at least one.
constexpr int64_t kInputRows = 96;
constexpr int64_t kOuterDepth = 256;
constexpr int64_t kOuterVecs = 3;
// Of matrices, what a second-level cache of 1 to 2 MB is trusted with. If U is more, a block of it serves a band of
// rows before the next one does, not a tile of them (time with bands over time without, 64 rows on a Xeon with 2 MB: U
// of 1.0 MB 1.01, 1.3 MB 1.0, 1.6 MB 0.97, 2.3 MB 0.89, 4 MB 0.81).
constexpr int64_t kNearBytes = int64_t{5} << 18, kBandRows = 96;
// By tiles of AMX the input's product may be made in the sums of its step, where W is fetched for its rows alone and
// not for kInputRows of them (time of a step with that over time without: 16, 32 and 64 rows x 128 units 0.84, 0.90,
// 0.90, x 256 1.07, 1.02, 0.98, x 512 1.14, 0.98, 0.93).
constexpr bool makes_near(int64_t rows, int64_t bytes_of_both) {
  return bytes_of_both <= kNearBytes && rows >= (bytes_of_both <= int64_t{1} << 17 ? kTileUnits : kMaxRowsByTiles);
}
// A bias's gradient is a plain sum over all rows, kBiasBlock at a time; kBiasBlock blocks make a block of the next
// level, so that 10^6 rows go through five sums of 16, not one of 10^6 whose error grows with the rows.
constexpr int64_t kBiasBlock = 16;
constexpr int64_t kBiasLevels = 5;
constexpr int64_t kUnitSums = 3;  // of b, and of the units' factors s and a
// Groups of columns of the left factor of those sums, kOuterDepth rows each, a vector for every one or two, that make
// 256 KB.
constexpr int64_t outer_groups(int64_t vector_bytes, int64_t terms) {
  return (int64_t{256} << 10) * terms / (kOuterDepth * vector_bytes);
}
constexpr int64_t kMaxChunkSteps = 256;

// One per build of sweep.cpp; which of them there are, CMakeLists.txt knows by the processor's family.
const Kernels* kernels_neon();
const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();
const Kernels* kernels_amx_fp16();

// Whether processor and system have AMX for bfloat16; asks the system for leave to use it (amx.cpp).
bool has_amx();
// And, where they have, whether for float16 too.
bool has_amx_fp16();

}  // namespace fused_rin
