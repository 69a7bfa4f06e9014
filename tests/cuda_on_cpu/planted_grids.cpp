// A small exchange between the blocks of a grid, as grid_exchange.cuh does it, with a bug planted in it or none.
//
// kBlocks blocks of two warps hold a word a thread. In every step each adds up all words of all blocks (of the step
// before), all but the first of a block twice, so that a wrong sum stays one; and its own number;
// the sums go to everybody by packets of three words and the step's number.
#include <launch.h>

#include <device.cuh>

#include "../../csrc/cuda_on_cpu/emulated.h"

using namespace fused_rin;
using device::SharedMemory;

namespace {

enum Bug : int {
  kNone,
  kNumberApart,         // the step's number in a store of its own
  kOneBuffer,           // written while others may not have read it
  kOldNumbers,          // what an earlier sweep left is not cleared
  kNumberOfStepBefore,  // looks for the number of the step before, which is there already
  kNotPublished,        // one block keeps its state for itself
  kReadsAtOnce,         // does not look at the numbers
};

constexpr int kBlocks = 3, kThreads = 64, kWords = kBlocks * kThreads, kPackets = (kThreads + 2) / 3;
constexpr int kBuffer = kBlocks * kPackets;

struct Arguments {
  int bug, steps;
  uint32_t* out;
  uint4* workspace;
};

void exchange(const Arguments a) {
  const SharedMemory shared = device::shared_memory();
  const int thread = device::thread_idx(), rank = static_cast<int>(device::block_idx() % kBlocks);
  const auto buffer = [&](int step) { return a.bug == kOneBuffer ? 0 : step & 1; };
  uint32_t sum = 0;
  for (int step = 0; step < a.steps; ++step) {
    const uint32_t here = (step & 1) * 4 * kWords, there = 4 * kWords - here;
    const uint32_t number = a.bug == kNumberOfStepBefore ? step - 1 : step;
    for (int i = thread; i < kBuffer; i += kThreads) {
      const int block = i / kPackets, packet = i % kPackets;
      if (step && block == rank) continue;  // its own part a block has
      uint4 value{};
      if (step) {
        const uint4* const from = a.workspace + buffer(step) * kBuffer + i;
        for (int tries = 0;; ++tries) {
          device::load_packet_if(true, from, value);
          if (value.w == number || a.bug == kReadsAtOnce) break;
          device::poll_again(tries);
        }
      }
      const uint32_t words[] = {value.x, value.y, value.z};
      for (int j = 0; j < 3 && 3 * packet + j < kThreads; ++j)
        shared.store(here + 4 * (block * kThreads + 3 * packet + j), words[j]);
    }
    device::sync_block();
    sum = rank + 1;
    for (int i = 0; i < kWords; ++i) sum += (i % kThreads ? 2 : 1) * shared.load<uint32_t>(here + 4 * i);
    const uint32_t own = there + 4 * rank * kThreads;
    shared.store<uint32_t>(own + 4 * thread, sum + thread);
    device::sync_block();
    if (thread < kPackets && !(a.bug == kNotPublished && rank == 1)) {
      uint32_t value[3] = {};
      for (int j = 0; j < 3 && 3 * thread + j < kThreads; ++j)
        value[j] = shared.load<uint32_t>(own + 4 * (3 * thread + j));
      uint4* const to = a.workspace + buffer(step + 1) * kBuffer + rank * kPackets + thread;
      const uint32_t next = step + 1;
      if (a.bug == kNumberApart) {
        for (int j = 0; j < 3; ++j) fibres::packet_store(&to->x + j, &value[j], 4);
        fibres::packet_store(&to->w, &next, 4);
      } else {
        device::store_packet(to, {value[0], value[1], value[2], next});
      }
    }
  }
  device::store_global(a.out + rank * kThreads + thread, sum + thread);
}

}  // namespace

extern "C" int emulate_planted_grid(int bug, int steps, uint32_t* out, uint4* workspace, int seed,
                                    const TensorView* tensors, int count, char* message, int message_bytes) {
  launch_seed = static_cast<uint64_t>(seed);
  const Arguments arguments{bug, steps, out, workspace};
  return emulate(tensors, count, message, message_bytes, [&] {
    if (bug != kOldNumbers) zero_memory(workspace, 2 * kBuffer * 16, nullptr);
    launch_kernel(exchange, arguments, kBlocks, kThreads, 2 * 4 * kWords, nullptr, kBlocks, true);
  });
}
