#include "fibres.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <random>

#include "packets.h"
#include "switch.h"

namespace fused_rin::fibres {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

struct AsyncCopy {
  uint32_t offset;
  const void* global;
  size_t bytes;
};

struct Thread {
  Fibre fibre;
  enum class State { kReady, kBarrier, kWarp, kMbarrier, kCluster, kPacket, kDone } state = State::kReady;
  int64_t waits_for = -1;           // the number of the barrier, or the place of the mbarrier
  std::vector<const void*> polled;  // where it has looked for packets since it last waited for one
  uint64_t looked_after = 0;        // how many had arrived when it began to look
  std::vector<AsyncCopy> open_group;
  std::deque<std::vector<AsyncCopy>> groups;
};

// A warp's own entry of its clock grows at every barrier and arrival, its `lockstep` at every __syncwarp.
struct Warp {
  Clock clock;
  uint32_t lockstep = 0;
  int arrived = 0;
  const char* collective = nullptr;
  void* arguments[kWarpSize] = {};
};

struct Barrier {
  int arrived = 0;
  int expected = 0;
  Clock clock;
  std::vector<bool> waiting;  // the warps that sync; those that only arrive learn nothing
};

struct Mbarrier {
  int count = 0;       // arrivals of a phase
  int pending = 0;     // of them, those to come
  int64_t bytes = 0;   // expected and not here; below zero: here and not expected
  uint32_t phase = 0;  // that is under way
  Clock clock, ended;  // what the arrivals of this phase know; of the phase before
};

// A store to a peer that is under way, with what its warp knew.
struct AsyncStore {
  int thread;
  size_t block;
  uint32_t offset;
  std::vector<char> value;
  uint32_t barrier;
  Clock clock;
};

struct Block {
  int64_t index;
  WatchedMemory shared;
  std::map<int, Barrier> barriers;
  std::map<uint32_t, Mbarrier> mbarriers;
  int running;
};

class Group;
Group* current = nullptr;

// The blocks that run side by side. Threads and warps are numbered through all of them.
class Group {
 public:
  Group(const Launch& launch, int64_t first_block, uint64_t seed, const std::function<void()>& kernel, char* stacks)
      : launch_(launch),
        kernel_(kernel),
        random_(seed),
        warps_a_block_(launch.threads / kWarpSize),
        threads_(launch.threads * launch.cluster),
        warps_(warps_a_block_ * launch.cluster) {
    for (size_t w = 0; w < warps_.size(); ++w) {
      warps_[w].clock.assign(warps_.size(), 0);
      warps_[w].clock[w] = 1;
    }
    for (int b = 0; b < launch.cluster; ++b)
      blocks_.push_back({first_block + b,
                         WatchedMemory(launch.shared_bytes, b * warps_a_block_, warps_a_block_),
                         {},
                         {},
                         launch.threads});
    for (size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].fibre.prepare(stacks + i * kStackBytes, kStackBytes, &Group::enter);
      ready_.push_back(static_cast<int>(i));
    }
  }

  void run() {
    current = this;
    size_t done = 0;
    while (done < threads_.size() && !error_) {
      if (!(under_way_.empty() && packets_.empty()) && (ready_.empty() || (random_() & 15) == 0)) {
        if (packets_.empty() || (!under_way_.empty() && random_() & 1))
          deliver();
        else
          deliver_packet();
        continue;
      }
      if (ready_.empty()) {
        error_ = std::make_exception_ptr(KernelError(where_all_wait()));
        break;
      }
      // Drawn evenly, all threads would go on at nearly one pace: so for some time one warp waits for all others.
      if (++decisions_ % (64 * launch_.threads) == 1) slow_ = static_cast<int>(random_() % warps_.size());
      size_t pick = random_() % ready_.size();
      for (size_t i = 0; i < ready_.size() && ready_[pick] / kWarpSize == slow_; ++i) pick = (pick + 1) % ready_.size();
      active_ = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      threads_[active_].fibre.resume(scheduler_);
      if (threads_[active_].state != Thread::State::kDone) continue;
      ++done;
      --block().running;
    }
    while (!packets_.empty()) deliver_packet();
    current = nullptr;
    if (error_) std::rethrow_exception(error_);  // the other fibres' stacks are simply abandoned
  }

  int active() const { return active_ % launch_.threads; }
  int64_t index() const { return blocks_[active_ / launch_.threads].index; }
  Thread& thread() { return threads_[active_]; }
  Block& block() { return blocks_[active_ / launch_.threads]; }

  [[noreturn]] void fail(const std::string& what) const {
    throw KernelError("kernel " + launch_.kernel + ", block " + std::to_string(index()) + ", thread " +
                      std::to_string(active()) + " (warp " + std::to_string(active() / kWarpSize) + ", lane " +
                      std::to_string(active() % kWarpSize) + "): " + what);
  }

  void barrier_sync(int id, int threads) {
    if (arrive(id, threads, 1, true)) return yield();
    suspend(Thread::State::kBarrier, id);
  }

  // A whole warp arrives and goes on; what it does from here on is not ordered by this barrier.
  void barrier_arrive(int id, int threads) {
    arrive(id, threads, kWarpSize, false);
    ++warp().clock[active_ / kWarpSize];
  }

  void cluster_sync() {
    if (++in_cluster_sync_ < static_cast<int>(threads_.size())) return suspend(Thread::State::kCluster, 0);
    in_cluster_sync_ = 0;
    Clock all(warps_.size());
    for (const Warp& one : warps_) join(all, one.clock);
    for (size_t w = 0; w < warps_.size(); ++w) {
      warps_[w].clock = all;
      ++warps_[w].clock[w];
    }
    for (size_t i = 0; i < threads_.size(); ++i)
      if (threads_[i].state == Thread::State::kCluster) wake(static_cast<int>(i));
    yield();
  }

  void collective(const char* name, void* arguments, void (*execute)(void* const (&)[kWarpSize])) {
    Warp& mine = warp();
    if (mine.arrived == 0) mine.collective = name;
    if (std::strcmp(mine.collective, name) != 0)
      fail(std::string("the warp has diverged: this lane is at ") + name + ", another at " + mine.collective);
    mine.arguments[active_ % kWarpSize] = arguments;
    if (++mine.arrived < kWarpSize) return suspend(Thread::State::kWarp, 0);
    mine.arrived = 0;
    execute(mine.arguments);
    const int first = active_ / kWarpSize * kWarpSize;
    for (int i = first; i < first + kWarpSize; ++i)
      if (i != active_) wake(i);
    yield();
  }

  void sync_warp_memory() { ++warp().lockstep; }

  char* shared_access(uint32_t offset, size_t bytes, bool write) {
    occasional_yield();
    for (const auto& [place, _] : block().mbarriers)
      if (place < offset + bytes && offset < place + 8)
        fail("shared access to the mbarrier at " + std::to_string(place));
    check(block().shared.access(offset, bytes, write, accessor()));
    return block().shared.data() + offset;
  }

  void global_access(const void* p, size_t bytes, bool write) {
    const auto at = reinterpret_cast<uintptr_t>(p);
    if (at % bytes) fail(std::string("misaligned global ") + (write ? "write" : "read"));
    std::string nearest = "no tensor", read_only;
    uintptr_t distance = ~uintptr_t{0};
    for (const Tensor& tensor : launch_.tensors) {
      const auto begin = reinterpret_cast<uintptr_t>(tensor.data), end = begin + tensor.bytes;
      if (at >= begin && at + bytes <= end) {
        if (!write || tensor.writable) return occasional_yield();
        read_only = tensor.name;  // another tensor may lie over it
      }
      const uintptr_t gap = at < begin ? begin - at : at + bytes - end;
      if (gap < distance) {
        distance = gap;
        nearest = (at < begin ? "starts " : "ends ") + std::to_string(gap) + " bytes " +
                  (at < begin ? "before " : "past the end of ") + tensor.name;
      }
    }
    if (!read_only.empty()) fail("write to the read-only tensor " + read_only);
    fail(std::string("global ") + (write ? "write" : "read") + " of " + std::to_string(bytes) +
         " bytes outside every tensor: it " + nearest);
  }

  // ---- clusters

  void mbarrier_init(uint32_t offset, int count) {
    std::memset(shared_access(offset, 8, true), 0, 8);
    block().mbarriers[offset] = {count, count, 0, 0, Clock(warps_.size()), Clock(warps_.size())};
  }

  void mbarrier_arrive(uint32_t offset, int expected_bytes) {
    Mbarrier& barrier = mbarrier(block(), offset);
    if (barrier.pending == 0) fail("more arrivals at an mbarrier than a phase has");
    barrier.bytes += expected_bytes;
    --barrier.pending;
    join(barrier.clock, warp().clock);
    ++warp().clock[active_ / kWarpSize];  // what it does from here on is not ordered by this phase
    end_phase(block(), offset, barrier);
    occasional_yield();
  }

  void mbarrier_wait(uint32_t offset, uint32_t parity) {
    Mbarrier& barrier = mbarrier(block(), offset);
    occasional_yield();
    while ((barrier.phase & 1) == parity) suspend(Thread::State::kMbarrier, offset);
    join(warp().clock, barrier.ended);
  }

  void async_store(int rank, uint32_t offset, const void* value, size_t bytes, uint32_t barrier) {
    occasional_yield();
    Block& peer = blocks_.at(rank);
    if (peer.running == 0) fail(ended(peer));
    check(peer.shared.access(offset, bytes, true, accessor()));
    peer.shared.under_way(offset, bytes, true);
    const char* const from = static_cast<const char*>(value);
    under_way_.push_back({active_, static_cast<size_t>(rank), offset, {from, from + bytes}, barrier, warp().clock});
    ++warp().clock[active_ / kWarpSize];  // who knows its later past does not know that this has arrived
  }

  // ---- packets

  void packet_store(void* p, const void* value, size_t bytes) {
    global_access(p, bytes, true);
    packets_.store(p, value, bytes);
  }

  void packet_load(const void* p, void* value, size_t bytes) {
    if (thread().polled.empty()) thread().looked_after = arrived_;
    thread().polled.push_back(p);
    global_access(p, bytes, false);
    std::memcpy(value, p, bytes);
  }

  // Until something arrives where the thread has looked; not at all if something has arrived since it began to.
  void packet_await() {
    if (thread().looked_after < arrived_)
      yield();
    else
      suspend(Thread::State::kPacket, 0);
    thread().polled.clear();
  }

 private:
  static void enter() {
    Group& group = *current;
    try {
      group.kernel_();
    } catch (...) {
      group.error_ = std::current_exception();
    }
    group.thread().state = Thread::State::kDone;
    Fibre::leave(group.scheduler_);
  }

  Warp& warp() { return warps_[active_ / kWarpSize]; }
  Accessor accessor() { return {active_, warp().clock, warp().lockstep}; }
  void check(const std::string& wrong) const {
    if (!wrong.empty()) fail(wrong);
  }

  // True if this arrival completes the barrier; then all who wait are woken, knowing each other's past.
  bool arrive(int id, int threads, int arriving, bool wait) {
    const int expected = threads ? threads : launch_.threads;
    Barrier& barrier = block().barriers[id];
    if (barrier.arrived == 0) barrier = {0, expected, Clock(warps_.size(), 0), std::vector<bool>(warps_.size(), false)};
    if (barrier.expected != expected)
      fail("barrier " + std::to_string(id) + " is used for " + std::to_string(expected) + " threads here, for " +
           std::to_string(barrier.expected) + " elsewhere");
    join(barrier.clock, warp().clock);
    if (wait) barrier.waiting[active_ / kWarpSize] = true;
    barrier.arrived += arriving;
    if (barrier.arrived < expected) return false;
    barrier.arrived = 0;
    for (size_t w = 0; w < warps_.size(); ++w) {
      if (!barrier.waiting[w]) continue;
      join(warps_[w].clock, barrier.clock);
      ++warps_[w].clock[w];
    }
    wake_block(block(), Thread::State::kBarrier, id);
    return true;
  }

  Mbarrier& mbarrier(Block& owner, uint32_t offset) {
    const auto found = owner.mbarriers.find(offset);
    if (found == owner.mbarriers.end()) fail("no mbarrier at offset " + std::to_string(offset));
    return found->second;
  }

  void end_phase(Block& owner, uint32_t offset, Mbarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.count;
    ++barrier.phase;
    barrier.ended = barrier.clock;
    wake_block(owner, Thread::State::kMbarrier, offset);
  }

  // One of the stores that are under way arrives.
  void deliver() {
    const size_t pick = random_() % under_way_.size();
    const AsyncStore store = std::move(under_way_[pick]);
    under_way_[pick] = std::move(under_way_.back());
    under_way_.pop_back();
    Block& peer = blocks_[store.block];
    active_ = store.thread;  // whose fault it is
    try {
      if (peer.running == 0) fail(ended(peer));
      peer.shared.under_way(store.offset, store.value.size(), false);
      std::memcpy(peer.shared.data() + store.offset, store.value.data(), store.value.size());
      Mbarrier& barrier = mbarrier(peer, store.barrier);
      barrier.bytes -= static_cast<int64_t>(store.value.size());
      join(barrier.clock, store.clock);
      end_phase(peer, store.barrier, barrier);
    } catch (...) {
      error_ = std::current_exception();
    }
  }

  void deliver_packet() {
    ++arrived_;
    const char* const place = packets_.deliver(random_());
    const auto is_there = [=](const void* packet) {  // a part of it
      return place >= packet && place < static_cast<const char*>(packet) + 16;
    };
    for (size_t i = 0; i < threads_.size(); ++i) {
      const Thread& one = threads_[i];
      if (one.state == Thread::State::kPacket && std::any_of(one.polled.begin(), one.polled.end(), is_there))
        wake(static_cast<int>(i));
    }
  }

  static std::string ended(const Block& peer) {
    return "a store to the shared memory of block " + std::to_string(peer.index) + ", which has ended";
  }

  void wake(int i) {
    threads_[i].state = Thread::State::kReady;
    ready_.push_back(i);
  }
  void wake_block(const Block& owner, Thread::State state, int64_t what) {
    const int first = static_cast<int>(&owner - blocks_.data()) * launch_.threads;
    for (int i = first; i < first + launch_.threads; ++i)
      if (threads_[i].state == state && threads_[i].waits_for == what) wake(i);
  }
  void suspend(Thread::State state, int64_t what) {
    const int me = active_;
    threads_[me].state = state;
    threads_[me].waits_for = what;
    threads_[me].fibre.wait(scheduler_);
  }
  void yield() {
    ready_.push_back(active_);
    suspend(Thread::State::kReady, 0);
  }
  void occasional_yield() {
    if ((random_() & 31) == 0) yield();
  }

  std::string where_all_wait() const {
    std::string text = "kernel " + launch_.kernel + ", block " + std::to_string(blocks_[0].index) + ": deadlock;";
    for (const Block& block : blocks_) {
      const std::string where = blocks_.size() > 1 ? " of block " + std::to_string(block.index) : "";
      for (const auto& [id, barrier] : block.barriers)
        if (barrier.arrived)
          text += " barrier " + std::to_string(id) + where + " has " + std::to_string(barrier.arrived) + " of " +
                  std::to_string(barrier.expected) + " threads;";
      for (const auto& [offset, barrier] : block.mbarriers)
        text += " mbarrier at " + std::to_string(offset) + where + " waits for " + std::to_string(barrier.pending) +
                " arrivals and " + std::to_string(barrier.bytes) + " bytes in phase " + std::to_string(barrier.phase) +
                ";";
    }
    for (size_t w = 0; w < warps_.size(); ++w)
      if (warps_[w].arrived)
        text += " warp " + std::to_string(w) + " has " + std::to_string(warps_[w].arrived) + " lanes at " +
                warps_[w].collective + ";";
    const auto polling = std::count_if(threads_.begin(), threads_.end(),
                                       [](const Thread& t) { return t.state == Thread::State::kPacket; });
    if (polling) text += " " + std::to_string(polling) + " threads wait for packets;";
    return text;
  }

  const Launch& launch_;
  const std::function<void()>& kernel_;
  std::mt19937_64 random_;
  jmp_buf scheduler_;
  const size_t warps_a_block_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::vector<int> ready_;
  std::vector<AsyncStore> under_way_;
  Packets packets_;
  uint64_t arrived_ = 0;  // packets
  uint64_t decisions_ = 0;
  int slow_ = -1;  // warp
  int in_cluster_sync_ = 0;
  std::exception_ptr error_;
  int active_ = 0;
};

}  // namespace

void run(const Launch& launch, const std::function<void()>& kernel) {
  if (launch.threads <= 0 || launch.threads % kWarpSize || launch.threads > 1024)
    throw KernelError("a block has whole warps, at most 1024 threads; got " + std::to_string(launch.threads));
  if (launch.cluster <= 0 || launch.blocks % launch.cluster)
    throw KernelError("blocks come in whole clusters; got " + std::to_string(launch.blocks) + " in clusters of " +
                      std::to_string(launch.cluster));
  static thread_local Stacks stacks;
  char* const memory = stacks.have(launch.threads * launch.cluster * kStackBytes);
  std::mt19937_64 random(launch.seed);
  std::vector<int64_t> order(launch.blocks / launch.cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i) * launch.cluster;
  std::shuffle(order.begin(), order.end(), random);
  for (const int64_t first : order) Group(launch, first, random(), kernel, memory).run();
}

int thread_idx() { return current->active(); }
int64_t block_idx() { return current->index(); }

void barrier_sync(int id, int threads) { current->barrier_sync(id, threads); }

void warp_collective(const char* name, void* arguments, void (*execute)(void* const (&)[kWarpSize])) {
  current->collective(name, arguments, execute);
}

void warp_sync() {
  warp_collective("sync_warp", nullptr, [](void* const(&)[kWarpSize]) { current->sync_warp_memory(); });
}

void barrier_arrive(int id, int threads) {
  int arguments[] = {id, threads};
  warp_collective("barrier_arrive", arguments, [](void* const(&lanes)[kWarpSize]) {
    const int* first = static_cast<const int*>(lanes[0]);
    current->barrier_arrive(first[0], first[1]);
  });
}

void trap() { current->fail("trap"); }

char* shared_access(uint32_t offset, size_t bytes, bool write) { return current->shared_access(offset, bytes, write); }
void global_access(const void* p, size_t bytes, bool write) { current->global_access(p, bytes, write); }

void async_copy(uint32_t offset, const void* global, size_t bytes) {
  std::memset(current->shared_access(offset, bytes, true), 0xff, bytes);
  current->block().shared.under_way(offset, bytes, true);
  current->thread().open_group.push_back({offset, global, bytes});
}
void async_commit() {
  Thread& thread = current->thread();
  thread.groups.push_back(std::move(thread.open_group));
  thread.open_group.clear();
}
void async_wait(int pending) {
  Thread& thread = current->thread();
  while (thread.groups.size() > static_cast<size_t>(pending)) {
    for (const AsyncCopy& copy : thread.groups.front()) {
      current->block().shared.under_way(copy.offset, copy.bytes, false);
      char* to = shared_access(copy.offset, copy.bytes, true);
      if (!copy.global) {
        std::memset(to, 0, copy.bytes);
        continue;
      }
      global_access(copy.global, copy.bytes, false);
      std::memcpy(to, copy.global, copy.bytes);
    }
    thread.groups.pop_front();
  }
}

void packet_store(void* p, const void* value, size_t bytes) { current->packet_store(p, value, bytes); }
void packet_load(const void* p, void* value, size_t bytes) { current->packet_load(p, value, bytes); }
void packet_await() { current->packet_await(); }

void cluster_sync() { current->cluster_sync(); }
void mbarrier_init(uint32_t offset, int count) { current->mbarrier_init(offset, count); }
void mbarrier_arrive(uint32_t offset, int expected_bytes) { current->mbarrier_arrive(offset, expected_bytes); }
void mbarrier_wait(uint32_t offset, uint32_t parity) { current->mbarrier_wait(offset, parity); }
void async_store(int rank, uint32_t offset, const void* value, size_t bytes, uint32_t barrier) {
  current->async_store(rank, offset, value, bytes, barrier);
}

}  // namespace fused_rin::fibres
