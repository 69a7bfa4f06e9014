#include "run.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <numeric>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "crowd.h"
#include "pool.h"
#include "sanitize.h"

namespace fused_rin {
namespace {

// Aligned memory. In huge pages, which save 5 percent of a step at B = 1, D = 1,024, where U is 4 MB, and nothing that
// could be measured up to D = 512.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) {
    const size_t align = bytes < kHuge / 16 ? 4096 : kHuge;
    size_ = (bytes + align - 1) / align * align;
    data_ = static_cast<char*>(std::aligned_alloc(align, size_));
    if (!data_) throw std::bad_alloc();
    if (align == kHuge) prefer_huge_pages(data_, size_);
  }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory() { std::free(data_); }
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;
  void swap(Memory& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Memory for one call, handed back at its end for the next one: a fresh megabyte costs 256 page faults. What is kept is
// the process's, not a thread's, and has a bound: threads that call now and then would else keep a matrix each for as
// long as they live. Nobody waits for it, so a fork from another thread's call can leave nothing locked: whoever finds
// it taken goes to the system.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    const std::unique_lock<std::mutex> lock(kept_.mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      std::vector<Memory>& all = kept_.pieces;
      for (size_t i = all.size(); i-- > 0;) {  // the last one handed back is the warmest
        if (all[i].size() < bytes) continue;
        memory_ = std::move(all[i]);
        all.erase(all.begin() + static_cast<std::ptrdiff_t>(i));
        return;
      }
    }
    memory_ = Memory(bytes);
  }
  ~Workspace() {
    allow(memory_.data(), memory_.size());
    const std::unique_lock<std::mutex> lock(kept_.mutex, std::try_to_lock);
    if (!lock.owns_lock() || memory_.size() > kMost) return;
    std::vector<Memory>& all = kept_.pieces;
    size_t sum = memory_.size();
    for (const Memory& m : all) sum += m.size();
    size_t first = 0;
    while (first < all.size() && (sum > kMost || all.size() - first >= kMostPieces)) sum -= all[first++].size();
    all.erase(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(first));
    all.push_back(std::move(memory_));
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return memory_.data(); }

 private:
  static constexpr size_t kMost = size_t{64} << 20;
  static constexpr size_t kMostPieces = 64;
  struct Kept {
    std::mutex mutex;
    std::vector<Memory> pieces;
    Kept() { pieces.reserve(kMostPieces); }  // where memory is handed back there is no way to say that more failed
  };
  // Never destroyed: a thread may still be in a call while the process ends. Made when this library is loaded: a child
  // forked while another thread made it would wait for that thread for ever.
  static inline Kept& kept_ = *new Kept;
  Memory memory_;
};

// Hands out pieces of a workspace; first asked only for their sizes, then for the pieces.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  void* take(int64_t bytes) {
    char* piece = base_ ? base_ + used_ : nullptr;
    const size_t end = used_ + static_cast<size_t>(bytes);
    used_ = (end + 127) / 128 * 128 + kForbiddenBytes;
    if (base_) forbid(base_ + end, base_ + used_);
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

constexpr int64_t kHalf = 2;  // bytes of a number of 16 bits

int64_t groups_of(int64_t columns, int64_t lanes) { return (columns + lanes - 1) / lanes; }
// Scalars that the weight gradients of a layer are summed up in (layer.h).
int64_t sums_of(const Problem& p, const Layer& layer, int64_t lanes) {
  const int64_t groups = groups_of(p.hidden, lanes) + groups_of(layer.inputs, lanes);
  const int64_t units = groups_of(p.hidden, lanes) * lanes, more = transitions_of(p) - 1;
  return ((groups + more * groups_of(p.hidden, lanes)) * lanes + (1 + more) * kUnitSums * kBiasLevels) * units;
}

// Of a layer's input. Of float16 it is by tiles if `states` are, since both are then pairs (factor.h).
Panels make_panels(int64_t terms, int64_t outputs, DType dtype, const Kernels& kernels, const Layout& states) {
  Panels l{};
  const int64_t lanes = states.lanes;
  const bool by_tiles = dtype == DType::kFloat16 ? states.tiles : kernels.takes_tiles(dtype, terms);
  l.set_depth(terms, kernels.unit_terms(dtype, by_tiles), by_tiles);
  l.outputs = outputs;
  l.lanes = lanes;
  l.vecs = (outputs + lanes - 1) / lanes;
  l.cut((l.vecs + kernels.narrow_block - 1) / kernels.narrow_block);
  return l;
}

// Batch indices of some rows, and the steps they have.
struct Rows {
  std::vector<int64_t> order, lengths;
  int64_t position = 0, stride = 1;
  RowList list(bool with_lengths) const {
    return {static_cast<int64_t>(order.size()), order.data(), with_lengths ? lengths.data() : nullptr};
  }
};

class Call {
 public:
  Call(const Problem& p, const Layer* layer, const Kernels& kernels, const CpuPlan& plan)
      : p_(p),
        layer_(layer),
        kernels_(kernels),
        plan_(plan),
        scalar_(kernels.vector_bytes / plan.layout.lanes),
        unit_(kernels.unit_terms(p.dtype, plan.layout.tiles)) {
    std::vector<int64_t> order(static_cast<size_t>(p.batch));
    std::iota(order.begin(), order.end(), int64_t{0});
    if (p.lengths) {
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p.lengths[a] > p.lengths[b]; });
    }
    for (const int64_t b : order) add(all_, b);
    if (plan.sharing == Sharing::kRows) deal();
    if (layer) {
      const int64_t terms = p.backward ? p.hidden : layer->inputs, outputs = p.backward ? layer->inputs : p.hidden;
      input_ = make_panels(terms, outputs, p.dtype, kernels, plan.layout);
      if (!p.backward && plan.layout.tiles) input_.cut(plan.layout.blocks);  // both may make one tile's sums
    }
  }

  size_t bytes() { return carve(Carver(nullptr)); }
  void bind(char* memory) { carve(Carver(memory)); }
  Team& team() { return team_; }

  void run(int rank) {
    if (rank == 0 && unit_ > 1) clear_ends();
    pack(rank);
    if (plan_.threads > 1) team_.meet(rank);
    for (int64_t g = 0; g < p_.groups; ++g) {
      if (rank != 0 && team_.has_ended(rank)) return;
      run_group(g, rank);
    }
  }

 private:
  void add(Rows& rows, int64_t b) const {
    rows.order.push_back(b);
    if (p_.lengths) rows.lengths.push_back(std::clamp<int64_t>(p_.lengths[b], 0, p_.steps));
  }

  int64_t panel_bytes() const { return plan_.layout.scalars() * scalar_; }
  int64_t input_bytes() const { return input_.scalars() * scalar_; }
  bool needs_input() const { return layer_ && (!p_.backward || layer_->grad_x); }
  int64_t state_bytes() const { return plan_.layout.padded() * p_.batch * scalar_; }
  int64_t matrices() const { return p_.groups * transitions_of(p_); }
  int64_t max_chunk_rows() const {
    return p_.backward ? transitions_of(p_) * std::max(p_.batch, kOuterDepth) : std::max(p_.batch, kInputRows);
  }

  size_t carve(Carver carver) {
    const auto scalars = [&](int64_t count) { return carver.take(count * scalar_); };
    panels_ = static_cast<char*>(scalars(matrices() * plan_.layout.scalars()));
    const auto factors = [&](int64_t rows) {
      return static_cast<char*>(carver.take(unit_ > 1 ? rows * plan_.layout.halves() * kHalf : 0));
    };
    // Where factors are apart from states, of the state a row's owner alone reads, its columns of it, and the next one
    // takes its place: a step of 64 rows x 128 units touches a third less. Where a product reads the states themselves
    // that is 5 % slower: its loads wait for stores to other rows, a multiple of 4 KB away. Factors are read by all
    // threads that share a row, and by products beside which the next ones are made (beside.h).
    const bool paired = unit_ > 1;
    const bool apart = plan_.sharing == Sharing::kOutputs || (layer_ && !p_.backward && plan_.layout.tiles);
    for (int i = 0; i < 2; ++i) {
      states_[i] = i && paired ? states_[0] : static_cast<char*>(carver.take(p_.groups * state_bytes()));
      factors_[i] = i && !apart ? factors_[0] : factors(p_.groups * p_.batch);
    }
    if (splits(p_)) carried_ = static_cast<char*>(carver.take(p_.groups * state_bytes()));
    if (needs_input()) input_panels_ = static_cast<char*>(scalars(p_.groups * input_.scalars()));
    const int64_t padded = plan_.layout.padded(), lanes = plan_.layout.lanes, rows = max_chunk_rows();
    // Gradients of pre are shared by all threads; an input product is its thread's own.
    if (layer_) {
      for (int i = 0; i < (p_.backward ? 2 : plan_.threads); ++i) chunk_rows_[i] = scalars(rows * padded);
      for (int i = 0; i < (p_.backward ? 2 : 0); ++i) chunk_factors_[i] = factors(rows);
      const bool aside = p_.backward && p_.form == Form::kOutside && (layer_->grad_skips || layer_->grad_gains);
      for (int i = 0; i < (aside ? 2 : 0); ++i) chunk_aside_[i] = scalars(rows * padded);
      const int64_t groups = groups_of(p_.hidden, lanes) + groups_of(layer_->inputs, lanes);
      if (p_.backward) gradient_ = layer_->sums.memory ? layer_->sums.memory : scalars(sums_of(p_, *layer_, lanes));
      gathered_ = p_.backward
                      ? std::min(groups, outer_groups(kernels_.vector_bytes, unit_)) * (kOuterDepth / unit_) * lanes
                      : rows * input_.depth;
    }
    const int64_t most = std::max({max_tile_rows(plan_.layout), max_tile_rows(input_), std::min(kBandRows, p_.batch)});
    for (int i = 0; i < plan_.threads; ++i) {
      Own& own = own_[i];
      own.scratch = scalars(most * std::max(padded, input_.padded()) + kSliceScalars);
      own.index = static_cast<int32_t*>(carver.take((p_.hidden + kListSlack) * static_cast<int64_t>(sizeof(int32_t))));
      if (!layer_) continue;
      own.gathered = scalars(gathered_);
      if (p_.backward) {
        own.panel = scalars(kOuterDepth * kOuterVecs * lanes);
        own.sources = static_cast<int64_t*>(carver.take(2 * rows * static_cast<int64_t>(sizeof(int64_t))));
      } else {
        own.bias = scalars(transitions_of(p_) * padded);
      }
    }
    return carver.used();
  }

  // What fills up a row of factors is multiplied by zeros of the matrix, and must not be a NaN.
  void clear_ends() {
    const int64_t stride = plan_.layout.halves(), begin = plan_.layout.terms;
    const auto clear = [&](char* rows, int64_t count) {
      for (int64_t row = 0; rows && begin < stride && row < count; ++row) {
        std::memset(rows + (row * stride + begin) * kHalf, 0, static_cast<size_t>((stride - begin) * kHalf));
      }
    };
    for (char* rows : factors_) clear(rows, p_.groups * p_.batch);
    for (char* rows : chunk_factors_) clear(rows, max_chunk_rows());
  }

  // Calls body(matrix, block) for this thread's share of the panels of all of them.
  template <class Body>
  void for_blocks(int rank, int64_t blocks, int64_t matrices, Body body) const {
    const int64_t all = blocks * matrices, begin = rank * all / plan_.threads, end = (rank + 1) * all / plan_.threads;
    for (int64_t i = begin; i < end; ++i) body(i / blocks, i % blocks);
  }

  void pack(int rank) {
    const int64_t scalar = p_.dtype == DType::kFloat64 ? 8 : p_.dtype == DType::kFloat32 ? 4 : 2;
    const auto matrix = [&](const void* all, int64_t group, const Panels& l) {
      return static_cast<const char*>(all) + group * l.terms * l.outputs * scalar;
    };
    for_blocks(rank, plan_.layout.blocks, matrices(), [&](int64_t number, int64_t block) {
      const void* u = matrix(p_.weight, number, plan_.layout);
      char* panels = panels_ + number * panel_bytes();
      if (!kernels_.pack(p_.dtype, u, p_.backward, plan_.layout, block, block + 1, panels)) {
        finite_.store(false, std::memory_order_relaxed);
      }
    });
    if (!needs_input()) return;
    for_blocks(rank, input_.blocks, p_.groups, [&](int64_t group, int64_t block) {
      const void* w = matrix(layer_->w_ih, group, input_);
      kernels_.pack(p_.dtype, w, p_.backward, input_, block, block + 1, input_panels_ + group * input_bytes());
    });
  }

  // Rows g * batch + b over the threads: in turn when they differ in length, else in runs. By the caller for all of
  // them: from another thread no failure to get memory would come through.
  void deal() {
    const int64_t n = plan_.threads, all = p_.groups * p_.batch;
    dealt_.resize(static_cast<size_t>(p_.groups * n));
    for (Rows& rows : dealt_) rows.stride = p_.lengths ? n : 1;
    for (int64_t i = 0; i < all; ++i) {
      const int64_t owner = p_.lengths ? i % n : ((i + 1) * n - 1) / all;
      Rows& rows = dealt_[static_cast<size_t>(i / p_.batch * n + owner)];
      if (rows.order.empty()) rows.position = i % p_.batch;
      add(rows, all_.order[static_cast<size_t>(i % p_.batch)]);
    }
  }
  const Rows& rows_of(int64_t group, int rank) const {
    return dealt_.empty() ? all_ : dealt_[static_cast<size_t>(group * plan_.threads + rank)];
  }

  void run_group(int64_t group, int rank) {
    const Rows& rows = rows_of(group, rank);
    if (rows.order.empty() && !layer_) return;  // in a layer's backward sweep there are gradients to share
    const Layout& l = plan_.layout;
    const Own& own = own_[rank];
    const bool ended = team_.has_ended(rank);  // rank 0 does this group alone
    const bool team = plan_.sharing == Sharing::kOutputs && !ended, with_lengths = p_.lengths != nullptr;
    Part part{};
    part.group = group;
    part.rows = rows.list(with_lengths);
    part.block_begin = team ? rank * l.blocks / plan_.threads : 0;
    part.block_end = team ? (rank + 1) * l.blocks / plan_.threads : l.blocks;
    part.panels = panels_ + group * transitions_of(p_) * panel_bytes();
    part.finite = finite_.load(std::memory_order_relaxed);
    part.index = own.index;
    // Rows of different threads never overlap in state memory: a run of rows starts at its batch index, and rows dealt
    // in turn are placed by rank.
    const int64_t slot = p_.lengths && plan_.sharing == Sharing::kRows ? first_slot(group, rank) : rows.position;
    for (int i = 0; i < 2; ++i) {
      part.state[i] = states_[i] + group * state_bytes() + slot * l.padded() * scalar_;
      if (unit_ > 1) part.factors[i] = factors_[i] + (group * p_.batch + slot) * l.halves() * kHalf;
    }
    if (carried_) part.carried = carried_ + group * state_bytes() + slot * l.padded() * scalar_;
    part.scratch = own.scratch;
    part.team = plan_.threads > 1 && !ended ? &team_ : nullptr;
    part.meets = team;
    part.rank = rank;
    part.threads = ended ? 1 : plan_.threads;
    if (layer_) add_layer(part, rows, rank);
    kernels_.sweep(p_, l, part);
  }

  void add_layer(Part& part, const Rows& rows, int rank) {
    const Own& own = own_[rank];
    part.layer = layer_;
    part.all = all_.list(p_.lengths != nullptr);
    part.position = rows.position;
    part.stride = rows.stride;
    part.input = &input_;
    part.input_panels = needs_input() ? input_panels_ + part.group * input_bytes() : nullptr;
    part.bias = own.bias;
    part.gathered = own.gathered;
    for (int i = 0; i < 2; ++i) {
      part.chunk_rows[i] = chunk_rows_[p_.backward ? i : rank];
      part.chunk_factors[i] = chunk_factors_[i];
      part.chunk_aside[i] = chunk_aside_[i];
    }
    part.panel = own.panel;
    part.gradient = gradient_;
    part.sources = own.sources;
    part.max_chunk_rows = max_chunk_rows();
  }

  // Where a thread's rows lie when rows are dealt in turn: after those of the lower ranks.
  int64_t first_slot(int64_t group, int rank) const {
    int64_t slot = 0;
    for (int64_t i = 0; i < p_.batch; ++i) slot += (group * p_.batch + i) % plan_.threads < rank;
    return slot;
  }

  // Memory of one thread's own.
  struct Own {
    void *scratch, *gathered, *panel, *bias;
    int32_t* index;
    int64_t* sources;
  };

  const Problem& p_;
  const Layer* layer_;
  const Kernels& kernels_;
  const CpuPlan& plan_;
  const int64_t scalar_;  // bytes
  const int64_t unit_;    // terms in a unit of a product
  Rows all_;
  // [G, threads], where each has rows of its own.
  std::vector<Rows> dealt_;
  Panels input_{};
  char *panels_ = nullptr, *input_panels_ = nullptr;
  char *states_[2] = {}, *factors_[2] = {}, *carried_ = nullptr;
  void* chunk_rows_[Team::kMaxThreads] = {};
  char* chunk_factors_[2] = {};
  void* chunk_aside_[2] = {};
  void* gradient_ = nullptr;
  int64_t gathered_ = 0;
  Own own_[Team::kMaxThreads] = {};
  std::atomic<bool> finite_{true};
  Team team_;
};

bool run_plan(const Problem& p, const Layer* layer, const Kernels& kernels, const CpuPlan& plan, int torchs) {
  Call call(p, layer, kernels, plan);
  const Workspace workspace(call.bytes());
  call.bind(workspace.data());
  bool done = true;
  if (plan.threads == 1) {
    call.run(0);
  } else {
    call.team().start(plan.threads, plan.sharing == Sharing::kOutputs);
    done = Pool::instance().try_run(plan.threads, torchs, [&](int rank) { call.run(rank); });
    if (done && call.team().has_ended(0)) found_crowded();
  }
  return done;
}

}  // namespace

void sweep_cpu(const Problem& p, const Layer* layer, const Kernels& kernels, int max_threads) {
  if (p.batch == 0 || p.groups == 0 || p.hidden == 0) return;
  const Company company = company_of(max_threads);
  if (run_plan(p, layer, kernels, plan_cpu(p, layer, kernels, company), company.torchs)) return;
  run_plan(p, layer, kernels, plan_cpu(p, layer, kernels, Company{}), 0);  // the pool is another caller's just now
}

int64_t sums_size(const Problem& p, const Layer& layer, const Kernels& kernels) {
  return sums_of(p, layer, kernels.vector_bytes / (p.dtype == DType::kFloat64 ? 8 : 4));
}

void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  // An advice: a system without huge pages refuses it, and nothing is lost.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

void step_cpu(const Step& s, const Kernels& kernels, int max_threads) {
  const int64_t outputs = s.groups * s.hidden, scalar = s.dtype == DType::kFloat64 ? 8 : 4;
  // Waking a thread takes about 10 us, in which one core reads a few hundred KB of weights.
  const int64_t weight_bytes = outputs * (s.inputs + s.hidden) * scalar;
  const int64_t rows_bytes = weight_bytes * std::max<int64_t>(s.batch, 1);
  const int64_t worthwhile =
      std::min<int64_t>({int64_t{max_threads}, int64_t{Team::kMaxThreads}, 1 + rows_bytes / (int64_t{2} << 20)});
  const Company company = company_of(static_cast<int>(worthwhile));
  const int threads = company.crowded ? 1 : company.threads;
  const auto first = [&](int rank) {
    const int64_t output = rank * outputs / threads;
    return output - output % s.hidden % kStepOutputs;
  };
  const auto part = [&](int rank) { kernels.step(s, first(rank), rank + 1 == threads ? outputs : first(rank + 1)); };
  if (threads > 1 && Pool::instance().try_run(threads, company.torchs ? max_threads : 0, part)) return;
  kernels.step(s, 0, outputs);
}

}  // namespace fused_rin
