#include "pairwise_ce/pairwise_ce.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "common/delta_loss.h"
#include "common/parallel.h"

namespace clado {
namespace {

// A panel holds sqrt(p) u of 16 perturbations, class-major: [classes][16]. The product of two panels is a 16 x 16 tile.
constexpr int kTile = kLanes;
constexpr int64_t kChunk = 128;  // classes added in float32 before they meet the tile's sum
constexpr int64_t kWorkspaceBytes = 8 << 20;
constexpr float kFloor = 5.9604645e-8f - 1.0f;

int64_t panels_of(int64_t perturbations) { return (perturbations + kTile - 1) / kTile; }

// Samples whose panels are in the workspace together.
int64_t samples_together(int64_t perturbations, int64_t samples, int64_t classes, int64_t element) {
  const int64_t one = std::max<int64_t>(1, panels_of(perturbations) * kTile * classes * element);
  return std::max<int64_t>(1, std::min(samples, kWorkspaceBytes / one));
}

// tile[r][l] = sum over classes of a[c][r] * b[c][l], `Rows` rows at a time: as many accumulators as the level has registers.
// The order of additions does not depend on Rows.
template <int Rows>
CLADO_INLINE void product_body(const float* a, const float* b, int64_t classes, float* tile) {
  for (int first = 0; first < kTile; first += Rows) {
    Float16x whole[Rows] = {};
    for (int64_t start = 0; start < classes; start += kChunk) {
      const int64_t stop = std::min(classes, start + kChunk);
      Float16x sum[Rows] = {};
      for (int64_t c = start; c < stop; ++c) {
        const Float16x y = load(b + c * kTile);
        for (int r = 0; r < Rows; ++r) sum[r] += a[c * kTile + first + r] * y;
      }
      for (int r = 0; r < Rows; ++r) whole[r] += sum[r];
    }
    for (int r = 0; r < Rows; ++r) store(tile + (first + r) * kTile, whole[r]);
  }
}
CLADO_INLINE void product_avx512_body(const float* a, const float* b, int64_t classes, float* tile) {
  product_body<16>(a, b, classes, tile);
}
CLADO_INLINE void product_avx2_body(const float* a, const float* b, int64_t classes, float* tile) {
  product_body<4>(a, b, classes, tile);
}
CLADO_SIMD_KERNEL(product_avx512, (const float* a, const float* b, int64_t classes, float* tile), (a, b, classes, tile))
CLADO_SIMD_KERNEL(product_avx2, (const float* a, const float* b, int64_t classes, float* tile), (a, b, classes, tile))

void product(const float* a, const float* b, int64_t classes, float* tile) {
  if (simd_level() == Simd::avx512)
    product_avx512(a, b, classes, tile);
  else
    product_avx2(a, b, classes, tile);
}
void product(const double* a, const double* b, int64_t classes, double* tile) {
  std::fill(tile, tile + kTile * kTile, 0.0);
  for (int64_t c = 0; c < classes; ++c)
    for (int r = 0; r < kTile; ++r)
      for (int l = 0; l < kTile; ++l) tile[r * kTile + l] += a[c * kTile + r] * b[c * kTile + l];
}

// total += log1p(tile), squares += log1p(tile)^2.
CLADO_INLINE void add_logs_body(const float* tile, double* total, double* squares) {
  for (int r = 0; r < kTile; ++r) {
    const Float16x x = load(tile + r * kTile);
    float a[kLanes];
    store(a, log1p_lanes(x < kFloor ? splat(kFloor) : x));
    for (int l = 0; l < kTile; ++l) {
      const double value = static_cast<double>(a[l]);
      total[r * kTile + l] += value;
      squares[r * kTile + l] += value * value;
    }
  }
}
CLADO_SIMD_KERNEL(add_logs, (const float* tile, double* total, double* squares), (tile, total, squares))
void add_logs(const double* tile, double* total, double* squares) {
  for (int i = 0; i < kTile * kTile; ++i) {
    const double a = std::log1p(tile[i] < static_cast<double>(kFloor) ? static_cast<double>(kFloor) : tile[i]);
    total[i] += a;
    squares[i] += a * a;
  }
}

// row[c] = sqrt(p) * expm1(d - log E_p[e^d]).
CLADO_INLINE void scaled_row_body(const float* root, const float* d, int64_t classes, float centre, float shift, float* row) {
  for (int64_t c = 0; c < classes; c += kLanes) {
    const Float16x weight = load_part(root + c, classes - c), x = load_part(d + c, classes - c);
    const Float16x y = weight > 0.0f ? (x - centre) - shift : Float16x{};
    const Float16x out = weight * expm1_lanes(y);
    if (classes - c >= kLanes) {
      store(row + c, out);
    } else {
      float part[kLanes];
      store(part, out);
      std::memcpy(row + c, part, sizeof(float) * static_cast<size_t>(classes - c));
    }
  }
}
CLADO_SIMD_KERNEL(scaled_row, (const float* root, const float* d, int64_t classes, float centre, float shift, float* row),
                  (root, d, classes, centre, shift, row))

// The plain way in double, for float64 and for rows that reach far: sqrt(p) e^x in one exponential where e^x alone overflows.
template <class T>
void scaled_row_far(const T* z, const T* d, int64_t classes, double log_norm, double log_mean_exp, T* row) {
  for (int64_t c = 0; c < classes; ++c) {
    const double half = 0.5 * (static_cast<double>(z[c]) - log_norm), x = static_cast<double>(d[c]) - log_mean_exp;
    row[c] = static_cast<T>(half == -INFINITY ? 0.0 : x > 30.0 ? std::exp(half + x) : std::exp(half) * std::expm1(x));
  }
}

void fill_row(const float* z, const float* root, const float* d, int64_t classes, double log_norm, const DeltaMoments& m, float* row) {
  if (m.far)
    scaled_row_far(z, d, classes, log_norm, m.log_mean_exp(), row);
  else
    scaled_row(root, d, classes, static_cast<float>(m.mean), static_cast<float>(m.log1p_tr), row);
}
void fill_row(const double* z, const double*, const double* d, int64_t classes, double log_norm, const DeltaMoments& m,
              double* row) {
  scaled_row_far(z, d, classes, log_norm, m.log_mean_exp(), row);
}

// Panel `panel` of sample `n`; rows beyond the last perturbation are zero.
template <class T>
void fill_panel(const T* logits, const T* delta, int64_t n, int64_t panel, int64_t perturbations, int64_t samples, int64_t classes,
                T* out) {
  const T* z = logits + n * classes;
  const double log_norm = log_sum_exp(z, classes);
  std::vector<T> p(static_cast<size_t>(classes)), root(p.size()), row(p.size());
  softmax_row(z, classes, log_norm, p.data());
  for (size_t c = 0; c < p.size(); ++c) root[c] = static_cast<T>(std::sqrt(static_cast<double>(p[c])));
  for (int r = 0; r < kTile; ++r) {
    const int64_t v = panel * kTile + r;
    if (v >= perturbations) {
      std::fill(row.begin(), row.end(), T(0));
    } else {
      const T* d = delta + (v * samples + n) * classes;
      const DeltaMoments m = moments(z, p.data(), d, classes, log_norm);
      if (std::isfinite(log_norm) && std::isfinite(m.log_mean_exp()))
        fill_row(z, root.data(), d, classes, log_norm, m, row.data());
      else
        std::fill(row.begin(), row.end(), static_cast<T>(NAN));
    }
    for (size_t c = 0; c < row.size(); ++c) out[c * kTile + static_cast<size_t>(r)] = row[c];
  }
}

template <class T>
void run(const T* logits, const T* delta, double* total, double* squares, T* workspace, int64_t perturbations, int64_t samples,
         int64_t classes, int threads) {
  const int64_t panels = panels_of(perturbations), size = kTile * classes;
  const int64_t together = samples_together(perturbations, samples, classes, sizeof(T));
  std::fill(total, total + perturbations * perturbations, 0.0);
  std::fill(squares, squares + perturbations * perturbations, 0.0);
  std::vector<std::pair<int64_t, int64_t>> tiles;  // the upper triangle; the other one is its mirror
  for (int64_t row = 0; row < panels; ++row)
    for (int64_t column = row; column < panels; ++column) tiles.emplace_back(row, column);
  for (int64_t start = 0; start < samples; start += together) {
    const int64_t count = std::min(together, samples - start);
    parallel_for(count * panels, threads, [&](int64_t i) {
      fill_panel(logits, delta, start + i / panels, i % panels, perturbations, samples, classes, workspace + i * size);
    });
    parallel_for(static_cast<int64_t>(tiles.size()), threads, [&](int64_t i) {
      const auto [row, column] = tiles[static_cast<size_t>(i)];
      double tile_total[kTile * kTile] = {}, tile_squares[kTile * kTile] = {};
      alignas(64) T tile[kTile * kTile];
      for (int64_t n = 0; n < count; ++n) {
        const T* sample = workspace + n * panels * size;
        product(sample + row * size, sample + column * size, classes, tile);
        add_logs(tile, tile_total, tile_squares);
      }
      for (int r = 0; r < kTile; ++r)
        for (int l = 0; l < kTile; ++l) {
          const int64_t v = row * kTile + r, w = column * kTile + l;
          if (v >= perturbations || w >= perturbations || w < v) continue;
          total[v * perturbations + w] += tile_total[r * kTile + l];
          squares[v * perturbations + w] += tile_squares[r * kTile + l];
        }
    });
  }
  for (int64_t v = 0; v < perturbations; ++v)
    for (int64_t w = 0; w < v; ++w) {
      total[v * perturbations + w] = total[w * perturbations + v];
      squares[v * perturbations + w] = squares[w * perturbations + v];
    }
}

}  // namespace

int64_t pairwise_ce_workspace_cpu(int64_t perturbations, int64_t samples, int64_t classes, bool is_double) {
  const int64_t element = is_double ? 8 : 4;
  return samples_together(perturbations, samples, classes, element) * panels_of(perturbations) * kTile * classes * element;
}

void pairwise_ce_cpu(const void* logits, const void* delta, double* total, double* squares, void* workspace, int64_t perturbations,
                     int64_t samples, int64_t classes, bool is_double, int threads) {
  if (is_double)
    run(static_cast<const double*>(logits), static_cast<const double*>(delta), total, squares, static_cast<double*>(workspace),
        perturbations, samples, classes, threads);
  else
    run(static_cast<const float*>(logits), static_cast<const float*>(delta), total, squares, static_cast<float*>(workspace),
        perturbations, samples, classes, threads);
}

}  // namespace clado
