// CUDA blocks on CPU fibres: every thread has a stack of its own, one runs at a time, and the one that runs next is
// drawn from a seeded generator, so a schedule can be replayed. The blocks of a cluster run side by side, and those of
// a grid that share a tile.
//
// What it watches, and reports as an exception with the kernel's coordinates (block, thread, warp, lane):
//   - accesses outside shared memory or outside every registered tensor, misaligned ones, writes to read-only tensors;
//   - shared memory read before anything was written there (it also starts as NaN bytes);
//   - races on shared memory: two accesses of one word, at least one a write, not ordered by barriers (vector clocks
//     per warp, so the verdict does not depend on the schedule that happened to run);
//   - warps that diverge around a collective, barriers that not all threads reach, deadlock;
//   - stores to a peer's shared memory that overtake its readers, that are read before their mbarrier's phase has ended
//     (they arrive late and in shuffled order), or that reach a block which has ended;
//   - packets in device memory that never come: each store of one arrives late too, whole, in shuffled order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "watched.h"

namespace fused_rin::fibres {

struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Tensor {
  std::string name;
  const void* data;
  size_t bytes;
  bool writable;
};

struct Launch {
  std::string kernel;
  int64_t blocks;
  int threads;
  int cluster;  // blocks that run side by side
  size_t shared_bytes;
  uint64_t seed;
  std::vector<Tensor> tensors;
};

// Runs `kernel` for every thread of every block; the clusters one after another, in shuffled order.
void run(const Launch& launch, const std::function<void()>& kernel);

// ---- called from inside a kernel ---------------------------------------------------------------------------------

int thread_idx();
int64_t block_idx();

void barrier_sync(int id, int threads);  // threads == 0: all of the block
void barrier_arrive(int id, int threads);
void warp_sync();
void trap();

// Checks an access and notes it; then the caller may touch the bytes.
char* shared_access(uint32_t offset, size_t bytes, bool write);
void global_access(const void* p, size_t bytes, bool write);

// All 32 lanes of the warp meet here; `execute` sees the arguments of every lane once, in lane order.
void warp_collective(const char* name, void* arguments, void (*execute)(void* const (&lanes)[kWarpSize]));

// A copy that lands when its group is waited for, and no sooner: until then nobody may touch the bytes. From null it
// lands zeros.
void async_copy(uint32_t offset, const void* global, size_t bytes);
void async_commit();
void async_wait(int pending);

// ---- packets: stores to device memory that arrive some time later, each whole, and loads of what has arrived
void packet_store(void* p, const void* value, size_t bytes);
void packet_load(const void* p, void* value, size_t bytes);
void packet_await();  // until something has arrived where the thread has looked

// ---- clusters
void cluster_sync();

// At a place of the running block's shared memory; a phase ends with `count` arrivals and as many bytes as expected.
void mbarrier_init(uint32_t offset, int count);
void mbarrier_arrive(uint32_t offset, int expected_bytes);
void mbarrier_wait(uint32_t offset, uint32_t parity);

// Into the shared memory of block `rank` of the cluster, some time later; then its mbarrier there is told.
void async_store(int rank, uint32_t offset, const void* value, size_t bytes, uint32_t barrier);

}  // namespace fused_rin::fibres
