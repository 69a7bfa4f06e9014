// The latencies that the kernels and the plans to come stand on, in cycles of one SM, as JSON on standard output.
//
//   nvcc -std=c++17 -O2 -gencode arch=compute_90a,code=sm_90a -I csrc/cuda benchmarks/gpu/latencies.cu -o latencies
//
// Every figure is the median over launches of (cycles of a chain of kRepeat dependent operations) / kRepeat. The PTX of
// wgmma is here until a kernel uses it; then it moves to csrc/cuda/device.cuh.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <device.cuh>
#include <string>
#include <vector>

namespace {

namespace cg = cooperative_groups;
using namespace fused_rin;

constexpr int kRepeat = 256, kLaunches = 15;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

long long* results;  // managed by main; kernels write the cycles of their chain to [0]
bool first_row = true;

void report(const char* name, const std::string& detail, const std::string& value) {
  std::printf("%s\n  {\"name\": \"%s\", \"detail\": \"%s\", %s}", first_row ? "" : ",", name, detail.c_str(),
              value.c_str());
  std::fflush(stdout);  // should a later kernel hang, what came before is kept
  first_row = false;
}

// Median cycles per operation over launches; a launch that the device refuses is reported as such and not measured.
template <class Launch>
void measure(const char* name, const std::string& detail, double operations, const Launch& launch) {
  std::vector<double> cycles;
  for (int i = 0; i < kLaunches; ++i) {
    cudaError_t error = launch();
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    if (error != cudaSuccess) {
      cudaGetLastError();
      return report(name, detail, std::string("\"not_measured\": \"") + cudaGetErrorString(error) + "\"");
    }
    long long value = 0;
    check(cudaMemcpy(&value, results, sizeof value, cudaMemcpyDeviceToHost), "copy of a result");
    cycles.push_back(value / operations);
  }
  std::sort(cycles.begin(), cycles.end());
  report(name, detail, "\"cycles\": " + std::to_string(cycles[cycles.size() / 2]));
}

__global__ void block_barrier(long long* out) {
  __syncthreads();
  const long long start = clock64();
  for (int i = 0; i < kRepeat; ++i) __syncthreads();
  if (threadIdx.x == 0) *out = clock64() - start;
}

// Store to shared memory, barrier, load what another warp stored: the exchange of one step without its arithmetic.
__global__ void block_exchange(long long* out) {
  extern __shared__ uint32_t state[];
  uint32_t value = threadIdx.x;
  __syncthreads();
  const long long start = clock64();
  for (int i = 0; i < kRepeat; ++i) {
    state[(i & 1) * blockDim.x + threadIdx.x] = value;
    __syncthreads();
    value = state[(i & 1) * blockDim.x + (threadIdx.x + 32) % blockDim.x];
  }
  if (threadIdx.x == 0) *out = clock64() - start + (value == 12345);
}

// ---- loads of the state: 128 bits a lane from `rows` rows, against ldmatrix.x4
template <bool kLdmatrix>
__global__ void state_load(long long* out, int rows) {
  extern __shared__ __align__(128) char bytes[];
  for (int i = threadIdx.x; i < 8192; i += blockDim.x) bytes[i] = 0;
  __syncthreads();
  const device::SharedMemory shared(bytes);
  const int lane = threadIdx.x & 31;
  uint32_t at = kLdmatrix ? lane % 8 * 144 + lane / 8 * 16 : min(lane / 4, rows - 1) * 192 + lane % 4 * 16;
  const long long start = clock64();
#pragma unroll 8
  for (int i = 0; i < kRepeat; ++i) {
    uint32_t d[4];
    if (kLdmatrix) {
      device::ldmatrix_x4(d, shared, at);
    } else {
      const uint4 v = shared.load<uint4>(at);
      d[0] = v.x, d[1] = v.y, d[2] = v.z, d[3] = v.w;
    }
    at += d[0] | d[1] | d[2] | d[3];  // zero: the next load depends on this one
  }
  if (threadIdx.x == 0) *out = clock64() - start + (at == 1);
}

// ---- mma.sync: a dependent chain over k of m16 x (8 * kTilesN), A in registers
template <int kTilesN>
__global__ void mma_chain(long long* out, uint32_t word) {
  const uint32_t a[4] = {word, word, word, word};
  float d[kTilesN][4] = {};
  __syncthreads();
  const long long start = clock64();
#pragma unroll 16
  for (int i = 0; i < kRepeat; ++i) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) device::mma_m16n8k16(device::BFloat16{}, d[n], a, word, word);
  }
  const long long end = clock64();
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) sum += d[n][0] + d[n][1] + d[n][2] + d[n][3];
  if (threadIdx.x == 0) *out = end - start + (sum == 1.5f);
}

template <int kTilesN>
__global__ void mma_tf32_chain(long long* out, uint32_t word) {
  const uint32_t a[4] = {word, word, word, word};
  float d[kTilesN][4] = {};
  const long long start = clock64();
#pragma unroll 16
  for (int i = 0; i < kRepeat; ++i) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) device::mma_m16n8k8_tf32(d[n], a, word, word);
  }
  const long long end = clock64();
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) sum += d[n][0] + d[n][1] + d[n][2] + d[n][3];
  if (threadIdx.x == 0) *out = end - start + (sum == 1.5f);
}

// ---- global memory
// Two blocks pass a number to and fro; a hop is half a round trip. Release and acquire at device scope, through L2.
__global__ void flag_hop(long long* out, int* flags) {
  if (threadIdx.x) return;
  int* const mine = flags + 64 * blockIdx.x;
  int* const theirs = flags + 64 * (1 - blockIdx.x);
  const long long start = clock64();
  for (int i = 1; i <= kRepeat; ++i) {
    int seen = 0;
    if (blockIdx.x == 0) asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(theirs), "r"(i) : "memory");
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(mine) : "memory");
    } while (seen != i);
    if (blockIdx.x == 1) asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(theirs), "r"(i) : "memory");
  }
  if (blockIdx.x == 0) *out = clock64() - start;
  *mine = 0;
}

__global__ void grid_sync(long long* out) {
  cg::grid_group grid = cg::this_grid();
  grid.sync();
  const long long start = clock64();
  for (int i = 0; i < kRepeat; ++i) grid.sync();
  if (grid.thread_rank() == 0) *out = clock64() - start;
}

// What the blocks of a grid do between two products, as grid_exchange.cuh does it: everybody publishes `count` packets
// of 16 bytes, numbered by the step and twice in a row, and polls for all of everybody's at once, from its own on.
// `before`: steps of earlier launches, whose numbers are still there.
constexpr int kPolls = 12;
__global__ void grid_gather(long long* out, uint4* workspace, int count, int before) {
  const int all = static_cast<int>(gridDim.x) * count, own = static_cast<int>(blockIdx.x) * count;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  uint32_t word = 0;
  const long long start = clock64();
  for (int i = 1; i <= kRepeat; ++i) {
    const uint32_t step = before + i;
    uint4* const buffer = workspace + (step & 1) * 2 * all;
    if (thread < count) {
      device::store_packet(buffer + own + thread, {word, word, word, step});
      device::store_packet(buffer + own + thread + all, {word, word, word, step});
    }
    uint4 packet[kPolls];
#pragma unroll
    for (int p = 0; p < kPolls; ++p) packet[p].w = thread + p * threads < all ? ~step : step;
    for (int tries = 0;; ++tries) {
#pragma unroll
      for (int p = 0; p < kPolls; ++p)
        device::load_packet_if(packet[p].w != step, buffer + own + thread + p * threads, packet[p]);
      uint32_t missing = 0;
#pragma unroll
      for (int p = 0; p < kPolls; ++p) missing |= packet[p].w ^ step;
      if (!missing) break;
      device::poll_again(tries);
    }
#pragma unroll
    for (int p = 0; p < kPolls; ++p) word |= thread + p * threads < all ? packet[p].x : 0;
    __syncthreads();
  }
  if (blockIdx.x == 0 && thread == 0) *out = clock64() - start + (word == 12345);
}

// ---- clusters
__global__ void cluster_barrier(long long* out) {
  const long long start = clock64();
  for (int i = 0; i < kRepeat; ++i) device::sync_cluster();
  if (blockIdx.x == 0 && threadIdx.x == 0) *out = clock64() - start;
}

// What the blocks of a cluster do between two products: everybody sends its `slice` of bytes to all, by st.async in
// chunks of 16 bytes, and waits for all of theirs. Two buffers, each with an mbarrier behind both.
template <int kCtas>
__global__ void cluster_gather(long long* out, int slice) {
  extern __shared__ __align__(128) char bytes[];
  const device::SharedMemory shared(bytes);
  const int rank = static_cast<int>(blockIdx.x) % kCtas, chunks = slice / 16;
  const uint32_t buffer = kCtas * slice, barriers = 2 * buffer;
  if (threadIdx.x == 0) {
    device::mbarrier_init(shared, barriers, 1);
    device::mbarrier_init(shared, barriers + 8, 1);
  }
  for (uint32_t i = 4 * threadIdx.x; i < 2 * buffer; i += 4 * blockDim.x) shared.store<uint32_t>(i, 0u);
  device::sync_cluster();
  uint4 value{};
  const long long start = clock64();
  for (int i = 0; i < kRepeat; ++i) {
    const uint32_t half = (i & 1) * buffer, barrier = barriers + 8 * (i & 1);
    if (threadIdx.x == 0) device::mbarrier_arrive_expect(shared, barrier, kCtas * slice);
    for (int c = threadIdx.x; c < kCtas * chunks; c += blockDim.x) {
      const device::Peer to = device::peer(shared, (rank + 1 + c / chunks) % kCtas);
      device::st_async(to, half + rank * slice + c % chunks * 16, value, barrier);
    }
    device::mbarrier_wait(shared, barrier, i >> 1 & 1);
    value.x = shared.load<uint32_t>(half + 4 * (threadIdx.x & 3));
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *out = clock64() - start + (value.x == 12345);
  device::sync_cluster();
}

// ---- wgmma (PTX 9.7.15): m64 x kN x k16, A in registers, a chain of `kDepth` k-steps accumulating in place, then the
// wait that a recurrence needs in every step. B's contents do not matter here; its layout is "no swizzle".
template <int kN, int kDepth>
__global__ void wgmma_chain(long long* out, uint32_t word) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ __align__(128) uint32_t b[16 * 32 / 2];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) b[i] = 0;
  __syncthreads();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(b)) >> 4;
  const uint64_t descriptor = address | uint64_t{8} << 16 | uint64_t{16} << 32;  // leading and stride offsets, 16 bytes
  float d[16] = {};
  // Four registers of their own: shared ones would be moved before every wgmma, and each move waited for.
  const uint32_t a[4] = {device::opaque(word), device::opaque(word), device::opaque(word), device::opaque(word)};
  const long long start = clock64();
  for (int i = 0; i < kRepeat / kDepth; ++i) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");  // for A's registers; ptxas would put it here otherwise
      if constexpr (kN == 8)
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));
      else if constexpr (kN == 16)
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, "
            "{%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));
      else
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
            "%11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
              "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  const long long end = clock64();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum += d[i];
  if (threadIdx.x == 0) *out = end - start + (sum == 1.5f);
#endif
}

template <int kN, int kDepth>
void measure_wgmma() {
  measure("wgmma m64k16, A in registers, a k-step",
          "N = " + std::to_string(kN) + ", a wait every " + std::to_string(kDepth), kRepeat, [] {
            wgmma_chain<kN, kDepth><<<1, 128>>>(results, 0);
            return cudaGetLastError();
          });
}

template <class... Arguments>
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  void (*kernel)(Arguments...);

  ClusterLaunch(void (*kernel_)(Arguments...), int size, int threads, int shared_bytes) : kernel(kernel_) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = size;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  cudaError_t run(Arguments... arguments) const { return cudaLaunchKernelEx(&config, kernel, arguments...); }
  int fit() const {
    int clusters = 0;
    return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess ? clusters : 0;
  }
};

template <int kCtas>
void measure_clusters() {
  const std::string of = std::to_string(kCtas) + " CTAs of 256 threads";
  const ClusterLaunch<long long*> barrier(cluster_barrier, kCtas, 256, 0);
  measure("cluster barrier", of, kRepeat, [&] { return barrier.run(results); });
  for (const int slice : {16, 64, 128, 256, 512, 1024, 2048}) {
    const ClusterLaunch<long long*, int> gather(cluster_gather<kCtas>, kCtas, 256, 2 * kCtas * slice + 16);
    measure("everything to everybody, st.async", std::to_string(slice) + " bytes of each, " + of, kRepeat,
            [&] { return gather.run(results, slice); });
  }
  // With as much shared memory as only one block of an SM can have: that is how the sweep's clusters lie.
  const ClusterLaunch<long long*> alone(cluster_barrier, kCtas, 256, 120 << 10);
  report("clusters that run at a time", of + ", one to an SM", "\"count\": " + std::to_string(alone.fit()));
}

}  // namespace

int main() {
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "no device");
  check(cudaMalloc(&results, sizeof(long long)), "cudaMalloc");
  int* flags = nullptr;
  check(cudaMalloc(&flags, 1024), "cudaMalloc");
  check(cudaMemset(flags, 0, 1024), "cudaMemset");
  std::printf("{\"device\": \"%s\", \"sms\": %d, \"rows\": [", device.name, device.multiProcessorCount);

  for (const int threads : {128, 256, 384, 512}) {
    const std::string detail = std::to_string(threads) + " threads";
    measure("block barrier", detail, kRepeat, [=] {
      block_barrier<<<1, threads>>>(results);
      return cudaGetLastError();
    });
    measure("store, block barrier, load", detail, kRepeat, [=] {
      block_exchange<<<1, threads, 8 * threads>>>(results);
      return cudaGetLastError();
    });
  }
  for (const int warps : {1, 4, 8}) {
    const std::string of = ", " + std::to_string(warps) + " warps";
    for (const int rows : {1, 2, 8})
      measure("128-bit load of the state", std::to_string(rows) + " rows" + of, kRepeat, [=] {
        state_load<false><<<1, 32 * warps, 8192>>>(results, rows);
        return cudaGetLastError();
      });
    measure("ldmatrix.x4 of the state", "8 rows" + of, kRepeat, [=] {
      state_load<true><<<1, 32 * warps, 8192>>>(results, 8);
      return cudaGetLastError();
    });
  }
  for (const int warps : {1, 4, 8}) {
    const std::string of = ", " + std::to_string(warps) + " warps";
    const auto chain = [&](const char* name, void (*kernel)(long long*, uint32_t), int n) {
      measure(name, "N = " + std::to_string(n) + of, kRepeat, [=] {
        kernel<<<1, 32 * warps>>>(results, 0);
        return cudaGetLastError();
      });
    };
    chain("mma.sync m16k16 bf16, a k-step of a dependent chain", mma_chain<1>, 8);
    chain("mma.sync m16k16 bf16, a k-step of a dependent chain", mma_chain<2>, 16);
    chain("mma.sync m16k16 bf16, a k-step of a dependent chain", mma_chain<4>, 32);
    chain("mma.sync m16k8 tf32, a k-step of a dependent chain", mma_tf32_chain<1>, 8);
    chain("mma.sync m16k8 tf32, a k-step of a dependent chain", mma_tf32_chain<4>, 32);
  }
  measure("flag hop through L2", "release, acquire, two CTAs", 2.0 * kRepeat, [=] {
    void* arguments[] = {&results, const_cast<int**>(&flags)};
    return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(flag_hop), 2, 32, arguments, 0, nullptr);
  });
  measure("grid sync", std::to_string(device.multiProcessorCount) + " CTAs of 256 threads", kRepeat, [=] {
    void* arguments[] = {&results};
    return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_sync), device.multiProcessorCount, 256, arguments,
                                       0, nullptr);
  });
  uint4* workspace = nullptr;
  constexpr int kMost = 256 * kPolls;  // packets
  check(cudaMalloc(&workspace, 4 * kMost * sizeof(uint4)), "cudaMalloc");
  check(cudaMemset(workspace, 0, 4 * kMost * sizeof(uint4)), "cudaMemset");
  int before = 0;
  for (const int blocks : {2, 8, 32, 64, 128}) {
    for (const int count : {3, 11, 22}) {
      if (blocks > device.multiProcessorCount || blocks * count > kMost) continue;
      measure(
          "everything to everybody, through L2",
          std::to_string(count) + " packets of each, " + std::to_string(blocks) + " CTAs of 256 threads", kRepeat, [&] {
            int given = count;
            void* arguments[] = {&results, &workspace, &given, &before};
            const cudaError_t error =
                cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_gather), blocks, 256, arguments, 0, nullptr);
            before += kRepeat;
            return error;
          });
    }
  }
  if (device.major >= 9 && device.major < 12) {
    measure_clusters<2>();
    measure_clusters<4>();
    measure_clusters<8>();
    measure_clusters<16>();
  }
  if (device.major == 9) {
    measure_wgmma<8, 8>();
    measure_wgmma<8, 16>();
    measure_wgmma<16, 8>();
    measure_wgmma<16, 16>();
    measure_wgmma<32, 8>();
    measure_wgmma<32, 16>();
  }
  std::printf("\n]}\n");
  return 0;
}
