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
struct Travel {
  double hop, bytes;
};
constexpr Travel kToPeers{430.0, 16.0}, kThroughL2{700.0, 22.0};

int bytes_of(const BlockInstance& kernel) { return kernel.math == Math::kMma ? 2 : 4; }
int outputs_of(const BlockInstance& kernel) { return kernel.hidden / kernel.ctas; }

bool is_grid(const BlockInstance& kernel) { return kernel.workspace_bytes > 0; }

// Cycles of blocks that share a tile against those of blocks on their own (cuda_plan.py says why).
constexpr double kWeightOfSharing = 1.25;

const Travel& travel(const BlockInstance& kernel) { return is_grid(kernel) ? kThroughL2 : kToPeers; }

double arriving_cycles(const BlockInstance& kernel, int64_t rows) {
  return rows * (kernel.hidden - outputs_of(kernel)) * bytes_of(kernel) / travel(kernel).bytes;
}

// Tiles that run at a time, one to an SM.
int64_t places_of(const BlockInstance& kernel, const DeviceLimits& device) {
  if (kernel.ctas == 1 || is_grid(kernel)) return device.sms / kernel.ctas;
  return std::max(1, 10 * device.sms / (11 * kernel.ctas));
}

// Of one step's product, what no overlap hides.
double work_cycles(const BlockInstance& kernel, const DeviceLimits& device) {
  const double hidden = kernel.hidden, outputs = outputs_of(kernel), warps = kernel.threads / 32 / kernel.parts;
  double arithmetic, state;
  if (kernel.math == Math::kFma) {
    arithmetic = hidden * outputs * kernel.rows / (device.major == 8 && device.minor == 0 ? 64 : 128);
    state = warps * (kernel.hidden / 16) * kernel.rows;
  } else {
    const int bytes = bytes_of(kernel);
    const double products = outputs_of(kernel) / 16 * (kernel.hidden * bytes / 32) * (kernel.rows / 8.0) *
                            (kernel.math == Math::kTf32x3 ? 3 : 1);
    arithmetic = products * mma_cycles(device) / 4;
    if (kernel.math == Math::kTf32x3) arithmetic = std::max(arithmetic, products * 4.5);
    state = warps * kernel.rows * hidden * bytes / 128;
  }
  return std::max(arithmetic, state + kernel.matrix_bytes / 128.0);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool suits(const BlockInstance& kernel, DType dtype, bool allow_tf32, bool units, const DeviceLimits& device) {
  return !kernel.backward && kernel.ctas <= (is_grid(kernel) ? device.sms : device.max_cluster_size) &&
         kernel.units == units && kernel.dtype == dtype && kernel.math != (allow_tf32 ? Math::kTf32x3 : Math::kTf32);
}

// Of either direction: a plan is for both.
int most_shared_bytes(const BlockInstance& forward) {
  for (const BlockInstance& i : block_instances())
    if (i.backward && i.units == forward.units && i.dtype == forward.dtype && i.math == forward.math &&
        i.hidden == forward.hidden && i.rows == forward.rows && i.ctas == forward.ctas)
      return std::max(forward.shared_bytes, i.shared_bytes);
  return forward.shared_bytes;
}

}  // namespace

int shared_bytes_of_code(int ptx_version) {
  const bool small = ptx_version == 86 || ptx_version == 89 || ptx_version >= 120;
  return 1024 * (small ? 99 : ptx_version < 90 ? 163 : 227);
}

BlockChoice plan_block(int64_t batch, int64_t groups, int64_t hidden, DType dtype, bool allow_tf32,
                       const DeviceLimits& device, bool units) {
  if (dtype == DType::kFloat64) throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16");
  if (device.major < 8)
    throw std::invalid_argument("the CUDA kernels need compute capability 8.0 or later, this device has " +
                                std::to_string(device.major) + "." + std::to_string(device.minor));
  BlockChoice best{};
  using Cost = std::tuple<double, int, int>;
  Cost least;
  int largest = 0;
  for (const BlockInstance& kernel : block_instances()) {
    if (!suits(kernel, dtype, allow_tf32, units, device)) continue;
    largest = std::max(largest, kernel.hidden);
    const int shared = most_shared_bytes(kernel);
    if (kernel.hidden < hidden || shared > device.shared_bytes_per_block ||
        kernel.threads * 168 > device.registers_per_sm)
      continue;
    const int64_t places = places_of(kernel, device);
    int64_t rows = kernel.rows;
    if (kernel.ctas > 1) {  // few rows a tile: what is sent takes longer than all else
      const int64_t places_a_group = std::max<int64_t>(1, places / std::max<int64_t>(1, groups));
      rows = std::min(rows, std::max<int64_t>(1, ceil_div(batch, places_a_group)));
    }
    const int64_t tiles = groups * ceil_div(batch, rows);
    const int64_t in_turn = std::max<int64_t>(1, ceil_div(tiles, places));  // tiles of a place
    const int64_t by_registers = device.registers_per_sm / (kernel.threads * 256);
    const int64_t by_shared = device.shared_bytes_per_block / shared;
    const int64_t resident = std::min(std::max<int64_t>(1, std::min(by_registers, by_shared)), in_turn);
    const double work = work_cycles(kernel, device);
    const double waves = static_cast<double>(ceil_div(in_turn, resident));
    const double arriving = arriving_cycles(kernel, rows);
    const double latency = kStepLatency + (kernel.ctas > 1 ? travel(kernel).hop + arriving : 0.0);
    const double cycles = waves * std::max(latency + work, resident * (work + arriving));
    const Cost cost{cycles * (kernel.ctas > 1 ? kWeightOfSharing : 1.0), kernel.hidden, kernel.rows};
    if (best.kernel && !(cost < least)) continue;
    best = {&kernel, kernel.ctas > 1 ? static_cast<int>(rows) : 0, std::min(tiles, places) * kernel.workspace_bytes};
    least = cost;
  }
  if (!best.kernel)
    throw std::invalid_argument("no CUDA kernel holds a matrix of " + std::to_string(hidden) +
                                " units on this device; they are compiled for up to " + std::to_string(largest) +
                                ". Split the layer into heads, or run the model in Python, which has Triton's kernels");
  return best;
}

}  // namespace fused_rin
