// The states of some rows, and where a sequence begins and ends. Compiled once per instruction set (vec.h).
#pragma once

#include "activation.h"
#include "factor.h"
#include "rows.h"
#include "sweep.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

template <class T>
class States {
  using S = Scalar<T>;
  using F = Factor<T>;
  using Row = FactorRow<T>;

 public:
  States(const Problem& p, const Layout& l, const Part& part)
      : p_(p),
        l_(l),
        rows_(part.rows),
        group_(part.group),
        rest_(p.form == Form::kCurrent && !p.backward ? at_rest<S>(p.activation) : 0),
        first_column_(l.first_column(part.block_begin)),
        end_column_(l.end_column(part.block_end - 1)),
        state_{static_cast<S*>(part.state[0]), static_cast<S*>(part.state[1])},
        factors_{static_cast<Row*>(part.factors[0]), static_cast<Row*>(part.factors[1])} {
    if (splits(p)) carried_ = static_cast<S*>(part.carried);
  }

  int64_t first_column() const { return first_column_; }
  int64_t end_column() const { return end_column_; }
  void take_all_columns() {
    first_column_ = 0;
    end_column_ = l_.end_column(l_.blocks - 1);
  }
  bool at_rest_is_zero() const { return rest_ == 0; }
  bool carries_apart() const { return carried_ != nullptr; }

  int64_t element(int64_t t, int64_t row) const {
    return (row_of(p_, t, rows_.order[row]) * p_.groups + group_) * p_.hidden;
  }
  int64_t state_element(int64_t row) const { return (rows_.order[row] * p_.groups + group_) * p_.hidden; }
  int64_t length(int64_t row) const { return rows_.lengths ? rows_.lengths[row] : p_.steps; }
  S* state(int64_t row) const { return state_[0] + row * l_.padded(); }
  S* next_state(int64_t row) const { return state_[1] + row * l_.padded(); }
  // What the skip is of.
  S* skipped(int64_t row) const { return carried_ ? carried_ + row * l_.padded() : state(row); }
  // The next step's are this step's from here on.
  void swap_states() {
    swap(state_[0], state_[1]);
    swap(factors_[0], factors_[1]);
  }

  // A state as the product takes it: in a row of its own, if it has to be rounded.
  Row* factor_row(int number, int64_t row) const { return factors_[number] + row * l_.halves(); }
  const F* factors(int64_t row) const {
    return kPaired<T> ? reinterpret_cast<const F*>(factor_row(0, row)) : reinterpret_cast<const F*>(state(row));
  }
  int64_t factor_stride() const { return kPaired<T> ? l_.halves() / UnitOf<F>::kTerms : l_.padded(); }

  // This part's columns of a state, 0: this step's, 1: the next's, to what there is before a sequence starts.
  void zero_state(int number, int64_t row) const {
    const size_t count = static_cast<size_t>(end_column_ - first_column_);
    memset(state_[number] + row * l_.padded() + first_column_, 0, count * sizeof(S));
    if constexpr (kPaired<T>) memset(factor_row(number, row) + first_column_, 0, count * sizeof(Row));
    if (!carried_) return;
    memset(skipped(row) + first_column_, 0, count * sizeof(S));
    if (rest_ == 0) return;
    for (int64_t i = first_column_; i < end_column_; i += l_.lanes) put_state(number, row, i, rest_ + Vec<T>{});
  }
  // One vector of a state, or what is left of it in this part's columns.
  void put_state(int number, int64_t row, int64_t column, Vec<T> value) const {
    const int64_t count = end_column_ - column;
    S* const to = state_[number] + row * l_.padded() + column;
    count < l_.lanes ? store_first(to, value, count) : store(to, value);
    if constexpr (kPaired<T>) {
      Row* const factor = factor_row(number, row) + column;
      count < l_.lanes ? store_first(factor, value, count) : store(factor, value);
    }
  }

  // What a sequence starts from, into this part's columns of a row.
  void load_start(int64_t row, S* to) const {
    if (!p_.state_in) {
      memset(to + first_column_, 0, static_cast<size_t>(end_column_ - first_column_) * sizeof(S));
    } else if (p_.scalar_states) {
      load_start(static_cast<const S*>(p_.state_in) + state_element(row), to);
    } else {
      load_start(static_cast<const T*>(p_.state_in) + state_element(row), to);
    }
  }
  template <class From>
  void load_start(const From* from, S* to) const {
    for (int64_t i = first_column_; i < end_column_; i += l_.lanes) {
      const int64_t count = end_column_ - i;
      store(to + i, count < l_.lanes ? load_first(from + i, count) : load(from + i));
    }
  }
  void load_state(int64_t row) const {
    load_start(row, state(row));
    for (int64_t i = first_column_; kPaired<T> && i < end_column_; i += l_.lanes) {
      put_state(0, row, i, load(state(row) + i));
    }
  }
  void store_state(int64_t row, const S* from) const {
    if (p_.scalar_states) return store_state(from, static_cast<S*>(p_.state_out) + state_element(row));
    store_state(from, static_cast<T*>(p_.state_out) + state_element(row));
  }
  template <class To>
  void store_state(const S* from, To* to) const {
    for (int64_t i = first_column_; i < end_column_; i += l_.lanes) {
      if (i + l_.lanes <= end_column_) {
        store(to + i, load(from + i));
      } else {
        store_first(to + i, load(from + i), end_column_ - i);
      }
    }
  }

  // In currents the state is carried, and f of it multiplied.
  void split_state(int64_t row) const {
    const AnyActivation f{p_.activation};
    for (int64_t i = first_column_; i < end_column_; i += l_.lanes) {
      const Vec<T> value = load(state(row) + i);
      const int64_t count = end_column_ - i;
      count < l_.lanes ? store_first(skipped(row) + i, value, count) : store(skipped(row) + i, value);
      put_state(0, row, i, f.of(value));
    }
  }

  // Empty sequences: the state passes through.
  void copy_unstarted(int64_t started) const {
    if (!p_.state_out) return;
    for (int64_t row = started; row < rows_.count; ++row) {
      load_state(row);
      store_state(row, state(row));
    }
  }

  void zero_padding(const Layer* layer) const {
    const auto zero = [&](T* columns) {
      memset(columns + first_column_, 0, static_cast<size_t>(end_column_ - first_column_) * sizeof(T));
    };
    for (int64_t row = 0; row < rows_.count; ++row) {
      for (int64_t t = length(row); t < p_.steps; ++t) {
        for (void* const out : {p_.out, p_.aside}) {
          if (!out) continue;
          zero(static_cast<T*>(out) + element(t, row));
        }
        for (int64_t k = 0; k + 1 < transitions_of(p_) && p_.inner && !p_.backward; ++k) {
          zero(static_cast<T*>(p_.inner) + k * p_.plane * p_.hidden + element(t, row));
        }
        if (layer && layer->grad_x && first_column_ == 0) {
          const int64_t inputs = layer->inputs;
          memset(static_cast<T*>(layer->grad_x) + row_of(p_, t, rows_.order[row]) * inputs, 0,
                 static_cast<size_t>(inputs) * sizeof(T));
        }
      }
    }
  }

 private:
  template <class P>
  static void swap(P*& a, P*& b) {
    P* const other = a;
    a = b;
    b = other;
  }

  const Problem& p_;
  const Layout& l_;
  const RowList& rows_;
  const int64_t group_;
  const S rest_;                       // what is multiplied of a state of zero
  int64_t first_column_, end_column_;  // this part's
  S* state_[2];                        // this step's and the next's,
  Row* factors_[2];                    // and as a product takes them (kPaired)
  S* carried_ = nullptr;               // what the skip is of, where it is not the state
};

}  // namespace
}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
