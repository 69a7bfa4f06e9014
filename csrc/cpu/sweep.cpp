#include "sweep.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <numeric>

#include "pool.h"

namespace fused_rin {
namespace {

// Aligned memory that a calling thread keeps between calls: a fresh megabyte costs 256 page faults.
class Workspace {
 public:
  ~Workspace() { std::free(data_); }
  char* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }
  void release_if_large() {
    if (size_ > (size_t{64} << 20)) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
    }
  }

 private:
  static constexpr size_t kAlign = 4096;
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out pieces of a workspace; first asked only for their sizes, then for the pieces.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  void* take(int64_t bytes) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(bytes) + 127) / 128 * 128;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// The rows of one recurrence that one thread works on.
struct Rows {
  std::vector<int64_t> order, lengths;
};

class Call {
 public:
  Call(const Problem& p, const Kernels& kernels, const CpuPlan& plan)
      : p_(p), kernels_(kernels), plan_(plan), scalar_(kernels.vector_bytes / plan.layout.lanes) {
    if (p.lengths) {
      sorted_.resize(static_cast<size_t>(p.batch));
      std::iota(sorted_.begin(), sorted_.end(), int64_t{0});
      std::stable_sort(sorted_.begin(), sorted_.end(),
                       [&](int64_t a, int64_t b) { return p.lengths[a] > p.lengths[b]; });
    }
  }

  size_t bytes() { return carve(Carver(nullptr)); }
  void bind(char* memory) { carve(Carver(memory)); }
  Team& team() { return team_; }

  void run(int rank) {
    pack(rank);
    if (plan_.threads > 1) team_.meet(rank);
    for (int64_t g = 0; g < p_.groups; ++g) run_group(g, rank);
  }

 private:
  int64_t panel_bytes() const { return plan_.layout.padded() * p_.hidden * scalar_; }
  int64_t state_bytes() const { return plan_.layout.padded() * p_.batch * scalar_; }

  size_t carve(Carver carver) {
    panels_ = static_cast<char*>(carver.take(p_.groups * panel_bytes()));
    for (int i = 0; i < 2; ++i) states_[i] = static_cast<char*>(carver.take(p_.groups * state_bytes()));
    for (int i = 0; i < plan_.threads; ++i) {
      scratch_[i] = carver.take(kScratchScalars * scalar_);
      index_[i] = static_cast<int32_t*>(carver.take(p_.hidden * static_cast<int64_t>(sizeof(int32_t))));
    }
    return carver.used();
  }

  void pack(int rank) {
    const int64_t blocks = plan_.layout.blocks, all = blocks * p_.groups;
    const int64_t begin = rank * all / plan_.threads, end = (rank + 1) * all / plan_.threads;
    for (int64_t i = begin; i < end; ++i) {
      char* panels = panels_ + i / blocks * panel_bytes();
      if (!kernels_.pack(p_, plan_.layout, i / blocks, i % blocks, i % blocks + 1, panels)) {
        finite_.store(false, std::memory_order_relaxed);
      }
    }
  }

  // Rows g * batch + b, dealt in turn when they differ in length, else in runs.
  Rows rows_of(int64_t group, int rank) const {
    Rows rows;
    const int64_t n = plan_.team ? 1 : plan_.threads, first = group * p_.batch, all = p_.groups * p_.batch;
    for (int64_t i = 0; i < p_.batch; ++i) {
      const int64_t owner = p_.lengths ? (first + i) % n : ((first + i + 1) * n - 1) / all;
      if (!plan_.team && owner != rank) continue;
      const int64_t b = p_.lengths ? sorted_[static_cast<size_t>(i)] : i;
      rows.order.push_back(b);
      if (p_.lengths) rows.lengths.push_back(std::clamp<int64_t>(p_.lengths[b], 0, p_.steps));
    }
    return rows;
  }

  void run_group(int64_t group, int rank) {
    const Rows rows = rows_of(group, rank);
    if (rows.order.empty()) return;
    const Layout& l = plan_.layout;
    Part part{};
    part.group = group;
    part.num_rows = static_cast<int64_t>(rows.order.size());
    part.order = rows.order.data();
    part.lengths = p_.lengths ? rows.lengths.data() : nullptr;
    part.block_begin = plan_.team ? rank * l.blocks / plan_.threads : 0;
    part.block_end = plan_.team ? (rank + 1) * l.blocks / plan_.threads : l.blocks;
    part.panels = panels_ + group * panel_bytes();
    part.finite = finite_.load(std::memory_order_relaxed);
    part.index = index_[rank];
    // Threads with rows of their own take state memory by their first row: rows of one group never overlap, since
    // a run of rows starts at its batch index, and rows dealt in turn are placed by rank.
    const int64_t row_bytes = l.padded() * scalar_;
    int64_t slot = 0;
    if (!plan_.team) slot = p_.lengths ? first_slot(group, rank) : part.order[0];
    for (int i = 0; i < 2; ++i) part.state[i] = states_[i] + group * state_bytes() + slot * row_bytes;
    part.scratch = scratch_[rank];
    part.team = plan_.team ? &team_ : nullptr;
    part.rank = rank;
    kernels_.sweep(p_, l, part);
  }

  // Where a thread's rows lie when rows are dealt in turn: after those of the lower ranks.
  int64_t first_slot(int64_t group, int rank) const {
    int64_t slot = 0;
    for (int64_t i = 0; i < p_.batch; ++i) slot += (group * p_.batch + i) % plan_.threads < rank;
    return slot;
  }

  const Problem& p_;
  const Kernels& kernels_;
  const CpuPlan& plan_;
  const int64_t scalar_;
  std::vector<int64_t> sorted_;
  char* panels_ = nullptr;
  char* states_[2] = {};
  void* scratch_[Team::kMaxThreads] = {};
  int32_t* index_[Team::kMaxThreads] = {};
  std::atomic<bool> finite_{true};
  Team team_;
};

void run_plan(const Problem& p, const Kernels& kernels, const CpuPlan& plan, bool& done) {
  thread_local Workspace workspace;
  Call call(p, kernels, plan);
  call.bind(workspace.get(call.bytes()));
  if (plan.threads == 1) {
    call.run(0);
    done = true;
  } else {
    call.team().start(plan.threads);
    done = Pool::instance().try_run(plan.threads, [&](int rank) { call.run(rank); });
  }
  workspace.release_if_large();
}

}  // namespace

void sweep_cpu(const Problem& p, const Kernels& kernels, int max_threads) {
  if (p.batch == 0 || p.groups == 0 || p.hidden == 0) return;
  bool done = false;
  run_plan(p, kernels, plan_cpu(p, kernels, max_threads), done);
  if (!done) run_plan(p, kernels, plan_cpu(p, kernels, 1), done);  // the pool is another caller's just now
}

void step_cpu(const Step& s, const Kernels& kernels, int max_threads) {
  const int64_t outputs = s.groups * s.hidden, scalar = s.dtype == DType::kFloat64 ? 8 : 4;
  // Waking a thread takes about 10 us, in which one core reads a few hundred KB of weights.
  const int64_t weight_bytes = outputs * (s.inputs + s.hidden) * scalar;
  const int64_t rows_bytes = weight_bytes * std::max<int64_t>(s.batch, 1);
  const int threads = static_cast<int>(
      std::min<int64_t>({int64_t{max_threads}, int64_t{Team::kMaxThreads}, 1 + rows_bytes / (int64_t{2} << 20)}));
  const auto first = [&](int rank) {
    const int64_t output = rank * outputs / threads;
    return output - output % s.hidden % kStepOutputs;
  };
  const auto part = [&](int rank) { kernels.step(s, first(rank), rank + 1 == threads ? outputs : first(rank + 1)); };
  if (threads > 1 && Pool::instance().try_run(threads, part)) return;
  kernels.step(s, 0, outputs);
}

}  // namespace fused_rin
