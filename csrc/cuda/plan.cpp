#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

namespace fused_rin {
namespace {

// Cycles that one mma.sync occupies one of an SM's four tensor cores.
double mma_cycles(const DeviceLimits& device) {
  const int capability = 10 * device.major + device.minor;
  if (capability == 87) return 16.0;
  if (capability == 86 || capability == 89 || device.major >= 12) return 32.0;
  if (device.major == 9) return 6.2;
  return device.major == 8 || device.major == 10 ? 8.0 : 32.0;
}

constexpr double kStepLatency = 190.0;

// Of one step's product, what no overlap hides.
double work_cycles(const BlockInstance& kernel, const DeviceLimits& device) {
  const double hidden = kernel.hidden, warps = kernel.threads / 32;
  double arithmetic, state;
  if (kernel.math == Math::kFma) {
    arithmetic = hidden * hidden * kernel.rows / (device.major == 8 && device.minor == 0 ? 64 : 128);
    state = warps * (kernel.hidden / 16) * kernel.rows;
  } else {
    const int bytes = kernel.math == Math::kMma ? 2 : 4;
    const double products = kernel.hidden / 16 * (kernel.hidden * bytes / 32) * (kernel.rows / 8.0) *
                            (kernel.math == Math::kTf32x3 ? 3 : 1);
    arithmetic = products * mma_cycles(device) / 4;
    if (kernel.math == Math::kTf32x3) arithmetic = std::max(arithmetic, products * 4.5);
    state = warps * kernel.rows * hidden * bytes / 128;
  }
  return std::max(arithmetic, state + kernel.matrix_bytes / 128.0);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool suits(const BlockInstance& kernel, DType dtype, bool allow_tf32, bool units) {
  return !kernel.backward && kernel.units == units && kernel.dtype == dtype &&
         kernel.math != (allow_tf32 ? Math::kTf32x3 : Math::kTf32);
}

// Of either direction: a plan is for both.
int most_shared_bytes(const BlockInstance& forward) {
  for (const BlockInstance& i : block_instances())
    if (i.backward && i.units == forward.units && i.dtype == forward.dtype && i.math == forward.math &&
        i.hidden == forward.hidden && i.rows == forward.rows)
      return std::max(forward.shared_bytes, i.shared_bytes);
  return forward.shared_bytes;
}

}  // namespace

int shared_bytes_of_code(int ptx_version) {
  const bool small = ptx_version == 86 || ptx_version == 89 || ptx_version >= 120;
  return 1024 * (small ? 99 : ptx_version < 90 ? 163 : 227);
}

const BlockInstance& plan_block(int64_t batch, int64_t groups, int64_t hidden, DType dtype, bool allow_tf32,
                                const DeviceLimits& device, bool units) {
  if (dtype == DType::kFloat64) throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16");
  if (device.major < 8)
    throw std::invalid_argument("the CUDA kernels need compute capability 8.0 or later, this device has " +
                                std::to_string(device.major) + "." + std::to_string(device.minor));
  const BlockInstance* best = nullptr;
  std::tuple<double, int, int> least;
  int largest = 0;
  for (const BlockInstance& kernel : block_instances()) {
    if (!suits(kernel, dtype, allow_tf32, units)) continue;
    largest = std::max(largest, kernel.hidden);
    const int shared = most_shared_bytes(kernel);
    if (kernel.hidden < hidden || shared > device.shared_bytes_per_block ||
        kernel.threads * 168 > device.registers_per_sm)
      continue;
    const int64_t blocks = groups * ceil_div(batch, kernel.rows);
    const int64_t per_sm = std::max<int64_t>(1, ceil_div(blocks, device.sms));
    const int64_t by_registers = device.registers_per_sm / (kernel.threads * 256);
    const int64_t by_shared = device.shared_bytes_per_block / shared;
    const int64_t resident = std::min(std::max<int64_t>(1, std::min(by_registers, by_shared)), per_sm);
    const double work = work_cycles(kernel, device);
    const double waves = static_cast<double>(ceil_div(per_sm, resident));
    const std::tuple<double, int, int> cost{waves * std::max(kStepLatency + work, resident * work), kernel.hidden,
                                            kernel.rows};
    if (!best || cost < least) best = &kernel, least = cost;
  }
  if (!best)
    throw std::invalid_argument("no CUDA kernel holds a matrix of " + std::to_string(hidden) +
                                " units on this device; they are compiled for up to " + std::to_string(largest) +
                                ". Split the layer into heads, or run the model in Python, which has Triton's kernels");
  return *best;
}

}  // namespace fused_rin
