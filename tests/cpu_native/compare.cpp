// The CPU sweep against a plain double loop, without Python: so that it runs under an emulator of another processor.
// Prints the worst relative error of each case; exits with 1 if one is too large or anything is left unwritten.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/crowd.h"
#include "../../csrc/cpu/run.h"
#include "../../csrc/cpu/team.h"

using namespace fused_rin;

namespace {

// As the kernels store it; arithmetic goes through float.
struct BFloat16 {
  BFloat16() = default;
  BFloat16(double value) {
    const float f = static_cast<float>(value);
    uint32_t b;
    std::memcpy(&b, &f, sizeof(b));
    bits = static_cast<uint16_t>(std::isnan(f) ? 0x7fc0 : (b + 0x7fff + ((b >> 16) & 1)) >> 16);
  }
  operator float() const {
    const uint32_t b = uint32_t{bits} << 16;
    float f;
    std::memcpy(&f, &b, sizeof(f));
    return f;
  }
  uint16_t bits;
};

struct Float16 {
  Float16() = default;
  Float16(double value) {
    const double size = std::fabs(value);
    int exponent;
    std::frexp(size, &exponent);
    if (std::isnan(value)) {
      bits = 0x7e00;
    } else if (size < 0x1p-14) {
      bits = static_cast<uint16_t>(std::nearbyint(size * 0x1p24));
    } else if (size >= 65520) {
      bits = 0x7c00;
    } else {
      const int places = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // 2^10 to 2^11
      bits = static_cast<uint16_t>(((exponent + 14) << 10) + places - 1024);
    }
    if (std::signbit(value)) bits |= 0x8000;
  }
  operator float() const {
    const int exponent = bits >> 10 & 31, places = bits & 1023;
    const double size = exponent == 31  ? (places ? NAN : INFINITY)
                        : exponent == 0 ? places * 0x1p-24
                                        : std::ldexp(1024 + places, exponent - 25);
    return static_cast<float>(bits >> 15 ? -size : size);
  }
  uint16_t bits;
};

struct Shape {
  int64_t steps, batch, groups, hidden, num_reversed;
};

// One direction of one recurrence, as problem.h states it; every sequence has all steps. Products take the state as T,
// the sums and the state that is carried are double.
template <class T>
void plain(const Shape& s, bool backward, double skip, const std::vector<double>& u, const std::vector<double>& in,
           const std::vector<double>& saved, const std::vector<double>& state_in, std::vector<double>& out,
           std::vector<double>& state_out) {
  const int64_t d = s.hidden;
  for (int64_t g = 0; g < s.groups; ++g) {
    const bool ascending = (g < s.groups - s.num_reversed) != backward;
    auto times_matrix = [&](const std::vector<double>& x) {
      std::vector<double> c(d);
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t k = 0; k < d; ++k)
          c[i] += double{static_cast<T>(x[k])} * u[(g * d + (backward ? k : i)) * d + (backward ? i : k)];
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
    plain<T>(s, backward, p.skip, wide(u), wide(backward ? grad : pre), wide(h), wide(state), want, want_end);
    const double error = std::fmax(worst(out, want), worst(end, want_end));
    good = good && error <= allowed;
    std::printf("%s T=%d B=%d G=%d D=%d %s: %.2g\n", kernels.name, static_cast<int>(s.steps), static_cast<int>(s.batch),
                static_cast<int>(s.groups), static_cast<int>(s.hidden), backward ? "backward" : "forward", error);
    if (!backward) h = out;
  }
  return good;
}

// A layer of one recurrence: against the plain loop on the input product, and products over all rows.
template <class T>
bool check_layer(DType dtype, const Shape& s, int64_t inputs, const Kernels& kernels, double allowed) {
  const int64_t d = s.hidden, rows = s.steps * s.batch, width = inputs;
  const bool starts = inputs % 8 != 0;  // from a state, else from none
  std::mt19937 draw(static_cast<unsigned>(d + inputs));
  std::normal_distribution<double> normal;
  auto make = [&](int64_t n, double scale) {
    std::vector<T> v(n);
    for (T& x : v) x = static_cast<T>(scale * normal(draw));
    return v;
  };
  auto wide = [](const std::vector<T>& v) { return std::vector<double>(v.begin(), v.end()); };
  auto fresh = [](int64_t n) { return std::vector<T>(n, static_cast<T>(NAN)); };
  const std::vector<T> u = make(d * d, 0.3 / std::sqrt(d)), w = make(d * width, 1 / std::sqrt(width)), b = make(d, 1),
                       x = make(rows * width, 1), h0 = make(s.batch * d, starts ? 1 : 0), grad = make(rows * d, 1),
                       grad_end = make(s.batch * d, 1);

  Problem p{};
  p.steps = s.steps, p.batch = s.batch, p.groups = 1, p.hidden = d, p.num_reversed = s.num_reversed;
  p.dtype = dtype, p.activation = Activation::kReLU, p.skip = 0.75, p.weight = u.data();
  Layer layer{};
  layer.inputs = width, layer.x = x.data(), layer.w_ih = w.data(), layer.b_ih = b.data(), layer.b_hh = b.data();
  std::vector<T> out = fresh(rows * d), end = fresh(s.batch * d);
  p.state_in = starts ? h0.data() : nullptr, p.out = out.data(), p.state_out = end.data();
  sweep_cpu(p, &layer, kernels, 3);
  std::vector<double> pre(rows * d), want(rows * d), want_end(s.batch * d);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < d; ++i) {
      pre[r * d + i] = 2 * b[i];
      for (int64_t k = 0; k < width; ++k) pre[r * d + i] += double{x[r * width + k]} * w[i * width + k];
    }
  }
  plain<T>(s, false, p.skip, wide(u), pre, {}, wide(h0), want, want_end);
  double error = std::fmax(worst(out, want), worst(end, want_end));

  std::vector<T> dx = fresh(rows * width), dw = fresh(d * width), du = fresh(d * d), db = fresh(d), db_too = fresh(d),
                 dh0 = fresh(s.batch * d);
  p.backward = true, p.in = grad.data(), p.saved = out.data(), p.state_in = grad_end.data(), p.out = nullptr;
  p.state_out = dh0.data();
  layer.h0 = starts ? h0.data() : nullptr, layer.states = out.data(), layer.grad_x = dx.data(),
  layer.grad_w_ih = dw.data(), layer.grad_w_hh = du.data();
  layer.grad_b_ih = db.data();
  layer.grad_b_hh = db_too.data();
  sweep_cpu(p, &layer, kernels, 3);
  plain<T>(s, true, p.skip, wide(u), wide(grad), wide(out), wide(grad_end), want, want_end);
  std::vector<double> want_dx(rows * width), want_dw(d * width), want_du(d * d), want_db(d);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = r / s.batch, before = s.num_reversed ? t + 1 : t - 1;
    const T* h = before < 0 || before == s.steps ? &h0[r % s.batch * d] : &out[(before * s.batch + r % s.batch) * d];
    for (int64_t i = 0; i < d; ++i) {
      want_db[i] += want[r * d + i];
      const double g = static_cast<T>(want[r * d + i]);
      for (int64_t k = 0; k < width; ++k) want_dw[i * width + k] += g * x[r * width + k];
      for (int64_t k = 0; k < width; ++k) want_dx[r * width + k] += g * w[i * width + k];
      for (int64_t j = 0; j < d; ++j) want_du[i * d + j] += g * h[j];
    }
  }
  error = std::fmax(error, std::fmax(worst(dx, want_dx), worst(dw, want_dw)));
  error = std::fmax(error, std::fmax(worst(du, want_du), std::fmax(worst(db, want_db), worst(db_too, want_db))));
  error = std::fmax(error, worst(dh0, want_end));
  std::printf("%s layer T=%d B=%d I=%d D=%d: %.2g\n", kernels.name, static_cast<int>(s.steps),
              static_cast<int>(s.batch), static_cast<int>(width), static_cast<int>(d), error);
  return error <= allowed;
}

// A layer's sequences of several lengths, with episodes, by one thread.
template <class T>
bool check_sequences(DType dtype, const Shape& s, int64_t inputs, const Kernels& kernels, double allowed) {
  const int64_t d = s.hidden, rows = s.steps * s.batch;
  const double skip = 0.75;
  std::mt19937 draw(static_cast<unsigned>(d + inputs + s.batch));
  std::normal_distribution<double> normal;
  auto make = [&](int64_t n, double scale) {
    std::vector<T> v(n);
    for (T& x : v) x = static_cast<T>(scale * normal(draw));
    return v;
  };
  const std::vector<T> u = make(d * d, 0.3 / std::sqrt(d)), w = make(d * inputs, 1 / std::sqrt(inputs)), b = make(d, 1),
                       x = make(rows * inputs, 1), h0 = make(s.batch * d, 1);
  std::vector<int64_t> lengths(s.batch);
  for (int64_t i = 0; i < s.batch; ++i) lengths[i] = (i * i + i / 3) % (s.steps + 1);
  std::vector<uint8_t> resets(rows);
  for (int64_t i = 0; i < rows; ++i) resets[i] = i % 5 == 2;
  bool good = true;
  for (const bool starts : {false, true}) {
    for (const bool episodes : {false, true}) {
      std::vector<T> out(rows * d, static_cast<T>(NAN)), end(s.batch * d, static_cast<T>(NAN));
      Problem p{};
      p.steps = s.steps, p.batch = s.batch, p.groups = 1, p.hidden = d, p.num_reversed = s.num_reversed;
      p.dtype = dtype, p.activation = Activation::kReLU, p.skip = skip, p.weight = u.data();
      p.lengths = lengths.data(), p.resets = episodes ? resets.data() : nullptr;
      p.state_in = starts ? h0.data() : nullptr, p.out = out.data(), p.state_out = end.data();
      Layer layer{};
      layer.inputs = inputs, layer.x = x.data(), layer.w_ih = w.data(), layer.b_ih = b.data();
      sweep_cpu(p, &layer, kernels, 1);
      std::vector<double> want(rows * d), want_end(s.batch * d);
      for (int64_t i = 0; i < s.batch; ++i) {
        std::vector<double> h(d), next(d);
        if (starts) h.assign(h0.begin() + i * d, h0.begin() + (i + 1) * d);
        for (int64_t step = 0; step < lengths[i]; ++step) {
          const int64_t t = s.num_reversed ? lengths[i] - 1 - step : step, row = t * s.batch + i;
          const int64_t boundary = s.num_reversed ? row + s.batch : row;
          const bool ends = episodes && (s.num_reversed == 0 || step > 0) && resets[boundary];
          if (ends) h.assign(d, 0);
          for (int64_t j = 0; j < d; ++j) {
            double a = b[j] + skip * h[j];
            for (int64_t k = 0; k < inputs; ++k) a += double{x[row * inputs + k]} * w[j * inputs + k];
            for (int64_t k = 0; k < d; ++k) a += double{static_cast<T>(h[k])} * u[j * d + k];
            next[j] = want[row * d + j] = std::fmax(a, 0);
          }
          h = next;
        }
        for (int64_t j = 0; j < d; ++j) want_end[i * d + j] = h[j];
      }
      const double error = std::fmax(worst(out, want), worst(end, want_end));
      good = good && error <= allowed;
      std::printf("%s sequences T=%d B=%d I=%d D=%d%s%s: %.2g\n", kernels.name, static_cast<int>(s.steps),
                  static_cast<int>(s.batch), static_cast<int>(inputs), static_cast<int>(d), starts ? " h0" : "",
                  episodes ? " episodes" : "", error);
    }
  }
  return good;
}

// Of the largest number: what the last rounding leaves (2^-9), and states on the other side of a rounding.
constexpr double kBFloat16Error = 0x1.8p-8, kFloat16Error = kBFloat16Error / 8;

bool check_all(const Kernels& kernels) {
  const bool pairs = kernels.unit_terms(DType::kBFloat16, false) == 2;  // other products take states unrounded
  bool good = (!kernels.tiles || kernels.tiles()) && (!kernels.half_tiles || kernels.half_tiles());
  std::printf("%s%s%s\n", kernels.name, kernels.tiles ? good ? " by tiles" : ": WRONG TILES" : "",
              kernels.half_tiles ? ", of float16 too" : "");
  for (const Shape& s :
       {Shape{5, 1, 1, 1, 0}, Shape{4, 3, 2, 5, 1}, Shape{3, 7, 1, 16, 0}, Shape{6, 1, 1, 129, 0},
        Shape{3, 13, 3, 37, 1}, Shape{40, 1, 1, 300, 1}, Shape{70, 5, 1, 24, 0}, Shape{4, 51, 1, 70, 0},
        Shape{7, 9, 1, 33, 1}, Shape{5, 17, 1, 32, 0}, Shape{3, 70, 1, 49, 1}}) {
    good = check<float>(DType::kFloat32, s, kernels, 1e-5) && good;
    good = check<double>(DType::kFloat64, s, kernels, 1e-13) && good;
    if (pairs) good = check<BFloat16>(DType::kBFloat16, s, kernels, kBFloat16Error) && good;
    const bool halves = s.batch > 1 && kernels.takes_tiles(DType::kFloat16, s.hidden);
    if (halves) good = check<Float16>(DType::kFloat16, s, kernels, kFloat16Error) && good;
    if (s.groups > 1) continue;
    for (const int64_t inputs : {1, 16, 21, 35, 40}) {
      good = check_layer<float>(DType::kFloat32, s, inputs, kernels, 1e-5) && good;
      good = check_layer<double>(DType::kFloat64, s, inputs, kernels, 1e-13) && good;
      if (pairs) good = check_layer<BFloat16>(DType::kBFloat16, s, inputs, kernels, kBFloat16Error) && good;
      if (halves) good = check_layer<Float16>(DType::kFloat16, s, inputs, kernels, kFloat16Error) && good;
    }
  }
  for (const Shape& s : {Shape{6, 70, 1, 33, 0}, Shape{6, 70, 1, 33, 1}, Shape{5, 9, 1, 64, 1}}) {
    for (const int64_t inputs : {3, 40}) {
      good = check_sequences<float>(DType::kFloat32, s, inputs, kernels, 1e-5) && good;
      if (pairs) good = check_sequences<BFloat16>(DType::kBFloat16, s, inputs, kernels, kBFloat16Error) && good;
      const bool halves = kernels.takes_tiles(DType::kFloat16, s.hidden);
      if (halves) good = check_sequences<Float16>(DType::kFloat16, s, inputs, kernels, kFloat16Error) && good;
    }
  }
  // A matrix beyond the second-level cache, whose blocks serve bands of rows.
  good = check<float>(DType::kFloat32, {2, 101, 1, 600, 0}, kernels, 1e-5) && good;
  return good;
}

}  // namespace

// With the name of an instruction set: that one alone.
int main(int count, char** arguments) {
  bool good = true;
  assume_processors(3);
  for (const Kernels* kernels : cpu_kernels()) {
    // (One that was left out of this program has no name.)
    if (!kernels->name || (count > 1 && std::strcmp(arguments[1], kernels->name) != 0)) continue;
    good = check_all(*kernels) && good;
    // When all have packed, at some step, with the first of two recurrences, and not at all.
    for (const uint64_t end : {1, 2, 9, 12, 0}) {
      end_teams_at(end);
      good = check<float>(DType::kFloat32, {9, 1, 2, 1000, 1}, *kernels, 1e-5) && good;
      good = check_layer<float>(DType::kFloat32, {30, 1, 1, 500, 0}, 16, *kernels, 1e-5) && good;
    }
  }
  std::puts(good ? "all within bounds" : "OUT OF BOUNDS");
  return good ? 0 : 1;
}
