// The problem every backend solves, as plain data: no torch, no Python.
//
// G independent recurrences over one packed, time-major batch. A *row* is the G * D contiguous values of one
// (time, batch) pair; row(t, b) = (offsets ? offsets[t] : t * batch) + b.
//
// Both sweeps are one loop, "elementwise, then state times matrix plus skip times state":
//
//     forward   (t ascending)    x = act(in_t + c)                 out_t = x    c = x U^T + skip * x
//     backward  (t descending)   x = (in_t + c) * act'(saved_t)    out_t = x    c = x U   + skip * x
//
// where forward starts from c = h0 U^T + skip * h0 and leaves h_n = x in state_out, and backward starts from
// c = state_in (the gradient of h_n) and leaves the last c (the gradient of h0) in state_out.
// For the last `num_reversed` recurrences, "ascending" and "descending" change places.
//
// That is the form "inside", the RIN's. The skip may stand elsewhere, with a factor s_i for each unit and, outside,
// another one, a_i (products by s, a and f' are unit by unit). g is the gradient of the state, d that of pre:
//
//     outside (a leaky rate network)         forward   z = f(in_t + x U^T)    x = s x + a z + noise_t    out_t = x
//                                            backward  g = in_t + d U + s g    d = g a f'(z_t)            out_t = d
//     current (the same network in currents) forward   x = in_t + f(x) U^T + s x                          out_t = x
//                                            backward  d = in_t + f'(saved_t) (d U) + s d                 out_t = d
//
// so what is multiplied by the matrix and what is carried differ, forward in the last, backward in the first.
#pragma once

#include <cstdint>

namespace fused_rin {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum class Activation : int { kNone = 0, kReLU = 1, kTanh = 2, kSigmoid = 3, kSoftplus = 4, kLeakyReLU = 5 };
enum class Form : int { kInside = 0, kOutside = 1, kCurrent = 2 };

struct Problem {
  int64_t steps;         // T
  int64_t batch;         // B
  int64_t groups;        // G: heads x directions
  int64_t hidden;        // D
  int64_t num_reversed;  // recurrences g >= G - num_reversed run from the last step to the first
  DType dtype;           // of every tensor below; 16-bit types accumulate and carry the state in float32
  Activation activation;
  bool backward;
  double skip;             // s; 0 means that the state is not added at all (0 * inf must not make a NaN)
  const int64_t* lengths;  // [B], steps of each row, or null: all have T. Past its length a row keeps its state
  const int64_t* offsets;  // [T], first row of each step (packed sequences), or null: t * B
  const uint8_t* resets;   // [rows], nonzero: an episode starts here, no state crosses into this row; or null
  const void* weight;      // [G, D, D] U, contiguous, U[i][j] is what h_j gives to a_i, in both sweeps
  const void* in;          // [rows, G, D] pre | gradient of out (null: zero)
  const void* saved;       // unused      | out; outside z
  const void* state_in;    // [B, G, D] h0 | gradient of h_n (null: zero)
  void* out;               // [rows, G, D] h | gradient of pre; rows past a length are written as zero. May be `in`
  void* state_out;         // [B, G, D] h_n | gradient of h0
  int64_t padding;         // how many of the D units, the last ones, are there for alignment alone; they stay 0
  // Deep transitions, of a layer of one recurrence on a CPU, form inside: each step is K of them, with a matrix each,
  //     x^1 = act(in_t + (U_1 + s) x_{t-1}),  x^k = act(b_k + (U_k + s) x^{k-1}),  out_t = x^K
  // (Pascanu et al. 2013, arXiv 1312.6026). weight is [K, D, D] then.
  int64_t transitions;  // K, or 0: one
  int64_t plane;        // rows of each of the planes of `inner`
  void* inner;          // [K - 1, rows, D] x^1 to x^(K-1), written (or null: not wanted) | read
  bool scalar_states;   // state_in and state_out are scalars, as they are carried: CPU, where a call ends mid-sequence

  // CUDA, where several blocks share a tile
  int64_t tile_rows;        // batch rows of a tile, or 0: as many as the kernel can take
  void* workspace;          // of a grid: what its blocks hand each other; overwritten, aligned to 16 bytes
  int64_t workspace_bytes;  // as many tiles run at a time as it has room for
  int64_t first_tile;       // of a launch; internal

  // CUDA, 16-bit types, where a call ends mid-sequence: what is carried, unrounded, or null
  const float* carried_in;  // [B, G, D], of which state_in is the rounded copy; with state_in alone
  float* carried_out;       // [B, G, D], written beside state_out

  // Units with factors of their own. Scalars here are float32, float64 with a dtype of float64.
  Form form;
  const void* skips;    // [G, D] scalars, s of each unit in place of `skip`; null only inside, where `skip` is for all
  const void* gains;    // [G, D] scalars, a of each unit; outside
  const void* initial;  // [B, G, D] h0, or null: zero; current, backward
  const void* noise;    // [rows, G, D] added to the state, or null; outside, forward
  void* aside;          // [rows, G, D] outside, or null: not wanted. z | gradient of the state
};

inline int64_t transitions_of(const Problem& p) { return p.transitions > 1 ? p.transitions : 1; }

}  // namespace fused_rin
