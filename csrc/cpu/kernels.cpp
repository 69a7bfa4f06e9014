// The sweep for CPUs, compiled once per instruction set (see vec.h).
//
// Per step and tile of rows: `dot` multiplies the states with one panel of U, sums in registers, and the epilogue adds
// skip * state and the streamed input to them, applies the activation, and writes the output and the next state. The
// product is summed on its own and the state added to it at the end: U is small against I, so its terms are kept
// from being rounded away one by one.
//
// No result depends on how rows are grouped into tiles or outputs over threads: the order of every sum follows from D
// alone (Layout::chains).

#include "kernels.h"

#include "dot.h"
#include "epilogue.h"
#include "step.h"
#include "vec.h"

namespace fused_rin {
namespace FUSED_RIN_ISA {
namespace {

template <class T>
class Sweep {
  using S = Scalar<T>;

 public:
  Sweep(const Problem& p, const Layout& l, const Part& part)
      : p_(p),
        l_(l),
        part_(part),
        ascending_((part.group < p.groups - p.num_reversed) != p.backward),
        direct_(p.backward || !p.state_in),
        first_column_(l.first_vec(part.block_begin) * l.lanes),
        end_column_(column_end(part.block_end - 1)),
        state_{static_cast<S*>(part.state[0]), static_cast<S*>(part.state[1])} {
    nonzero_.index = part.index;
  }

  void run() {
    int64_t active = 0;
    const int64_t started = rows_longer_than(0);
    copy_unstarted(started);
    if (part_.lengths && !p_.offsets) zero_padding();
    for (int64_t i = 0; i < p_.steps; ++i) {
      const int64_t t = ascending_ ? i : p_.steps - 1 - i;
      const int64_t now = rows_longer_than(t);
      if (now < active) leave(now, active);
      const int64_t stay = now < active ? now : active;
      if (now > active && !direct_) enter(active, now);
      multiply(0, direct_ ? stay : now, t);
      if (direct_) start_from_carry(stay, now, t);
      active = now;
      if (p_.resets) drop_states(active, t);
      if (part_.team) part_.team->meet(part_.rank);
      swap_states();
    }
    leave(0, active);
  }

 private:
  // ---- who runs when ----

  int64_t length(int64_t row) const { return part_.lengths ? part_.lengths[row] : p_.steps; }

  // Rows are sorted, longest first.
  int64_t rows_longer_than(int64_t t) const {
    if (!part_.lengths) return t < p_.steps ? part_.num_rows : 0;
    int64_t low = 0, high = part_.num_rows;
    while (low < high) {
      const int64_t mid = (low + high) / 2;
      if (length(mid) > t) {
        low = mid + 1;
      } else {
        high = mid;
      }
    }
    return low;
  }

  int64_t row_at(int64_t t, int64_t row) const {
    return (p_.offsets ? p_.offsets[t] : t * p_.batch) + part_.order[row];
  }
  int64_t element(int64_t t, int64_t row) const { return (row_at(t, row) * p_.groups + part_.group) * p_.hidden; }
  int64_t state_element(int64_t row) const { return (part_.order[row] * p_.groups + part_.group) * p_.hidden; }
  S* state(int64_t row) const { return state_[0] + row * l_.padded(); }
  S* next_state(int64_t row) const { return state_[1] + row * l_.padded(); }
  void swap_states() {
    S* const other = state_[0];
    state_[0] = state_[1];
    state_[1] = other;
  }
  int64_t column_end(int64_t block) const {
    const int64_t end = l_.first_vec(block + 1) * l_.lanes;
    return end < l_.hidden ? end : l_.hidden;
  }

  // ---- a step ----

  // A block of the product for a tile of rows, into scratch.
  void dot_block(int64_t row, int64_t rows, int64_t block) {
    const int64_t vec = l_.first_vec(block), vecs = l_.first_vec(block + 1) - vec;
    const S* panel = static_cast<const S*>(part_.panels) + vec * l_.lanes * l_.hidden;
    if (l_.chunks > 1) {
      const Nonzero* nonzero = part_.finite && nonzero_.worthwhile ? &nonzero_ : nullptr;
      kDotChunked<S>[vecs - 1](state(row), panel, l_, nonzero, descending_, scratch());
    } else {
      find_dot<S>(l_, rows, vecs)(state(row), l_.padded(), panel, l_.hidden, scratch());
    }
  }
  S* scratch() const { return static_cast<S*>(part_.scratch); }

  // Rows in tiles of nearly equal size: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
  template <class Body>
  void for_tiles(int64_t begin, int64_t end, Body body) const {
    const int64_t rows = end - begin, tiles = (rows + max_tile_rows(l_) - 1) / max_tile_rows(l_);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = begin + i * rows / tiles;
      body(first, begin + (i + 1) * rows / tiles - first);
    }
  }

  Columns<T> columns(int64_t row, int64_t t, int64_t column, int64_t count) const {
    const int64_t at = element(t, row) + column;
    return {nullptr,
            nullptr,
            static_cast<S>(p_.skip),
            p_.in ? static_cast<const T*>(p_.in) + at : nullptr,
            p_.backward ? static_cast<const T*>(p_.saved) + at : nullptr,
            static_cast<T*>(p_.out) + at,
            next_state(row) + column,
            count};
  }

  // state x U for rows [begin, end) and this part's blocks: body(row, its product from `column` on, column, count).
  template <class Body>
  void product(int64_t begin, int64_t end, Body body) {
    for_tiles(begin, end, [&](int64_t row, int64_t rows) {
      if (l_.chunks > 1) nonzero_.find(state(row), l_);
      for (int64_t i = part_.block_begin; i < part_.block_end; ++i) {
        const int64_t block = descending_ ? part_.block_begin + part_.block_end - 1 - i : i;
        dot_block(row, rows, block);
        const int64_t column = l_.first_vec(block) * l_.lanes;
        const int64_t width = l_.first_vec(block + 1) * l_.lanes - column;
        for (int64_t r = 0; r < rows; ++r) body(row + r, scratch() + r * width, column, column_end(block) - column);
      }
      descending_ = !descending_;
    });
  }

  void multiply(int64_t begin, int64_t end, int64_t t) {
    product(begin, end, [&](int64_t row, const S* carry, int64_t column, int64_t count) {
      Columns<T> c = columns(row, t, column, count);
      c.carry = carry;
      c.x = p_.skip != 0 ? state(row) + column : nullptr;
      epilogue(p_, c);
    });
  }

  // The first step of a sequence whose carry is given (the gradient of h_n) or zero (no h0): no product.
  void start_from_carry(int64_t begin, int64_t end, int64_t t) {
    for (int64_t row = begin; row < end; ++row) {
      load_state(row, state(row));
      Columns<T> c = columns(row, t, first_column_, end_column_ - first_column_);
      c.carry = state(row) + first_column_;
      epilogue(p_, c);
    }
  }

  // An episode boundary between this step and the one to be processed next: nothing crosses it.
  void drop_states(int64_t active, int64_t t) {
    const int64_t start = ascending_ ? t + 1 : t;
    const bool into_h0 = !ascending_ && t == 0;
    if (into_h0 && !p_.backward) return;  // a reversed recurrence ends here; h_n is no crossing
    for (int64_t row = 0; row < active; ++row) {
      if (start < length(row) && p_.resets[row_at(start, row)]) zero_columns(next_state(row));
    }
  }
  void zero_columns(S* row) const {
    memset(row + first_column_, 0, static_cast<size_t>(end_column_ - first_column_) * sizeof(S));
  }

  // ---- the ends of a sequence ----

  void load_state(int64_t row, S* to) const {
    if (!p_.state_in) return zero_columns(to);
    const T* from = static_cast<const T*>(p_.state_in) + state_element(row);
    for (int64_t i = first_column_; i < end_column_; i += l_.lanes) {
      store(to + i, i + l_.lanes <= end_column_ ? load(from + i) : load_first(from + i, end_column_ - i));
    }
  }
  void store_state(int64_t row, const S* from) const {
    T* to = static_cast<T*>(p_.state_out) + state_element(row);
    for (int64_t i = first_column_; i < end_column_; i += l_.lanes) {
      if (i + l_.lanes <= end_column_) {
        store(to + i, load(from + i));
      } else {
        store_first(to + i, load(from + i), end_column_ - i);
      }
    }
  }

  // Rows that begin with a product of h0.
  void enter(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      load_state(row, state(row));
      if (p_.resets && ascending_ && p_.resets[row_at(0, row)]) zero_columns(state(row));
    }
    if (part_.team) part_.team->meet(part_.rank);
  }

  // Rows that have run all their steps: h_n is the state, the gradient of h0 one more product.
  void leave(int64_t begin, int64_t end) {
    if (!p_.state_out || begin == end) return;
    if (!p_.backward) {
      for (int64_t row = begin; row < end; ++row) store_state(row, state(row));
      return;
    }
    product(begin, end, [&](int64_t row, const S* carry, int64_t column, int64_t count) {
      Columns<T> c{};
      c.carry = carry;
      c.x = p_.skip != 0 ? state(row) + column : nullptr;
      c.skip = static_cast<S>(p_.skip);
      c.out = static_cast<T*>(p_.state_out) + state_element(row) + column;
      c.count = count;
      c.apply([](Vec<T> a, Vec<T>) { return a; });
    });
  }

  // Empty sequences: the state passes through.
  void copy_unstarted(int64_t started) {
    if (!p_.state_out) return;
    for (int64_t row = started; row < part_.num_rows; ++row) {
      load_state(row, state(row));
      store_state(row, state(row));
    }
  }

  void zero_padding() const {
    for (int64_t row = 0; row < part_.num_rows; ++row) {
      for (int64_t t = length(row); t < p_.steps; ++t) {
        memset(static_cast<T*>(p_.out) + element(t, row) + first_column_, 0,
               static_cast<size_t>(end_column_ - first_column_) * sizeof(T));
      }
    }
  }

  const Problem& p_;
  const Layout& l_;
  const Part& part_;
  const bool ascending_;  // in time, this sweep
  const bool direct_;     // sequences start from a carry, not from a state to be multiplied
  const int64_t first_column_, end_column_;
  S* state_[2];  // this step's and the next's
  Nonzero nonzero_;
  bool descending_ = false;  // the direction in which the matrix is walked, turned at every tile
};

template <class T>
void sweep(const Problem& p, const Layout& l, const Part& part) {
  Sweep<T>(p, l, part).run();
}

// Panel element [k][i] is what state k gives to output i: U[i][k] forward, U[k][i] backward.
template <class T>
bool pack(const Problem& p, const Layout& l, int64_t group, int64_t begin, int64_t end, void* panels) {
  using S = Scalar<T>;
  const int64_t depth = l.hidden, lanes = l.lanes;
  const T* u = static_cast<const T*>(p.weight) + group * depth * depth;
  Vec<T> zero{};  // sum of 0 * u: NaN where a u is not finite
  for (int64_t block = begin; block < end; ++block) {
    const int64_t vec = l.first_vec(block), width = (l.first_vec(block + 1) - vec) * lanes;
    S* panel = static_cast<S*>(panels) + vec * lanes * depth;
    const int64_t column = vec * lanes;
    const int64_t valid = column + width <= depth ? width : depth - column;
    if (p.backward) {
      for (int64_t k = 0; k < depth; ++k) {
        const T* from = u + k * depth + column;
        S* to = panel + k * width;
        for (int64_t i = 0; i < width; i += lanes) {
          store(to + i, i + lanes <= valid ? load(from + i) : load_first(from + i, valid > i ? valid - i : int64_t{0}));
        }
      }
    } else {
      // A transposition: rows of U are read a vector at a time and scattered down one column of the panel. `lanes`
      // columns at once share the panel's cache lines.
      for (int64_t i = 0; i < width; i += lanes) {
        for (int64_t k = 0; k < depth; k += lanes) {
          const int64_t ks = k + lanes <= depth ? lanes : depth - k;
          for (int64_t lane = 0; lane < lanes; ++lane) {
            alignas(64) S values[VecOf<S>::kLanes] = {};
            if (i + lane < valid) {
              const T* from = u + (column + i + lane) * depth + k;
              store(values, ks == lanes ? load(from) : load_first(from, ks));
            }
            for (int64_t j = 0; j < ks; ++j) panel[(k + j) * width + i + lane] = values[j];
          }
        }
      }
    }
    for (int64_t i = 0; i < width * depth; i += lanes) zero += load(panel + i) * 0;
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    if (zero[lane] != 0) return false;
  }
  return true;
}

bool pack_any(const Problem& p, const Layout& l, int64_t group, int64_t begin, int64_t end, void* panels) {
  switch (p.dtype) {
    case DType::kFloat32:
      return pack<float>(p, l, group, begin, end, panels);
    case DType::kFloat64:
      return pack<double>(p, l, group, begin, end, panels);
    case DType::kBFloat16:
      return pack<BFloat16>(p, l, group, begin, end, panels);
    case DType::kFloat16:
      return pack<Float16>(p, l, group, begin, end, panels);
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
      return sweep<Float16>(p, l, part);
  }
}

#define FUSED_RIN_STRING_(x) #x
#define FUSED_RIN_STRING(x) FUSED_RIN_STRING_(x)
const Kernels kKernels = {
    FUSED_RIN_STRING(FUSED_RIN_ISA), FUSED_RIN_VECTOR_BYTES, kNarrow, kWide, pack_any, sweep_any, step_any};

}  // namespace
}  // namespace FUSED_RIN_ISA

#define FUSED_RIN_JOIN_(a, b) a##b
#define FUSED_RIN_JOIN(a, b) FUSED_RIN_JOIN_(a, b)
const Kernels* FUSED_RIN_JOIN(kernels_, FUSED_RIN_ISA)() { return &FUSED_RIN_ISA::kKernels; }

}  // namespace fused_rin
