// All pairs of two sets of perturbations: products of panels, tile by tile, and sums over samples in a fixed order.
//
// A panel holds one row of 16 perturbations, turned: [width][16]. A tile is what two panels make of each other, 16 x 16. Panels of
// several rows are in the workspace together, or a slice of one row's width, so that memory does not grow with the rows.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "common/lanes.h"
#include "common/pairs.h"
#include "common/parallel.h"

namespace clado {

constexpr int kTile = kLanes;
constexpr int kTileSize = kTile * kTile;
constexpr int64_t kChunk = 128;  // products added in float32 before they meet the tile's sum
constexpr int64_t kAhead = 8;    // lines of a panel that are fetched ahead of the one that is multiplied
constexpr int64_t kPanelBytes = 3 << 19;  // of all panels at a time: they stay in the second-level cache

// What panel `first` (its `rows` perturbations, rounded up to four) and panel `second` make. The shorter of the two comes first, so
// that little is computed of a side's last panel; `turned`: the first is the one of columns.
struct Tile {
  int64_t first, second;
  int rows;
  bool turned;
};

// The perturbations of both sides in panels; those of `other` come behind the others.
template <class T>
struct Panels {
  const T *delta, *other;
  int64_t perturbations, others, rows, width, left, right;
  explicit Panels(const Pairs& pairs)
      : delta(static_cast<const T*>(pairs.delta)),
        other(static_cast<const T*>(pairs.other)),
        perturbations(pairs.perturbations),
        others(pairs.others),
        rows(pairs.rows),
        width(pairs.width),
        left((perturbations + kTile - 1) / kTile),
        right(other ? (others + kTile - 1) / kTile : 0) {}
  int64_t count() const { return left + right; }
  // Row n of a panel's r-th perturbation (or of the one behind its last); null beyond the last one of its side.
  const T* row(int64_t panel, int64_t r, int64_t n) const {
    const bool first = panel < left;
    const int64_t v = (first ? panel : panel - left) * kTile + r;
    if (v >= (first ? perturbations : others)) return nullptr;
    return (first ? delta : other) + (v * rows + n) * width;
  }
  int rows_of(int64_t panel) const {
    const int64_t rest = panel < left ? perturbations - panel * kTile : others - (panel - left) * kTile;
    return static_cast<int>(std::min<int64_t>(kTile, (rest + 3) / 4 * 4));
  }
  // The tiles to make: the upper triangle (the other one is its mirror), or all of left and right.
  std::vector<Tile> tiles() const {
    std::vector<Tile> all;
    for (int64_t row = 0; row < left; ++row)
      for (int64_t column = other ? left : row; column < count(); ++column) {
        const bool turned = rows_of(column) < rows_of(row);
        all.push_back(turned ? Tile{column, row, rows_of(column), true} : Tile{row, column, rows_of(row), false});
      }
    return all;
  }
};

// How the work is cut: rows whose panels are in the workspace together, or a slice of the width of one row.
struct PairCut {
  int64_t rows, width;
  PairCut(int64_t panels, int64_t all_rows, int64_t all_width, int64_t element) {
    const int64_t column = std::max<int64_t>(1, panels * kTile * element);
    width = std::min(all_width, std::max<int64_t>(1, kPanelBytes / column / kChunk) * kChunk);
    rows = std::max<int64_t>(1, std::min(all_rows, width < all_width ? 1 : kPanelBytes / (column * all_width)));
  }
};

// ---- eight at a time: in vectors, which loops over what a register was stored to are not ----

using Float8x = float __attribute__((vector_size(32)));
using Double8x = double __attribute__((vector_size(64)));
using Int8x = int32_t __attribute__((vector_size(32)));

template <class V, class T>
CLADO_INLINE V load_as(const T* x) {
  V v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
CLADO_INLINE Double8x widened(const float* x) { return __builtin_convertvector(load_as<Float8x>(x), Double8x); }
CLADO_INLINE void add_to(double* x, Double8x y) {
  const Double8x sum = load_as<Double8x>(x) + y;
  std::memcpy(x, &sum, sizeof sum);
}
// x[l] += y[l] for sixteen lanes.
CLADO_INLINE void add_lanes(double* x, const float* y) {
  for (int l = 0; l < kLanes; l += 8) add_to(x + l, widened(y + l));
}
CLADO_INLINE void add_lanes(float* x, const float* y) {
  for (int l = 0; l < kLanes; l += 8) {
    const Float8x sum = load_as<Float8x>(x + l) + load_as<Float8x>(y + l);
    std::memcpy(x + l, &sum, sizeof sum);
  }
}

// ---- filling panels ----

template <int S>
CLADO_INLINE void exchange(Float8x& a, Float8x& b) {  // swaps the S x S corners of the pair
  Int8x low{}, high{};
  for (int j = 0; j < 8; ++j) {
    low[j] = j & S ? 8 + j - S : j;
    high[j] = j & S ? 8 + j : j + S;
  }
  const Float8x x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
  a = x, b = y;
}

// out[c][r] = in[r][c] for 8 x 8 floats; both have rows of 16.
CLADO_INLINE void transpose_corner(const float* in, float* out) {
  Float8x x[8];
  for (int r = 0; r < 8; ++r) std::memcpy(&x[r], in + r * kTile, sizeof x[r]);
  for (int r = 0; r < 4; ++r) exchange<4>(x[r], x[r + 4]);
  for (int r = 0; r < 8; r += 4) exchange<2>(x[r], x[r + 2]), exchange<2>(x[r + 1], x[r + 3]);
  for (int r = 0; r < 8; r += 2) exchange<1>(x[r], x[r + 1]);
  for (int c = 0; c < 8; ++c) std::memcpy(out + c * kTile, &x[c], sizeof x[c]);
}

// out[c][r] = block[r][c], 16 x 16.
CLADO_INLINE void transpose_tile(const float* block, float* out) {
  for (int corner = 0; corner < 4; ++corner) {
    const int r = corner / 2 * 8, l = corner % 2 * 8;
    transpose_corner(block + r * kTile + l, out + l * kTile + r);
  }
}
// The first `rest` rows of it.
CLADO_INLINE void store_turned(const float* block, int64_t rest, float* out) {
  if (rest >= kTile) return transpose_tile(block, out);
  alignas(64) float turned[kTileSize];
  transpose_tile(block, turned);
  std::memcpy(out, turned, sizeof(float) * static_cast<size_t>(rest * kTile));
}

// ---- products of two panels ----

// tile[r][l] += sum over c of a[c][r] * b[c][l] for r < rows, 4, 8, 12 or 16: runs of kChunk by fused multiply-adds, each run added to the tile, which is float
// or double. Fused at every level (base asks the C library), so the bits agree; written with intrinsics since contraction is off,
// which halves the time of the whole op.
template <class Sum>
inline void product_base(const float* a, const float* b, int rows, int64_t width, Sum* tile) {
  for (int64_t start = 0; start < width; start += kChunk) {
    const int64_t stop = std::min(width, start + kChunk);
    for (int r = 0; r < rows; ++r) {
      float sum[kTile] = {};
      for (int64_t c = start; c < stop; ++c)
        for (int l = 0; l < kTile; ++l) sum[l] = __builtin_fmaf(a[c * kTile + r], b[c * kTile + l], sum[l]);
      add_lanes(tile + r * kTile, sum);
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
template <int Rows, class Sum>
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) inline void product_avx512(const float* a, const float* b, int64_t width, Sum* tile) {
  for (int64_t start = 0; start < width; start += kChunk) {
    const int64_t stop = std::min(width, start + kChunk);
    __m512 sum[Rows];
    for (int r = 0; r < Rows; ++r) sum[r] = _mm512_setzero_ps();
    for (int64_t c = start; c < stop; ++c) {
      const __m512 y = _mm512_loadu_ps(b + c * kTile);
      __builtin_prefetch(a + (c + kAhead) * kTile);
      __builtin_prefetch(b + (c + kAhead) * kTile);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[c * kTile + r]), y, sum[r]);
    }
    for (int r = 0; r < Rows; ++r) {
      float part[kTile];
      _mm512_storeu_ps(part, sum[r]);
      add_lanes(tile + r * kTile, part);
    }
  }
}

template <class Sum>
__attribute__((target("arch=x86-64-v3"))) inline void product_avx2(const float* a, const float* b, int rows, int64_t width, Sum* tile) {
  constexpr int some = 4;
  for (int64_t start = 0; start < width; start += kChunk) {
    const int64_t stop = std::min(width, start + kChunk);
    for (int first = 0; first < rows; first += some) {
      __m256 low[some], high[some];
      for (int r = 0; r < some; ++r) low[r] = high[r] = _mm256_setzero_ps();
      for (int64_t c = start; c < stop; ++c) {
        const __m256 y = _mm256_loadu_ps(b + c * kTile), z = _mm256_loadu_ps(b + c * kTile + 8);
#pragma GCC unroll 4
        for (int r = 0; r < some; ++r) {
          const __m256 x = _mm256_broadcast_ss(a + c * kTile + first + r);
          low[r] = _mm256_fmadd_ps(x, y, low[r]);
          high[r] = _mm256_fmadd_ps(x, z, high[r]);
        }
      }
      for (int r = 0; r < some; ++r) {
        float part[kTile];
        _mm256_storeu_ps(part, low[r]);
        _mm256_storeu_ps(part + 8, high[r]);
        add_lanes(tile + (first + r) * kTile, part);
      }
    }
  }
}
template <class Sum>
inline void product_avx512(const float* a, const float* b, int rows, int64_t width, Sum* tile) {
  switch (rows) {
    case 4: return product_avx512<4>(a, b, width, tile);
    case 8: return product_avx512<8>(a, b, width, tile);
    case 12: return product_avx512<12>(a, b, width, tile);
    default: return product_avx512<16>(a, b, width, tile);
  }
}
#else
template <class Sum>
inline void product_avx512(const float* a, const float* b, int rows, int64_t width, Sum* tile) {
  product_base(a, b, rows, width, tile);
}
template <class Sum>
inline void product_avx2(const float* a, const float* b, int rows, int64_t width, Sum* tile) {
  product_base(a, b, rows, width, tile);
}
#endif

template <class Sum>
inline void product(const float* a, const float* b, int rows, int64_t width, Sum* tile) {
  switch (simd_level()) {
    case Simd::avx512: return product_avx512(a, b, rows, width, tile);
    case Simd::avx2: return product_avx2(a, b, rows, width, tile);
    default: return product_base(a, b, rows, width, tile);
  }
}
inline void product(const double* a, const double* b, int rows, int64_t width, double* tile) {
  for (int64_t c = 0; c < width; ++c)
    for (int r = 0; r < rows; ++r)
      for (int l = 0; l < kTile; ++l) tile[r * kTile + l] += a[c * kTile + r] * b[c * kTile + l];
}

// ---- all pairs ----

// total and squares receive the sums over samples, in order, of a and of a^2, where a is a sample's sum over its rows. `work` has
//   Element, Sum                                   what panels and tiles hold
//   panels                                         Panels<Element>
//   prepare(start, count, first, width, threads)   rows start … start + count and this slice of their width come next
//   counts(i)                                      whether row start + i adds anything
//   fill(i, panel, first, width, out)              the panel of row start + i
//   multiply(i, a, b, rows, width, tile)           tile += what `rows` of a and all of b make over the slice
//   finish(i, rows, tile, sum)                     sum += the row's share of the sample
//   finish(i, rows, tile, total, squares)          the same into both at once, for samples of one row
template <class Work>
void all_pairs(Work& work, int64_t per_sample, double* total, double* squares, int threads) {
  using T = typename Work::Element;
  using Sum = typename Work::Sum;
  const Panels<T>& panels = work.panels;
  const int64_t rows = panels.rows, width = panels.width, columns = panels.other ? panels.others : panels.perturbations;
  const PairCut cut(panels.count(), rows, width, sizeof(T));
  threads = threads_for((panels.perturbations + (panels.other ? columns : 0)) * cut.rows * cut.width, threads);
  std::fill(total, total + panels.perturbations * columns, 0.0);
  std::fill(squares, squares + panels.perturbations * columns, 0.0);
  const auto tiles = panels.tiles();
  const bool sliced = cut.width < width, whole = per_sample == 1;
  std::vector<Sum> unfinished(sliced ? tiles.size() * kTileSize : 0);  // the one row's tiles between two slices of its width
  std::vector<double> running(whole ? 0 : tiles.size() * kTileSize);   // a sample's sums between two groups of its rows
  const std::unique_ptr<T[]> workspace(new T[static_cast<size_t>(cut.rows * panels.count() * kTile * cut.width)]);

  // Adds the finished tiles of a group, or (last = false) keeps them for the next slice.
  const auto multiply = [&](int64_t start, int64_t count, int64_t size, bool last) {
    parallel_for(static_cast<int64_t>(tiles.size()), threads, [&](int64_t i) {
      const Tile& made = tiles[static_cast<size_t>(i)];
      double tile_total[kTileSize] = {}, tile_squares[kTileSize] = {};
      alignas(64) Sum tile[kTileSize];
      Sum* const kept = sliced ? &unfinished[static_cast<size_t>(i) * kTileSize] : nullptr;
      double* const run = whole ? nullptr : &running[static_cast<size_t>(i) * kTileSize];
      for (int64_t n = 0; n < count; ++n) {
        if (work.counts(n)) {
          const T* of_row = workspace.get() + n * panels.count() * kTile * size;
          if (kept)
            std::copy(kept, kept + kTileSize, tile);
          else
            std::fill(tile, tile + kTileSize, Sum(0));
          work.multiply(n, of_row + made.first * kTile * size, of_row + made.second * kTile * size, made.rows, size, tile);
          if (last && whole) work.finish(n, made.rows, tile, tile_total, tile_squares);
          if (last && !whole) work.finish(n, made.rows, tile, run);
          if (kept) std::transform(tile, tile + kTileSize, kept, [last](Sum x) { return last ? Sum(0) : x; });
        }
        if (whole || !last || (start + n + 1) % per_sample != 0) continue;
        for (int j = 0; j < kTileSize; ++j) {
          tile_total[j] += run[j];
          tile_squares[j] += run[j] * run[j];
          run[j] = 0.0;
        }
      }
      if (!last) return;
      const int64_t row = made.turned ? made.second : made.first, column = made.turned ? made.first : made.second;
      for (int r = 0; r < made.rows; ++r)
        for (int l = 0; l < kTile; ++l) {
          const int64_t v = row * kTile + (made.turned ? l : r);
          const int64_t w = (column - (panels.other ? panels.left : 0)) * kTile + (made.turned ? r : l);
          if (v >= panels.perturbations || w >= columns || (!panels.other && w < v)) continue;
          total[v * columns + w] += tile_total[r * kTile + l];
          squares[v * columns + w] += tile_squares[r * kTile + l];
        }
    });
  };

  for (int64_t start = 0; start < rows; start += cut.rows) {
    const int64_t count = std::min(cut.rows, rows - start);
    for (int64_t first = 0; first < width; first += cut.width) {
      const int64_t size = std::min(cut.width, width - first);
      work.prepare(start, count, first, size, threads);
      parallel_for(count * panels.count(), threads, [&](int64_t i) {
        const int64_t n = i / panels.count();
        if (work.counts(n)) work.fill(n, i % panels.count(), first, size, workspace.get() + i * kTile * size);
      });
      multiply(start, count, size, first + size == width);
    }
  }
  for (int64_t v = 0; !panels.other && v < columns; ++v)
    for (int64_t w = 0; w < v; ++w) {
      total[v * columns + w] = total[w * columns + v];
      squares[v * columns + w] = squares[w * columns + v];
    }
}

}  // namespace clado
