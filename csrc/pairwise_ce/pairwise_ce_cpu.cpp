#include "pairwise_ce/pairwise_ce.h"

#include <cmath>
#include <optional>
#include <vector>

#include "common/delta_loss.h"
#include "common/pairs_cpu.h"

namespace clado {
namespace {

constexpr float kFloor = 5.9604645e-8f - 1.0f;

// sum += weight * log1p(tile).
template <class F>
CLADO_INLINE void add_logs_body(const float* tile, int rows, double weight, double* sum) {
  for (int r = 0; r < rows; ++r) {
    const F x = F::load(tile + r * kTile);
    float a[kLanes];
    store(a, log1p_lanes(select(x < kFloor, F(kFloor), x)));
    for (int l = 0; l < kTile; l += 8) add_to(sum + r * kTile + l, weight * widened(a + l));
  }
}
CLADO_LANES_KERNEL(add_logs, (const float* tile, int rows, double weight, double* sum), (tile, rows, weight, sum))
inline double log_of(double x) {
  return std::log1p(x < static_cast<double>(kFloor) ? static_cast<double>(kFloor) : x);
}
void add_logs(const double* tile, int rows, double weight, double* sum) {
  for (int i = 0; i < rows * kTile; ++i) sum[i] += weight * log_of(tile[i]);
}

// total += weight * log1p(tile), squares += (weight * log1p(tile))^2.
template <class F>
CLADO_INLINE void add_squares_body(const float* tile, int rows, double weight, double* total, double* squares) {
  for (int r = 0; r < rows; ++r) {
    const F x = F::load(tile + r * kTile);
    float a[kLanes];
    store(a, log1p_lanes(select(x < kFloor, F(kFloor), x)));
    for (int l = 0; l < kTile; l += 8) {
      const Double8x value = weight * widened(a + l);
      add_to(total + r * kTile + l, value);
      add_to(squares + r * kTile + l, value * value);
    }
  }
}
CLADO_LANES_KERNEL(add_squares, (const float* tile, int rows, double weight, double* total, double* squares),
                   (tile, rows, weight, total, squares))
void add_squares(const double* tile, int rows, double weight, double* total, double* squares) {
  for (int i = 0; i < rows * kTile; ++i) {
    const double a = weight * log_of(tile[i]);
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
template <class F>
CLADO_INLINE void fill_near_body(const float* root, const Row<float>* rows, int64_t first, int64_t classes, float* out) {
  for (int64_t c = 0; c < classes; c += kTile) {
    const int64_t rest = classes - c;
    const F weight = F::load_part(root + c, rest);
    alignas(64) float block[kTileSize];
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
    store_turned(block, rest, out + c * kTile);
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

void fill_panel(const CleanRow<float>& clean, const float* root, const Row<float>* rows, int64_t first, int64_t classes, float* out) {
  fill_near(root + first, rows, first, classes, out);
  for (int r = 0; r < kTile; ++r)
    if (rows[r].moments.far) fill_far(clean, rows[r], r, first, classes, out);
}
void fill_panel(const CleanRow<double>& clean, const double*, const Row<double>* rows, int64_t first, int64_t classes, double* out) {
  for (int r = 0; r < kTile; ++r) fill_far(clean, rows[r], r, first, classes, out);
}

// A row of clean logits with its square roots of p.
template <class T>
struct Clean {
  CleanRow<T> row;
  std::vector<T> root;
  Clean(const T* z, int64_t classes) : row(z, classes), root(row.weight) {
    for (T& x : root) x = static_cast<T>(std::sqrt(static_cast<double>(x) / row.norm));
  }
};

// What all_pairs asks for: rows of sqrt(p) u, whose products are the sums over classes.
template <class T>
struct CrossEntropy {
  using Element = T;
  using Sum = T;

  Panels<T> panels;
  const T* logits;
  const double* weight;
  std::vector<std::optional<Clean<T>>> group;  // none where the weight is 0
  std::vector<Row<T>> rows;                     // of the whole group, panel by panel
  int64_t start = 0;

  CrossEntropy(const Pairs& pairs, const LogitRows& given)
      : panels(pairs), logits(static_cast<const T*>(given.logits)), weight(given.weight) {}

  double weight_of(int64_t i) const { return weight ? weight[start + i] : 1.0; }
  bool counts(int64_t i) const { return group[static_cast<size_t>(i)].has_value(); }
  void prepare(int64_t begin, int64_t count, int64_t first, int64_t, int threads) {
    if (first != 0) return;
    start = begin;
    group.resize(static_cast<size_t>(count));
    rows.resize(static_cast<size_t>(count * panels.count() * kTile));
    parallel_for(count, threads_for(count * panels.width, threads), [&](int64_t i) {
      auto& clean = group[static_cast<size_t>(i)];
      clean.reset();
      if (weight_of(i) != 0.0) clean.emplace(logits + (start + i) * panels.width, panels.width);
    });
  }
  void fill(int64_t i, int64_t panel, int64_t first, int64_t width, T* out) {
    const Clean<T>& clean = *group[static_cast<size_t>(i)];
    Row<T>* const own = &rows[static_cast<size_t>((i * panels.count() + panel) * kTile)];
    for (int r = 0; first == 0 && r < kTile; ++r) {
      own[r] = Row<T>{};
      own[r].d = panels.row(panel, r, start + i);
      if (!own[r].d) continue;
      const T* next = panels.row(panel, r + 1, start + i);
      own[r].moments = moments(clean.row, own[r].d, next ? next : own[r].d);
    }
    fill_panel(clean.row, clean.root.data(), own, first, width, out);
  }
  void multiply(int64_t, const T* a, const T* b, int rows, int64_t width, T* tile) const { product(a, b, rows, width, tile); }
  void finish(int64_t i, int rows, const T* tile, double* sum) const { add_logs(tile, rows, weight_of(i), sum); }
  void finish(int64_t i, int rows, const T* tile, double* total, double* squares) const {
    add_squares(tile, rows, weight_of(i), total, squares);
  }
};

template <class T>
void run(const Pairs& pairs, const LogitRows& rows, double* total, double* squares, int threads) {
  CrossEntropy<T> work(pairs, rows);
  all_pairs(work, rows.per_sample, total, squares, threads);
}

}  // namespace

void pairwise_ce_cpu(const Pairs& pairs, const LogitRows& rows, double* total, double* squares, int threads) {
  pairs.is_double ? run<double>(pairs, rows, total, squares, threads) : run<float>(pairs, rows, total, squares, threads);
}

}  // namespace clado
