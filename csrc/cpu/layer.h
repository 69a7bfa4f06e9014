// What surrounds the recurrence in a layer, in chunks of steps that stay in the caches: W x_t + b before the steps that
// need it, and after a backward sweep's steps the gradients of U, W, b and x. Compiled once per instruction set
// (vec.h).
//
// Computed for all steps at once, as a library would, these read and write tensors of T * B * D numbers six more times.
// At B = 128, D = 100, T = 784 each is 40 MB, fresh from the operating system, and takes longer than the arithmetic.
#pragma once

#include "activation.h"
#include "dot.h"
#include "factor.h"
#include "outer.h"
#include "rows.h"
#include "sweep.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

// A row of numbers as whole units, what is missing zero.
template <class T>
void copy_row(const T* from, Factor<T>* to, const Panels& l) {
  if constexpr (kPaired<T>) {
    memcpy(to, from, static_cast<size_t>(l.terms) * sizeof(T));
    memset(reinterpret_cast<T*>(to) + l.terms, 0, static_cast<size_t>(2 * l.depth - l.terms) * sizeof(T));
  } else {
    constexpr int64_t kLanes = VecOf<Scalar<T>>::kLanes;
    int64_t i = 0;
    for (; i + kLanes <= l.terms; i += kLanes) store(to + i, load(from + i));
    if (i < l.terms) store_first(to + i, load_first(from + i, l.terms - i), l.terms - i);
  }
}

// body(first row, rows) over tiles of rows for `multiply_block`.
template <class Body>
void for_row_tiles(const Panels& l, int64_t begin, int64_t end, Body body) {
  const int64_t most = max_tile_rows(l);
  for (int64_t row = begin; row < end; row += most) body(row, end - row < most ? end - row : most);
}

template <class T>
class InputProduct {
  using S = Scalar<T>;
  using F = Factor<T>;

 public:
  InputProduct(const Problem& p, const Part& part, Tiles<T>& tiles)
      : p_(p), part_(part), layer_(*part.layer), l_(*part.input), tiles_(tiles) {
    const T* const first[] = {static_cast<const T*>(layer_.b_ih), static_cast<const T*>(layer_.b_hh)};
    for (int64_t i = 0; i < l_.padded(); i += l_.lanes) {
      const int64_t count = l_.outputs - i < l_.lanes ? l_.outputs - i : l_.lanes;
      Vec<T> sum{};
      for (const T* b : first) {
        if (b) sum += load_first(b + part.group * l_.outputs + i, count);
      }
      store(bias(0) + i, sum);
      for (int64_t k = 1; k < transitions_of(p); ++k) {
        const T* const b = static_cast<const T*>(layer_.b_deep);
        store(bias(k) + i, b ? load_first(b + (k - 1) * l_.outputs + i, count) : Vec<T>{});
      }
    }
  }

  // The chunk whose rows are multiplied from here on.
  void use(const RowList& rows, const Chunk& chunk, bool ascending) { x_ = input_rows(rows, chunk, ascending); }

  // Rows [begin, end) of the chunk, columns [first_column, end_column), into to[row of the chunk][padded].
  void run(int64_t begin, int64_t end, int64_t first_column, int64_t end_column, S* to) const {
    for (int64_t block = 0; block < l_.blocks; ++block) {
      if (l_.end_column(block) <= first_column || l_.first_column(block) >= end_column) continue;
      const int64_t column = l_.first_column(block), vecs = l_.first_vec(block + 1) - l_.first_vec(block);
      const F* panel = static_cast<const F*>(part_.input_panels) + column * l_.depth;
      for_row_tiles(l_, begin, end, [&](int64_t row, int64_t count) {
        S* const sums = to + row * l_.padded() + column;
        multiply_block(tiles_, l_, 1, x_ + row * l_.depth, l_.depth, count, panel, vecs, sums, l_.padded(),
                       bias(0) + column);
      });
    }
  }
  // What is multiplied for rows from this one on and for columns from this vector's first one on.
  TileFactors factors(int64_t row, int64_t column) const {
    const F* panel = static_cast<const F*>(part_.input_panels) + column * l_.depth;
    return {x_ + row * l_.depth, l_.depth, panel, l_.depth};
  }
  // What a transition adds, the first one beside its input.
  S* bias(int64_t transition) const { return static_cast<S*>(part_.bias) + transition * l_.padded(); }

 private:
  // The input of a chunk, [rows][depth]: where it lies, if all its rows follow each other there in whole units, or a
  // copy.
  const F* input_rows(const RowList& rows, const Chunk& chunk, bool ascending) const {
    const T* x = static_cast<const T*>(layer_.x);
    if constexpr (sizeof(T) * UnitOf<F>::kTerms == sizeof(F)) {
      if (ascending && !rows.lengths && rows.count == p_.batch && l_.depth * UnitOf<F>::kTerms == l_.terms) {
        return reinterpret_cast<const F*>(x + chunk.begin * p_.batch * l_.terms);
      }
    }
    F* to = static_cast<F*>(part_.gathered);
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      const int64_t t = time_of(p_, ascending, i),
                    count = chunk.base[i + 1 - chunk.begin] - chunk.base[i - chunk.begin];
      for (int64_t r = 0; r < count; ++r, to += l_.depth) {
        copy_row(x + row_of(p_, t, rows.order[r]) * l_.terms, to, l_);
      }
    }
    return static_cast<const F*>(part_.gathered);
  }

  const Problem& p_;
  const Part& part_;
  const Layer& layer_;
  const Panels& l_;
  Tiles<T>& tiles_;
  const F* x_ = nullptr;  // rows of the chunk, [depth] each
};

// Gradients of U and W, one product: the sum over rows of [h that entered, x] x [gradient of pre]. Its left factor lies
// in groups of `lanes` columns, first those of h, then those of x; a thread owns some groups, for the whole call, so
// that the order of every sum follows from the rows alone. The gradient of b, the sum of the gradients of pre, those of
// the units' own factors (problem.h), sums of g h_{t-1} and g z_t, and the gradient of x, columns and rows divided
// alike.
template <class T>
class WeightGradient {
  using S = Scalar<T>;
  using F = Factor<T>;
  using Row = FactorRow<T>;
  static constexpr int64_t kLanes = VecOf<S>::kLanes, kTerms = UnitOf<F>::kTerms;
  static constexpr bool kByTiles = kHasTiles && kPaired<T>;
  static constexpr int64_t kVecs = kByTiles ? 2 : kOuterVecs;  // of a panel

 public:
  WeightGradient(const Problem& p, const Layout& l, const Part& part, Tiles<T>& tiles)
      : p_(p),
        l_(l),
        part_(part),
        tiles_(tiles),
        layer_(*part.layer),
        ascending_(is_ascending(p, part.group)),
        transitions_(transitions_of(p)),
        state_groups_(groups_of(p.hidden)),
        groups_(layer_.grad_w_hh ? transitions_ * state_groups_ + groups_of(layer_.inputs) : 0),
        rows_(part.sources),
        entered_(rows_ + part.max_chunk_rows) {
    if (layer_.sums.blocks) blocks_ = *layer_.sums.blocks;
    if (layer_.sums.continues) return;
    for (int64_t i = first_group() * kLanes * l.padded(); i < end_group() * kLanes * l.padded(); i += kLanes) {
      store(sums() + i, Vec<T>{});
    }
    for (int64_t level = 0; level < transitions_ * kUnitSums * kBiasLevels; ++level) {
      for (int64_t v = first_vec(); v < end_vec(); ++v) store(unit_sum(0, level) + v * kLanes, Vec<T>{});
    }
  }

  // The gradients of pre in the rows of a chunk, [rows][padded], those of the state, if the form is outside, and of pre
  // as factors, [rows][stride].
  void add(const Chunk& chunk, const S* grad_pre, const S* grad_state, const Row* factors, int64_t stride) {
    find_rows(chunk);
    const int64_t rows = chunk.rows();
    for (int64_t i = 0; i < transitions_ && first_group() < end_group(); ++i) {
      for (int64_t k = 0; k < rows; k += kOuterDepth) {
        const int64_t first = i * rows + k;
        add_rows(i, first, rows - k < kOuterDepth ? rows - k : kOuterDepth, factors + first * stride, stride);
      }
    }
    const int64_t before = blocks_;
    for (int64_t i = 1; i < transitions_ && layer_.grad_b_deep; ++i) {
      blocks_ = before;
      const S* const grads = grad_pre + i * rows * l_.padded();
      add_rows_of(i * kUnitSums, rows, [&](int64_t k, int64_t j) { return load(grads + k * l_.padded() + j); });
    }
    blocks_ = before;
    add_unit_sums(rows, grad_pre, grad_state ? grad_state : grad_pre);
    const int64_t rank = part_.rank, n = part_.threads;
    if (layer_.grad_x) input_gradient(rank * rows / n, (rank + 1) * rows / n, factors, stride);
  }

  // Writes what all threads have added up: this one's share of the outputs, rows of each gradient.
  void finish() const {
    if (layer_.sums.blocks && part_.rank == 0) *layer_.sums.blocks = blocks_;
    if (layer_.sums.goes_on) return;
    const int64_t matrix = p_.hidden * p_.hidden;
    const int64_t begin = first_vec() * kLanes, end = end_vec() * kLanes;
    for (int64_t i = begin; i < end; i += kLanes) {
      write_unit_sum(kBias, i, static_cast<T*>(layer_.grad_b_ih));
      write_unit_sum(kBias, i, static_cast<T*>(layer_.grad_b_hh));
      write_unit_sum(kSkips, i, static_cast<S*>(layer_.grad_skips));
      write_unit_sum(kGains, i, static_cast<S*>(layer_.grad_gains));
      for (int64_t k = 1; k < transitions_ && layer_.grad_b_deep; ++k) {
        write_unit_sum(k * kUnitSums, i, static_cast<T*>(layer_.grad_b_deep) + (k - 1) * p_.hidden);
      }
    }
    if (!layer_.grad_w_hh) return;
    const S* inputs = sums() + state_groups_ * kLanes * l_.padded();
    for (int64_t i = begin; i < end; i += kLanes) {
      for (int64_t k = 0; k < transitions_; ++k) {
        const S* const states = sums() + groups_before(k) * kLanes * l_.padded();
        write(states, i, p_.hidden, static_cast<T*>(layer_.grad_w_hh) + k * matrix);
      }
      write(inputs, i, layer_.inputs, static_cast<T*>(layer_.grad_w_ih));
    }
  }

 private:
  // Of kUnitSums for each transition.
  static constexpr int64_t kBias = 0, kSkips = 1, kGains = 2;
  // The groups of a transition's matrix: those of its states and, of the first one's, those of the input.
  int64_t groups_before(int64_t transition) const {
    return transition * state_groups_ + (transition ? groups_of(layer_.inputs) : 0);
  }
  template <class To>
  void write_unit_sum(int64_t which, int64_t i, To* to) const {
    if (!to) return;
    Vec<T> sum{};
    for (int64_t level = 0; level < kBiasLevels; ++level) sum += load(unit_sum(which, level) + i);
    store_first(to + i, sum, columns_at(i));
  }
  // Units in the vector at column i.
  int64_t columns_at(int64_t i) const { return p_.hidden - i < kLanes ? p_.hidden - i : kLanes; }

  static int64_t groups_of(int64_t columns) { return (columns + kLanes - 1) / kLanes; }
  static constexpr int64_t kZero = -1, kInitial = -2;  // in place of a row: zero, or minus the index into h0

  S* sums() const { return static_cast<S*>(part_.gradient); }
  S* unit_sum(int64_t which, int64_t level) const {
    return sums() + (groups_ * kLanes + which * kBiasLevels + level) * l_.padded();
  }
  // This thread's share of the groups, and of the outputs; all of them once it goes on alone.
  int64_t first_group() const { return part_.rank * groups_ / part_.threads; }
  int64_t end_group() const { return (part_.rank + 1) * groups_ / part_.threads; }
  int64_t first_vec() const { return part_.rank * l_.vecs / part_.threads; }
  int64_t end_vec() const { return (part_.rank + 1) * l_.vecs / part_.threads; }

  void add_unit_sums(int64_t rows, const S* grad_pre, const S* grad_state) {
    const auto at = [&](const S* of, int64_t k, int64_t i) { return load(of + k * l_.padded() + i); };
    const T* const states = static_cast<const T*>(layer_.states);
    const T* const h0 = static_cast<const T*>(layer_.h0);
    const int64_t before = blocks_;
    if (layer_.grad_b_ih) add_rows_of(kBias, rows, [&](int64_t k, int64_t i) { return at(grad_pre, k, i); });
    if (layer_.grad_skips) {
      blocks_ = before;
      add_rows_of(kSkips, rows, [&](int64_t k, int64_t i) {
        const int64_t row = entered_[k];
        return row == kZero
                   ? Vec<T>{}
                   : at(grad_state, k, i) * numbers(row >= 0 ? states : h0, row >= 0 ? row : kInitial - row, i);
      });
    }
    if (layer_.grad_gains) {
      blocks_ = before;
      add_rows_of(kGains, rows, [&](int64_t k, int64_t i) {
        return at(grad_state, k, i) * numbers(static_cast<const T*>(p_.saved), rows_[k], i);
      });
    }
  }
  // A vector of a row of D numbers.
  Vec<T> numbers(const T* of, int64_t row, int64_t i) const {
    const T* const from = of + row * p_.hidden + i;
    return columns_at(i) == kLanes ? load(from) : load_first(from, columns_at(i));
  }

  template <class Value>
  void add_rows_of(int64_t which, int64_t rows, Value value) {
    for (int64_t begin = 0; begin < rows; begin += kBiasBlock) {
      const int64_t end = rows - begin < kBiasBlock ? rows : begin + kBiasBlock;
      for (int64_t v = first_vec(); v < end_vec(); ++v) {
        Vec<T> sum{}, other{};  // rows in turn: two sums of half as many
        int64_t k = begin;
        for (; k + 2 <= end; k += 2) {
          sum += value(k, v * kLanes);
          other += value(k + 1, v * kLanes);
        }
        if (k < end) sum += value(k, v * kLanes);
        add_to(unit_sum(which, 0) + v * kLanes, sum + other);
      }
      int64_t level = 0;
      for (int64_t blocks = ++blocks_; blocks % kBiasBlock == 0 && level + 1 < kBiasLevels; blocks /= kBiasBlock) {
        for (int64_t v = first_vec(); v < end_vec(); ++v) {
          add_to(unit_sum(which, level + 1) + v * kLanes, load(unit_sum(which, level) + v * kLanes));
          store(unit_sum(which, level) + v * kLanes, Vec<T>{});
        }
        ++level;
      }
    }
  }
  static void add_to(S* sum, Vec<T> value) { store(sum, load(sum) + value); }
  F* gathered(int64_t group) const { return static_cast<F*>(part_.gathered) + group * (kOuterDepth / kTerms) * kLanes; }

  // For every row of the chunk, its own place and that of the state that entered it.
  void find_rows(const Chunk& chunk) {
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      const int64_t t = time_of(p_, ascending_, i), base = chunk.base[i - chunk.begin];
      const int64_t count = chunk.base[i + 1 - chunk.begin] - base;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = row_of(p_, t, part_.all.order[r]);
        rows_[base + r] = row;
        entered_[base + r] = entered(t, r);
        for (int64_t k = 1; k < transitions_; ++k) entered_[k * chunk.rows() + base + r] = row;
      }
    }
  }
  int64_t entered(int64_t t, int64_t r) const {
    const int64_t b = part_.all.order[r], length = part_.all.lengths ? part_.all.lengths[r] : p_.steps;
    const int64_t boundary = ascending_ ? t + 1 : t;  // the recurrence runs against the sweep
    if (boundary < length && p_.resets && p_.resets[row_of(p_, boundary, b)]) return kZero;
    if (ascending_ ? t + 1 < length : t > 0) return row_of(p_, ascending_ ? t + 1 : t - 1, b);
    return layer_.h0 ? kInitial - b : kZero;
  }

  // As many groups at a time as stay in the second-level cache while the panels of gradients pass by.
  void add_rows(int64_t transition, int64_t first, int64_t rows, const Row* factors, int64_t stride) {
    constexpr int64_t kAtATime = outer_groups(FUSED_RIN_VECTOR_BYTES, kTerms);
    const int64_t before = groups_before(transition), after = groups_before(transition + 1);
    const int64_t all = end_group() < after ? end_group() : after;
    for (int64_t begin = first_group() < before ? before : first_group(); begin < all; begin += kAtATime) {
      const int64_t end = all - begin < kAtATime ? all : begin + kAtATime;
      for (int64_t g = begin; g < end; ++g) gather(transition, g - before, first, rows, gathered(g - begin));
      add_groups(begin, end, before, rows, factors, stride);
    }
  }

  void add_groups(int64_t begin, int64_t end, int64_t before, int64_t rows, const Row* factors, int64_t stride) {
    const int64_t vecs = l_.vecs, blocks = (vecs + kVecs - 1) / kVecs, depth = depth_of(rows);
    F* const panel = static_cast<F*>(part_.panel);
    constexpr int64_t kNear = 768 * 1024 / sizeof(S);
    const bool far = (end_group() - first_group()) * kLanes * l_.padded() > kNear;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t vec = block * vecs / blocks, width = (block + 1) * vecs / blocks - vec;
      for (int64_t k = 0; k < depth; ++k) {
        const Row* from = factors + k * kTerms * stride + vec * kLanes;
        const int64_t left = rows - k * kTerms;
        for (int64_t v = 0; v < width; ++v, from += kLanes) {
          const Row *first = left > 0 ? from : nullptr, *second = left > 1 ? from + stride : nullptr;
          store(panel + (kByTiles ? v * depth + k : k * width + v) * kLanes, load_across(first, second, kLanes));
        }
      }
      S* const to = sums() + vec * kLanes;
      if constexpr (kByTiles) {
        for (int64_t g = begin; g < end; g += 2) {
          tiles_.outer(gathered(g - begin), kOuterDepth / kTerms, end - g < 2 ? 1 : 2, panel, width, depth,
                       to + g * kLanes * l_.padded(), l_.padded());
        }
      } else {
        for (int64_t g = begin; g < end; ++g) {
          for (int64_t r = 0; r < columns_in(g - before); r += kOuterRows<F>) {
            S* const tile = to + (g * kLanes + r) * l_.padded();
            outer(width, gathered(g - begin) + r, panel, depth, tile, l_.padded(), far);
          }
        }
      }
    }
  }

  static int64_t depth_of(int64_t rows) {
    constexpr int64_t kWhole = kByTiles ? kTerms * kTileUnits : kTerms;
    return (rows + kWhole - 1) / kWhole * kWhole / kTerms;
  }
  // Of a group among those of its transition.
  int64_t columns_in(int64_t group) const {
    const int64_t left =
        group < state_groups_ ? p_.hidden - group * kLanes : layer_.inputs - (group - state_groups_) * kLanes;
    return left < kLanes ? left : kLanes;
  }

  // One group of columns of the left factor: [rows, in units][lanes], for tiles [lanes][kOuterDepth, in units].
  void gather(int64_t transition, int64_t group, int64_t first, int64_t rows, F* to) const {
    const bool states = group < state_groups_;
    const int64_t column = (states ? group : group - state_groups_) * kLanes, count = columns_in(group);
    // What entered a transition is what the one before it left.
    const T* const all = static_cast<const T*>(transition ? p_.inner : layer_.states);
    const T* const out = all + (transition ? (transition - 1) * p_.plane * p_.hidden : 0) + column;
    const T* const h0 = layer_.h0 ? static_cast<const T*>(layer_.h0) + column : nullptr;
    const T* const x = static_cast<const T*>(layer_.x) + column;
    const auto state = [&](int64_t k) -> const T* {
      const int64_t row = entered_[first + k];
      return row == kZero ? nullptr : row >= 0 ? out + row * p_.hidden : h0 + (kInitial - row) * p_.hidden;
    };
    if (states && p_.form == Form::kCurrent) {  // f of it is what was multiplied
      const AnyActivation f{p_.activation};
      T values[2][kLanes];
      const auto value = [&](int64_t k, T* to_row) -> const T* {
        if (k >= rows) return nullptr;
        const T* const from = state(k);
        store(to_row, f.of(!from ? Vec<T>{} : count < kLanes ? load_first(from, count) : load(from)));
        return to_row;
      };
      return gather_units(rows, to, [&](int64_t k) {
        return load_across(value(k * kTerms, values[0]), value((k + 1) * kTerms - 1, values[1]), count);
      });
    }
    const auto source = [&](int64_t k) -> const T* {
      return k >= rows ? nullptr : states ? state(k) : x + rows_[first + k] * layer_.inputs;
    };
    gather_units(rows, to,
                 [&](int64_t k) { return load_across(source(k * kTerms), source((k + 1) * kTerms - 1), count); });
  }
  template <class Units>
  void gather_units(int64_t rows, F* to, Units units) const {
    for (int64_t k = 0, depth = depth_of(rows); k < depth; k += kByTiles ? kLanes : 1) {
      if constexpr (kByTiles) {
        typename VecOf<F>::Vec square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) square[i] = units(k + i);
        transpose<F>(square);
        for (int64_t i = 0; i < kLanes; ++i) store(to + i * (kOuterDepth / kTerms) + k, square[i]);
      } else {
        store(to + k * kLanes, units(k));
      }
    }
  }

  void input_gradient(int64_t begin, int64_t end, const Row* factors, int64_t stride) const {
    const Panels& l = *part_.input;
    S* const sum = static_cast<S*>(part_.scratch);
    for (int64_t block = 0; block < l.blocks; ++block) {
      const int64_t column = l.first_column(block), count = l.end_column(block) - column;
      const int64_t vecs = l.first_vec(block + 1) - l.first_vec(block);
      const F* panel = static_cast<const F*>(part_.input_panels) + column * l.depth;
      for_row_tiles(l, begin, end, [&](int64_t row, int64_t rows) {
        const F* from = reinterpret_cast<const F*>(factors + row * stride);
        multiply_block(tiles_, l, 1, from, stride / kTerms, rows, panel, vecs, sum, l.padded());
        for (int64_t r = 0; r < rows; ++r) {
          T* to = static_cast<T*>(layer_.grad_x) + rows_[row + r] * layer_.inputs + column;
          for (int64_t i = 0; i < count; i += kLanes) {
            const Vec<T> value = load(sum + r * l.padded() + i);
            if (i + kLanes <= count) {
              store(to + i, value);
            } else {
              store_first(to + i, value, count - i);
            }
          }
        }
      });
    }
  }

  // Rows [i, i + lanes) of a gradient [D, columns], from sums that lie transposed.
  void write(const S* from, int64_t i, int64_t columns, T* to) const {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t count = columns - j < kLanes ? columns - j : kLanes;
      Vec<T> square[kLanes] = {};
      for (int64_t c = 0; c < count; ++c) square[c] = load(from + (j + c) * l_.padded() + i);
      transpose<S>(square);
      for (int64_t r = 0; r < kLanes && i + r < p_.hidden; ++r) {
        T* row = to + (i + r) * columns + j;
        if (count == kLanes) {
          store(row, square[r]);
        } else {
          store_first(row, square[r], count);
        }
      }
    }
  }

  const Problem& p_;
  const Layout& l_;
  const Part& part_;
  Tiles<T>& tiles_;
  const Layer& layer_;
  const bool ascending_;
  const int64_t transitions_, state_groups_, groups_;
  int64_t *rows_, *entered_;
  int64_t blocks_ = 0;  // of each unit's sums
};

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
