// State times matrix on tensor cores: A = U (16 outputs x k, in registers for the whole sequence, what does not fit in
// shared memory), B = state^T (k x 8 batch rows). A thread ends up owning pairs of neighbouring outputs.
#pragma once

#include "block.h"
#include "element.cuh"
#include "parts.cuh"
#include "state.cuh"

namespace fused_rin {

template <class Config, bool kBackward>
class MmaProduct;

// Who keeps what where. kRegisterSteps of the matrix's k-steps (32 bytes of k each) live in registers; each costs
// 4 * kTilesM registers a thread. kSlots*: steps in the ring of the streamed tensors, the one at hand included. kCtas
// share the outputs, a cluster or, kGrid, blocks anywhere. kParts: of k, with warps of their own; the first part's own
// the sums.
template <class T_, Math kMath_, int kHidden_, int kRows_, int kWarps_, int kRegisterSteps_, int kSlotsForward_,
          int kSlotsBackward_, int kCtas_ = 1, int kParts_ = 1, bool kGrid_ = false>
struct MmaConfig {
  using T = T_;
  template <bool kBackward>
  using Product = MmaProduct<MmaConfig, kBackward>;
  static constexpr Math kMath = kMath_;
  static constexpr int kHidden = kHidden_, kRows = kRows_, kWarps = kWarps_, kThreads = 32 * kWarps_;
  static constexpr int kCtas = kCtas_, kParts = kParts_, kOutputs = kHidden / kCtas;  // outputs of a CTA
  static constexpr bool kGrid = kGrid_;
  static constexpr int kSlotsForward = kSlotsForward_, kSlotsBackward = kSlotsBackward_;
  static constexpr int kSteps = kHidden / kParts * Element<T>::kBytes / 32;  // k-steps of a warp
  static constexpr int kRegisterSteps = kRegisterSteps_ < kSteps ? kRegisterSteps_ : kSteps;
  static constexpr int kTilesM = kOutputs * kParts / 16 / kWarps, kTilesN = kRows / 8;
  // Independent accumulators per output, so that each tensor core has four chains to choose from: about the latency of
  // an mma over its rate. A small tile waits for the chain, not for the rate.
  // Over a long k, four: of 32 k-steps two chains would take twice the time of the products.
  static constexpr int kTilesACore = kTilesM * kTilesN * kWarps / 4;
  static constexpr int kChains = kTilesACore >= 4 || kMath == Math::kTf32x3 ? 1
                                 : kSteps < 32 || kTilesACore > 1           ? 2
                                                                            : 4;
  // 3xTF32: keep both halves of the matrix where there is room for nearly all of it; else split it anew in every step.
  static constexpr bool kSplitKept = kMath == Math::kTf32x3 && kSteps * kTilesM <= 16;
  static constexpr int kMatrixBytes = (kSteps - kRegisterSteps) * kTilesM * 16 * kThreads;
  static constexpr int kStateBytes = State<T, kHidden, kRows>::kBytes;
  static constexpr int kGivenBytes = (kParts - 1) * kTilesM * kTilesN * 16 * kThreads / kParts;
  static_assert(kOutputs * kParts == kTilesM * 16 * kWarps, "warps share the outputs evenly");
  static_assert(kSteps % 2 == 0, "a load of the state feeds two k-steps");
  static_assert((kMath == Math::kMma) == (Element<T>::kBytes == 2), "float32 goes through tf32");
};

template <class Config, bool kBackward>
class MmaProduct {
  using T = typename Config::T;
  using E = Element<T>;
  using StateT = State<T, Config::kHidden, Config::kRows>;
  using PartsOfK = Parts<Config>;
  static constexpr int kParts = Config::kParts;
  static constexpr int kTilesM = Config::kTilesM, kTilesN = Config::kTilesN, kSteps = Config::kSteps;

 public:
  static constexpr int kColumns = 2 * kTilesN;           // batch rows of a thread
  static constexpr int kPairs = kTilesM * kColumns;      // pair p belongs to column(p)
  static constexpr int kTogether = kTilesM % 2 ? 1 : 2;  // pairs that are neighbours, and p and p + 1
  // Whether what the product is added to goes in as its accumulator. That one truncates once per k-step: harmless for a
  // step's own input, but never for what all steps hand on (see sweep.cuh).
  static constexpr bool kSumInside = !kBackward && Config::kMath == Math::kMma && kParts == 1;
  static constexpr bool kStateIsOutput = Config::kMath != Math::kTf32;  // to the last bit: see to_state

  // `given`: kGivenBytes of shared memory, through which the parts of a sum meet.
  __device__ __forceinline__ MmaProduct(device::SharedMemory shared, uint32_t given, int live_rows)
      : shared_(shared), given_(given) {
    const int g = device::lane_idx() / 4, q = device::lane_idx() % 4;
    // Of a tile of 8, the rows past the batch read the last live one again: a broadcast instead of bank traffic.
    const int row = kTilesN == 1 && g >= live_rows ? live_rows - 1 : g;
    lane_offset_ = StateT::row(row) + 16 * q + PartsOfK::part() * (Config::kHidden / kParts * E::kBytes);
    // Of a cluster it takes registers to their limit, and would be found anew behind the wait for the peers.
    if (Config::kCtas > 1) lane_offset_ = device::opaque(lane_offset_);
  }

  // The pairs that `thread` of the block owns: the first, and from there to pair p, known when compiled.
  static __device__ __forceinline__ int neuron(int thread) {
    return warp_of_part(thread) * kTilesM * 16 + 2 * kTogether * ((thread & 31) / 4);
  }
  static __device__ __forceinline__ int row(int thread) { return 2 * (thread & 3); }
  static __device__ __forceinline__ constexpr int column(int p) { return p / kTogether % kColumns; }
  static __device__ __forceinline__ constexpr int neuron_step(int p) { return output(tile(p)); }
  static __device__ __forceinline__ constexpr int row_step(int p) { return column(p) / 2 * 8 + column(p) % 2; }
  static __device__ __forceinline__ bool owner(int thread) { return PartsOfK::owner(thread); }
  // Where the first pair is in a tile that lies so in shared memory, and from there to pair p.
  template <class Tile>
  static __device__ __forceinline__ uint32_t place(int thread) {
    return Tile::row(row(thread)) + neuron(thread) * E::kBytes;
  }
  template <class Tile>
  static __device__ __forceinline__ constexpr uint32_t place_step(int p) {
    return Tile::row(row_step(p)) + neuron_step(p) * E::kBytes;
  }

  static __device__ __forceinline__ typename E::Pair to_state(typename E::Pair x) {
    if constexpr (Config::kMath == Math::kTf32)
      return {device::to_tf32(device::as_float(x.x)), device::to_tf32(device::as_float(x.y))};
    return x;
  }

  // `first`: of the block's outputs, among all.
  __device__ __forceinline__ void load(const typename E::Pair* weight, int first, int hidden) {
    // What goes to shared memory comes first, while the registers of the rest are free for loads in flight: one by one
    // they would take 0.3 to 0.6 us each, 36 to 52 of them. All at once, behind the others, spilled.
    constexpr int kShared = (kSteps - Config::kRegisterSteps) * kTilesM;
#pragma unroll 8
    for (int i = 0; i < kShared; ++i) {
      const int step = Config::kRegisterSteps + i / kTilesM, m = i % kTilesM;
      uint32_t a[4];
      load_fragment(a, weight, first, hidden, step, m);
      shared_.store(fragment(step, m), uint4{a[0], a[1], a[2], a[3]});
    }
#pragma unroll
    for (int step = 0; step < Config::kRegisterSteps; ++step) {
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        uint32_t a[4];
        load_fragment(a, weight, first, hidden, step, m);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (Config::kSplitKept)
            device::split_tf32(device::as_float(a[i]), a_[step][m][i], a_[step][m][4 + i]);
          else
            a_[step][m][i] = a[i];
        }
      }
    }
  }

  // sum[p] = (x times matrix)[p] for the state at byte `state` of shared memory; += where kSumInside. What is off the
  // critical path goes into the two callbacks: `prepare`, which may set sum, runs while the first loads are in flight,
  // `carry_on` behind the products.
  template <class Prepare, class CarryOn>
  __device__ __forceinline__ void multiply(uint32_t state, float2 (&sum)[kPairs], const Prepare& prepare,
                                           const CarryOn& carry_on) const {
    // As many as cover their latency, about 33 cycles, but 4 registers each.
    constexpr int kFirst = kTilesN > 1 || kTilesM > 2 ? 1 : kSteps < 8 ? kSteps / 2 : 4;
    uint4 first[kFirst][kTilesN];
#pragma unroll
    for (int j = 0; j < kFirst; ++j) load_state(state, j, first[j]);
    prepare();

    float d[Config::kChains][kTilesM][kTilesN][4] = {};
    if constexpr (kSumInside) {
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
          const int p = pair(m, 2 * n);
          d[0][m][n][0] = sum[p].x, d[0][m][n][2] = sum[p].y;
          d[0][m][n][1] = sum[p + kTogether].x, d[0][m][n][3] = sum[p + kTogether].y;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kSteps / 2; ++j) {
      uint4 b[kTilesN];
#pragma unroll
      for (int n = 0; n < kTilesN; ++n)
        if (j < kFirst) b[n] = first[j < kFirst ? j : 0][n];
      if (j >= kFirst) load_state(state, j, b);
      if constexpr (Config::kMath == Math::kTf32x3) {
        // The tensor core truncates its accumulator, in one direction, where an FADD rounds: so only 16 of k are summed
        // there. One accumulator over all of k made 3.4 times the error of torch at D = 128.
        float partial[1][kTilesM][kTilesN][4] = {};
        multiply_pair(j, b, partial);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
          for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) d[0][m][n][i] += partial[0][m][n][i];
          }
        }
      } else {
        multiply_pair(j, b, d);
      }
    }
    carry_on();
    const auto hand_over = [&](int m, int n) {
      const int p = pair(m, 2 * n);
      sum[p] = {d[0][m][n][0], d[0][m][n][2]};
      sum[p + kTogether] = {d[0][m][n][1], d[0][m][n][3]};
    };
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int c = 1; c < Config::kChains; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) d[0][m][n][i] += d[c][m][n][i];
        }
        if (kParts == 1) hand_over(m, n);
      }
    }
    if constexpr (kParts > 1) {
      float4 sums[kTilesM * kTilesN];
#pragma unroll
      for (int i = 0; i < kTilesM * kTilesN; ++i) {
        const float (&tile)[4] = d[0][i / kTilesN][i % kTilesN];
        sums[i] = {tile[0], tile[1], tile[2], tile[3]};
      }
      PartsOfK::meet(shared_, given_, sums);
#pragma unroll
      for (int i = 0; i < kTilesM * kTilesN; ++i) {
        const int p = pair(i / kTilesN, 2 * (i % kTilesN));
        sum[p] = {sums[i].x, sums[i].z};
        sum[p + kTogether] = {sums[i].y, sums[i].w};
      }
    }
  }

 private:
  static __device__ __forceinline__ int warp_of_part(int thread) { return PartsOfK::in_part(thread) >> 5; }

  // A-fragment rows g and g + 8 of a tile are outputs next to each other, and those of kTogether tiles are, so that the
  // load-store unit has half as many of a thread's outputs to move, each twice as long.
  static __device__ __forceinline__ constexpr int output(int m) {
    return m / kTogether * 16 * kTogether + m % kTogether * 2;
  }
  static __device__ __forceinline__ constexpr int pair(int m, int column) {
    return (m / kTogether * kColumns + column) * kTogether + m % kTogether;
  }
  static __device__ __forceinline__ constexpr int tile(int p) {
    return p / kTogether / kColumns * kTogether + p % kTogether;
  }

  static __device__ __forceinline__ void load_fragment(uint32_t (&a)[4], const typename E::Pair* weight, int first,
                                                       int hidden, int step, int m) {
    constexpr int kWords = 4 / E::kBytes;  // elements in a 4-byte word
    const int lane = device::lane_idx();
    const int k = 4 * (lane % 4) * kWords + PartsOfK::part() * (Config::kHidden / kParts);
    const int more = 16 * (step / 2) + 2 * (step % 2);
    typename E::Scalar block[2][2 * kWords];
    load_weight_block<T, kBackward>(block, weight, first + neuron(device::thread_idx()) + output(m), k, more * kWords,
                                    hidden);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kWords == 2)
        a[i] = E::pair(block[i % 2][i / 2 * 2], block[i % 2][i / 2 * 2 + 1]);
      else
        a[i] =
            Config::kMath == Math::kTf32 ? device::to_tf32(device::as_float(block[i % 2][i / 2])) : block[i % 2][i / 2];
    }
  }

  __device__ __forceinline__ uint32_t fragment(int step, int m) const {
    return 2 * Config::kStateBytes +
           (((step - Config::kRegisterSteps) * kTilesM + m) * Config::kThreads + device::thread_idx()) * 16;
  }

  __device__ __forceinline__ void load_state(uint32_t state, int j, uint4 (&b)[kTilesN]) const {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n)
      b[n] = shared_.load<uint4>(state + lane_offset_ + n * StateT::kEightRows + 64 * j);
  }

  // The two k-steps that one load of the state feeds.
  template <int kChains>
  __device__ __forceinline__ void multiply_pair(int j, const uint4 (&b)[kTilesN],
                                                float (&d)[kChains][kTilesM][kTilesN][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int step = 2 * j + half;
      const int kept = step < Config::kRegisterSteps ? step : 0;
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        uint32_t a[4];
        if (step < Config::kRegisterSteps) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = a_[kept][m][i];
        } else {
          const uint4 v = shared_.load<uint4>(fragment(step, m));
          a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
        }
        if constexpr (Config::kMath == Math::kTf32x3) {
          uint32_t small_a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (Config::kSplitKept && step < Config::kRegisterSteps)
              small_a[i] = a_[kept][m][Config::kSplitKept ? 4 + i : i];
            else  // opaque: or the compiler moves the splitting out of the loop, and spills what it gets
              device::split_tf32(device::as_float(device::opaque(a[i])), a[i], small_a[i]);
          }
#pragma unroll
          for (int n = 0; n < kTilesN; ++n) {
            // (A + a)(B + b) without a b, the small terms first.
            uint32_t big[2], small[2];
            device::split_tf32(device::as_float(half ? b[n].z : b[n].x), big[0], small[0]);
            device::split_tf32(device::as_float(half ? b[n].w : b[n].y), big[1], small[1]);
            device::mma_m16n8k8_tf32(d[0][m][n], small_a, big[0], big[1]);
            device::mma_m16n8k8_tf32(d[0][m][n], a, small[0], small[1]);
            device::mma_m16n8k8_tf32(d[0][m][n], a, big[0], big[1]);
          }
        } else {
#pragma unroll
          for (int n = 0; n < kTilesN; ++n) {
            const uint32_t b0 = half ? b[n].z : b[n].x, b1 = half ? b[n].w : b[n].y;
            if constexpr (Config::kMath == Math::kMma)
              device::mma_m16n8k16(T{}, d[step % kChains][m][n], a, b0, b1);
            else
              device::mma_m16n8k8_tf32(d[step % kChains][m][n], a, b0, b1);
          }
        }
      }
    }
  }

  device::SharedMemory shared_;
  uint32_t given_, lane_offset_;
  uint32_t a_[Config::kRegisterSteps][kTilesM][Config::kSplitKept ? 8 : 4];  // kept split: 4 big, 4 small
};

}  // namespace fused_rin
