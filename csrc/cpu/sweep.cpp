// The sweep for CPUs, compiled once per instruction set (see vec.h).
//
// Per step and tile of rows: `dot` multiplies the states with one panel of U, sums in registers, and the epilogue adds
// skip * state and the streamed input to them, applies the activation, and writes the output and the next state. The
// product is summed on its own and the state added to it at the end: U is small against I, so its terms are kept
// from being rounded away one by one.
//
// No result depends on how rows are grouped into tiles or outputs over threads: the order of every sum follows from D
// alone (Layout::chains).

#include "sweep.h"

#include "dot.h"
#include "epilogue.h"
#include "factor.h"
#include "layer.h"
#include "pack.h"
#include "rows.h"
#include "step.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

template <class T>
class Sweep {
  using S = Scalar<T>;
  using F = Factor<T>;
  using Row = FactorRow<T>;

 public:
  Sweep(const Problem& p, const Layout& l, const Part& part)
      : p_(p),
        l_(l),
        part_(part),
        rows_(part_.rows),
        ascending_(is_ascending(p, part.group)),
        rest_(p.form == Form::kCurrent && !p.backward ? at_rest<S>(p.activation) : 0),
        // From no state there is nothing to multiply, unless U holds an Inf or a NaN, which times zero is NaN.
        transitions_(transitions_of(p)),
        direct_(p.backward || (!p.state_in && part.finite && rest_ == 0)),
        first_column_(l.first_column(part.block_begin)),
        end_column_(l.end_column(part.block_end - 1)),
        state_{static_cast<S*>(part.state[0]), static_cast<S*>(part.state[1])},
        factors_{static_cast<Row*>(part.factors[0]), static_cast<Row*>(part.factors[1])},
        panels_(static_cast<const F*>(part.panels)) {
    nonzero_.index = part.index;
    if (splits(p)) carried_ = static_cast<S*>(part.carried);
  }

  void run() {
    const int64_t started = rows_at(p_, rows_, 0);
    copy_unstarted(started);
    if (rows_.lengths && !p_.offsets) zero_padding();
    const bool mine = !part_.layer ? run_steps(0, p_.steps) : p_.backward ? run_layer_backward() : run_layer();
    if (mine) leave(0, active_);
  }

 private:
  // ---- a layer: what is done before and after some steps ----

  void use_chunk(int64_t number) {
    chunk_data_ = static_cast<S*>(part_.chunk_rows[number % 2]);
    chunk_factors_ = static_cast<Row*>(part_.chunk_factors[number % 2]);
    chunk_aside_ = static_cast<S*>(part_.chunk_aside[number % 2]);
  }
  // False if the team ends here and this thread is not the one that goes on.
  bool meet() {
    if (!part_.team || !part_.team->meet(part_.rank)) return true;
    if (part_.rank != 0) return false;
    go_on_alone();
    return true;
  }

  // All columns from here on, what the others have done lying in memory of all. In a layer the others have kept their
  // columns of this chunk's input product to themselves; their sums of weight gradients end with the chunk before.
  void go_on_alone() {
    part_.team = nullptr;
    part_.meets = false;
    part_.threads = 1;
    part_.block_begin = 0;
    part_.block_end = l_.blocks;
    first_column_ = 0;
    end_column_ = l_.end_column(l_.blocks - 1);
    if (input_ && !near_) input_->run(0, chunk_.rows(), 0, end_column_, chunk_data_);
  }

  // Each thread makes the input product of its own rows and columns. As of the others here, false if the team ended and
  // others do the rest.
  bool run_layer() {
    InputProduct<T> input(p_, part_, tiles_);
    input_ = &input;
    near_ = by_tiles() && part_.input->tiles && rows_.count >= kNearRows &&
            (l_.scalars() + part_.input->scalars()) * static_cast<int64_t>(sizeof(F)) <= kNearBytes;
    use_chunk(0);
    while (chunk_.advance(p_, rows_, ascending_, kInputRows)) {
      input.use(rows_, chunk_, ascending_);
      if (!near_) input.run(0, chunk_.rows(), first_column_, end_column_, chunk_data_);
      if (!run_steps(chunk_.begin, chunk_.end)) return false;
    }
    return true;
  }

  // The gradients of pre are kept for a chunk of steps of all threads' rows, in two places that take turns, so that
  // one meeting a chunk is enough.
  bool run_layer_backward() {
    WeightGradient<T> gradient(p_, l_, part_, tiles_);
    for (int64_t number = 0; chunk_.advance(p_, part_.all, ascending_, kOuterDepth); ++number) {
      use_chunk(number);
      if (!run_steps(chunk_.begin, chunk_.end)) return false;
      if (!part_.meets) meet();
      if constexpr (kPaired<T>) {
        gradient.add(chunk_, chunk_data_, chunk_aside_, chunk_factors_, l_.halves());
      } else {
        gradient.add(chunk_, chunk_data_, chunk_aside_, chunk_data_, l_.padded());
      }
    }
    if (!meet()) return false;
    gradient.finish();
    return true;
  }

  // Tiles of sums start from what is added to them: from the input's product, or from the bias, and then (`near_`) that
  // product is made in them too. Written by one sweep of tiles and read by the next it was a tenth of a step of 64 rows
  // x 128 units. The sums are the same.
  bool by_tiles() const { return kHasTiles && kPaired<T> && l_.tiles && part_.layer && !p_.backward; }

  // ---- who runs when ----

  bool run_steps(int64_t begin, int64_t end) {
    if (rows_.count == 0) return true;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = time_of(p_, ascending_, i);
      const int64_t now = rows_at(p_, rows_, t);
      if (now < active_) leave(now, active_);
      const int64_t stay = now < active_ ? now : active_;
      if (now > active_ && !direct_ && !enter(active_, now)) return false;
      for (int64_t turn = 0; turn < transitions_; ++turn) {
        take_turn(turn);
        if (part_.layer) chunk_base_ = chunk_.base[i - chunk_.begin] + transition_ * chunk_.rows();
        const bool starts = direct_ && turn == 0;
        multiply(0, starts ? stay : now, t);
        if (starts) start_from_carry(stay, now, t);
        active_ = now;
        if (p_.resets && turn + 1 == transitions_) drop_states(active_, t);
        if (part_.meets && !meet()) return false;
        swap_states();
      }
    }
    return true;
  }
  // What is multiplied comes from the transition before, in a backward sweep the one after, by whose matrix it went.
  void take_turn(int64_t turn) {
    if (transitions_ == 1) return;
    transition_ = p_.backward ? transitions_ - 1 - turn : turn;
    const int64_t matrix = p_.backward ? (transition_ + 1) % transitions_ : transition_;
    panels_ = static_cast<const F*>(part_.panels) + matrix * l_.scalars();
  }

  int64_t element(int64_t t, int64_t row) const {
    return (row_of(p_, t, rows_.order[row]) * p_.groups + part_.group) * p_.hidden;
  }
  int64_t state_element(int64_t row) const { return (rows_.order[row] * p_.groups + part_.group) * p_.hidden; }
  int64_t length(int64_t row) const { return rows_.lengths ? rows_.lengths[row] : p_.steps; }
  S* state(int64_t row) const { return state_[0] + row * l_.padded(); }
  S* next_state(int64_t row) const { return state_[1] + row * l_.padded(); }
  // What the skip is of.
  S* skipped(int64_t row) const { return carried_ ? carried_ + row * l_.padded() : state(row); }
  void swap_states() {
    swap(state_[0], state_[1]);
    swap(factors_[0], factors_[1]);
  }
  template <class P>
  static void swap(P*& a, P*& b) {
    P* const other = a;
    a = b;
    b = other;
  }

  // A state as the product takes it: in a row of its own, if it has to be rounded.
  Row* factor_row(int number, int64_t row) const { return factors_[number] + row * l_.halves(); }
  const F* factors(int64_t row) const {
    return kPaired<T> ? reinterpret_cast<const F*>(factor_row(0, row)) : reinterpret_cast<const F*>(state(row));
  }
  int64_t factor_stride() const { return kPaired<T> ? l_.halves() / UnitOf<F>::kTerms : l_.padded(); }

  // ---- a step ----

  // A block of the product for a tile of rows, into its columns of `sums`.
  void dot_block(int64_t row, int64_t rows, int64_t block, S* sums) {
    const int64_t vec = l_.first_vec(block), vecs = l_.first_vec(block + 1) - vec;
    const F* panel = panels_ + vec * l_.lanes * l_.depth;
    S* const to = sums + vec * l_.lanes;
    if constexpr (kHasTiles && kPaired<T>) {
      if (by_tiles()) return dot_by_tiles(row, rows, block, {factors(row), factor_stride(), panel, l_.depth}, to);
    }
    if (l_.slices > 1) {
      const Nonzero* nonzero = part_.finite && nonzero_.worthwhile ? &nonzero_ : nullptr;
      kDotSliced<F>[vecs - 1](factors(row), panel, l_, nonzero, descending_, this->sums(1), to);
    } else {
      multiply_block(tiles_, l_, l_.chains, factors(row), factor_stride(), rows, panel, vecs, to, l_.padded());
    }
  }
  void dot_by_tiles(int64_t row, int64_t rows, int64_t block, const TileFactors& states, S* to) {
    const int64_t column = l_.first_column(block), vecs = l_.first_vec(block + 1) - l_.first_vec(block);
    const auto dot = [&](const TileFactors* factors, int64_t count, const S* start, int64_t stride) {
      tiles_.dot(factors, count, rows, vecs, to, l_.padded(), {start + column, stride});
    };
    if (transition_ > 0) return dot(&states, 1, input_->bias(transition_), 0);
    if (!near_) return dot(&states, 1, pre(row), l_.padded());
    const TileFactors both[] = {input_->factors(chunk_base_ + row, block), states};
    dot(both, 2, input_->bias(0), 0);
  }
  // Of a layer, what is added to a row's sums.
  S* pre(int64_t row) const {
    return transition_ > 0 ? input_->bias(transition_) : chunk_data_ + (chunk_base_ + row) * l_.padded();
  }
  S* sums(int64_t row) const { return static_cast<S*>(part_.scratch) + row * l_.padded(); }

  // Rows in tiles of nearly equal size: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
  template <class Body>
  void for_tiles(int64_t begin, int64_t end, Body body) const {
    const int64_t rows = end - begin;
    if (rows == 1) return body(begin, 1);
    const int64_t tiles = (rows + rows_at_a_time(l_) - 1) / rows_at_a_time(l_);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = begin + i * rows / tiles;
      body(first, begin + (i + 1) * rows / tiles - first);
    }
  }

  // Where the states of the transition at hand are, those of the last one being `last`.
  template <class P>
  P* plane(P* last) const {
    if (transition_ + 1 == transitions_) return last;
    return p_.inner ? static_cast<T*>(p_.inner) + transition_ * p_.plane * p_.hidden : nullptr;
  }
  // This part's columns of a row at step t.
  void set(Columns<T>& c, int64_t row, int64_t t) const {
    const int64_t at = element(t, row) + first_column_;
    if (p_.in && transition_ == (p_.backward ? transitions_ - 1 : 0)) c.in = static_cast<const T*>(p_.in) + at;
    if (p_.backward) c.saved = static_cast<const T*>(plane(p_.saved)) + at;
    if (void* const out = p_.backward ? p_.out : plane(p_.out)) c.out = static_cast<T*>(out) + at;
    c.next = next_state(row) + first_column_;
    if constexpr (kPaired<T>) c.factor = factor_row(1, row) + first_column_;
    c.count = end_column_ - first_column_;
    if (part_.layer && p_.backward) {
      const int64_t place = chunk_base_ + part_.position + row * part_.stride;
      c.kept = chunk_data_ + place * l_.padded() + first_column_;
      if constexpr (kPaired<T>) c.kept_factor = chunk_factors_ + place * l_.halves() + first_column_;
    }
    if (part_.layer && !p_.backward) c.pre = pre(row) + first_column_;
  }
  // The same where units have factors of their own.
  void set_units(UnitColumns<T>& c, int64_t row, int64_t t) const {
    set(c, row, t);
    c.skips = factors_of_units(p_.skips);
    if (carried_) c.carried = skipped(row) + first_column_;
    if (p_.form != Form::kOutside) return;
    c.gains = factors_of_units(p_.gains);
    const int64_t at = element(t, row) + first_column_;
    if (p_.noise) c.noise = static_cast<const T*>(p_.noise) + at;
    if (p_.aside) c.aside = static_cast<T*>(p_.aside) + at;
    if (part_.layer && part_.chunk_aside[0]) {
      c.kept_aside = chunk_aside_ + (chunk_base_ + part_.position + row * part_.stride) * l_.padded() + first_column_;
    }
  }
  const S* factors_of_units(const void* all) const {
    return all ? static_cast<const S*>(all) + part_.group * p_.hidden + first_column_ : nullptr;
  }

  // state x U for rows [begin, end) and this part's columns: body(row, its product). A tile of rows goes through all of
  // U. Where U is not in the second-level cache, each of its blocks serves a band of tiles, so that U is fetched once
  // or twice a step and not for every six rows.
  template <class Body>
  void product(int64_t begin, int64_t end, Body body) {
    const int64_t columns = l_.first_column(part_.block_end) - first_column_;
    if (columns * l_.depth * static_cast<int64_t>(sizeof(F)) <= kNearBytes) {
      return for_tiles(begin, end, [&](int64_t row, int64_t rows) { product_of_band(row, rows, body); });
    }
    for (; begin < end; begin += kBandRows) {
      product_of_band(begin, end - begin < kBandRows ? end - begin : kBandRows, body);
    }
  }
  template <class Body>
  void product_of_band(int64_t begin, int64_t count, Body body) {
    if (l_.slices > 1) nonzero_.find(factors(begin), l_);
    for (int64_t i = part_.block_begin; i < part_.block_end; ++i) {
      const int64_t block = descending_ ? part_.block_begin + part_.block_end - 1 - i : i;
      for_tiles(begin, begin + count,
                [&](int64_t row, int64_t rows) { dot_block(row, rows, block, sums(row - begin)); });
    }
    for (int64_t r = 0; r < count; ++r) body(begin + r, sums(r) + first_column_);
    descending_ = !descending_;
  }

  void multiply(int64_t begin, int64_t end, int64_t t) {
    if (p_.skips) {
      return product(begin, end, [&](int64_t row, const S* carry) {
        UnitColumns<T> c{};
        set_units(c, row, t);
        c.carry = carry;
        if (by_tiles()) c.pre = nullptr;
        c.x = skipped(row) + first_column_;
        epilogue(p_, c);
      });
    }
    product(begin, end, [&](int64_t row, const S* carry) {
      Columns<T> c{};
      set(c, row, t);
      c.carry = carry;
      if (by_tiles()) c.pre = nullptr;
      c.skip = static_cast<S>(p_.skip);
      c.x = p_.skip != 0 ? state(row) + first_column_ : nullptr;
      epilogue(p_, c);
    });
  }

  // The first step of a sequence whose carry is given (the gradient of h_n) or zero (no h0): no product.
  void start_from_carry(int64_t begin, int64_t end, int64_t t) {
    if (near_ && begin < end) {
      input_->run(chunk_base_ + begin, chunk_base_ + end, first_column_, end_column_, chunk_data_);
    }
    for (int64_t row = begin; row < end; ++row) {
      load_start(row, sums(0));
      if (p_.skips) {
        UnitColumns<T> c{};
        set_units(c, row, t);
        if (p_.backward) c.pre = sums(0) + first_column_;  // added, whatever is done to products
        epilogue(p_, c);
      } else {
        Columns<T> c{};
        set(c, row, t);
        c.carry = sums(0) + first_column_;
        epilogue(p_, c);
      }
    }
  }

  // An episode boundary between this step and the one to be processed next: nothing crosses it.
  void drop_states(int64_t active, int64_t t) {
    const int64_t start = ascending_ ? t + 1 : t;
    const bool into_h0 = !ascending_ && t == 0;
    if (into_h0 && !p_.backward) return;  // a reversed recurrence ends here; h_n is no crossing
    for (int64_t row = 0; row < active; ++row) {
      if (start < length(row) && p_.resets[row_of(p_, start, rows_.order[row])]) zero_state(1, row);
    }
  }
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

  // ---- the ends of a sequence ----

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

  // Rows that begin with a product of h0.
  bool enter(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      load_state(row);
      if (carried_) split_state(row);
      if (p_.resets && ascending_ && p_.resets[row_of(p_, 0, rows_.order[row])]) zero_state(0, row);
    }
    return !part_.meets || meet();
  }

  // Rows that have run all their steps: h_n is the state, the gradient of h0 one more product.
  void leave(int64_t begin, int64_t end) {
    if (!p_.state_out || begin == end) return;
    take_turn(0);
    if (!p_.backward) {
      for (int64_t row = begin; row < end; ++row) store_state(row, skipped(row));
      return;
    }
    product(begin, end, [&](int64_t row, const S* carry) {
      UnitColumns<T> c{};
      c.carry = carry;
      c.next = next_state(row) + first_column_;
      c.count = end_column_ - first_column_;
      if (p_.skips) {
        c.x = skipped(row) + first_column_;
        c.skips = factors_of_units(p_.skips);
        if (p_.initial) c.saved = static_cast<const T*>(p_.initial) + state_element(row) + first_column_;
        epilogue_of_start(p_, c);
      } else {
        c.x = p_.skip != 0 ? state(row) + first_column_ : nullptr;
        c.skip = static_cast<S>(p_.skip);
        c.apply([](Vec<T> a, Vec<T>) { return a; });
      }
      store_state(row, next_state(row));
    });
  }

  // Empty sequences: the state passes through.
  void copy_unstarted(int64_t started) {
    if (!p_.state_out) return;
    for (int64_t row = started; row < rows_.count; ++row) {
      load_state(row);
      store_state(row, state(row));
    }
  }

  void zero_padding() const {
    const auto zero = [&](T* columns) {
      memset(columns + first_column_, 0, static_cast<size_t>(end_column_ - first_column_) * sizeof(T));
    };
    for (int64_t row = 0; row < rows_.count; ++row) {
      for (int64_t t = length(row); t < p_.steps; ++t) {
        for (void* const out : {p_.out, p_.aside}) {
          if (!out) continue;
          zero(static_cast<T*>(out) + element(t, row));
        }
        for (int64_t k = 0; k + 1 < transitions_ && p_.inner && !p_.backward; ++k) {
          zero(static_cast<T*>(p_.inner) + k * p_.plane * p_.hidden + element(t, row));
        }
        if (part_.layer && part_.layer->grad_x && first_column_ == 0) {
          const int64_t inputs = part_.layer->inputs;
          memset(static_cast<T*>(part_.layer->grad_x) + row_of(p_, t, rows_.order[row]) * inputs, 0,
                 static_cast<size_t>(inputs) * sizeof(T));
        }
      }
    }
  }

  const Problem& p_;
  const Layout& l_;
  Part part_;  // changes where the team ends
  const RowList& rows_;
  const bool ascending_;       // in time, this sweep
  const S rest_;               // what is multiplied of a state of zero
  const int64_t transitions_;  // of a step
  const bool direct_;          // sequences start from a carry, not from a state to be multiplied
  int64_t first_column_, end_column_;
  S* state_[2];             // this step's and the next's,
  Row* factors_[2];         // and as a product takes them (kPaired)
  S* carried_ = nullptr;    // what the skip is of, where it is not the state
  const F* panels_;         // of the matrix at hand,
  int64_t transition_ = 0;  // and whose states it makes
  int64_t active_ = 0;      // rows that have begun and not ended
  const InputProduct<T>* input_ = nullptr;
  bool near_ = false;        // its product is made in the tiles of a step's sums
  Chunk chunk_;              // of a layer: the steps at hand,
  S* chunk_data_ = nullptr;  // their input products or gradients of pre,
  Row* chunk_factors_ = nullptr;
  S* chunk_aside_ = nullptr;
  int64_t chunk_base_ = 0;  // and the first row of the step at hand
  Nonzero nonzero_;
  Tiles<T> tiles_;
  bool descending_ = false;  // the direction in which the matrix is walked, turned at every tile
};

template <class T>
void sweep(const Problem& p, const Layout& l, const Part& part) {
  Sweep<T>(p, l, part).run();
}

bool pack_any(DType dtype, const void* matrix, bool transposed, const Panels& l, int64_t begin, int64_t end,
              void* panels) {
  switch (dtype) {
    case DType::kFloat32:
      return pack<float>(matrix, transposed, l, begin, end, panels);
    case DType::kFloat64:
      return pack<double>(matrix, transposed, l, begin, end, panels);
    case DType::kBFloat16:
      return pack<BFloat16>(matrix, transposed, l, begin, end, panels);
    case DType::kFloat16:
      if constexpr (kHasHalfTiles) {
        if (l.tiles) return pack<TiledFloat16>(matrix, transposed, l, begin, end, panels);
      }
      return pack<Float16>(matrix, transposed, l, begin, end, panels);
  }
  return false;
}

void sweep_any(const Problem& p, const Layout& l, const Part& part) {
  switch (p.dtype) {
    case DType::kFloat32:
      return sweep<float>(p, l, part);
    case DType::kFloat64:
      return sweep<double>(p, l, part);
    case DType::kBFloat16:
      return sweep<BFloat16>(p, l, part);
    case DType::kFloat16:
      if constexpr (kHasHalfTiles) {
        if (l.tiles) return sweep<TiledFloat16>(p, l, part);
      }
      return sweep<Float16>(p, l, part);
  }
}

#define FUSED_RIN_STRING_(x) #x
#define FUSED_RIN_STRING(x) FUSED_RIN_STRING_(x)
constexpr Kernels make_kernels(const char* name, bool (*half_tiles)()) {
  return {name,
          FUSED_RIN_VECTOR_BYTES,
          UnitOf<Factor<BFloat16>>::kTerms,
          kNarrow,
          kWide,
          pack_any,
          sweep_any,
          step_any,
          kCheckTiles,
          half_tiles};
}
// The model of the tiles has those of float16 as well; of the instructions a processor may have one and not the other.
const Kernels kKernels =
    make_kernels(FUSED_RIN_STRING(FUSED_RIN_ISA), FUSED_RIN_TILES == 2 ? kCheckHalfTiles : nullptr);
#if FUSED_RIN_TILES == 1 && FUSED_RIN_HALF_TILES
const Kernels kHalfKernels = make_kernels(FUSED_RIN_STRING(FUSED_RIN_ISA) "_fp16", kCheckHalfTiles);
#endif

}  // namespace
}  // namespace FUSED_RIN_ISA

#define FUSED_RIN_JOIN_(a, b) a##b
#define FUSED_RIN_JOIN(a, b) FUSED_RIN_JOIN_(a, b)
const Kernels* FUSED_RIN_JOIN(kernels_, FUSED_RIN_ISA)() { return &FUSED_RIN_ISA::kKernels; }
#if FUSED_RIN_TILES == 1 && FUSED_RIN_HALF_TILES
const Kernels* kernels_amx_fp16() { return &FUSED_RIN_ISA::kHalfKernels; }
#endif

}  // namespace fused_rin
