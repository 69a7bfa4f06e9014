// Small kernels with a bug planted in each, to show that the fibres catch it; kBug == kNone is the same kernel without.
// They are written as the sweeps are: through <device.cuh> alone.
#include <launch.h>

#include <device.cuh>

#include "../../csrc/cuda_on_cpu/emulated.h"

using namespace fused_rin;
using device::SharedMemory;

namespace {

enum Bug : int {
  kNone,
  kMissingBarrier,
  kWrongFragment,
  kReadBeyondTensor,
  kReadBeyondShared,
  kUnwritten,
  kDiverged,
  kBarrierNotReachedByAll,
  kForgottenWait,
  kWriteToInput,
};

struct Arguments {
  int bug;
  const uint32_t* in;
  uint32_t* out;
};

constexpr int kThreads = 64;

// out[i] = in[(i + 32) % 64]: two warps exchange their values through shared memory.
void exchange(const Arguments a) {
  const SharedMemory shared = device::shared_memory();
  const int i = device::thread_idx();
  const int source = a.bug == kReadBeyondTensor ? i + 1 : i;
  if (a.bug != kUnwritten || i < 32) shared.store<uint32_t>(4 * i, device::load_global(a.in + source));
  if (a.bug != kMissingBarrier && !(a.bug == kBarrierNotReachedByAll && i == 40)) device::sync_block();
  const int peer = a.bug == kReadBeyondShared ? i + 32 : (i + 32) % kThreads;
  const uint32_t value = shared.load<uint32_t>(4 * peer);
  if (a.bug == kDiverged && i < 32) {
    if (i % 2)
      device::shuffle_xor(0.f, 1);
    else
      device::sync_warp();
  }
  if (a.bug == kWriteToInput) device::store_global(const_cast<uint32_t*>(a.in) + i, value);
  device::store_global(a.out + i, value);
}

// The same through cp.async: each of the first 16 threads copies 16 bytes.
void exchange_async(const Arguments a) {
  const SharedMemory shared = device::shared_memory();
  const int i = device::thread_idx();
  if (i < 16) device::cp_async<16>(shared, 16 * i, a.in + 4 * i, true);
  device::cp_async_commit();
  if (a.bug != kForgottenWait) device::cp_async_wait<0>();
  device::sync_block();
  device::store_global(a.out + i, shared.load<uint32_t>(4 * ((i + 32) % kThreads)));
}

// out [16][8] float = A [16][16] times B^T, B [8][16], bfloat16, one warp. `kTransposed` B is stored [16][8] instead
// and read by ldmatrix.trans.
template <bool kTransposed>
void multiply(const Arguments a) {
  const SharedMemory shared = device::shared_memory();
  const int lane = device::lane_idx(), g = lane / 4, q = lane % 4;
  constexpr int kB = 16 * 32;  // B's place, after A
  for (int i = lane; i < (16 + 8) * 8; i += 32) shared.store<uint32_t>(4 * i, device::load_global(a.in + i));
  device::sync_warp();
  uint32_t fa[4], fb[4];
  // A: matrices (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
  device::ldmatrix_x4(fa, shared, (lane % 16) * 32 + lane / 16 * 16);
  if (kTransposed)  // two 8x8 matrices, k 0-7 and 8-15; the other lanes repeat them
    device::ldmatrix_x4_trans(fb, shared, kB + lane % 16 * 16);
  else
    device::ldmatrix_x4(fb, shared, kB + lane % 8 * 32 + lane / 8 % 2 * 16);
  if (a.bug == kWrongFragment) std::swap(fa[1], fa[2]);
  float d[4] = {};
  device::mma_m16n8k16(device::BFloat16{}, d, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) device::store_global(a.out + (g + i / 2 * 8) * 8 + 2 * q + i % 2, device::as_word(d[i]));
}

// Warp 0 produces, warp 1 consumes, on named barriers: the producer only arrives.
void handover(const Arguments a) {
  const SharedMemory shared = device::shared_memory();
  const int i = device::thread_idx();
  if (device::warp_idx() == 0) {
    if (a.bug != kMissingBarrier) shared.store<uint32_t>(4 * i, device::load_global(a.in + i));
    device::named_barrier_arrive(1, kThreads);
    if (a.bug == kMissingBarrier) shared.store<uint32_t>(4 * i, device::load_global(a.in + i));
  } else {
    device::named_barrier_sync(1, kThreads);
    device::store_global(a.out + i - 32, shared.load<uint32_t>(4 * (i - 32)));
  }
}

}  // namespace

extern "C" int emulate_planted(int kernel, int bug, const uint32_t* in, uint32_t* out, int seed,
                               const TensorView* tensors, int count, char* message, int message_bytes) {
  launch_seed = static_cast<uint64_t>(seed);
  const Arguments arguments{bug, in, out};
  void (*const kernels[])(Arguments) = {exchange, exchange_async, multiply<false>, multiply<true>, handover};
  const int threads = kernel == 2 || kernel == 3 ? 32 : kThreads;
  const int shared_bytes = kernel == 2 || kernel == 3 ? (16 + 8) * 32 : 4 * kThreads;
  return emulate(tensors, count, message, message_bytes,
                 [&] { launch_kernel(kernels[kernel], arguments, 1, threads, shared_bytes, nullptr); });
}
