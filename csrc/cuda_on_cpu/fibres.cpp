#include "fibres.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <random>

namespace fused_rin::fibres {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kWord = 4;  // granularity of the race detector

struct AsyncCopy {
  uint32_t offset;
  const void* global;
  size_t bytes;
};

struct Thread {
  ucontext_t context;
  enum class State { kReady, kBarrier, kWarp, kDone } state = State::kReady;
  int barrier = -1;
  std::vector<AsyncCopy> open_group;
  std::deque<std::vector<AsyncCopy>> groups;
};

// Logical time of a warp: `clock[v]` is how much of warp v's past it knows. Its own entry grows at every barrier, its
// `lockstep` at every __syncwarp.
struct Warp {
  std::vector<uint32_t> clock;
  uint32_t lockstep = 0;
  int arrived = 0;
  const char* collective = nullptr;
  void* arguments[kWarpSize] = {};
};

struct Barrier {
  int arrived = 0;
  int expected = 0;
  std::vector<uint32_t> clock;
  std::vector<bool> waiting;  // the warps that sync; those that only arrive learn nothing
};

struct Access {
  uint32_t time = 0;  // of the accessing warp; 0: never
  uint32_t lockstep = 0;
  int thread = -1;
};

class Block;
Block* current = nullptr;

class Block {
 public:
  Block(const Launch& launch, int64_t index, uint64_t seed, const std::function<void()>& kernel, char* stacks)
      : launch_(launch), index_(index), random_(seed), kernel_(kernel) {
    const int warps = launch.threads / kWarpSize;
    warps_.resize(warps);
    for (int w = 0; w < warps; ++w) {
      warps_[w].clock.assign(warps, 0);
      warps_[w].clock[w] = 1;
    }
    shared_.assign(launch.shared_bytes, static_cast<char>(0xff));
    const size_t words = launch.shared_bytes / kWord + 1;
    under_way_.resize(words);
    writes_.resize(words);
    reads_.resize(words * warps);
    threads_.resize(launch.threads);
    for (int i = 0; i < launch.threads; ++i) {
      getcontext(&threads_[i].context);
      threads_[i].context.uc_stack.ss_sp = stacks + i * kStackBytes;
      threads_[i].context.uc_stack.ss_size = kStackBytes;
      threads_[i].context.uc_link = &scheduler_;
      makecontext(&threads_[i].context, &Block::enter, 0);
      ready_.push_back(i);
    }
  }

  void run() {
    current = this;
    int done = 0;
    while (done < launch_.threads && !error_) {
      if (ready_.empty()) {
        error_ = std::make_exception_ptr(KernelError(where_all_wait()));
        break;
      }
      const size_t pick = random_() % ready_.size();
      active_ = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      swapcontext(&scheduler_, &threads_[active_].context);
      done += threads_[active_].state == Thread::State::kDone;
    }
    current = nullptr;
    if (error_) std::rethrow_exception(error_);  // the other fibres' stacks are simply abandoned
  }

  int active() const { return active_; }
  int64_t index() const { return index_; }

  [[noreturn]] void fail(const std::string& what) const {
    throw KernelError("kernel " + launch_.kernel + ", block " + std::to_string(index_) + ", thread " +
                      std::to_string(active_) + " (warp " + std::to_string(active_ / kWarpSize) + ", lane " +
                      std::to_string(active_ % kWarpSize) + "): " + what);
  }

  void barrier_sync(int id, int threads) {
    if (arrive(id, threads, 1, true)) return yield();
    threads_[active_].barrier = id;
    suspend(Thread::State::kBarrier);
  }

  // A whole warp arrives and goes on; what it does from here on is not ordered by this barrier.
  void barrier_arrive(int id, int threads) {
    arrive(id, threads, kWarpSize, false);
    ++warp().clock[active_ / kWarpSize];
  }

  void collective(const char* name, void* arguments, void (*execute)(void* const (&)[kWarpSize])) {
    Warp& mine = warp();
    if (mine.arrived == 0) mine.collective = name;
    if (std::strcmp(mine.collective, name) != 0)
      fail(std::string("the warp has diverged: this lane is at ") + name + ", another at " + mine.collective);
    mine.arguments[active_ % kWarpSize] = arguments;
    if (++mine.arrived < kWarpSize) return suspend(Thread::State::kWarp);
    mine.arrived = 0;
    execute(mine.arguments);
    const int first = active_ / kWarpSize * kWarpSize;
    for (int i = first; i < first + kWarpSize; ++i)
      if (i != active_) wake(i);
    yield();
  }

  void sync_warp_memory() { ++warp().lockstep; }

  char* shared_access(uint32_t offset, size_t bytes, bool write) {
    const char* verb = write ? "write" : "read";
    if (offset % bytes) fail("misaligned shared " + describe(verb, bytes, offset));
    if (offset + bytes > launch_.shared_bytes)
      fail("shared " + describe(verb, bytes, offset) + ", outside the block's " + std::to_string(launch_.shared_bytes) +
           " bytes");
    occasional_yield();
    for (size_t word = offset / kWord; word * kWord < offset + bytes; ++word) note(word, write);
    return shared_.data() + offset;
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

  Thread& thread() { return threads_[active_]; }

  // What a copy is under way to is neither what was there nor what will be.
  void under_way(uint32_t offset, size_t bytes, bool yes) {
    for (size_t word = offset / kWord; word * kWord < offset + bytes; ++word) under_way_[word] = yes;
  }

 private:
  static void enter() {
    Block& block = *current;
    try {
      block.kernel_();
    } catch (...) {
      block.error_ = std::current_exception();
    }
    block.thread().state = Thread::State::kDone;
  }

  Warp& warp() { return warps_[active_ / kWarpSize]; }

  // True if this arrival completes the barrier; then all who wait are woken, knowing each other's past.
  bool arrive(int id, int threads, int arriving, bool wait) {
    const int expected = threads ? threads : launch_.threads;
    Barrier& barrier = barriers_[id];
    if (barrier.arrived == 0)
      barrier = {0, expected, std::vector<uint32_t>(warps_.size(), 0), std::vector<bool>(warps_.size(), false)};
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
    for (int i = 0; i < launch_.threads; ++i)
      if (threads_[i].state == Thread::State::kBarrier && threads_[i].barrier == id) wake(i);
    return true;
  }

  static void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
    for (size_t v = 0; v < into.size(); ++v) into[v] = std::max(into[v], from[v]);
  }

  void wake(int i) {
    threads_[i].state = Thread::State::kReady;
    ready_.push_back(i);
  }
  void suspend(Thread::State state) {
    const int me = active_;
    threads_[me].state = state;
    swapcontext(&threads_[me].context, &scheduler_);
  }
  void yield() {
    ready_.push_back(active_);
    suspend(Thread::State::kReady);
  }
  void occasional_yield() {
    if ((random_() & 31) == 0) yield();
  }

  static std::string describe(const char* verb, size_t bytes, uint32_t offset) {
    return std::string(verb) + " of " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset);
  }

  // Is an access of warp `w` known to (so: before) the running thread's next one?
  bool ordered(const Access& earlier, size_t w) {
    if (earlier.time == 0 || earlier.thread == active_) return true;
    const size_t mine = active_ / kWarpSize;
    if (w != mine) return earlier.time <= warps_[mine].clock[w];
    return earlier.time < warps_[w].clock[w] || earlier.lockstep != warps_[w].lockstep;
  }

  void note(size_t word, bool write) {
    const size_t mine = active_ / kWarpSize, warps = warps_.size();
    const Access now{warps_[mine].clock[mine], warps_[mine].lockstep, active_};
    Access& last = writes_[word];
    if (under_way_[word])
      fail("shared " + describe(write ? "write" : "read", kWord, word * kWord) + ", to which a copy is under way");
    if (!write && last.time == 0)
      fail("shared " + describe("read", kWord, word * kWord) + ", which nothing has written");
    if (!ordered(last, last.thread / kWarpSize)) race(word, write, last.thread, "written");
    Access* readers = &reads_[word * warps];
    if (write) {
      for (size_t w = 0; w < warps; ++w)
        if (!ordered(readers[w], w)) race(word, write, readers[w].thread, "read");
      last = now;
    } else {
      readers[mine] = now;
    }
  }

  [[noreturn]] void race(size_t word, bool write, int other, const char* what) const {
    fail("race: shared " + describe(write ? "write" : "read", kWord, word * kWord) + ", " + what + " by thread " +
         std::to_string(other) + " with no barrier between");
  }

  std::string where_all_wait() const {
    std::string text = "kernel " + launch_.kernel + ", block " + std::to_string(index_) + ": deadlock;";
    for (const auto& [id, barrier] : barriers_)
      if (barrier.arrived)
        text += " barrier " + std::to_string(id) + " has " + std::to_string(barrier.arrived) + " of " +
                std::to_string(barrier.expected) + " threads;";
    for (size_t w = 0; w < warps_.size(); ++w)
      if (warps_[w].arrived)
        text += " warp " + std::to_string(w) + " has " + std::to_string(warps_[w].arrived) + " lanes at " +
                warps_[w].collective + ";";
    return text;
  }

  const Launch& launch_;
  const int64_t index_;
  std::mt19937_64 random_;
  const std::function<void()>& kernel_;
  ucontext_t scheduler_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::map<int, Barrier> barriers_;
  std::vector<int> ready_;
  std::vector<char> shared_;
  std::vector<bool> under_way_;         // per word
  std::vector<Access> writes_, reads_;  // per word; per word and warp
  std::exception_ptr error_;
  int active_ = -1;
};

}  // namespace

void run(const Launch& launch, const std::function<void()>& kernel) {
  if (launch.threads <= 0 || launch.threads % kWarpSize || launch.threads > 1024)
    throw KernelError("a block has whole warps, at most 1024 threads; got " + std::to_string(launch.threads));
  const size_t bytes = launch.threads * kStackBytes;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  const std::unique_ptr<void, std::function<void(void*)>> stacks(memory, [=](void* p) { munmap(p, bytes); });
  std::mt19937_64 random(launch.seed);
  std::vector<int64_t> order(launch.blocks);
  for (int64_t i = 0; i < launch.blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (const int64_t index : order) Block(launch, index, random(), kernel, static_cast<char*>(memory)).run();
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
  current->under_way(offset, bytes, true);
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
      current->under_way(copy.offset, copy.bytes, false);
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

}  // namespace fused_rin::fibres
