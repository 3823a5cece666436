#include "pairwise_ce/pairwise_ce.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "common/delta_loss.h"
#include "common/parallel.h"

namespace clado {
namespace {

// A panel holds sqrt(p) u of 16 perturbations, class-major: [classes][16]. The product of two panels is a 16 x 16 tile.
constexpr int kTile = kLanes;
constexpr int kTileSize = kTile * kTile;
constexpr int64_t kChunk = 128;  // classes added in float32 before they meet the tile's sum
constexpr int64_t kPanelBytes = 3 << 19;  // of all panels at a time: they stay in the second-level cache
constexpr float kFloor = 5.9604645e-8f - 1.0f;

int64_t panels_of(int64_t perturbations) { return (perturbations + kTile - 1) / kTile; }

// How the work is cut: panels of several samples are in the workspace together, or a slice of the classes of one sample.
struct Cut {
  int64_t panels, samples, classes;
  Cut(int64_t perturbations, int64_t all_samples, int64_t all_classes, int64_t element) : panels(panels_of(perturbations)) {
    const int64_t column = std::max<int64_t>(1, panels * kTile * element);
    classes = std::min(all_classes, std::max<int64_t>(1, kPanelBytes / column / kChunk) * kChunk);
    samples = std::max<int64_t>(1, std::min(all_samples, classes < all_classes ? 1 : kPanelBytes / (column * all_classes)));
  }
  int64_t tiles() const { return panels * (panels + 1) / 2; }
};

// tile[r][l] += sum over classes of a[c][r] * b[c][l]: runs of kChunk classes by fused multiply-adds, each run added to the tile.
// Fused at every level (base asks the C library), so the bits agree; written with intrinsics since contraction is off, which
// halves the time of the whole op.
void product_base(const float* a, const float* b, int64_t classes, float* tile) {
  for (int64_t start = 0; start < classes; start += kChunk) {
    const int64_t stop = std::min(classes, start + kChunk);
    for (int r = 0; r < kTile; ++r) {
      float sum[kTile] = {};
      for (int64_t c = start; c < stop; ++c)
        for (int l = 0; l < kTile; ++l) sum[l] = __builtin_fmaf(a[c * kTile + r], b[c * kTile + l], sum[l]);
      for (int l = 0; l < kTile; ++l) tile[r * kTile + l] += sum[l];
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("arch=x86-64-v4"))) void product_avx512(const float* a, const float* b, int64_t classes, float* tile) {
  for (int64_t start = 0; start < classes; start += kChunk) {
    const int64_t stop = std::min(classes, start + kChunk);
    __m512 sum[kTile];
    for (int r = 0; r < kTile; ++r) sum[r] = _mm512_setzero_ps();
    for (int64_t c = start; c < stop; ++c) {
      const __m512 y = _mm512_loadu_ps(b + c * kTile);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[c * kTile + r]), y, sum[r]);
    }
    for (int r = 0; r < kTile; ++r) {
      float* row = tile + r * kTile;
      _mm512_storeu_ps(row, _mm512_add_ps(_mm512_loadu_ps(row), sum[r]));
    }
  }
}

__attribute__((target("arch=x86-64-v3"))) void product_avx2(const float* a, const float* b, int64_t classes, float* tile) {
  constexpr int rows = 4;
  for (int64_t start = 0; start < classes; start += kChunk) {
    const int64_t stop = std::min(classes, start + kChunk);
    for (int first = 0; first < kTile; first += rows) {
      __m256 low[rows], high[rows];
      for (int r = 0; r < rows; ++r) low[r] = high[r] = _mm256_setzero_ps();
      for (int64_t c = start; c < stop; ++c) {
        const __m256 y = _mm256_loadu_ps(b + c * kTile), z = _mm256_loadu_ps(b + c * kTile + 8);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          const __m256 x = _mm256_broadcast_ss(a + c * kTile + first + r);
          low[r] = _mm256_fmadd_ps(x, y, low[r]);
          high[r] = _mm256_fmadd_ps(x, z, high[r]);
        }
      }
      for (int r = 0; r < rows; ++r) {
        float* row = tile + (first + r) * kTile;
        _mm256_storeu_ps(row, _mm256_add_ps(_mm256_loadu_ps(row), low[r]));
        _mm256_storeu_ps(row + 8, _mm256_add_ps(_mm256_loadu_ps(row + 8), high[r]));
      }
    }
  }
}
#else
constexpr auto product_avx512 = product_base, product_avx2 = product_base;
#endif

void product(const float* a, const float* b, int64_t classes, float* tile) {
  switch (simd_level()) {
    case Simd::avx512: return product_avx512(a, b, classes, tile);
    case Simd::avx2: return product_avx2(a, b, classes, tile);
    default: return product_base(a, b, classes, tile);
  }
}
void product(const double* a, const double* b, int64_t classes, double* tile) {
  for (int64_t c = 0; c < classes; ++c)
    for (int r = 0; r < kTile; ++r)
      for (int l = 0; l < kTile; ++l) tile[r * kTile + l] += a[c * kTile + r] * b[c * kTile + l];
}

// total += log1p(tile), squares += log1p(tile)^2.
template <class F>
CLADO_INLINE void add_logs_body(const float* tile, double* total, double* squares) {
  for (int r = 0; r < kTile; ++r) {
    const F x = F::load(tile + r * kTile);
    float a[kLanes];
    store(a, log1p_lanes(select(x < kFloor, F(kFloor), x)));
    for (int l = 0; l < kTile; ++l) {
      const double value = static_cast<double>(a[l]);
      total[r * kTile + l] += value;
      squares[r * kTile + l] += value * value;
    }
  }
}
CLADO_LANES_KERNEL(add_logs, (const float* tile, double* total, double* squares), (tile, total, squares))
void add_logs(const double* tile, double* total, double* squares) {
  for (int i = 0; i < kTile * kTile; ++i) {
    const double a = std::log1p(tile[i] < static_cast<double>(kFloor) ? static_cast<double>(kFloor) : tile[i]);
    total[i] += a;
    squares[i] += a * a;
  }
}

// One row of a panel: sqrt(p) * expm1(d - log E_p[e^d]) class by class.
template <class T>
struct Row {
  const T* d = nullptr;  // null: beyond the last perturbation, zeros
  DeltaMoments moments{};
  bool sound() const { return std::isfinite(moments.log_mean_exp()); }
  float centre() const { return static_cast<float>(moments.mean); }
  float shift() const { return static_cast<float>(moments.log1p_tr); }
  bool near() const { return moments.reach + std::fabs(centre()) + std::fabs(shift()) < kNear; }
};

// root = sqrt(p); the rows of a whole panel, none of which reaches far, sixteen classes at a time: computed along the classes,
// turned, and stored along the perturbations.
using Float8x = float __attribute__((vector_size(32)));
using Int8x = int32_t __attribute__((vector_size(32)));

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

template <class F>
CLADO_INLINE void fill_near_body(const float* root, const Row<float>* rows, int64_t first, int64_t classes, float* out) {
  for (int64_t c = 0; c < classes; c += kTile) {
    const int64_t rest = classes - c;
    const F weight = F::load_part(root + c, rest);
    alignas(64) float block[kTileSize], turned[kTileSize];
    for (int r = 0; r < kTile; ++r) {
      const Row<float>& row = rows[r];
      F u;
      if (row.d && row.sound()) {
        const F x = (F::load_part(row.d + first + c, rest) - row.centre()) - row.shift(), y = select(weight > 0.0f, x, u);
        u = weight * (row.near() ? near_expm1(y) : expm1_lanes(y));
      } else if (row.d) {
        u = NAN;
      }
      store(block + r * kTile, u);
    }
    for (int corner = 0; corner < 4; ++corner) {
      const int r = corner / 2 * 8, l = corner % 2 * 8;
      transpose_corner(block + r * kTile + l, turned + l * kTile + r);
    }
    std::memcpy(out + c * kTile, turned, sizeof(float) * static_cast<size_t>(std::min<int64_t>(rest, kTile) * kTile));
  }
}
CLADO_LANES_KERNEL(fill_near, (const float* root, const Row<float>* rows, int64_t first, int64_t classes, float* out),
                   (root, rows, first, classes, out))

// Row `r` of a panel the plain way in double: sqrt(p) e^x in one exponential where e^x alone overflows.
template <class T>
void fill_far(const CleanRow<T>& clean, const Row<T>& row, int r, int64_t first, int64_t classes, T* out) {
  const double shift = row.moments.log_mean_exp();
  for (int64_t c = 0; c < classes; ++c) {
    double u = row.d ? NAN : 0.0;
    if (row.d && row.sound()) {
      const double half = 0.5 * (static_cast<double>(clean.z[first + c]) - clean.log_norm);
      const double x = static_cast<double>(row.d[first + c]) - shift;
      u = half == -INFINITY ? 0.0 : x > 30.0 ? std::exp(half + x) : std::exp(half) * std::expm1(x);
    }
    out[c * kTile + r] = static_cast<T>(u);
  }
}

void fill(const CleanRow<float>& clean, const float* root, const Row<float>* rows, int64_t first, int64_t classes, float* out) {
  fill_near(root + first, rows, first, classes, out);
  for (int r = 0; r < kTile; ++r)
    if (rows[r].moments.far) fill_far(clean, rows[r], r, first, classes, out);
}
void fill(const CleanRow<double>& clean, const double*, const Row<double>* rows, int64_t first, int64_t classes, double* out) {
  for (int r = 0; r < kTile; ++r) fill_far(clean, rows[r], r, first, classes, out);
}

// A sample with its square roots of p.
template <class T>
struct Sample {
  CleanRow<T> clean;
  std::vector<T> root;
  Sample(const T* z, int64_t classes) : clean(z, classes), root(clean.weight) {
    for (T& x : root) x = static_cast<T>(std::sqrt(static_cast<double>(x) / clean.norm));
  }
};

template <class T>
void run(const LogitChanges& changes, double* total, double* squares, int threads) {
  const auto *logits = static_cast<const T*>(changes.logits), *delta = static_cast<const T*>(changes.delta);
  const int64_t perturbations = changes.perturbations, samples = changes.samples, classes = changes.classes;
  const Cut cut(perturbations, samples, classes, sizeof(T));
  threads = threads_for(perturbations * cut.samples * cut.classes, threads);
  std::fill(total, total + perturbations * perturbations, 0.0);
  std::fill(squares, squares + perturbations * perturbations, 0.0);
  std::vector<std::pair<int64_t, int64_t>> tiles;  // the upper triangle; the other one is its mirror
  for (int64_t row = 0; row < cut.panels; ++row)
    for (int64_t column = row; column < cut.panels; ++column) tiles.emplace_back(row, column);
  const bool sliced = cut.classes < classes;
  std::vector<T> unfinished(sliced ? tiles.size() * kTileSize : 0);  // the one sample's tiles between two slices of its classes
  std::vector<Row<T>> rows(static_cast<size_t>(cut.samples * cut.panels * kTile));
  const std::unique_ptr<T[]> workspace(new T[static_cast<size_t>(cut.samples * cut.panels * kTile * cut.classes)]);
  std::vector<Sample<T>> group;

  // Adds the finished tiles of a group, or (last = false) keeps them for the next slice.
  const auto multiply = [&](int64_t count, int64_t width, bool last) {
    const int64_t size = kTile * width;
    parallel_for(static_cast<int64_t>(tiles.size()), threads, [&](int64_t i) {
      const auto [row, column] = tiles[static_cast<size_t>(i)];
      double tile_total[kTileSize] = {}, tile_squares[kTileSize] = {};
      alignas(64) T tile[kTileSize];
      T* const kept = sliced ? &unfinished[static_cast<size_t>(i) * kTileSize] : nullptr;
      for (int64_t n = 0; n < count; ++n) {
        const T* sample = workspace.get() + n * cut.panels * size;
        if (kept)
          std::copy(kept, kept + kTileSize, tile);
        else
          std::fill(tile, tile + kTileSize, T(0));
        product(sample + row * size, sample + column * size, width, tile);
        if (last) add_logs(tile, tile_total, tile_squares);
        if (kept) std::transform(tile, tile + kTileSize, kept, [last](T x) { return last ? T(0) : x; });
      }
      if (!last) return;
      for (int r = 0; r < kTile; ++r)
        for (int l = 0; l < kTile; ++l) {
          const int64_t v = row * kTile + r, w = column * kTile + l;
          if (v >= perturbations || w >= perturbations || w < v) continue;
          total[v * perturbations + w] += tile_total[r * kTile + l];
          squares[v * perturbations + w] += tile_squares[r * kTile + l];
        }
    });
  };

  for (int64_t start = 0; start < samples; start += cut.samples) {
    const int64_t count = std::min(cut.samples, samples - start);
    group.clear();
    for (int64_t n = 0; n < count; ++n) group.emplace_back(logits + (start + n) * classes, classes);
    for (int64_t first = 0; first < classes; first += cut.classes) {
      const int64_t width = std::min(cut.classes, classes - first);
      parallel_for(count * cut.panels, threads, [&](int64_t i) {
        const int64_t n = i / cut.panels, panel = i % cut.panels;
        const Sample<T>& sample = group[static_cast<size_t>(n)];
        Row<T>* const own = &rows[static_cast<size_t>(i * kTile)];
        for (int r = 0; first == 0 && r < kTile; ++r) {
          const int64_t v = panel * kTile + r;
          own[r] = Row<T>{};
          if (v >= perturbations) continue;
          own[r].d = delta + (v * samples + start + n) * classes;
          own[r].moments = moments(sample.clean, own[r].d, v + 1 < perturbations ? own[r].d + samples * classes : own[r].d);
        }
        fill(sample.clean, sample.root.data(), own, first, width, workspace.get() + i * kTile * width);
      });
      multiply(count, width, first + width == classes);
    }
  }
  for (int64_t v = 0; v < perturbations; ++v)
    for (int64_t w = 0; w < v; ++w) {
      total[v * perturbations + w] = total[w * perturbations + v];
      squares[v * perturbations + w] = squares[w * perturbations + v];
    }
}

}  // namespace

void pairwise_ce_cpu(const LogitChanges& changes, double* total, double* squares, int threads) {
  changes.is_double ? run<double>(changes, total, squares, threads) : run<float>(changes, total, squares, threads);
}

}  // namespace clado
