// Steps of a layer by tiles, the results of some sums made beside the product of the next. Compiled once per
// instruction set (vec.h).
//
// A multiplication keeps the tile unit busy for 16 cycles, in which the core has nothing else to do, and what makes
// results of sums (skip, activation, rounding, three stores) leaves the tile unit idle: nearly half of a step of 64
// rows x 128 units. So a tile of sums, up to 32 rows by two vectors, stays in its registers until the next product's
// first multiplications take them, and becomes results row by row between the others. Only a product that reads those
// results, of the same rows in the next step, has to have them all, and by then its own input has been multiplied.
#pragma once

#include <type_traits>

#include "activation.h"
#include "factor.h"
#include "sweep.h"
#include "tiles.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

// Where there are no tiles, nothing asks for it.
template <class T, bool = kHasTiles && kPaired<T>>
class Beside {
 public:
  struct Results {};
  template <class... Any>
  explicit Beside(Any&&...) {}
  void store_held() {}
  void finish() {}
};

#if FUSED_RIN_TILES

template <class T>
class Beside<T, true> {
 public:
  using Row = FactorRow<T>;
  // What the sums of some rows and columns become.
  struct Results {
    float* state;          // read and written, [rows][state_stride]
    Row* factors;          // [rows][factor_stride]
    T* out;                // the row order[i] is at order[i] * out_stride
    const int64_t* order;  // [rows]
    int64_t row, rows, columns, step;
  };

  Beside(Tiles<T>& tiles, float* sums, const Problem& p, const Layout& l, bool ascending)
      : tiles_(tiles),
        sums_(sums),
        state_stride_(l.padded()),
        factor_stride_(l.halves()),
        out_stride_(p.groups * p.hidden),
        ahead_(p.offsets ? 0 : p.batch * out_stride_ * (ascending ? 1 : -1)),
        skip_(static_cast<float>(p.skip)),
        activation_(p.activation),
        make_(find_make(p.activation)) {}
  Beside(const Beside&) = delete;
  Beside& operator=(const Beside&) = delete;

  // One or two vectors of sums of up to 32 rows, start + the products of one or two pairs of factors, of which the last
  // are states.
  void add(const TileFactors* factors, int64_t count, const TileStart& start, const Results& results) {
    const bool waits =
        left() && at_.step != results.step && at_.row < results.row + results.rows && results.row < at_.row + at_.rows;
    if (waits && count == 1) finish();
    const int64_t second = results.rows > kTile ? (results.rows + 1) / 2 : results.rows;
    const bool two_rows = results.rows > kTile, two_vecs = results.columns > kTile;
    if (held_ && (results.rows != at_.rows || two_vecs != (at_.columns > kTile))) store_held();
    tiles_.use(second, results.rows - second);
    int64_t calls = factors[0].depth / kTile - 1;  // before results are waited for, or until the end
    if (!waits && count == 2) calls += factors[1].depth / kTile;
    if (two_rows) calls *= 2;
    at_once_ = left() && calls ? (left() + calls - 1) / calls : 0;
    const Product p{factors, count, second, start, waits};
    if (two_rows) {
      two_vecs ? product<true, true>(p) : product<true, false>(p);
    } else {
      two_vecs ? product<false, true>(p) : product<false, false>(p);
    }
    make(left());
    at_ = results;
    made_ = 0;
    held_ = true;
  }

  // Before others take the tiles, and before anybody reads a state.
  void store_held() {
    if (!held_) return;
    held_ = false;
    const int64_t second = at_.rows > kTile ? (at_.rows + 1) / 2 : at_.rows;
    store<0>(second);
    if (at_.columns > kTile) store<1>(second);
    if (at_.rows > kTile) store<2>(second);
    if (at_.rows > kTile && at_.columns > kTile) store<3>(second);
  }
  void finish() {
    store_held();
    make(left());
  }

 private:
  static constexpr int64_t kWidth = 2 * kTile;
  struct Product {
    const TileFactors* factors;
    int64_t count, second;  // rows from the first tile to the second
    TileStart start;
    bool waits;
  };
  using Make = void (*)(const Beside&, int64_t begin, int64_t end);

  int64_t left() const { return at_.rows - made_; }
  void make(int64_t rows) {
    if (rows == 0) return;
    make_(*this, made_, made_ + rows);
    made_ += rows;
  }
  void between() { make(at_once_ < left() ? at_once_ : left()); }

  template <int sum>
  void store(int64_t second) const {
    tile_store<sum>(sums_ + sum / 2 * second * kWidth + sum % 2 * kTile, kWidth * 4);
  }

  // Sums 0 and 1 are the first rows', 1 and 3 the second vector's.
  template <int sum>
  void begin(const Product& p, bool held) const {
    if (held) store<sum>(p.second);
    tile_load<sum>(p.start.data + sum / 2 * p.second * p.start.stride + sum % 2 * kTile, p.start.stride * 4);
  }

  // As in Tiles, with what goes on beside it: one template for both made plain products 5 to 10 percent slower.
  template <bool two_rows, bool two_vecs>
  void product(const Product& p) {
    const bool held = held_;
    for (int64_t i = 0; i < p.count; ++i) {
      const TileFactors& f = p.factors[i];
      const int64_t stride = f.x_stride * 4, to_second_vec = f.depth * kTile, to_second = p.second * f.x_stride;
      if (i == 1 && p.waits) make(left());
      for (int64_t k = 0; k < f.depth; k += kTile) {
        const Pair *const x = f.x + k, *const matrix = f.panel + k * kTile;
        const bool first = i == 0 && k == 0;
        tile_load<6>(matrix, 64);
        tile_load<4>(x, stride);
        if (first) begin<0>(p, held);
        tile_multiply_add<T, 0, 4, 6>();
        if constexpr (two_vecs) {
          tile_load<7>(matrix + to_second_vec, 64);
          if (first) begin<1>(p, held);
          tile_multiply_add<T, 1, 4, 7>();
        }
        if (two_rows && !first) between();
        if constexpr (two_rows) {
          tile_load<5>(x + to_second, stride);
          if (first) begin<2>(p, held);
          tile_multiply_add<T, 2, 5, 6>();
        }
        if constexpr (two_rows && two_vecs) {
          if (first) begin<3>(p, held);
          tile_multiply_add<T, 3, 5, 7>();
        }
        if (!first) between();
      }
    }
  }

  template <class Op>
  static void make_rows(const Beside& b, int64_t begin, int64_t end) {
    const Results at = b.at_;  // no store can change it
    const auto f = operation<Op>(b.activation_);
    const float skip = b.skip_;
    for (int64_t i = begin; i < end; ++i) {
      const float* const sums = b.sums_ + i * kWidth;
      float* const state = at.state + i * b.state_stride_;
      Row* const factors = at.factors + i * b.factor_stride_;
      T* const out = at.out + at.order[i] * b.out_stride_;
      // What a step writes comes from afar, and stores that wait for it hold up all that follow.
      __builtin_prefetch(out + b.ahead_, 1, 2);
      const auto result = [&](int64_t v) {
        Vec<T> a = load(sums + v);
        if (skip != 0) a += load(state + v) * skip;
        a = f.of(a);
        fused_rin::FUSED_RIN_ISA::store(state + v, a);
        return narrow(T{}, a);
      };
      const auto whole = [&](int64_t v) {
        const auto bits = result(v);
        memcpy(factors + v, &bits, sizeof(bits));
        memcpy(out + v, &bits, sizeof(bits));
      };
      const auto first_of = [&](int64_t v, int64_t count) {
        const auto bits = result(v);
        store_first_bits(factors + v, bits, count);
        store_first_bits(out + v, bits, count);
      };
      if (at.columns < kTile) {
        first_of(0, at.columns);
        continue;
      }
      whole(0);
      if (at.columns == kWidth) {
        whole(kTile);
      } else if (at.columns > kTile) {
        first_of(kTile, at.columns - kTile);
      }
    }
  }
  static Make find_make(Activation f) {
    switch (f) {
      case Activation::kNone:
        return make_rows<Identity>;
      case Activation::kReLU:
        return make_rows<Relu>;
      case Activation::kTanh:
        return make_rows<Tanh>;
      default:
        return make_rows<AnyActivation>;
    }
  }
  template <class Op>
  static Op operation(Activation f) {
    if constexpr (std::is_same_v<Op, AnyActivation>) {
      return {f};
    } else {
      return {};
    }
  }

  Tiles<T>& tiles_;
  float* const sums_;  // [rows][kWidth], of `at_`
  const int64_t state_stride_, factor_stride_, out_stride_, ahead_;
  const float skip_;
  const Activation activation_;
  const Make make_;
  Results at_{};  // being made
  int64_t made_ = 0, at_once_ = 0;
  bool held_ = false;  // its sums are in the tiles yet
};

#endif

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
