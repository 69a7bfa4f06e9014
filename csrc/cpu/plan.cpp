// Which instruction set, how many threads, and what they share.

#include <algorithm>
#include <stdexcept>

#include "run.h"

namespace fused_rin {

const std::vector<const Kernels*>& cpu_kernels() {
  // Never destroyed: a thread may still call while the process ends.
  static const auto* const available = new std::vector<const Kernels*>([] {
    std::vector<const Kernels*> sets;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
#if FUSED_RIN_WITH_AMX
      if (__builtin_cpu_supports("avx512bf16") && has_amx() && kernels_amx()->tiles()) {
#if FUSED_RIN_WITH_AMX_FP16
        if (has_amx_fp16() && kernels_amx_fp16()->half_tiles()) sets.push_back(kernels_amx_fp16());
#endif
        sets.push_back(kernels_amx());
      }
#endif
      sets.push_back(kernels_avx512());
#if FUSED_RIN_WITH_AVX512_BF16
      // Intel's cores lose by products of pairs: a step of 64 rows x 256 units takes 239 us by them and 144 widened to
      // float32 (a Xeon with AMX, which is not asked for them); AMD's gain 1.8 times.
      if (__builtin_cpu_supports("avx512bf16"))
        sets.insert(sets.end() - (__builtin_cpu_is("intel") ? 0 : 1), kernels_avx512_bf16());
#endif
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(kernels_avx2());
#endif
#if defined(__aarch64__)
    sets.push_back(kernels_neon());  // every 64-bit ARM has it
#else
    sets.push_back(kernels_baseline());
#endif
    return sets;
  }());
  return *available;
}

namespace {
// When this library is loaded: a child forked while another thread made the list would wait for that thread for ever.
[[maybe_unused]] const std::vector<const Kernels*>& kernels_at_load = cpu_kernels();
}  // namespace

const Kernels& cpu_kernels(const std::string& name) {
  std::string names;
  for (const Kernels* kernels : cpu_kernels()) {
    if (name.empty() || name == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("CPU instruction set '" + name + "' is not available here; expected one of: " + names);
}

namespace {

int64_t scalar_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

Layout make_layout(const Problem& p, const Kernels& kernels, int64_t min_blocks) {
  Layout l{};
  l.outputs = p.hidden;
  // A single row goes by vectors, which pass over zeros; two and more by tiles, so that none depends on the batch.
  const bool by_tiles = p.batch > 1 && kernels.takes_tiles(p.dtype, p.hidden);
  l.set_depth(p.hidden, kernels.unit_terms(p.dtype, by_tiles), by_tiles);
  l.lanes = kernels.vector_bytes / scalar_bytes(p.dtype);
  l.vecs = (p.hidden + l.lanes - 1) / l.lanes;
  // A sum needs several chains to hide the latency of its multiply-adds when a row has few vectors.
  l.chains = l.vecs == 1 ? 4 : l.vecs <= 4 ? 2 : 1;
  const bool exceeds_l1 = l.vecs * kernels.vector_bytes * l.depth > 24 * 1024;
  l.slices = p.batch == 1 && l.chains == 1 && exceeds_l1 ? std::clamp<int64_t>(l.depth / 64, 1, kMaxSlices) : 1;
  l.slice_depth = ((l.depth + l.slices - 1) / l.slices + 7) / 8 * 8;  // zeros are looked for eight states at a time
  const int64_t width = p.batch == 1 && l.chains == 1 ? kernels.wide_block : kernels.narrow_block;
  l.cut(std::min(l.vecs, std::max((l.vecs + width - 1) / width, min_blocks)));
  return l;
}

// Cycles of a multiply-add of vectors: two 32-byte ones or one of 64 bytes.
double multiply_add_cycles(double vector_bytes) { return vector_bytes / 64; }

// Cycles of one step over `rows` rows and `share` of the matrix: multiply-adds, or the panel's way from the cache that
// holds it, once per tile of rows, whichever is longer. The constants are a Zen 4 core's, rounded; only the order of
// the candidates hangs on them.
double step_cycles(const Layout& l, double vector_bytes, double rows, double share) {
  const double each = multiply_add_cycles(vector_bytes) / (l.tiles ? 16 : 1);
  const double multiply_adds = rows * static_cast<double>(l.vecs * l.depth) * share * each;
  const double bytes = static_cast<double>(l.vecs * l.depth) * vector_bytes * share;
  const double bytes_per_cycle = bytes < 24e3 ? 64 : bytes < 700e3 ? 28 : 12;
  const double tiles = std::max(1.0, rows / static_cast<double>(max_tile_rows(l)));
  return 50 + 30 * rows + std::max(multiply_adds, tiles * bytes / bytes_per_cycle);
}

// And of the products a layer has before or after the step.
double product_cycles(const Problem& p, const Layer* layer, const Layout& l, const Kernels& kernels) {
  if (!layer) return 0;
  const double inputs = static_cast<double>(layer->inputs), hidden = static_cast<double>(p.hidden);
  const double vecs = static_cast<double>(l.vecs), lanes = static_cast<double>(l.lanes);
  double multiply_adds = 0;
  if (!p.backward) multiply_adds += inputs * vecs;
  if (layer->grad_w_hh) multiply_adds += (static_cast<double>(transitions_of(p)) * hidden + inputs) * vecs;
  if (layer->grad_x) multiply_adds += hidden * inputs / lanes;
  return static_cast<double>(p.batch * p.groups) * multiply_adds *
         multiply_add_cycles(static_cast<double>(kernels.vector_bytes)) /
         static_cast<double>(kernels.unit_terms(p.dtype, l.tiles));
}

constexpr double kMeetCycles =
    4000;  // a barrier and the misses on the state it exchanges: 1,300 (Zen 4) to 5,000 (Zen 3)
constexpr double kWakeCycles = 40000;  // a sleeping thread, once per call
constexpr double kLongCycles = 4e7;    // 10 ms
// Some 0.3 ms: what is that short is divided only if it gains a good part of it.
constexpr double kShortCycles = 1e6, kShortGain = 1.25;

}  // namespace

CpuPlan plan_cpu(const Problem& p, const Layer* layer, const Kernels& kernels, const Company& company) {
  const double bytes = static_cast<double>(kernels.vector_bytes);
  const double rows = static_cast<double>(p.batch), groups = static_cast<double>(p.groups);
  const double steps = static_cast<double>(std::max<int64_t>(p.steps, 1));
  const Layout alone = make_layout(p, kernels, 1);
  const double turns = static_cast<double>(transitions_of(p));
  const double sweep = groups * turns * step_cycles(alone, bytes, rows, 1),
               products = product_cycles(p, layer, alone, kernels);
  CpuPlan best{1, Sharing::kNothing, alone, sweep + products};
  const double by_one = best.cycles_per_step * steps;
  // On a crowded machine a second thread may come a time slice late, 4 ms: worth it for long work alone, and not if
  // they are to meet.
  if (company.crowded && by_one < kLongCycles) return best;
  const double gain = by_one < kShortCycles ? kShortGain : 1;
  const auto consider = [&](int64_t threads, Sharing sharing, const Layout& layout, double cycles) {
    cycles += kWakeCycles / steps;
    if (cycles * gain < best.cycles_per_step) best = {static_cast<int>(threads), sharing, layout, cycles * gain};
  };
  const int64_t most = std::min<int64_t>(company.threads, Team::kMaxThreads);

  const int64_t apart = std::min<int64_t>(most, p.batch * p.groups);
  if (apart > 1) {
    const double n = static_cast<double>(apart);
    const double share = std::max(1.0, rows * groups / n);  // rows of one thread, over one or more recurrences
    const double parts = std::max(1.0, groups / n);
    consider(apart, Sharing::kRows, alone, parts * turns * step_cycles(alone, bytes, share / parts, 1) + products / n);
  }
  const int64_t together = std::min<int64_t>(most, alone.vecs);
  if (together > 1 && !company.crowded) {
    const Layout shared = make_layout(p, kernels, together);
    const double n = static_cast<double>(together);
    consider(together, Sharing::kOutputs, shared,
             groups * turns * (step_cycles(shared, bytes, rows, 1 / n) + kMeetCycles) + products / n);
  }
  return best;
}

}  // namespace fused_rin
