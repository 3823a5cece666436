#include "pairwise_bce/pairwise_bce.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/pairs_cpu.h"

namespace clado {
namespace {

constexpr float kFloor = 5.9604645e-8f - 1.0f, kTop = 0x1p126f;  // of products
constexpr float kCap = 3e38f, kFarthest = 174.0f;                  // of s and of |d|
constexpr double kDoubleCap = 1e308, kDoubleFarthest = 1400.0;

// What the perturbations share of a slice of elements.
template <class T>
struct Elements {
  std::vector<T> up, down, weight;  // e^{z / 2}, e^{-z / 2}
  void resize(size_t count) { up.resize(count), down.resize(count), weight.resize(count); }
};

// out[m][r] = s of rows[r][m]; 0 where the weight is, and for rows that are not there.
template <class F>
CLADO_INLINE void fill_sines_body(const float* const* rows, const float* up, const float* down, const float* weight, int64_t width,
                                  float* out) {
  for (int64_t m = 0; m < width; m += kTile) {
    const int64_t rest = width - m;
    const F rise = F::load_part(up + m, rest), fall = F::load_part(down + m, rest), counted = F::load_part(weight + m, rest);
    alignas(64) float block[kTileSize];
    for (int r = 0; r < kTile; ++r) {
      F s;
      if (rows[r]) {
        const F d = F::load_part(rows[r] + m, rest), size = abs(d);
        const F half = select(size > kFarthest, F(kFarthest), size) * -0.5f;
        const F k = log2_multiple(half), scale = power_of_two(k), near = scale * near_expm1(log2_rest(half, k));
        const F h = near + scale, minus = near + (scale - 1.0f);  // e^half, and e^half - 1
        const auto positive = d > 0.0f;
        const F first = select(positive, rise, fall), second = select(positive, fall, rise);
        const F ratio = (minus * (minus + 2.0f)) / (first + (second * h) * h), capped = select(ratio < -kCap, F(-kCap), ratio);
        s = select(positive, -capped, capped) + (d - d);
        s = select(counted == 0.0f, F{}, s);
      }
      store(block + r * kTile, s);
    }
    store_turned(block, rest, out + m * kTile);
  }
}
CLADO_LANES_KERNEL(fill_sines,
                   (const float* const* rows, const float* up, const float* down, const float* weight, int64_t width, float* out),
                   (rows, up, down, weight, width, out))
void fill_sines(const double* const* rows, const double* up, const double* down, const double* weight, int64_t width, double* out) {
  for (int64_t m = 0; m < width; ++m)
    for (int r = 0; r < kTile; ++r) {
      double s = 0.0;
      if (rows[r] && weight[m] != 0.0) {
        const double d = rows[r][m], half = -0.5 * std::min(std::fabs(d), kDoubleFarthest), h = std::exp(half), minus = std::expm1(half);
        const double first = d > 0.0 ? up[m] : down[m], second = d > 0.0 ? down[m] : up[m];
        const double ratio = minus * (minus + 2.0) / (first + second * h * h), capped = ratio < -kDoubleCap ? -kDoubleCap : ratio;
        s = (d > 0.0 ? -capped : capped) + (d - d);
      }
      out[m * kTile + r] = s;
    }
}

// tile[r][l] += sum over m of weight[m] * log1p(a[m][r] * b[m][l]) for r < rows, runs of kRun in float32.
template <class F>
CLADO_INLINE void add_logs_body(const float* a, const float* b, const float* weight, int rows, int64_t width, double* tile) {
  for (int64_t start = 0; start < width; start += kRun) {
    const int64_t stop = std::min(width, start + kRun);
    for (int r = 0; r < rows; ++r) {
      F sum;
      for (int64_t m = start; m < stop; ++m) {
        const F x = F::load(b + m * kTile) * a[m * kTile + r];
        sum += log1p_lanes(clamp(x, kFloor, kTop)) * weight[m];
      }
      float part[kLanes];
      store(part, sum);
      add_lanes(tile + r * kTile, part);
    }
  }
}
CLADO_LANES_KERNEL(add_logs, (const float* a, const float* b, const float* weight, int rows, int64_t width, double* tile),
                   (a, b, weight, rows, width, tile))
void add_logs(const double* a, const double* b, const double* weight, int rows, int64_t width, double* tile) {
  const double floor = static_cast<double>(kFloor);
  for (int64_t m = 0; m < width; ++m)
    for (int r = 0; r < rows; ++r)
      for (int l = 0; l < kTile; ++l) {
        const double x = a[m * kTile + r] * b[m * kTile + l];
        tile[r * kTile + l] += weight[m] * std::log1p(x < floor ? floor : x > kDoubleCap ? kDoubleCap : x);
      }
}

// What all_pairs asks for, a row being all elements of a sample: their s, whose logarithms are added as products are.
template <class T>
struct BinaryCrossEntropy {
  using Element = T;
  using Sum = double;

  Panels<T> panels;
  const T* logits;
  const double* weight;
  Elements<T> elements;  // of the samples and the slice in hand
  int64_t start = 0;

  void prepare(int64_t begin, int64_t count, int64_t first, int64_t width, int threads) {
    start = begin;
    elements.resize(static_cast<size_t>(count * width));
    parallel_for(count * width, threads_for(count * width, threads), [&](int64_t j) {
      const int64_t from = (start + j / width) * panels.width + first + j % width;
      const auto to = static_cast<size_t>(j);
      const double half = 0.5 * static_cast<double>(logits[from]);
      elements.up[to] = static_cast<T>(std::exp(half));
      elements.down[to] = static_cast<T>(std::exp(-half));
      elements.weight[to] = static_cast<T>(weight ? weight[from] : 1.0);
    });
  }
  bool counts(int64_t) const { return true; }
  void fill(int64_t i, int64_t panel, int64_t first, int64_t width, T* out) const {
    const T* rows[kTile];
    for (int r = 0; r < kTile; ++r) {
      const T* row = panels.row(panel, r, start + i);
      rows[r] = row ? row + first : nullptr;
    }
    const auto at = static_cast<size_t>(i * width);
    fill_sines(rows, &elements.up[at], &elements.down[at], &elements.weight[at], width, out);
  }
  void multiply(int64_t i, const T* a, const T* b, int rows, int64_t width, double* tile) const {
    add_logs(a, b, &elements.weight[static_cast<size_t>(i * width)], rows, width, tile);
  }
  void finish(int64_t, int rows, const double* tile, double* sum) const {
    for (int j = 0; j < rows * kTile; ++j) sum[j] += tile[j];
  }
  void finish(int64_t, int rows, const double* tile, double* total, double* squares) const {
    for (int j = 0; j < rows * kTile; ++j) {
      total[j] += tile[j];
      squares[j] += tile[j] * tile[j];
    }
  }
};

template <class T>
void run(const Pairs& pairs, const LogitRows& rows, double* total, double* squares, int threads) {
  Pairs samples = pairs;
  samples.rows = pairs.rows / rows.per_sample, samples.width = rows.per_sample;
  BinaryCrossEntropy<T> work{Panels<T>(samples), static_cast<const T*>(rows.logits), rows.weight, {}};
  all_pairs(work, 1, total, squares, threads);
}

}  // namespace

void pairwise_bce_cpu(const Pairs& pairs, const LogitRows& rows, double* total, double* squares, int threads) {
  pairs.is_double ? run<double>(pairs, rows, total, squares, threads) : run<float>(pairs, rows, total, squares, threads);
}

}  // namespace clado
