// The machine of csrc/cuda/device.cuh on CPU fibres: the same names, the same meaning, every access checked.
// Compiled instead of it by putting this folder first on the include path; see fibres.h for what is detected.
//
// Tensor cores: products are exact, a group is summed exactly and truncated to float32, which is the least accurate
// hardware we know of (NVIDIA truncates the accumulator), so tolerances proved here hold on a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace fused_rin {
using std::max;
using std::min;
}  // namespace fused_rin

namespace fused_rin::device {

struct BFloat16 {};
struct Float16 {};

// ---- threads -----------------------------------------------------------------------------------------------------

inline int thread_idx() { return fibres::thread_idx(); }
inline int lane_idx() { return thread_idx() & 31; }
inline int warp_idx() { return thread_idx() >> 5; }
inline int thread_idx_anew() { return thread_idx(); }
inline int64_t block_idx() { return fibres::block_idx(); }
inline void trap() { fibres::trap(); }
inline void sync_block() { fibres::barrier_sync(0, 0); }
inline void named_barrier_sync(int id, int threads) { fibres::barrier_sync(id, threads); }
inline void named_barrier_arrive(int id, int threads) { fibres::barrier_arrive(id, threads); }
inline void sync_warp() { fibres::warp_sync(); }
inline void sync_cluster() { fibres::cluster_sync(); }

inline float shuffle_xor(float value, int lane_mask) {
  struct Arguments {
    float value, result;
    int mask;
  } mine{value, 0, lane_mask};
  fibres::warp_collective("shuffle_xor", &mine, [](void* const(&lanes)[32]) {
    for (int i = 0; i < 32; ++i) {
      auto* lane = static_cast<Arguments*>(lanes[i]);
      lane->result = static_cast<Arguments*>(lanes[(i ^ lane->mask) & 31])->value;
    }
  });
  return mine.result;
}

// ---- memory ------------------------------------------------------------------------------------------------------

constexpr int kMaxSharedBytes = 227 << 10;

class SharedMemory {
 public:
  template <class T>
  T load(uint32_t offset) const {
    T value;
    std::memcpy(&value, fibres::shared_access(offset, sizeof(T), false), sizeof(T));
    return value;
  }
  template <class T>
  void store(uint32_t offset, T value) const {
    std::memcpy(fibres::shared_access(offset, sizeof(T), true), &value, sizeof(T));
  }
};

inline SharedMemory shared_memory() { return {}; }

// ---- clusters

constexpr bool kHasClusters = true;

struct Peer {
  int rank;
};
inline Peer peer(const SharedMemory&, int rank) { return {rank}; }

inline void mbarrier_init(const SharedMemory&, uint32_t offset, int count) { fibres::mbarrier_init(offset, count); }
inline void mbarrier_arrive(const SharedMemory&, uint32_t offset) { fibres::mbarrier_arrive(offset, 0); }
inline void mbarrier_arrive_expect(const SharedMemory&, uint32_t offset, int bytes) {
  fibres::mbarrier_arrive(offset, bytes);
}
inline void mbarrier_wait(const SharedMemory&, uint32_t offset, uint32_t parity) {
  fibres::mbarrier_wait(offset, parity);
}
inline void st_async(Peer peer, uint32_t offset, uint4 value, uint32_t barrier) {
  fibres::async_store(peer.rank, offset, &value, sizeof(value), barrier);
}

// ---- packets

inline void store_packet(uint4* p, uint4 value) { fibres::packet_store(p, &value, sizeof(value)); }
inline void load_packet_if(bool wanted, const uint4* p, uint4& value) {
  if (wanted) fibres::packet_load(p, &value, sizeof(value));
}
inline void poll_again(int) { fibres::packet_await(); }

template <class T>
T load_global(const T* p) {
  fibres::global_access(p, sizeof(T), false);
  return *p;
}
template <class T>
void store_global(T* p, std::common_type_t<T> value) {
  fibres::global_access(p, sizeof(T), true);
  *p = value;
}
template <class T>
T load_streaming_if(bool wanted, const T* p) {
  return wanted ? load_global(p) : T{};
}
template <class T>
T load_if(bool wanted, const T* p) {
  return wanted ? load_global(p) : T{};
}
template <class T>
void store_global_if(bool wanted, T* p, std::common_type_t<T> value) {
  if (wanted) store_global(p, value);
}

template <int kBytes>
void cp_async(const SharedMemory&, uint32_t offset, const void* global, bool wanted) {
  fibres::async_copy(offset, wanted ? global : nullptr, kBytes);
}
inline void cp_async_commit() { fibres::async_commit(); }
template <int kPending>
void cp_async_wait() {
  fibres::async_wait(kPending);
}

namespace detail {

struct MatrixArguments {
  uint32_t (*d)[4];
  const SharedMemory* shared;
  uint32_t offset;
};

// Matrix i comes from the row addresses of lanes 8i .. 8i + 7; lane 4g + q receives row g, elements 2q and 2q + 1
// (transposed: column g, rows 2q and 2q + 1).
template <bool kTransposed>
void ldmatrix_x4(void* const (&lanes)[32]) {
  uint16_t element[4][8][8];
  for (int i = 0; i < 32; ++i) {
    const auto* lane = static_cast<const MatrixArguments*>(lanes[i]);
    const uint4 row = lane->shared->load<uint4>(lane->offset);
    std::memcpy(element[i / 8][i % 8], &row, 16);
  }
  for (int i = 0; i < 32; ++i) {
    const int g = i / 4, q = i % 4;
    for (int m = 0; m < 4; ++m) {
      const uint32_t low = kTransposed ? element[m][2 * q][g] : element[m][g][2 * q];
      const uint32_t high = kTransposed ? element[m][2 * q + 1][g] : element[m][g][2 * q + 1];
      (*static_cast<MatrixArguments*>(lanes[i])->d)[m] = low | high << 16;
    }
  }
}

}  // namespace detail

inline void ldmatrix_x4(uint32_t (&d)[4], const SharedMemory& shared, uint32_t offset) {
  detail::MatrixArguments mine{&d, &shared, offset};
  fibres::warp_collective("ldmatrix_x4", &mine, detail::ldmatrix_x4<false>);
}
inline void ldmatrix_x4_trans(uint32_t (&d)[4], const SharedMemory& shared, uint32_t offset) {
  detail::MatrixArguments mine{&d, &shared, offset};
  fibres::warp_collective("ldmatrix_x4_trans", &mine, detail::ldmatrix_x4<true>);
}

// ---- numbers -----------------------------------------------------------------------------------------------------

inline float as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
inline uint32_t as_word(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}

namespace detail {

inline uint32_t round(BFloat16, float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = as_word(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t round(Float16, float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return value != value ? 0x7fff : bits;
}
inline float widen(BFloat16, uint32_t bits) { return as_float(bits << 16); }
inline float widen(Float16, uint32_t bits) {
  const auto narrow = static_cast<uint16_t>(bits);
  _Float16 half;
  std::memcpy(&half, &narrow, 2);
  return static_cast<float>(half);
}

}  // namespace detail

template <class T>
uint32_t pack(T, float low, float high) {
  return detail::round(T{}, low) | detail::round(T{}, high) << 16;
}
template <class T>
uint32_t pack_relu(T, float low, float high) {
  return pack(T{}, low <= 0 ? 0 : low, high <= 0 ? 0 : high);
}
template <class T>
float2 unpack(T, uint32_t word) {
  return {detail::widen(T{}, word & 0xffff), detail::widen(T{}, word >> 16)};
}
inline uint32_t to_tf32(float value) {
  const uint32_t bits = as_word(value);
  return std::isfinite(value) ? (bits + 0x1000) & 0xffffe000 : bits;
}
inline void split_tf32(float value, uint32_t& big, uint32_t& small) {
  const float scaled = value * 8193.f;  // compiled with -ffp-contract=off
  const float rounded = scaled - (scaled - value);
  big = as_word(rounded);
  small = (as_word(value - rounded) + 0x1000u) & 0xffffe000u;
}
inline uint32_t spread_signs(uint32_t halves) {
  return (halves & 0x80000000u ? 0xffff0000u : 0u) | (halves & 0x8000u ? 0xffffu : 0u);
}
inline uint32_t opaque(uint32_t word) { return word; }
inline int64_t opaque(int64_t value) { return value; }
inline const char* opaque(const char* address) { return address; }
inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline float max_nan(float a, float b) { return a != a || b != b ? as_float(0x7fffffff) : a > b ? a : b; }

// ---- tensor cores ------------------------------------------------------------------------------------------------

namespace detail {

inline float truncate(double exact) {
  const float nearest = static_cast<float>(exact);
  return std::isfinite(nearest) && std::fabs(nearest) > std::fabs(exact) ? std::nextafter(nearest, 0.f) : nearest;
}

struct TensorFloat32 {};
inline void widen_word(TensorFloat32, uint32_t word, float (&k)[2]) { k[0] = as_float(word & 0xffffe000), k[1] = 0; }
template <class T>
void widen_word(T, uint32_t word, float (&k)[2]) {
  k[0] = widen(T{}, word & 0xffff), k[1] = widen(T{}, word >> 16);
}

struct MmaArguments {
  float (*d)[4];
  const uint32_t (*a)[4];
  uint32_t b[2];
};

template <class T>
void mma_m16n8(void* const (&lanes)[32]) {
  float a[16][16], b[8][16];  // k in words of two
  for (int i = 0; i < 32; ++i) {
    const auto* lane = static_cast<const MmaArguments*>(lanes[i]);
    const int g = i / 4, q = i % 4;
    for (int r = 0; r < 4; ++r)
      widen_word(T{}, (*lane->a)[r], *reinterpret_cast<float (*)[2]>(&a[g + r % 2 * 8][2 * (q + r / 2 * 4)]));
    for (int r = 0; r < 2; ++r) widen_word(T{}, lane->b[r], *reinterpret_cast<float (*)[2]>(&b[g][2 * (q + r * 4)]));
  }
  for (int i = 0; i < 32; ++i) {
    float (&d)[4] = *static_cast<MmaArguments*>(lanes[i])->d;
    for (int r = 0; r < 4; ++r) {
      const float* row = a[i / 4 + r / 2 * 8];
      const float* column = b[i % 4 * 2 + r % 2];
      double sum = d[r];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(row[k]) * column[k];
      d[r] = truncate(sum);
    }
  }
}

template <class T>
void mma(const char* name, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaArguments mine{&d, &a, {b0, b1}};
  fibres::warp_collective(name, &mine, mma_m16n8<T>);
}

}  // namespace detail

template <class T>
void mma_m16n8k16(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  detail::mma<T>("mma_m16n8k16", d, a, b0, b1);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  detail::mma<detail::TensorFloat32>("mma_m16n8k8_tf32", d, a, b0, b1);
}

}  // namespace fused_rin::device
