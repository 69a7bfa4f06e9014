// The kernels of CUDA tensors for torch.ops.fused_rin: a library of its own beside the CPU's, which defines the
// operators, so that a process without a GPU does not map it.
#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <dlfcn.h>
#endif

#include <launch.h>

#include "../cuda/plan.h"
#include "sweep.h"

namespace fused_rin::operators {
namespace {

DeviceLimits ask(int device) {
  const DeviceGuard guard(device);
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  DeviceLimits limits{};
  limits.major = attribute(cudaDevAttrComputeCapabilityMajor);
  limits.minor = attribute(cudaDevAttrComputeCapabilityMinor);
  limits.sms = attribute(cudaDevAttrMultiProcessorCount);
  limits.registers_per_sm = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  const int code = block_instances().front().ptx_version();
  limits.shared_bytes_per_block =
      std::min(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), shared_bytes_of_code(code));
  limits.max_cluster_size = code >= 90 && limits.major >= 9 && limits.major < 12 ? 16 : 1;
  return limits;
}

const DeviceLimits& limits(int device) {
  static std::mutex mutex;
  static std::unordered_map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, ask(device)).first->second;
}

// torch's stream. Not linked: the function is in libtorch_cuda, which a torch without CUDA does not have.
void* stream(int device) {
  using Ask = AOTITorchError (*)(int32_t, void**);
  static const Ask ask = [] {
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? reinterpret_cast<Ask>(dlsym(torch, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  check(ask && ask(device, &stream) == AOTI_TORCH_SUCCESS, "torch's current CUDA stream could not be found");
  return stream;
}

// In float32's own accuracy: torch's switch for TF32 is not part of its stable ABI.
void run(const Problem& p, int64_t, int device, const Workspace& workspace) {
  check(p.skips || p.activation <= Activation::kTanh,
        "there is no CUDA kernel for activations but relu, tanh and none");
  const BlockChoice chosen = plan_block(p.batch, p.groups, p.hidden - p.padding, p.dtype, /*allow_tf32=*/false,
                                        limits(device), /*units=*/p.skips != nullptr);
  Problem problem = p;
  problem.tile_rows = chosen.tile_rows;
  problem.workspace_bytes = chosen.workspace_bytes;
  if (chosen.workspace_bytes) problem.workspace = workspace(chosen.workspace_bytes);
  const BlockInstance& kernel = *chosen.kernel;
  launch_block(problem, kernel.math, kernel.hidden, kernel.rows, kernel.ctas, device, stream(device));
}

}  // namespace

constexpr Device kCuda{"cuda", [](const Tensor& tensor) { return tensor.is_cuda(); }, 16, run};

}  // namespace fused_rin::operators

STABLE_TORCH_LIBRARY_IMPL(fused_rin, CUDA, library) {
  fused_rin::operators::implement_sweeps<fused_rin::operators::kCuda>(library);
  fused_rin::operators::implement_units<fused_rin::operators::kCuda>(library);
}
