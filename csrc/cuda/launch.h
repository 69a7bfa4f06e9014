// How a kernel is started on a GPU; csrc/cuda_on_cpu/launch.h starts it on fibres.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace fused_rin {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

#ifdef __CUDACC__  // operators/cuda.cpp, which launches by block.h, is compiled without nvcc
inline void zero_memory(void* memory, int64_t bytes, void* stream) {
  check_cuda(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
             "cudaMemsetAsync");
}

// `group`: blocks in a row that need each other, and so run side by side: a cluster; or, `anywhere` on the device, all
// that are launched.
template <class Arguments>
void launch_kernel(void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads, int shared_bytes,
                   void* stream, int group = 1, bool anywhere = false) {
  if (blocks > std::numeric_limits<int>::max())
    throw std::invalid_argument("batch tiles x recurrences must be below 2^31, got " + std::to_string(blocks));
  // More than 48 KB of shared memory has to be asked for, on each device; a note on the host, allowed in a capture.
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
               "cudaFuncSetAttribute");
  if (group == 1) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
    check_cuda(cudaGetLastError(), "kernel launch");
    return;
  }
  cudaLaunchAttribute attribute{};
  if (!anywhere) {
    if (group > 8)  // what every device with clusters has; 16 has to be asked for
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                 "cudaFuncSetAttribute");
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(group), 1, 1};
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments), "launch of blocks that run side by side");
}
#endif

template <class Arguments>
int ptx_version(void (*kernel)(Arguments)) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == device)
      previous_ = -1;
    else
      check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace fused_rin
