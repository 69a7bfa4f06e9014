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
template <class Arguments>
void launch_kernel(void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads, int shared_bytes,
                   void* stream) {
  if (blocks > std::numeric_limits<int>::max())
    throw std::invalid_argument("batch tiles x recurrences must be below 2^31, got " + std::to_string(blocks));
  // More than 48 KB of shared memory has to be asked for, on each device; a note on the host, allowed in a capture.
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
               "cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  check_cuda(cudaGetLastError(), "kernel launch");
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
