// The CPU sweep against a plain double loop, without Python: so that it runs under an emulator of another processor.
// Prints the worst relative error of each case; exits with 1 if one is too large or anything is left unwritten.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cpu/sweep.h"

using namespace fused_rin;

namespace {

struct Shape {
  int64_t steps, batch, groups, hidden, num_reversed;
};

// One direction of one recurrence, as problem.h states it; every sequence has all steps.
void plain(const Shape& s, bool backward, double skip, const std::vector<double>& u, const std::vector<double>& in,
           const std::vector<double>& saved, const std::vector<double>& state_in, std::vector<double>& out,
           std::vector<double>& state_out) {
  const int64_t d = s.hidden;
  for (int64_t g = 0; g < s.groups; ++g) {
    const bool ascending = (g < s.groups - s.num_reversed) != backward;
    auto times_matrix = [&](const std::vector<double>& x) {
      std::vector<double> c(d);
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t k = 0; k < d; ++k) c[i] += x[k] * u[(g * d + (backward ? k : i)) * d + (backward ? i : k)];
        c[i] += skip * x[i];
      }
      return c;
    };
    for (int64_t b = 0; b < s.batch; ++b) {
      std::vector<double> x(state_in.begin() + (b * s.groups + g) * d, state_in.begin() + (b * s.groups + g + 1) * d);
      std::vector<double> c = backward ? x : times_matrix(x);
      for (int64_t step = 0; step < s.steps; ++step) {
        const int64_t t = ascending ? step : s.steps - 1 - step;
        for (int64_t i = 0; i < d; ++i) {
          const int64_t at = ((t * s.batch + b) * s.groups + g) * d + i;
          const double a = in[at] + c[i];
          x[i] = backward ? (saved[at] > 0 ? a : 0) : std::fmax(a, 0);
          out[at] = x[i];
        }
        c = times_matrix(x);
      }
      for (int64_t i = 0; i < d; ++i) state_out[(b * s.groups + g) * d + i] = backward ? c[i] : x[i];
    }
  }
}

template <class T>
double worst(const std::vector<T>& got, const std::vector<double>& want) {
  double error = 0, size = 1;
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::isnan(static_cast<double>(got[i]))) return INFINITY;
    error = std::fmax(error, std::fabs(got[i] - want[i]));
    size = std::fmax(size, std::fabs(want[i]));
  }
  return error / size;
}

template <class T>
bool check(DType dtype, const Shape& s, const Kernels& kernels, double allowed) {
  std::mt19937 draw(static_cast<unsigned>(s.hidden));
  std::normal_distribution<double> normal;
  auto make = [&](int64_t n, double scale) {
    std::vector<T> v(n);
    for (T& x : v) x = static_cast<T>(scale * normal(draw));
    return v;
  };
  auto wide = [](const std::vector<T>& v) { return std::vector<double>(v.begin(), v.end()); };
  const int64_t rows = s.steps * s.batch * s.groups * s.hidden, states = s.batch * s.groups * s.hidden;
  const std::vector<T> u = make(s.groups * s.hidden * s.hidden, 0.3 / std::sqrt(s.hidden)), pre = make(rows, 1),
                       grad = make(rows, 1), state = make(states, 1);
  bool good = true;
  std::vector<T> h(rows);
  for (const bool backward : {false, true}) {
    std::vector<T> out(rows, static_cast<T>(NAN)), end(states, static_cast<T>(NAN));
    std::vector<double> want(rows), want_end(states);
    Problem p{};
    p.steps = s.steps, p.batch = s.batch, p.groups = s.groups, p.hidden = s.hidden, p.num_reversed = s.num_reversed;
    p.dtype = dtype, p.activation = Activation::kReLU, p.backward = backward, p.skip = 0.75;
    p.weight = u.data(), p.in = backward ? grad.data() : pre.data(), p.saved = h.data(), p.state_in = state.data();
    p.out = out.data(), p.state_out = end.data();
    sweep_cpu(p, nullptr, kernels, 2);
    plain(s, backward, p.skip, wide(u), wide(backward ? grad : pre), wide(h), wide(state), want, want_end);
    const double error = std::fmax(worst(out, want), worst(end, want_end));
    good = good && error <= allowed;
    std::printf("%s T=%d B=%d G=%d D=%d %s: %.2g\n", kernels.name, static_cast<int>(s.steps), static_cast<int>(s.batch),
                static_cast<int>(s.groups), static_cast<int>(s.hidden), backward ? "backward" : "forward", error);
    if (!backward) h = out;
  }
  return good;
}

}  // namespace

int main() {
  bool good = true;
  for (const Kernels* kernels : cpu_kernels()) {
    for (const Shape& s : {Shape{5, 1, 1, 1, 0}, Shape{4, 3, 2, 5, 1}, Shape{3, 7, 1, 16, 0}, Shape{6, 1, 1, 129, 0},
                           Shape{3, 13, 3, 37, 1}, Shape{40, 1, 1, 300, 1}}) {
      good = check<float>(DType::kFloat32, s, *kernels, 1e-5) && good;
      good = check<double>(DType::kFloat64, s, *kernels, 1e-13) && good;
    }
  }
  std::puts(good ? "all within bounds" : "OUT OF BOUNDS");
  return good ? 0 : 1;
}
