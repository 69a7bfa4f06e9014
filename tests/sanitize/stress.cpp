// The CPU engine as programs treat it at their worst, without Python or torch, to be built with a sanitizer: several
// callers at once while settings change, forks, memory and threads that are not to be had, an exit in the middle of a
// call. Every result is compared with what a lone call on one thread gave, bit for bit.
//
//     native_stress ISA SECONDS      all scenarios; SECONDS: how long callers go on at once,
//                                    below 5 with fewer calls for the rest, too
//     native_stress ISA out-of-bounds | race | overflow     a fault that a sanitizer has to find

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../../csrc/cpu/crowd.h"
#include "../../csrc/cpu/openmp.h"
#include "../../csrc/cpu/run.h"
#include "../../csrc/cpu/sanitize.h"
#include "../../csrc/cpu/team.h"

#if FUSED_RIN_ASAN
#include <sanitizer/lsan_interface.h>
#endif

using namespace fused_rin;

// Findings end a process, also one that was forked while it had threads; memory that is not to be had is a null
// pointer. Leaks are looked for once, at the end of main: children have no threads for it to stop.
extern "C" const char* __tsan_default_options() {
  return "halt_on_error=1:die_after_fork=0:allocator_may_return_null=1:atexit_sleep_ms=0";
}
// Locals that outlive their function are not looked for where GCC compiles: it then puts vectors of 64 bytes where they
// are not aligned (12.2, AVX-512).
extern "C" const char* __asan_default_options() {
#if defined(__clang__)
  return "allocator_may_return_null=1:leak_check_at_exit=0";
#else
  return "allocator_may_return_null=1:leak_check_at_exit=0:detect_stack_use_after_return=0";
#endif
}

// ---- memory that fails

namespace {
std::atomic<int64_t> until_failure{-1};  // this many allocations succeed; negative: all

void* allocate(size_t bytes) {
  if (until_failure.load(std::memory_order_relaxed) >= 0 &&
      until_failure.fetch_sub(1, std::memory_order_relaxed) == 0) {
    throw std::bad_alloc();
  }
  if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
}  // namespace

// Not inlined: GCC would see memory of `new` be handed to free().
#define REPLACED __attribute__((noinline))
REPLACED void* operator new(size_t bytes) { return allocate(bytes); }
REPLACED void* operator new[](size_t bytes) { return allocate(bytes); }
REPLACED void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return std::malloc(bytes ? bytes : 1); }
REPLACED void operator delete(void* memory) noexcept { std::free(memory); }
REPLACED void operator delete[](void* memory) noexcept { std::free(memory); }
REPLACED void operator delete(void* memory, size_t) noexcept { std::free(memory); }
REPLACED void operator delete[](void* memory, size_t) noexcept { std::free(memory); }

namespace {

// ---- calls

using Bytes = std::vector<char>;  // of its exact size: a step out of it is a finding

int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

void put(DType dtype, double value, char* to) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  const uint32_t exponent = bits >> 23 & 255;
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::kFloat16) {
    const uint32_t sign = bits >> 16 & 0x8000,
                   rest = exponent <= 112 ? 0 : (exponent - 112) << 10 | (bits >> 13 & 1023);
    half = static_cast<uint16_t>(sign | rest);
  }
  if (dtype == DType::kFloat64) std::memcpy(to, &value, 8);
  if (dtype == DType::kFloat32) std::memcpy(to, &single, 4);
  if (size_of(dtype) == 2) std::memcpy(to, &half, 2);
}

enum class Kind { kSweep, kLayer, kStep };
enum class Batch { kFull, kLengths, kPacked };

struct Shape {
  Kind kind;
  int64_t steps, batch, groups, hidden, reversed, inputs;
  Batch layout;
  bool resets;
  Form form = Form::kInside;
  Activation activation = Activation::kReLU;  // another one: units have factors of their own
  bool spans = false;                         // a layer's, in several calls
  int64_t transitions = 1;                    // of a layer
};

// One call with all that it reads. It may be made from many threads at once.
class Call {
 public:
  Call(const Shape& s, DType dtype, bool backward) : shape_(s), dtype_(dtype), backward_(backward) {
    draw_.seed(static_cast<unsigned>(s.hidden + s.batch));
    const int64_t units = s.groups * s.hidden;
    rows_ = s.steps * s.batch;
    if (s.layout != Batch::kFull) {
      for (int64_t b = 0; b < s.batch; ++b) {
        lengths_.push_back(s.layout == Batch::kPacked ? s.steps - b * s.steps / s.batch : b * 7 % (s.steps + 1));
      }
    }
    if (s.layout == Batch::kPacked) {
      rows_ = 0;
      for (int64_t t = 0; t < s.steps; ++t) {
        offsets_.push_back(rows_);
        for (const int64_t length : lengths_) rows_ += length > t;
      }
    }
    if (s.resets) {
      for (int64_t r = 0; r < rows_; ++r) resets_.push_back(r % 5 == 3);
    }
    u_ = numbers(s.transitions * s.groups * s.hidden * s.hidden, 0.3 / std::sqrt(static_cast<double>(s.hidden)));
    w_ = numbers(units * s.inputs, 0.5 / std::sqrt(static_cast<double>(s.inputs + 1)));
    bias_ = numbers(units, 0.5);
    x_ = numbers(rows_ * s.inputs, 1);
    in_ = numbers(rows_ * units, 1);
    state_ = numbers(s.batch * units, 1);
    saved_ = numbers(s.transitions * rows_ * units, 1);
    deep_ = numbers((s.transitions - 1) * units, 1);
    factors_ = numbers(units, 1, scalar());
    scalars_ = numbers(s.batch * units, 1, scalar());
  }

  // What the call writes, one after the other; `threads` as torch has them.
  std::vector<Bytes> run(const Kernels& kernels, int threads) const {
    std::vector<Bytes> outputs;
    outputs.reserve(12);
    const auto output = [&](int64_t count, DType dtype) {
      outputs.emplace_back(static_cast<size_t>(count * size_of(dtype)), '\xff');
      return outputs.back().data();
    };
    run(kernels, threads, output);
    return outputs;
  }

  template <class Output>
  void run(const Kernels& kernels, int threads, Output output_of) const {
    const auto output = [&](int64_t count) { return output_of(count, dtype_); };
    const Shape& s = shape_;
    const int64_t units = s.groups * s.hidden;
    if (s.kind == Kind::kStep) {
      Step step{};
      step.batch = s.batch, step.inputs = s.inputs, step.groups = s.groups, step.hidden = s.hidden;
      step.dtype = dtype_, step.activation = Activation::kReLU, step.skip = 0.75;
      step.w_ih = w_.data(), step.w_hh = u_.data(), step.b_ih = step.b_hh = bias_.data();
      step.x = x_.data(), step.h = state_.data();
      step.out = output(s.batch * units), step.h_n = output(s.batch * units);
      return step_cpu(step, kernels, threads);
    }
    Problem p = problem();
    Layer layer = this->layer();
    const bool is_layer = s.kind == Kind::kLayer;
    if (!is_layer || !backward_) p.out = output(rows_ * units);
    p.state_out = output_of(s.batch * units, s.spans ? scalar() : dtype_);
    if (is_layer && backward_) {
      layer.grad_x = output(rows_ * s.inputs), layer.grad_w_ih = output(s.hidden * s.inputs);
      layer.grad_w_hh = output(s.transitions * s.hidden * s.hidden);
      if (s.transitions > 1) layer.grad_b_deep = output((s.transitions - 1) * s.hidden);
      layer.grad_b_ih = output(s.hidden), layer.grad_b_hh = output(s.hidden);
      if (has_units()) layer.grad_skips = output_of(s.hidden, scalar());
      if (s.form == Form::kOutside) layer.grad_gains = output_of(s.hidden, scalar());
    }
    if (s.form == Form::kOutside && (!is_layer || !backward_)) p.aside = output(rows_ * units);
    if (s.transitions > 1 && !backward_) p.inner = output((s.transitions - 1) * rows_ * units);
    if (s.spans) return run_spans(p, layer, kernels, threads);
    sweep_cpu(p, is_layer ? &layer : nullptr, kernels, threads);
  }

  // In several calls, as checkpoint.py makes them.
  void run_spans(const Problem& whole, const Layer& layer, const Kernels& kernels, int threads) const {
    const int64_t size = size_of(dtype_), hidden = shape_.hidden, inputs = shape_.inputs;
    Bytes now = scalars_, next = scalars_;
    Bytes sums(static_cast<size_t>(sums_size(whole, layer, kernels) * size_of(scalar())));
    int64_t blocks = 0, begin = 0;
    for (const int64_t end : spans_cpu(whole, 0, 1)) {
      const int64_t rows = (backward_ ? whole.steps - end : begin) * whole.batch;
      const auto read = [&](const void*& numbers, int64_t width) {
        if (numbers) numbers = static_cast<const char*>(numbers) + rows * width * size;
      };
      const auto written = [&](void*& numbers, int64_t width) {
        if (numbers) numbers = static_cast<char*>(numbers) + rows * width * size;
      };
      Problem p = whole;
      Layer l = layer;
      p.steps = end - begin, p.scalar_states = true;
      p.state_in = now.data(), p.state_out = next.data();
      read(p.in, hidden), read(p.saved, hidden), read(p.noise, hidden), read(l.states, hidden), read(l.x, inputs);
      written(p.out, hidden), written(p.aside, hidden), written(l.grad_x, inputs);
      if (backward_) l.sums = {sums.data(), &blocks, begin > 0, end < whole.steps};
      sweep_cpu(p, &l, kernels, threads);
      now.swap(next);
      begin = end;
    }
    std::memcpy(whole.state_out, now.data(), now.size());
  }

  Problem problem() const {
    const Shape& s = shape_;
    Problem p{};
    p.steps = s.steps, p.batch = s.batch, p.groups = s.groups, p.hidden = s.hidden, p.num_reversed = s.reversed;
    p.dtype = dtype_, p.activation = s.activation, p.backward = backward_, p.skip = 0.75;
    p.form = s.form;
    if (has_units()) p.skips = factors_.data();
    if (s.form == Form::kOutside) p.gains = factors_.data(), p.noise = backward_ ? nullptr : in_.data();
    if (s.form == Form::kCurrent && backward_) p.initial = state_.data();
    p.lengths = lengths_.empty() ? nullptr : lengths_.data();
    p.offsets = offsets_.empty() ? nullptr : offsets_.data();
    p.resets = resets_.empty() ? nullptr : resets_.data();
    p.weight = u_.data(), p.state_in = state_.data();
    p.transitions = s.transitions, p.plane = rows_;
    if (backward_ && s.transitions > 1) p.inner = const_cast<char*>(saved_.data()) + rows_ * s.hidden * size_of(dtype_);
    if (s.kind == Kind::kSweep || backward_) p.in = in_.data();
    if (backward_) p.saved = saved_.data();
    return p;
  }
  Layer layer() const {
    Layer layer{};
    layer.inputs = shape_.inputs, layer.x = x_.data(), layer.w_ih = w_.data();
    if (backward_) layer.h0 = state_.data(), layer.states = saved_.data();
    if (!backward_) layer.b_ih = layer.b_hh = bias_.data(), layer.b_deep = deep_.data();
    return layer;
  }
  Sharing sharing(const Kernels& kernels) const {
    if (shape_.kind == Kind::kStep) return Sharing::kNothing;
    const Layer l = layer();
    return plan_cpu(problem(), shape_.kind == Kind::kLayer ? &l : nullptr, kernels, Company{3, 0, false}).sharing;
  }

  std::string name() const {
    static const char* const kinds[] = {"sweep", "layer", "step"};
    char text[200];
    std::snprintf(text, sizeof text, "%s T=%d B=%d G=%d D=%d I=%d dtype %d form %d %s",
                  kinds[static_cast<int>(shape_.kind)], static_cast<int>(shape_.steps), static_cast<int>(shape_.batch),
                  static_cast<int>(shape_.groups), static_cast<int>(shape_.hidden), static_cast<int>(shape_.inputs),
                  static_cast<int>(dtype_), static_cast<int>(shape_.form), backward_ ? "backward" : "forward");
    return text;
  }

 private:
  Bytes numbers(int64_t count, double scale) { return numbers(count, scale, dtype_); }
  Bytes numbers(int64_t count, double scale, DType dtype) {
    std::uniform_real_distribution<double> uniform(-scale, scale);
    Bytes all(static_cast<size_t>(count * size_of(dtype)));
    for (int64_t i = 0; i < count; ++i) put(dtype, uniform(draw_), all.data() + i * size_of(dtype));
    return all;
  }
  bool has_units() const { return shape_.activation != Activation::kReLU; }
  DType scalar() const { return dtype_ == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

  const Shape shape_;
  const DType dtype_;
  const bool backward_;
  int64_t rows_;
  std::mt19937 draw_;
  std::vector<int64_t> lengths_, offsets_;
  std::vector<uint8_t> resets_;
  Bytes u_, w_, bias_, x_, in_, state_, saved_, factors_, scalars_, deep_;
};

// A call and what it gives alone.
struct Work {
  std::unique_ptr<const Call> call;
  std::vector<Bytes> alone;

  bool gives_the_same(const Kernels& kernels, int threads) const {
    if (call->run(kernels, threads) == alone) return true;
    std::printf("OTHER BITS: %s on %d threads\n", call->name().c_str(), threads);
    return false;
  }
};

const Shape kShapes[] = {
    // Of which threads share outputs, or rows of all kinds, and too small for either.
    {Kind::kSweep, 12, 1, 1, 500, 0, 0, Batch::kFull, false},
    {Kind::kSweep, 4, 2, 2, 400, 1, 0, Batch::kLengths, false},
    {Kind::kSweep, 30, 60, 1, 24, 0, 0, Batch::kFull, false},
    {Kind::kSweep, 20, 31, 3, 37, 1, 0, Batch::kPacked, true},
    {Kind::kSweep, 3, 2, 1, 5, 0, 0, Batch::kFull, true},
    {Kind::kLayer, 12, 1, 1, 500, 0, 16, Batch::kFull, false},
    {Kind::kLayer, 9, 33, 1, 40, 0, 21, Batch::kLengths, true},
    {Kind::kLayer, 20, 40, 1, 33, 0, 5, Batch::kPacked, false},
    {Kind::kLayer, 8, 12, 2, 50, 1, 7, Batch::kFull, false},
    {Kind::kStep, 1, 3, 1, 900, 0, 40, Batch::kFull, false},
    {Kind::kSweep, 12, 1, 1, 500, 0, 0, Batch::kFull, true, Form::kCurrent, Activation::kSoftplus},
    {Kind::kSweep, 9, 7, 2, 37, 1, 0, Batch::kLengths, true, Form::kOutside, Activation::kSigmoid},
    {Kind::kLayer, 12, 1, 1, 500, 0, 16, Batch::kFull, false, Form::kOutside, Activation::kTanh},
    {Kind::kLayer, 9, 33, 1, 40, 0, 21, Batch::kLengths, true, Form::kCurrent, Activation::kSigmoid},
    {Kind::kLayer, 20, 40, 1, 33, 0, 5, Batch::kPacked, false, Form::kInside, Activation::kLeakyReLU},
    {Kind::kLayer, 20, 40, 1, 33, 0, 5, Batch::kFull, true, Form::kInside, Activation::kReLU, true},
    {Kind::kLayer, 9, 33, 1, 40, 0, 21, Batch::kLengths, true, Form::kInside, Activation::kReLU, false, 3},
    {Kind::kLayer, 12, 1, 1, 500, 0, 16, Batch::kFull, false, Form::kInside, Activation::kReLU, false, 2},
    {Kind::kLayer, 280, 1, 1, 300, 0, 3, Batch::kFull, false, Form::kOutside, Activation::kTanh, true},
};

// Never destroyed, as threads go on with them while the process ends.
std::vector<Work>* made = nullptr;

// Every shape in every type, or in a hurry in one of them each.
std::vector<Work>& make_works(const Kernels& kernels, bool quick) {
  made = new std::vector<Work>;
  std::vector<Work>& works = *made;
  bool shares_rows = false, shares_outputs = false;
  int turn = 0;
  for (const Shape& shape : kShapes) {
    for (const bool backward : {false, true}) {
      if (backward && (shape.kind == Kind::kStep || (shape.kind == Kind::kLayer && shape.groups > 1))) continue;
      ++turn;
      for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
        if (quick && static_cast<int>(dtype) != turn % 4) continue;
        works.push_back({std::make_unique<Call>(shape, dtype, backward), {}});
        Work& work = works.back();
        work.alone = work.call->run(kernels, 1);
        shares_rows |= work.call->sharing(kernels) == Sharing::kRows;
        shares_outputs |= work.call->sharing(kernels) == Sharing::kOutputs;
      }
    }
  }
  if (!shares_rows || !shares_outputs) {
    std::puts("no work that threads divide in each way");
    std::exit(1);
  }
  return works;
}

// ---- scenarios

using Works = std::vector<Work>;

bool all_the_same(const Works& works, const Kernels& kernels, int threads) {
  bool good = true;
  for (const Work& work : works) good = work.gives_the_same(kernels, threads) && good;
  return good;
}

// The exit status of a child that runs `body`, which may end it itself; -1 if a signal did.
int in_a_child(const std::function<bool()>& body) {
  std::fflush(stdout);
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(120);
    const bool good = body();
    std::fflush(stdout);
    _exit(good ? 0 : 1);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  if (!WIFEXITED(status)) std::printf("a child ended with signal %d\n", WTERMSIG(status));
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// Callers at once, each on any number of threads, while another thread changes all that can be changed.
bool many_callers(const Works& works, const Kernels& kernels, double seconds, const std::function<bool()>& meanwhile) {
  std::atomic<bool> good{true}, stop{false};
  std::vector<std::thread> threads;
  for (unsigned caller = 0; caller < 3; ++caller) {
    threads.emplace_back([&, caller] {
      std::mt19937 draw(caller);
      while (!stop) {
        const Work& work = works[draw() % works.size()];
        if (!work.gives_the_same(kernels, 1 + static_cast<int>(draw() % 4))) good = false;
      }
    });
  }
  threads.emplace_back([&] {
    std::mt19937 draw(99);
    while (!stop) {
      assume_processors(static_cast<int>(draw() % 5));
      end_teams_at(draw() % 3 ? 0 : draw() % 20);
      use_torchs_threads(draw() % 2);
      draw() % 2 ? found_crowded() : forget_crowds();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (std::chrono::steady_clock::now() < end) {
    if (!meanwhile()) good = false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  assume_processors(4);
  end_teams_at(0);
  use_torchs_threads(true);
  forget_crowds();
  return good;
}

// Each allocation of a call fails in turn: an exception for the caller or the right bits, and the next call is as ever.
bool memory_fails(const Works& works, const Kernels& kernels) {
  use_torchs_threads(false);  // the runtime here would not survive it
  int failures = 0;
  for (const Work& work : works) {
    std::vector<Bytes> outputs = work.alone;
    for (int64_t allocation = 0;; ++allocation) {
      size_t next = 0;
      bool failed = false;
      until_failure = allocation;
      try {
        work.call->run(kernels, 3, [&](int64_t, DType) { return outputs[next++].data(); });
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      const bool reached = until_failure.exchange(-1) < 0;
      failures += failed;
      if (!failed && outputs != work.alone) return false;
      if (!reached) break;
    }
    if (!work.gives_the_same(kernels, 3)) return false;
  }
  return failures > 0;
}

// More than any system has, in one piece: 16 TB for U's panels.
bool a_matrix_is_too_large(const Kernels& kernels) {
  Problem p{};
  p.steps = p.batch = p.groups = 1, p.hidden = int64_t{1} << 21, p.dtype = DType::kFloat32;
  try {
    sweep_cpu(p, nullptr, kernels, 3);
  } catch (const std::bad_alloc&) {
    return true;
  }
  return false;
}

// A process that may have no more threads: here, as their stacks are larger than memory has addresses.
bool threads_fail(const Works& works, const Kernels& kernels) {
#if defined(__GLIBC__)
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, size_t{1} << 47);
  if (pthread_setattr_default_np(&attributes) != 0) return false;
  try {
    std::thread([] {}).join();
    std::puts("threads are still to be had");
    return false;
  } catch (const std::system_error&) {
  }
  use_torchs_threads(false);
  return all_the_same(works, kernels, 3);
#else
  return all_the_same(works, kernels, 3);
#endif
}

// The process ends while threads are in calls. Registered before anything is called, so run after what the engine made
// at its first call is destroyed: threads go on for a while without it.
std::atomic<bool> ending{false};
[[maybe_unused]] const int lingering = std::atexit([] {
  if (ending) std::this_thread::sleep_for(std::chrono::milliseconds(30));
});

[[noreturn]] void exit_during_calls(const Works& works, const Kernels& kernels, unsigned round) {
  for (unsigned caller = 0; caller < 2; ++caller) {
    std::thread([&works, &kernels, caller, round] {
      std::mt19937 draw(100 * round + caller);
      for (;;) {
        // By name, as bindings do: what the list of sets is in must live on, too.
        if (!works[draw() % works.size()].gives_the_same(cpu_kernels(kernels.name), 2)) _exit(1);
      }
    }).detach();
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(3 + round));
  ending = true;
  std::exit(0);
}

std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();

bool check(const char* scenario, bool good) {
  const auto end = std::chrono::steady_clock::now();
  std::printf("%-30s %s %6.2f s\n", scenario, good ? "good" : "BAD ",
              std::chrono::duration<double>(end - begin).count());
  begin = end;
  std::fflush(stdout);
  return good;
}

bool all_scenarios(const Kernels& kernels, double seconds) {
  bool good = true;
  assume_processors(4);
  const auto whole = [&] {
    const Works& works = make_works(kernels, seconds < 5);
    return all_the_same(works, kernels, 3);
  };
  good = check("fork before the first call", in_a_child(whole) == 0) && good;
  const Works& works = make_works(kernels, seconds < 5);
#if FUSED_RIN_TSAN
  const int in_children = 1;  // its runtime has no room for new threads after a fork of many
#else
  const int in_children = 3;
#endif
  const auto again = [&] { return all_the_same(works, kernels, in_children); };
  good = check("no more threads", in_a_child([&] { return threads_fail(works, kernels); }) == 0) && good;
  good = check("memory fails", in_a_child([&] { return memory_fails(works, kernels); }) == 0) && good;
  bool ends = true;
  for (unsigned round = 0; round < 10; ++round) {
    ends = in_a_child([&]() -> bool { exit_during_calls(works, kernels, round); }) == 0 && ends;
  }
  good = check("exit during calls", ends) && good;
  // From here on this process has threads.
  good = check("a matrix is too large", a_matrix_is_too_large(kernels)) && good;
  for (const int threads : {2, 3, 4}) good = check("more threads", all_the_same(works, kernels, threads)) && good;
  for (const uint64_t end : {1, 2, 9, 12}) {  // all have packed; at some step, with the first of two recurrences
    end_teams_at(end);
    good = check("teams that one of them leaves", all_the_same(works, kernels, 3)) && good;
  }
  end_teams_at(0);
  use_torchs_threads(false);
  good = check("threads of its own", all_the_same(works, kernels, 3)) && good;
  use_torchs_threads(true);
  good = check("fork after a call", in_a_child(again) == 0) && good;
  good = check("many callers", many_callers(works, kernels, seconds, [] { return true; })) && good;
#if FUSED_RIN_ASAN
  // GCC 12's runtime does not take its allocator's locks before a fork: a child of a process in which another thread
  // asked for memory just then waits for ever, in malloc.
  std::puts("forks during calls             left to ThreadSanitizer and to no sanitizer");
#else
  const auto fork_here = [&] {
    bool same = false;
    std::thread([&] {
      same = in_a_child([&] {
               return works[0].gives_the_same(kernels, in_children) &&
                      works[works.size() / 2].gives_the_same(kernels, in_children);
             }) == 0;
    }).join();
    return same;
  };
  good = check("forks during calls", many_callers(works, kernels, seconds, fork_here)) && good;
#endif
  return good;
}

// ---- faults, each of which a sanitizer has to find within the engine's own code

void plant(const std::string& fault, const Kernels& kernels) {
  assume_processors(3);
  const Shape shape{Kind::kSweep, 30, 8, 1, 64, 0, 0, Batch::kPacked, false};
  const Call call(shape, DType::kFloat32, false);
  if (fault == "out-of-bounds") {
    call.run(kernels, 3, [](int64_t count, DType) {  // one number less than the kernel writes
      return static_cast<char*>(std::malloc(static_cast<size_t>(4 * (count - 1))));
    });
  } else if (fault == "race") {
    std::vector<Bytes> outputs{Bytes(4 * 30 * 8 * 64), Bytes(4 * 8 * 64)};
    // Often, since a call that begins after the other's end finds its memory, which puts the two in order.
    const auto write = [&] {
      for (int i = 0; i < 200; ++i) {
        size_t next = 0;
        call.run(kernels, 1, [&](int64_t, DType) { return outputs[next++].data(); });
      }
    };
    std::thread other(write);
    write();
    other.join();
  } else if (fault == "overflow") {
    Problem p = call.problem();
    Bytes out(4 * 30 * 8 * 64);
    std::vector<int64_t> offsets(30, INT64_MAX / 32);
    p.offsets = offsets.data(), p.out = out.data();
    sweep_cpu(p, nullptr, kernels, 1);
  }
  std::puts("nothing was found");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fputs("usage: native_stress ISA SECONDS | out-of-bounds | race | overflow\n", stderr);
    return 2;
  }
  const Kernels& kernels = cpu_kernels(arguments[1]);
  const std::string what = arguments[2];
  if (what == "out-of-bounds" || what == "race" || what == "overflow") {
    plant(what, kernels);
    return 0;
  }
  const bool good = all_scenarios(kernels, std::atof(arguments[2]));
#if FUSED_RIN_ASAN
  if (good) __lsan_do_leak_check();
#endif
  std::printf("%s: %s\n", kernels.name, good ? "every result as alone" : "FAILED");
  return good ? 0 : 1;
}
