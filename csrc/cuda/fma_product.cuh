// State times matrix without tensor cores, for float32 and one to four batch rows, where an mma would compute eight.
//
// Per step and SM, D * D * rows / 128 cycles of FFMA stand against 3 * D * D * 8 / 1,024 * (about 6.5 / 4) of 3xTF32
// mma (D = 128: 128 cycles a row against 620 for up to 8), and the result is plain float32. For 16-bit types mma wins
// at any batch: 105 cycles at D = 128, and the FFMAs would need their operands unpacked first.
//
// Four lanes (q) share an output and split k: lane q takes the same 16-byte chunks of the state as in mma_product.cuh.
// Eight groups (g) of four lanes own kOutputs outputs each. Two shuffles scatter the sums over the four lanes.
#pragma once

#include "block.h"
#include "element.cuh"
#include "parts.cuh"
#include "state.cuh"

namespace fused_rin {

template <class Config, bool kBackward>
class FmaProduct;

// See mma_product.cuh for kCtas, kParts and kGrid.
template <int kHidden_, int kRows_, int kWarps_, int kRegisterChunks_, int kSlotsForward_, int kSlotsBackward_,
          int kCtas_ = 1, int kParts_ = 1, bool kGrid_ = false>
struct FmaConfig {
  using T = float;
  template <bool kBackward>
  using Product = FmaProduct<FmaConfig, kBackward>;
  static constexpr Math kMath = Math::kFma;
  static constexpr int kHidden = kHidden_, kRows = kRows_, kWarps = kWarps_, kThreads = 32 * kWarps_;
  static constexpr int kCtas = kCtas_, kParts = kParts_, kOutputs = kHidden / kCtas;  // outputs of a CTA
  static constexpr bool kGrid = kGrid_;
  static constexpr int kSlotsForward = kSlotsForward_, kSlotsBackward = kSlotsBackward_;
  static constexpr int kGroupOutputs = kOutputs * kParts / (8 * kWarps);
  static constexpr int kChunks = kHidden / kParts / 16;  // 16-byte chunks of k that a lane multiplies
  static constexpr int kRegisterChunks = kRegisterChunks_ < kChunks ? kRegisterChunks_ : kChunks;
  static constexpr int kMatrixBytes = (kChunks - kRegisterChunks) * kGroupOutputs * 16 * kThreads;
  static constexpr int kStateBytes = State<T, kHidden, kRows>::kBytes;
  static constexpr int kPairs = kGroupOutputs * kRows >= 8 ? kGroupOutputs * kRows / 8 : 1;  // of a lane
  static constexpr int kGivenBytes = (kParts - 1) * kPairs * 8 * kThreads / kParts;
  static_assert(kOutputs * kParts == kGroupOutputs * 8 * kWarps && kGroupOutputs % 2 == 0,
                "warps share the outputs evenly, in pairs");
};

template <class Config, bool kBackward>
class FmaProduct {
  using StateT = State<float, Config::kHidden, Config::kRows>;
  using PartsOfK = Parts<Config>;
  static constexpr int kOutputs = Config::kGroupOutputs, kRows = Config::kRows, kChunks = Config::kChunks;
  static constexpr int kGroupPairs = kOutputs / 2 * kRows;  // of the four lanes together
  static constexpr int kHalf = kGroupPairs >= 2 ? kGroupPairs / 2 : 1, kQuarter = kHalf >= 2 ? kHalf / 2 : 1;

 public:
  static constexpr int kPairs = kQuarter, kColumns = kQuarter, kTogether = 1;
  static constexpr bool kSumInside = false;
  static constexpr bool kStateIsOutput = true;
  static_assert(kPairs == Config::kPairs);
  static_assert(kRows % kPairs == 0 || kPairs % kRows == 0, "see group_pair");

  __device__ __forceinline__ FmaProduct(device::SharedMemory shared, uint32_t given, int)
      : shared_(shared), given_(given) {}

  // The pairs that `thread` of the block owns: the first, and from there to pair p, known when compiled. Fewer pairs
  // than lanes: several lanes hold the same pair, one speaks.
  static __device__ __forceinline__ int neuron(int thread) {
    return first_output(thread) + group_pair(thread) / kRows * 2;
  }
  static __device__ __forceinline__ int row(int thread) { return group_pair(thread) % kRows; }
  static __device__ __forceinline__ constexpr int column(int p) { return p; }
  static __device__ __forceinline__ constexpr int neuron_step(int p) { return p / kRows * 2; }
  static __device__ __forceinline__ constexpr int row_step(int p) { return p % kRows; }
  static __device__ __forceinline__ bool owner(int thread) {
    return thread % 4 < (kGroupPairs < 4 ? kGroupPairs : 4) && PartsOfK::owner(thread);
  }
  template <class Tile>
  static __device__ __forceinline__ uint32_t place(int thread) {
    return Tile::row(row(thread)) + neuron(thread) * 4;
  }
  template <class Tile>
  static __device__ __forceinline__ constexpr uint32_t place_step(int p) {
    return Tile::row(row_step(p)) + neuron_step(p) * 4;
  }

  static __device__ __forceinline__ uint2 to_state(uint2 x) { return x; }

  __device__ __forceinline__ void load(const uint2* weight, int first, int hidden) {
    // See mma_product.cuh.
    constexpr int kShared = (kChunks - Config::kRegisterChunks) * (kOutputs / 2);
#pragma unroll 4
    for (int n = 0; n < kShared; ++n) {
      const int chunk = Config::kRegisterChunks + n / (kOutputs / 2), r = n % (kOutputs / 2) * 2;
      uint32_t block[2][4];
      load_block(block, weight, first, hidden, chunk, r);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        shared_.store(slot(chunk, r + i), uint4{block[i][0], block[i][1], block[i][2], block[i][3]});
    }
#pragma unroll
    for (int chunk = 0; chunk < Config::kRegisterChunks; ++chunk) {
#pragma unroll
      for (int r = 0; r < kOutputs; r += 2) {
        uint32_t block[2][4];
        load_block(block, weight, first, hidden, chunk, r);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) w_[chunk][r + i][j] = device::as_float(block[i][j]);
        }
      }
    }
  }

  // See mma_product.cuh.
  template <class Prepare, class CarryOn>
  __device__ __forceinline__ void multiply(uint32_t state, float2 (&sum)[kPairs], const Prepare& prepare,
                                           const CarryOn& carry_on) const {
    const uint32_t mine =
        state + 16 * (device::lane_idx() % 4) + PartsOfK::part() * (Config::kHidden / Config::kParts * 4);
    float4 first[kRows];
#pragma unroll
    for (int n = 0; n < kRows; ++n) first[n] = shared_.load<float4>(mine + StateT::row(n));
    prepare();

    float d[kOutputs][kRows] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float4 x[kRows];
#pragma unroll
      for (int n = 0; n < kRows; ++n)
        x[n] = chunk == 0 ? first[n] : shared_.load<float4>(mine + StateT::row(n) + 64 * chunk);
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) {
        float w[4];
        if (chunk < Config::kRegisterChunks) {
#pragma unroll
          for (int j = 0; j < 4; ++j) w[j] = w_[chunk < Config::kRegisterChunks ? chunk : 0][r][j];
        } else {
          const float4 v = shared_.load<float4>(slot(chunk, r));
          w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
        }
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
          d[r][n] += w[0] * x[n].x;
          d[r][n] += w[1] * x[n].y;
          d[r][n] += w[2] * x[n].z;
          d[r][n] += w[3] * x[n].w;
        }
      }
    }

    carry_on();

    // Sums of the group's pairs, pair (r / 2) * kRows + n; halved by every shuffle while there is more than one.
    float2 v[kGroupPairs];
#pragma unroll
    for (int r = 0; r < kOutputs; r += 2) {
#pragma unroll
      for (int n = 0; n < kRows; ++n) v[r / 2 * kRows + n] = {d[r][n], d[r + 1][n]};
    }
    reduce<kGroupPairs>(v, 1);
    reduce<kHalf>(v, 2);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) sum[p] = v[p];
    if constexpr (Config::kParts > 1) PartsOfK::meet(shared_, given_, sum);
  }

 private:
  static __device__ __forceinline__ void load_block(uint32_t (&block)[2][4], const uint2* weight, int first, int hidden,
                                                    int chunk, int r) {
    const int k = 4 * (device::lane_idx() % 4) + PartsOfK::part() * (Config::kHidden / Config::kParts);
    load_weight_block<float, kBackward>(block, weight, first + first_output(device::thread_idx()) + r, k, 16 * chunk,
                                        hidden);
  }
  static __device__ __forceinline__ int first_output(int thread) { return PartsOfK::in_part(thread) / 4 * kOutputs; }
  // The first pair of a thread: a multiple of kPairs, so that those after it are in the same row or neuron, or whole
  // rows of neurons.
  static __device__ __forceinline__ int group_pair(int thread) {
    const int q = thread % 4;
    return (kHalf < kGroupPairs ? q % 2 * kHalf : 0) + (kQuarter < kHalf ? q / 2 * kQuarter : 0);
  }
  __device__ __forceinline__ uint32_t slot(int chunk, int r) const {
    return 2 * Config::kStateBytes +
           (((chunk - Config::kRegisterChunks) * kOutputs + r) * Config::kThreads + device::thread_idx()) * 16;
  }

  // Adds over lanes `mask` apart. With n pairs at hand, each lane gives half of them away and keeps the other half.
  template <int n>
  static __device__ __forceinline__ void reduce(float2 (&v)[kGroupPairs], int mask) {
    if constexpr (n == 1) {
      v[0] = {v[0].x + device::shuffle_xor(v[0].x, mask), v[0].y + device::shuffle_xor(v[0].y, mask)};
    } else {
      const bool upper = device::lane_idx() & mask;
#pragma unroll
      for (int i = 0; i < n / 2; ++i) {
        const float2 give = upper ? v[i] : v[i + n / 2], keep = upper ? v[i + n / 2] : v[i];
        v[i] = {keep.x + device::shuffle_xor(give.x, mask), keep.y + device::shuffle_xor(give.y, mask)};
      }
    }
  }

  device::SharedMemory shared_;
  uint32_t given_;
  float w_[Config::kRegisterChunks][kOutputs][4];
};

}  // namespace fused_rin
