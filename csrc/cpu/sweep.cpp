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

#include "beside.h"
#include "dot.h"
#include "epilogue.h"
#include "factor.h"
#include "layer.h"
#include "pack.h"
#include "rows.h"
#include "states.h"
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
        h_(p, l, part_),
        ascending_(is_ascending(p, part.group)),
        // From no state there is nothing to multiply, unless U holds an Inf or a NaN, which times zero is NaN.
        transitions_(transitions_of(p)),
        direct_(p.backward || (!p.state_in && part.finite && h_.at_rest_is_zero())),
        panels_(static_cast<const F*>(part.panels)),
        beside_(tiles_, static_cast<S*>(part.scratch), p, l, ascending_) {
    nonzero_.index = part.index;
  }

  void run() {
    const int64_t started = rows_at(p_, rows_, 0);
    h_.copy_unstarted(started);
    if (rows_.lengths && !p_.offsets) h_.zero_padding(part_.layer);
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
    h_.take_all_columns();
    if (input_ && !near_) input_->run(0, chunk_.rows(), 0, h_.end_column(), chunk_data_);
  }

  // Each thread makes the input product of its own rows and columns. As of the others here, false if the team ended and
  // others do the rest.
  bool run_layer() {
    InputProduct<T> input(p_, part_, tiles_);
    input_ = &input;
    near_ = by_tiles() && part_.input->tiles &&
            makes_near(rows_.count, (l_.scalars() + part_.input->scalars()) * static_cast<int64_t>(sizeof(F)));
    use_chunk(0);
    while (chunk_.advance(p_, rows_, ascending_, kInputRows)) {
      input.use(rows_, chunk_, ascending_);
      beside_.store_held();
      if (!near_) input.run(0, chunk_.rows(), h_.first_column(), h_.end_column(), chunk_data_);
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
        if (p_.resets || part_.meets) beside_.finish();
        if (p_.resets && turn + 1 == transitions_) drop_states(active_, t);
        if (part_.meets && !meet()) return false;
        h_.swap_states();
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

  // ---- a step ----

  // A block of the product for a tile of rows, into its columns of `sums`.
  void dot_block(int64_t row, int64_t rows, int64_t block, S* sums) {
    const int64_t vec = l_.first_vec(block), vecs = l_.first_vec(block + 1) - vec;
    const F* panel = panels_ + vec * l_.lanes * l_.depth;
    S* const to = sums + vec * l_.lanes;
    if constexpr (kHasTiles && kPaired<T>) {
      if (by_tiles()) return dot_by_tiles(row, rows, block, {h_.factors(row), h_.factor_stride(), panel, l_.depth}, to);
    }
    if (l_.slices > 1) {
      const Nonzero* nonzero = part_.finite && nonzero_.worthwhile ? &nonzero_ : nullptr;
      kDotSliced<F>[vecs - 1](h_.factors(row), panel, l_, nonzero, descending_, this->sums(1), to);
    } else {
      multiply_block(tiles_, l_, l_.chains, h_.factors(row), h_.factor_stride(), rows, panel, vecs, to, l_.padded());
    }
  }
  void dot_by_tiles(int64_t row, int64_t rows, int64_t block, const TileFactors& states, S* to) {
    const int64_t column = l_.first_column(block), vecs = l_.first_vec(block + 1) - l_.first_vec(block);
    const auto dot = [&](const TileFactors* factors, int64_t count, const S* start, int64_t stride) {
      tiles_.dot(factors, count, rows, vecs, to, l_.padded(), {start + column, stride});
    };
    if (transition_ > 0) return dot(&states, 1, input_->bias(transition_), 0);
    if (!near_) return dot(&states, 1, pre(row), l_.padded());
    const TileFactors both[] = {input_->factors(chunk_base_ + row, column), states};
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
    const int64_t at = h_.element(t, row) + h_.first_column();
    if (p_.in && transition_ == (p_.backward ? transitions_ - 1 : 0)) c.in = static_cast<const T*>(p_.in) + at;
    if (p_.backward) c.saved = static_cast<const T*>(plane(p_.saved)) + at;
    if (void* const out = p_.backward ? p_.out : plane(p_.out)) c.out = static_cast<T*>(out) + at;
    c.ahead = p_.offsets ? 0 : p_.batch * p_.groups * p_.hidden * (ascending_ ? 1 : -1);
    c.next = h_.next_state(row) + h_.first_column();
    if constexpr (kPaired<T>) c.factor = h_.factor_row(1, row) + h_.first_column();
    c.count = h_.end_column() - h_.first_column();
    if (part_.layer && p_.backward) {
      const int64_t place = chunk_base_ + part_.position + row * part_.stride;
      c.kept = chunk_data_ + place * l_.padded() + h_.first_column();
      if constexpr (kPaired<T>) c.kept_factor = chunk_factors_ + place * l_.halves() + h_.first_column();
    }
    if (part_.layer && !p_.backward) c.pre = pre(row) + h_.first_column();
  }
  // The same where units have factors of their own.
  void set_units(UnitColumns<T>& c, int64_t row, int64_t t) const {
    set(c, row, t);
    c.skips = factors_of_units(p_.skips);
    if (h_.carries_apart()) c.carried = h_.skipped(row) + h_.first_column();
    if (p_.form != Form::kOutside) return;
    c.gains = factors_of_units(p_.gains);
    const int64_t at = h_.element(t, row) + h_.first_column();
    if (p_.noise) c.noise = static_cast<const T*>(p_.noise) + at;
    if (p_.aside) c.aside = static_cast<T*>(p_.aside) + at;
    if (part_.layer && part_.chunk_aside[0]) {
      c.kept_aside =
          chunk_aside_ + (chunk_base_ + part_.position + row * part_.stride) * l_.padded() + h_.first_column();
    }
  }
  const S* factors_of_units(const void* all) const {
    return all ? static_cast<const S*>(all) + part_.group * p_.hidden + h_.first_column() : nullptr;
  }

  // state x U for rows [begin, end) and this part's columns: body(row, its product). A tile of rows goes through all of
  // U. Where U is not in the second-level cache, each of its blocks serves a band of tiles, so that U is fetched once
  // or twice a step and not for every six rows.
  template <class Body>
  void product(int64_t begin, int64_t end, Body body) {
    const int64_t columns = l_.first_column(part_.block_end) - h_.first_column();
    if (columns * l_.depth * static_cast<int64_t>(sizeof(F)) <= kNearBytes) {
      return for_tiles(begin, end, [&](int64_t row, int64_t rows) { product_of_band(row, rows, body); });
    }
    for (; begin < end; begin += kBandRows) {
      product_of_band(begin, end - begin < kBandRows ? end - begin : kBandRows, body);
    }
  }
  template <class Body>
  void product_of_band(int64_t begin, int64_t count, Body body) {
    if (l_.slices > 1) nonzero_.find(h_.factors(begin), l_);
    for (int64_t i = part_.block_begin; i < part_.block_end; ++i) {
      const int64_t block = descending_ ? part_.block_begin + part_.block_end - 1 - i : i;
      for_tiles(begin, begin + count,
                [&](int64_t row, int64_t rows) { dot_block(row, rows, block, sums(row - begin)); });
    }
    for (int64_t r = 0; r < count; ++r) body(begin + r, sums(r) + h_.first_column());
    descending_ = !descending_;
  }

  void multiply(int64_t begin, int64_t end, int64_t t) {
    if constexpr (kHasTiles && kPaired<T>) {
      if (by_tiles() && !p_.skips && p_.out && transitions_ == 1) return multiply_beside(begin, end, t);
    }
    if (p_.skips) {
      return product(begin, end, [&](int64_t row, const S* carry) {
        UnitColumns<T> c{};
        set_units(c, row, t);
        c.carry = carry;
        if (by_tiles()) c.pre = nullptr;
        c.x = h_.skipped(row) + h_.first_column();
        epilogue(p_, c);
      });
    }
    product(begin, end, [&](int64_t row, const S* carry) {
      Columns<T> c{};
      set(c, row, t);
      c.carry = carry;
      if (by_tiles()) c.pre = nullptr;
      c.skip = static_cast<S>(p_.skip);
      c.x = p_.skip != 0 ? h_.state(row) + h_.first_column() : nullptr;
      epilogue(p_, c);
    });
  }

  // The same a tile of sums at a time, whose results are made while the next one is multiplied (beside.h). Some may be
  // missing when the step ends.
  void multiply_beside(int64_t begin, int64_t end, int64_t t) {
    const int64_t first = l_.first_vec(part_.block_begin), vecs = l_.first_vec(part_.block_end) - first;
    const int64_t band =
        vecs * l_.lanes * l_.depth * static_cast<int64_t>(sizeof(F)) <= kNearBytes ? kMaxRowsByTiles : kBandRows;
    const int64_t bands = (end - begin + band - 1) / band, pairs = (vecs + 1) / 2;
    for (int64_t b = 0; b < bands; ++b) {
      for (int64_t i = 0; i < pairs; ++i) {
        const int64_t column = (first + 2 * (descending_ ? pairs - 1 - i : i)) * l_.lanes;
        for_tiles(begin + b * (end - begin) / bands, begin + (b + 1) * (end - begin) / bands,
                  [&](int64_t row, int64_t rows) { add_beside(row, rows, column, t); });
      }
      descending_ = !descending_;
    }
  }
  void add_beside(int64_t row, int64_t rows, int64_t column, int64_t t) {
    typename Beside<T>::Results to;
    to.state = h_.next_state(row) + column;
    to.factors = h_.factor_row(1, row) + column;
    to.out = static_cast<T*>(p_.out) + (row_of(p_, t, 0) * p_.groups + part_.group) * p_.hidden + column;
    to.order = rows_.order + row;
    to.row = row;
    to.rows = rows;
    to.columns = h_.end_column() - column < 2 * l_.lanes ? h_.end_column() - column : 2 * l_.lanes;
    to.step = t;
    const TileFactors states{h_.factors(row), h_.factor_stride(), panels_ + column * l_.depth, l_.depth};
    if (!near_) return beside_.add(&states, 1, {pre(row) + column, l_.padded()}, to);
    const TileFactors both[] = {input_->factors(chunk_base_ + row, column), states};
    beside_.add(both, 2, {input_->bias(0) + column, 0}, to);
  }

  // The first step of a sequence whose carry is given (the gradient of h_n) or zero (no h0): no product.
  void start_from_carry(int64_t begin, int64_t end, int64_t t) {
    if (begin == end) return;
    beside_.finish();
    if (near_) {
      input_->run(chunk_base_ + begin, chunk_base_ + end, h_.first_column(), h_.end_column(), chunk_data_);
    }
    for (int64_t row = begin; row < end; ++row) {
      h_.load_start(row, sums(0));
      if (p_.skips) {
        UnitColumns<T> c{};
        set_units(c, row, t);
        if (p_.backward) c.pre = sums(0) + h_.first_column();  // added, whatever is done to products
        epilogue(p_, c);
      } else {
        Columns<T> c{};
        set(c, row, t);
        c.carry = sums(0) + h_.first_column();
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
      if (start < h_.length(row) && p_.resets[row_of(p_, start, rows_.order[row])]) h_.zero_state(1, row);
    }
  }
  // ---- the ends of a sequence ----

  // Rows that begin with a product of h0.
  bool enter(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      h_.load_state(row);
      if (h_.carries_apart()) h_.split_state(row);
      if (p_.resets && ascending_ && p_.resets[row_of(p_, 0, rows_.order[row])]) h_.zero_state(0, row);
    }
    return !part_.meets || meet();
  }

  // Rows that have run all their steps: h_n is the state, the gradient of h0 one more product.
  void leave(int64_t begin, int64_t end) {
    beside_.finish();
    if (!p_.state_out || begin == end) return;
    take_turn(0);
    if (!p_.backward) {
      for (int64_t row = begin; row < end; ++row) h_.store_state(row, h_.skipped(row));
      return;
    }
    product(begin, end, [&](int64_t row, const S* carry) {
      UnitColumns<T> c{};
      c.carry = carry;
      c.next = h_.next_state(row) + h_.first_column();
      c.count = h_.end_column() - h_.first_column();
      if (p_.skips) {
        c.x = h_.skipped(row) + h_.first_column();
        c.skips = factors_of_units(p_.skips);
        if (p_.initial) c.saved = static_cast<const T*>(p_.initial) + h_.state_element(row) + h_.first_column();
        epilogue_of_start(p_, c);
      } else {
        c.x = p_.skip != 0 ? h_.state(row) + h_.first_column() : nullptr;
        c.skip = static_cast<S>(p_.skip);
        c.apply([](Vec<T> a, Vec<T>) { return a; });
      }
      h_.store_state(row, h_.next_state(row));
    });
  }

  const Problem& p_;
  const Layout& l_;
  Part part_;  // changes where the team ends
  const RowList& rows_;
  States<T> h_;
  const bool ascending_;       // in time, this sweep
  const int64_t transitions_;  // of a step
  const bool direct_;          // sequences start from a carry, not from a state to be multiplied
  const F* panels_;            // of the matrix at hand,
  int64_t transition_ = 0;     // and whose states it makes
  int64_t active_ = 0;         // rows that have begun and not ended
  const InputProduct<T>* input_ = nullptr;
  bool near_ = false;        // its product is made in the tiles of a step's sums
  Chunk chunk_;              // of a layer: the steps at hand,
  S* chunk_data_ = nullptr;  // their input products or gradients of pre,
  Row* chunk_factors_ = nullptr;
  S* chunk_aside_ = nullptr;
  int64_t chunk_base_ = 0;  // and the first row of the step at hand
  Nonzero nonzero_;
  Tiles<T> tiles_;
  Beside<T> beside_;
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
