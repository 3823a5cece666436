#include "pairwise_mse/pairwise_mse.h"

#include <cmath>
#include <vector>

#include "common/pairs_cpu.h"

namespace clado {
namespace {

// out[m][r] = root[m] * rows[r][m]; zeros where the root is 0 and for rows that are not there. root null: 1.
template <class F>
CLADO_INLINE void fill_products_body(const float* const* rows, const float* root, int64_t width, float* out) {
  for (int64_t m = 0; m < width; m += kTile) {
    const int64_t rest = width - m;
    const F factor = root ? F::load_part(root + m, rest) : F(1.0f);
    alignas(64) float block[kTileSize];
    for (int r = 0; r < kTile; ++r) {
      F x;
      if (rows[r]) x = F::load_part(rows[r] + m, rest);
      if (root) x = select(factor == 0.0f, F{}, factor * x);
      store(block + r * kTile, x);
    }
    store_turned(block, rest, out + m * kTile);
  }
}
CLADO_LANES_KERNEL(fill_products, (const float* const* rows, const float* root, int64_t width, float* out), (rows, root, width, out))
void fill_products(const double* const* rows, const double* root, int64_t width, double* out) {
  for (int64_t m = 0; m < width; ++m)
    for (int r = 0; r < kTile; ++r) {
      const double x = rows[r] ? rows[r][m] : 0.0;
      out[m * kTile + r] = !root ? x : root[m] == 0.0 ? 0.0 : root[m] * x;
    }
}

// What all_pairs asks for: rows of sqrt(weight) d.
template <class T>
struct SquaredError {
  using Element = T;
  using Sum = double;

  Panels<T> panels;
  const T* weight;
  std::vector<T> root;  // of the rows and the slice in hand
  int64_t start = 0;

  void prepare(int64_t begin, int64_t count, int64_t first, int64_t width, int) {
    start = begin;
    if (!weight) return;
    root.resize(static_cast<size_t>(count * width));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t m = 0; m < width; ++m)
        root[static_cast<size_t>(i * width + m)] = std::sqrt(weight[(start + i) * panels.width + first + m]);
  }
  bool counts(int64_t) const { return true; }
  void fill(int64_t i, int64_t panel, int64_t first, int64_t width, T* out) const {
    const T* rows[kTile];
    for (int r = 0; r < kTile; ++r) {
      const T* row = panels.row(panel, r, start + i);
      rows[r] = row ? row + first : nullptr;
    }
    fill_products(rows, weight ? &root[static_cast<size_t>(i * width)] : nullptr, width, out);
  }
  void multiply(int64_t, const T* a, const T* b, int rows, int64_t width, double* tile) const { product(a, b, rows, width, tile); }
  void finish(int64_t, int rows, const double* tile, double* sum) const {
    for (int j = 0; j < rows * kTile; ++j) sum[j] += 2.0 * tile[j];
  }
  void finish(int64_t, int rows, const double* tile, double* total, double* squares) const {
    for (int j = 0; j < rows * kTile; ++j) {
      const double a = 2.0 * tile[j];
      total[j] += a;
      squares[j] += a * a;
    }
  }
};

template <class T>
void run(const Pairs& pairs, const void* weight, double* total, double* squares, int threads) {
  SquaredError<T> work{Panels<T>(pairs), static_cast<const T*>(weight), {}};
  all_pairs(work, 1, total, squares, threads);
}

}  // namespace

void pairwise_mse_cpu(const Pairs& pairs, const void* weight, double* total, double* squares, int threads) {
  pairs.is_double ? run<double>(pairs, weight, total, squares, threads) : run<float>(pairs, weight, total, squares, threads);
}

}  // namespace clado
