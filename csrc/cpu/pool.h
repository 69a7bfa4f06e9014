// Threads for the sweep: torch's own where they can be had (openmp.h), else a pool.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>

namespace fused_rin {

// Threads are started when first needed and wait asleep between calls. One caller at a time may use them: a caller
// that finds them busy runs its work on its own thread alone, which gives the same bits. After a fork the child gets
// a fresh, empty pool (the parent's threads do not exist there).
class Pool {
 public:
  static Pool& instance();

  // Calls task(0 .. threads-1) at the same time, rank 0 on the caller's thread, and returns when all are done. `torchs`
  // is how many threads torch uses, 0 if its are not to be these. Returns false, having done nothing, if another caller
  // holds the pool or the system gives no more threads. The task must not throw.
  bool try_run(int threads, int torchs, const std::function<void(int rank)>& task);

 private:
  bool run(int threads, int torchs, const std::function<void(int)>& task);
  bool start_worker(int rank);
  void work(int rank, uint64_t seen);

  std::mutex in_use_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};  // raised once per call, under mutex_
  std::atomic<int> running_{0};     // workers that have not finished this round
  int workers_ = 0;
  int threads_ = 0;
  const std::function<void(int)>* task_ = nullptr;
};

}  // namespace fused_rin
