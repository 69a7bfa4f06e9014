// A small exchange between the blocks of a cluster, as exchange.cuh does it, with a bug planted in it or none.
//
// kBlocks blocks of two warps hold a word a thread. In every step each adds up all words of all blocks (of the step
// before), all but the first of a block twice, so that a wrong sum stays one; and its own number;
// the sums go to everybody by st.async.
#include <launch.h>

#include <device.cuh>

#include "../../csrc/cuda_on_cpu/emulated.h"

using namespace fused_rin;
using device::SharedMemory;

namespace {

enum Bug : int {
  kNone,
  kNothingExpected,     // no expect_tx: a phase ends with the block's own arrivals
  kOneBuffer,           // written while peers may still read it
  kEndsAtOnce,          // a block that ends while stores to it are under way
  kWrongParity,         // waits for the phase before, which has ended
  kTooManyExpected,     // more bytes than ever come
  kNotMet,              // stores to a peer that has not made its barrier yet
  kArrivesBeforeReads,  // tells the others that it has read what it reads afterwards
};

constexpr int kBlocks = 3, kThreads = 64, kWords = kBlocks * kThreads, kBufferBytes = 4 * kWords;

struct Arguments {
  int bug, steps;
  uint32_t* out;
};

void exchange(const Arguments a) {
  const SharedMemory shared = device::shared_memory();
  const int thread = device::thread_idx(), rank = static_cast<int>(device::block_idx() % kBlocks);
  const uint32_t barriers = 2 * kBufferBytes;
  const auto buffer = [&](int step) { return a.bug == kOneBuffer ? 0u : static_cast<uint32_t>(step % 2); };
  for (int i = thread; i < kWords; i += kThreads) {
    shared.store<uint32_t>(4 * i, 0u);
    shared.store<uint32_t>(kBufferBytes + 4 * i, 0u);
  }
  if (thread == 0) {
    device::mbarrier_init(shared, barriers, kThreads / 32);
    device::mbarrier_init(shared, barriers + 8, kThreads / 32);
  }
  if (a.bug == kNotMet)
    device::sync_block();
  else
    device::sync_cluster();

  uint32_t sum = 0;
  for (int step = 0; step < a.steps; ++step) {
    if (step > 0) {
      const uint32_t phase = a.bug == kOneBuffer ? step - 1 : (step - 1) / 2;
      device::mbarrier_wait(shared, barriers + 8 * buffer(step), (phase & 1) ^ (a.bug == kWrongParity));
    }
    const uint32_t here = buffer(step) * kBufferBytes, there = buffer(step + 1) * kBufferBytes;
    const uint32_t barrier = barriers + 8 * buffer(step + 1);
    const auto arrive = [&] {
      device::sync_warp();
      if (device::lane_idx()) return;
      const int bytes = (kBlocks - 1) * 4 * kThreads + (a.bug == kTooManyExpected ? 16 : 0);
      if (thread == 0 && a.bug != kNothingExpected)
        device::mbarrier_arrive_expect(shared, barrier, bytes);
      else
        device::mbarrier_arrive(shared, barrier);
    };
    sum = rank + 1;
    for (int i = 0; i < kWords; ++i) sum += (i % kThreads ? 2 : 1) * shared.load<uint32_t>(here + 4 * i);
    const uint32_t own = there + 4 * (rank * kThreads + thread);
    shared.store<uint32_t>(own, sum + thread);
    device::sync_warp();
    if (a.bug == kArrivesBeforeReads) arrive();
    if (thread % 4 == 0) {
      const uint4 value = shared.load<uint4>(own);
      for (int d = 1; d < kBlocks; ++d)
        device::st_async(device::peer(shared, (rank + d) % kBlocks), own, value, barrier);
    }
    if (a.bug == kArrivesBeforeReads) {
      for (int i = 0; i < kWords; ++i) sum += shared.load<uint32_t>(here + 4 * i) & 0;
    } else {
      arrive();
    }
  }
  if (a.bug != kEndsAtOnce) {
    const uint32_t phase = a.bug == kOneBuffer ? a.steps - 1 : (a.steps - 1) / 2;
    device::mbarrier_wait(shared, barriers + 8 * buffer(a.steps), phase & 1);
  }
  device::store_global(a.out + rank * kThreads + thread, sum + thread);
}

}  // namespace

extern "C" int emulate_planted_cluster(int bug, int steps, uint32_t* out, int seed, const TensorView* tensors,
                                       int count, char* message, int message_bytes) {
  launch_seed = static_cast<uint64_t>(seed);
  const Arguments arguments{bug, steps, out};
  return emulate(tensors, count, message, message_bytes, [&] {
    launch_kernel(exchange, arguments, kBlocks, kThreads, 2 * kBufferBytes + 16, nullptr, kBlocks);
  });
}
