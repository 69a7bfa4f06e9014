// The machine as the kernels see it: the only file of the CUDA backend that contains PTX.
//
// Every kernel includes <device.cuh> with angle brackets and touches threads, shared memory, global memory and tensor
// cores through these functions alone. csrc/cuda_on_cpu/device.cuh offers the same names on CPU fibres; the include
// path decides which machine a sweep is compiled for. "PTX n.n" below are sections of the PTX ISA manual, version 9.0.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fused_rin::device {

struct BFloat16 {};  // tags: the bits travel in uint16_t / uint32_t, so that both machines share one code
struct Float16 {};

// ---- threads -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ int thread_idx() { return threadIdx.x; }
__device__ __forceinline__ int lane_idx() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_idx() { return threadIdx.x >> 5; }
// thread_idx(), of which the compiler does not know that: so it keeps nothing alive for what is computed from it later.
__device__ __forceinline__ int thread_idx_anew() {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));  // PTX 10.3
  return (threadIdx.x & ~31u) | lane;
}
__device__ __forceinline__ int64_t block_idx() { return blockIdx.x; }

// Ends the kernel with an error that the host sees.
__device__ __forceinline__ void trap() { asm volatile("trap;"); }

// barrier.cta.sync 0 (PTX 9.7.13.1): all threads of the block, and their shared memory accesses, in order.
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Barriers 1-15 for a subset of the warps (PTX 9.7.13.1); `threads` counts those that sync and those that arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// barrier.cluster (PTX 9.7.13.3): all threads of the cluster, and their shared memory accesses, in order.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // PTX 9.7.13.15.9: barriers made by this thread
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ float shuffle_xor(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// ---- memory ------------------------------------------------------------------------------------------------------

// What a block may opt in to (CUDA C++ Programming Guide, technical specifications by compute capability).
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMaxSharedBytes = 99 << 10;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMaxSharedBytes = 163 << 10;
#else
constexpr int kMaxSharedBytes = 227 << 10;
#endif

// The block's dynamic shared memory, addressed by byte offsets.
class SharedMemory {
 public:
  __device__ __forceinline__ explicit SharedMemory(char* base) : base_(base) {}

  template <class T>
  __device__ __forceinline__ T load(uint32_t offset) const {
    return *reinterpret_cast<const T*>(base_ + offset);
  }
  template <class T>
  __device__ __forceinline__ void store(uint32_t offset, T value) const {
    *reinterpret_cast<T*>(base_ + offset) = value;
  }
  // The .shared state-space address that PTX instructions take.
  __device__ __forceinline__ uint32_t address(uint32_t offset) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(base_ + offset));
  }

 private:
  char* base_;
};

// ---- clusters (sm_90+) -------------------------------------------------------------------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// mapa (PTX 9.7.9.23): where the shared memory of another block of the cluster begins; offsets are those of the own.
struct Peer {
  uint32_t base;
};
__device__ __forceinline__ Peer peer(const SharedMemory& shared, int rank) {
  Peer peer{};
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer.base) : "r"(shared.address(0)), "r"(rank));
#endif
  return peer;
}

// An mbarrier (PTX 9.7.13.15): 8 bytes of shared memory. A phase ends with the last of `count` arrivals and the last of
// the bytes that were expected in it; bytes may come before they are expected, the count is signed.
__device__ __forceinline__ void mbarrier_init(const SharedMemory& shared, uint32_t offset, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared.address(offset)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(const SharedMemory& shared, uint32_t offset) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared.address(offset)) : "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive_expect(const SharedMemory& shared, uint32_t offset, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared.address(offset)),
               "r"(bytes)
               : "memory");
#endif
}
// Returns when the phase of this parity has ended; what was stored by st.async before is there. The scope of the
// acquire is the block: all that is read lies in its own shared memory, and that of the cluster makes ptxas throw L1
// away, in every step. A wait of seconds, in which the blocks of a cluster run side by side, is an error, not patience.
__device__ __forceinline__ void mbarrier_wait(const SharedMemory& shared, uint32_t offset, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  const uint32_t place = shared.address(offset);
  uint32_t done = 0;
#pragma unroll 1
  for (int tries = 0; !done; ++tries) {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(place), "r"(parity)
        : "memory");
    if (tries == 1 << 26) trap();
  }
#endif
}
// st.async (PTX 9.7.9.12): 16 bytes into a peer's shared memory, counted by its mbarrier at `barrier`.
__device__ __forceinline__ void st_async(Peer peer, uint32_t offset, uint4 value, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   peer.base + offset),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(peer.base + barrier)
               : "memory");
#endif
}

// ---- packets

// 16 bytes of device memory that blocks hand each other whole: relaxed at the scope of the device, .b128 is one access
// (PTX 9.7.9.8 and 9.7.9.12, memory consistency model 8.4: since CUDA 12.3).
__device__ __forceinline__ void store_packet(uint4* p, uint4 value) {
  const uint64_t low = value.x | uint64_t{value.y} << 32, high = value.z | uint64_t{value.w} << 32;
  asm volatile("{.reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v;}" ::"l"(p), "l"(low), "l"(high)
               : "memory");
}
// Where it is wanted; else `value` stays.
__device__ __forceinline__ void load_packet_if(bool wanted, const uint4* p, uint4& value) {
  uint64_t low = value.x | uint64_t{value.y} << 32, high = value.z | uint64_t{value.w} << 32;
  asm volatile(
      "{.reg .pred p; .reg .b128 v; setp.ne.u32 p, %2, 0; mov.b128 v, {%0, %1};"
      " @p ld.relaxed.gpu.global.b128 v, [%3]; mov.b128 {%0, %1}, v;}"
      : "+l"(low), "+l"(high)
      : "r"(static_cast<uint32_t>(wanted)), "l"(p)
      : "memory");
  value = {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
           static_cast<uint32_t>(high >> 32)};
}
// Before a packet is asked for again that was not there. Seconds, in which all blocks run, are an error, not patience.
__device__ __forceinline__ void poll_again(int tries) {
  if (tries == 1 << 23) trap();
}

__device__ __forceinline__ SharedMemory shared_memory() {
  extern __shared__ __align__(128) char dynamic_shared_memory[];
  return SharedMemory(dynamic_shared_memory);
}

template <class T>
__device__ __forceinline__ T load_global(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store_global(T* p, T value) {
  *p = value;
}

// ld.global (PTX 9.7.9.8), predicated, 0 where not wanted: for tensors that are read once, step by step. Not .nc, as
// the output may lie over the input. A prefetch several steps ahead lives from being issued where it is written: hence
// volatile. And from not being a branch: then it is scheduled between the mma. Each warp consumes whole 32-byte
// sectors, so L1 would only be churned; a row is contiguous, so L2 may fetch the neighbouring sectors of 128 bytes.
__device__ __forceinline__ uint32_t load_streaming_if(bool wanted, const uint32_t* p) {
  uint32_t value;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %1, 0; mov.u32 %0, 0;"
      " @p ld.global.L1::no_allocate.L2::128B.u32 %0, [%2];}"
      : "=r"(value)
      : "r"(static_cast<uint32_t>(wanted)), "l"(p));
  return value;
}
__device__ __forceinline__ uint2 load_streaming_if(bool wanted, const uint2* p) {
  uint2 value;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; mov.u32 %1, 0;"
      " @p ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%3];}"
      : "=r"(value.x), "=r"(value.y)
      : "r"(static_cast<uint32_t>(wanted)), "l"(p));
  return value;
}
// ld.global.nc (PTX 9.7.9.9): for what a block reads piecewise and never writes, through L1.
__device__ __forceinline__ uint32_t load_if(bool wanted, const uint32_t* p) {
  uint32_t value;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; mov.u32 %0, 0; @p ld.global.nc.u32 %0, [%2];}"
               : "=r"(value)
               : "r"(static_cast<uint32_t>(wanted)), "l"(p));
  return value;
}
__device__ __forceinline__ uint2 load_if(bool wanted, const uint2* p) {
  uint2 value;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; mov.u32 %1, 0;"
      " @p ld.global.nc.v2.u32 {%0, %1}, [%3];}"
      : "=r"(value.x), "=r"(value.y)
      : "r"(static_cast<uint32_t>(wanted)), "l"(p));
  return value;
}
__device__ __forceinline__ void store_global_if(bool wanted, uint32_t* p, uint32_t value) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.u32 [%1], %2;}" ::"r"(static_cast<uint32_t>(wanted)),
               "l"(p), "r"(value)
               : "memory");
}
__device__ __forceinline__ void store_global_if(bool wanted, uint2* p, uint2 value) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.v2.u32 [%1], {%2, %3};}" ::"r"(static_cast<uint32_t>(wanted)),
      "l"(p), "r"(value.x), "r"(value.y)
      : "memory");
}

__device__ __forceinline__ void store_global_if(bool wanted, uint4* p, uint4 value) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.v4.u32 [%1], {%2, %3, %4, %5};}" ::"r"(
                   static_cast<uint32_t>(wanted)),
               "l"(p), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// cp.async (PTX 9.7.9.25.3): from global to shared memory past the registers, completing by group. What is not wanted
// is not read: the bytes become zero. Only 16 bytes at a time go past L1 too.
template <int kBytes>
__device__ __forceinline__ void cp_async(const SharedMemory& shared, uint32_t offset, const void* global, bool wanted) {
  const uint32_t to = shared.address(offset), bytes = wanted ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ldmatrix (PTX 9.7.14.5.15): four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const SharedMemory& shared, uint32_t offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared.address(offset))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], const SharedMemory& shared, uint32_t offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared.address(offset))
               : "memory");
}

// ---- tensor cores ------------------------------------------------------------------------------------------------

// mma.sync (PTX 9.7.14.5.14), D += A B, A row-major, B column-major, D in float32. Lane 4g + q holds
//   A  a[0] (g, word q)   a[1] (g + 8, word q)   a[2] (g, word q + 4)   a[3] (g + 8, word q + 4)
//   B  b[0] (word q, column g)                   b[1] (word q + 4, column g)
//   D  d[0], d[1] (g, columns 2q, 2q + 1)        d[2], d[3] (g + 8, columns 2q, 2q + 1)
// where a word is 4 bytes along k: two 16-bit elements or one tf32. So m16n8k16 and m16n8k8.tf32 look the same here.
__device__ __forceinline__ void mma_m16n8k16(BFloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k16(Float16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers -----------------------------------------------------------------------------------------------------

// cvt (PTX 9.7.9.21), round to nearest even; .rna for tf32: ties away from zero. The low half of a word comes first.
__device__ __forceinline__ uint32_t pack(BFloat16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t pack(Float16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
// The same of max(value, 0); a NaN stays one (PTX 9.7.9.21: .relu).
__device__ __forceinline__ uint32_t pack_relu(BFloat16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t pack_relu(Float16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ float2 unpack(BFloat16, uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack(Float16, uint32_t word) {
  float2 pair;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(word));
  return pair;
}
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
  return word;
}
// value = big + small, both tf32 (11 significant bits each, so what is lost is below 2^-22 of the value). Dekker's
// splitting: it runs on the FMA pipe at full rate, rounds to nearest, and keeps a NaN a NaN where adding half a unit
// to the bits would carry it into the sign. Above 2^114 the product overflows and the result is NaN.
__device__ __forceinline__ void split_tf32(float value, uint32_t& big, uint32_t& small) {
  const float scaled = __fmul_rn(value, 8193.f);  // 2^13 + 1; never contracted into an fma
  const float rounded = __fsub_rn(scaled, __fsub_rn(scaled, value));
  big = __float_as_uint(rounded);
  small = (__float_as_uint(__fsub_rn(value, rounded)) + 0x1000u) & 0xffffe000u;
}
// The same word, of which the compiler knows nothing: what is computed from it stays in the loop.
__device__ __forceinline__ uint32_t opaque(uint32_t word) {
  asm volatile("" : "+r"(word));
  return word;
}
__device__ __forceinline__ int64_t opaque(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}
__device__ __forceinline__ const char* opaque(const char* address) {
  asm volatile("" : "+l"(address));
  return address;
}
// prmt (PTX 9.7.8.7): the sign of each half in all of its bits.
// Not __byte_perm: that masks the selectors' sign bits away.
__device__ __forceinline__ uint32_t spread_signs(uint32_t halves) {
  uint32_t word;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(word) : "r"(halves));
  return word;
}
__device__ __forceinline__ float as_float(uint32_t word) { return __uint_as_float(word); }
__device__ __forceinline__ uint32_t as_word(float value) { return __float_as_uint(value); }

// ex2, lg2, rcp (PTX 9.7.3.20, 9.7.3.18, 9.7.3.12): relative errors of 2^-22, 2^-22 (an absolute one near 1) and 2^-23.
__device__ __forceinline__ float exp2(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
__device__ __forceinline__ float log2(float x) {
  float value;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
__device__ __forceinline__ float reciprocal(float x) {
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

// max.NaN (PTX 9.7.3.13): unlike fmaxf, a NaN stays one, as in torch.relu.
__device__ __forceinline__ float max_nan(float a, float b) {
  float value;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
  return value;
}

}  // namespace fused_rin::device
