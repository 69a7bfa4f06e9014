// Products of 16 bits by AMX: tiles of 16 rows by 64 bytes, one instruction for 16 rows x 16 outputs x 16 pairs of
// bfloat16 or (AMX-FP16) of float16, sums in float32. Compiled once per instruction set (vec.h).
//
// A tile of states is read from rows of factors as they lie, a tile of the matrix from panels of one vector each, where
// it lies in one piece, and both must be whole: the depth of a product by tiles is a multiple of 16 units, filled up
// with zeros. Eight tiles make 2 x 2 tiles of sums, so every one that is loaded is used twice: up to 32 rows by two
// vectors.
#pragma once

#include <type_traits>

#include "factor.h"
#include "sweep.h"

// FUSED_RIN_TILES: 1 uses the instructions, 2 what they do, in plain C++, for tests on other processors.
#if !defined(FUSED_RIN_TILES)
#define FUSED_RIN_TILES 0
#endif
// FUSED_RIN_HALF_TILES: an assembler that knows those of float16.
#if !defined(FUSED_RIN_HALF_TILES)
#define FUSED_RIN_HALF_TILES (FUSED_RIN_TILES == 2)
#endif

namespace fused_rin {
namespace FUSED_RIN_ISA {

constexpr bool kHasTiles = FUSED_RIN_TILES != 0, kHasHalfTiles = kHasTiles && FUSED_RIN_HALF_TILES;

// Rows times a block of a matrix: x [rows][depth], panel [vectors of the block][depth]; depth and stride in units.
struct TileFactors {
  const Pair* x;
  int64_t x_stride;
  const Pair* panel;
  int64_t depth;
};
// What sums start from, [rows][columns of the block]; a stride of 0, in numbers: the same for all rows.
struct TileStart {
  const float* data;
  int64_t stride;
};
alignas(64) constexpr float kZeros[8 * VecOf<float>::kLanes] = {};  // of any block

#if FUSED_RIN_TILES

static_assert(FUSED_RIN_VECTOR_BYTES == 64, "a row of a tile is a vector");
constexpr int64_t kTile = kTileUnits;  // rows of a tile, and units in a row

// The shapes of all eight tiles, as the instruction reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if FUSED_RIN_TILES == 1

inline void use_shapes(const TileShapes* shapes) { asm volatile("ldtilecfg %0" ::"m"(*shapes)); }
inline void release_tiles() { asm volatile("tilerelease"); }
template <int to>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(to) : "memory");
}
template <int from>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(from) : "memory");
}
// sum[m][n] += a[m][k] . b[k][n] over the pairs k
template <class T, int sum, int a, int b>
inline void tile_multiply_add() {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
  } else {
#if FUSED_RIN_HALF_TILES
    asm volatile("tdpfp16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
#endif
  }
}

#else

struct TileUnit {
  TileShapes shapes;
  char data[8][kTile][64];
};
inline TileUnit& tile_unit() {
  static thread_local TileUnit unit;
  return unit;
}
inline void use_shapes(const TileShapes* shapes) {
  tile_unit().shapes = *shapes;
  memset(tile_unit().data, 0, sizeof(tile_unit().data));
}
inline void release_tiles() { tile_unit().shapes = TileShapes{}; }
// Of a tile without rows every instruction is invalid.
inline const TileShapes& shapes_of(int tile) {
  if (tile_unit().shapes.rows[tile] == 0) __builtin_trap();
  return tile_unit().shapes;
}
template <int to>
inline void tile_load(const void* from, int64_t stride) {
  const TileShapes& s = shapes_of(to);
  memset(tile_unit().data[to], 0, sizeof(tile_unit().data[to]));
  for (int r = 0; r < s.rows[to]; ++r) {
    memcpy(tile_unit().data[to][r], static_cast<const char*>(from) + r * stride, s.row_bytes[to]);
  }
}
template <int from>
inline void tile_store(void* to, int64_t stride) {
  const TileShapes& s = shapes_of(from);
  for (int r = 0; r < s.rows[from]; ++r) {
    memcpy(static_cast<char*>(to) + r * stride, tile_unit().data[from][r], s.row_bytes[from]);
  }
}
// The lower numbers of all pairs make one sum and the upper ones another; both together are added to what is there.
template <class T, int sum, int a, int b>
inline void tile_multiply_add() {
  TileUnit& t = tile_unit();
  const auto number = [&](int tile, int row, int at) {
    T half;
    memcpy(&half, t.data[tile][row] + at * 2, sizeof(half));
    return load_first(&half, 1)[0];
  };
  for (int m = 0; m < t.shapes.rows[sum]; ++m) {
    for (int n = 0; n < t.shapes.row_bytes[sum] / 4; ++n) {
      float low = 0, high = 0, total;
      for (int k = 0; k < t.shapes.row_bytes[a] / 4; ++k) {
        low += number(a, m, 2 * k) * number(b, k, 2 * n);
        high += number(a, m, 2 * k + 1) * number(b, k, 2 * n + 1);
      }
      memcpy(&total, t.data[sum][m] + n * 4, sizeof(total));
      total += low + high;
      memcpy(t.data[sum][m] + n * 4, &total, sizeof(total));
    }
  }
}

#endif

// The tiles of one thread, for as long as it multiplies: 0 to 3 are sums, 4 and 5 rows, 6 and 7 of a matrix. Setting
// their shapes takes a hundred cycles, so it is done when they change.
template <class T>
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (rows_) release_tiles();
  }

  // acc[r][v] = start[r][v] + sum over k of x[r][k] * panel[k][v], and of a second pair of factors if `count` is 2, all
  // in the same tiles; acc_stride in numbers.
  void dot(const TileFactors* factors, int64_t count, int64_t rows, int64_t vecs, float* acc, int64_t acc_stride,
           const TileStart& start) {
    const int64_t first = rows > kTile ? (rows + 1) / 2 : rows;
    use(first, rows - first);
    multiply(factors, count, first, rows > kTile, vecs, acc, acc_stride, start);
  }

  // c[i][j] += sum over k of a[i][k] * b[k][j] for `groups` (1 or 2) of 16 rows of a, which lie one after the other.
  void outer(const Pair* a, int64_t a_stride, int64_t groups, const Pair* panel, int64_t vecs, int64_t depth, float* c,
             int64_t c_stride) {
    use(kTile, kTile);
    const TileFactors factors{a, a_stride, panel, depth};
    multiply(&factors, 1, kTile, groups == 2, vecs, c, c_stride, {c, c_stride});
  }

  // The rows of a first tile and of a second one.
  void use(int64_t first, int64_t second) {
    const int64_t rows = first * 32 + second;
    if (rows == rows_) return;
    rows_ = rows;
    TileShapes shapes;
    const int64_t of[8] = {first, first, second, second, first, second, kTile, kTile};
    for (int i = 0; i < 8; ++i) {
      shapes.rows[i] = static_cast<uint8_t>(of[i]);
      shapes.row_bytes[i] = of[i] ? 64 : 0;
    }
    use_shapes(&shapes);
  }

 private:
  static void multiply(const TileFactors* factors, int64_t count, int64_t second, bool two_rows, int64_t vecs,
                       float* acc, int64_t acc_stride, const TileStart& start) {
    for (int64_t v = 0; v < vecs; v += 2) {
      const Product p{factors, count, v, second, start, acc, acc_stride};
      if (two_rows) {
        v + 1 < vecs ? product<true, true>(p) : product<true, false>(p);
      } else {
        v + 1 < vecs ? product<false, true>(p) : product<false, false>(p);
      }
    }
  }

  struct Product {
    const TileFactors* factors;
    int64_t count, vec;  // of the factors; of the panel's vectors the first one
    int64_t second;      // rows from the first tile to the second
    TileStart start;
    float* to;
    int64_t to_stride;
  };

  template <bool two_rows, bool two_vecs>
  static void product(const Product& p) {
    const int64_t column = p.vec * kTile, bytes = p.to_stride * 4, start_bytes = p.start.stride * 4;
    const float* const start = p.start.data + column;
    const float* const start_below = start + p.second * p.start.stride;
    float* const to = p.to + column;
    float* const below = to + p.second * p.to_stride;
    tile_load<0>(start, start_bytes);
    if constexpr (two_vecs) tile_load<1>(start + kTile, start_bytes);
    if constexpr (two_rows) tile_load<2>(start_below, start_bytes);
    if constexpr (two_rows && two_vecs) tile_load<3>(start_below + kTile, start_bytes);
    for (const TileFactors* f = p.factors; f != p.factors + p.count; ++f) {
      const Pair* const panel = f->panel + column * f->depth;
      for (int64_t k = 0; k < f->depth; k += kTile) {
        const Pair *const x = f->x + k, *const matrix = panel + k * kTile;
        tile_load<6>(matrix, 64);
        tile_load<4>(x, f->x_stride * 4);
        tile_multiply_add<T, 0, 4, 6>();
        if constexpr (two_vecs) {
          tile_load<7>(matrix + f->depth * kTile, 64);
          tile_multiply_add<T, 1, 4, 7>();
        }
        if constexpr (two_rows) {
          tile_load<5>(x + p.second * f->x_stride, f->x_stride * 4);
          tile_multiply_add<T, 2, 5, 6>();
        }
        if constexpr (two_rows && two_vecs) tile_multiply_add<T, 3, 5, 7>();
      }
    }
    tile_store<0>(to, bytes);
    if constexpr (two_vecs) tile_store<1>(to + kTile, bytes);
    if constexpr (two_rows) tile_store<2>(below, bytes);
    if constexpr (two_rows && two_vecs) tile_store<3>(below + kTile, bytes);
  }

  int64_t rows_ = 0;
};

// Sums of small integers, exact in any order, of every shape that products have: whether they come out right.
template <class T>
bool check_tiles() {
  constexpr int64_t kRows = 32, kDepth = 2 * kTile, kVecs = 3, kWidth = kVecs * kTile, kStride = kDepth + 16;
  static const int kValues[] = {0, 1, 2, 3, -1, -2};
  uint16_t numbers[6];
  for (int i = 0; i < 6; ++i) numbers[i] = narrow(T{}, Vec<T>{} + static_cast<float>(kValues[i]))[0];
  const auto pick = [](int64_t i) { return (i * i + i / 7) % 6; };
  const auto a = [&](int64_t row, int64_t term) { return pick(row * 131 + term * 3); };
  const auto b = [&](int64_t term, int64_t column) { return pick(term * 57 + column * 5 + 1); };
  Pair rows[kRows * kStride], panel[kDepth * kWidth];
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t k = 0; k < kDepth; ++k) {
      rows[r * kStride + k].bits = numbers[a(r, 2 * k)] | uint32_t{numbers[a(r, 2 * k + 1)]} << 16;
    }
  }
  for (int64_t k = 0; k < kDepth; ++k) {
    for (int64_t i = 0; i < kWidth; ++i) {
      panel[(i / kTile * kDepth + k) * kTile + i % kTile].bits =
          numbers[b(2 * k, i)] | uint32_t{numbers[b(2 * k + 1, i)]} << 16;
    }
  }
  Tiles<T> tiles;
  float sums[kRows * kWidth];
  const float zeros[kWidth] = {};
  const TileFactors factors[] = {{rows, kStride, panel, kDepth}, {rows, kStride, panel, kDepth}};
  const auto right = [&](int64_t count, int times) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < kWidth; ++i) {
        int want = 0;
        for (int64_t k = 0; k < 2 * kDepth; ++k) want += times * kValues[a(r, k)] * kValues[b(k, i)];
        if (sums[r * kWidth + i] != static_cast<float>(want)) return false;
      }
    }
    return true;
  };
  for (const int64_t count : {1, 15, 16, 17, 31, 32}) {
    tiles.dot(factors, 1, count, kVecs, sums, kWidth, {zeros, 0});
    if (!right(count, 1)) return false;
    tiles.dot(factors, 2, count, kVecs, sums, kWidth, {sums, kWidth});
    if (!right(count, 3)) return false;
  }
  for (const int64_t groups : {1, 2}) {
    tiles.dot(factors, 1, groups * kTile, kVecs, sums, kWidth, {zeros, 0});
    tiles.outer(rows, kStride, groups, panel, kVecs, kDepth, sums, kWidth);
    if (!right(groups * kTile, 2)) return false;
  }
  return true;
}
constexpr bool (*kCheckTiles)() = check_tiles<BFloat16>;
constexpr bool (*kCheckHalfTiles)() = kHasHalfTiles ? check_tiles<TiledFloat16> : nullptr;

#else

// Where there are none, nothing asks for them.
template <class T>
class Tiles {
 public:
  void dot(const TileFactors*, int64_t, int64_t, int64_t, void*, int64_t, const TileStart&) {}
  void outer(const void*, int64_t, int64_t, const void*, int64_t, int64_t, void*, int64_t) {}
};
constexpr bool (*kCheckTiles)() = nullptr;
constexpr bool (*kCheckHalfTiles)() = nullptr;

#endif

}  // namespace FUSED_RIN_ISA
}  // namespace fused_rin
