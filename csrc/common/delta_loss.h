// One sample under one perturbation: from clean logits z and logit changes d to log E_p[e^d], p = softmax(z).
//
// KL(p || softmax(z + d)) = log E_p[e^d] - E_p[d] is second order in d, so nothing of first order may be subtracted. With a
// reference point m near E_p[d], x = d - m, T = E_p[e^x - 1 - x] and the residue r = E_p[x] (m is rounded, so r is not 0):
//
//   log E_p[e^d] = m + log1p(T + r),      KL = log1p(T + r) - r,      cross-entropy increase = log1p(T + r) + m - d[y]
//
// An error in r cancels in KL to first order. Classes with z = -inf have p = 0 and are left out. A row whose d reaches far
// (|d| > 30) cancels nothing and takes the plain log-sum-exp in double. NaN gives NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "common/lanes.h"

namespace clado {

struct DeltaMoments {
  double mean;      // m
  double residue;   // r
  double log1p_tr;  // log1p(T + r), so that log E_p[e^d] = m + log1p_tr
  bool far = false;  // the row reaches far: m = 0 and r = E_p[d]
  float reach = 0.0f;  // largest |d| of a float32 row that does not
  double kl() const { return log1p_tr - residue; }
  double log_mean_exp() const { return mean + log1p_tr; }
};

// log sum exp of a row in double; -inf entries do not count.
template <class T>
inline double log_sum_exp(const T* z, int64_t classes) {
  double top = -INFINITY;
  for (int64_t c = 0; c < classes; ++c) {
    const double x = static_cast<double>(z[c]);
    if (x > top || x != x) top = x;
    if (x != x) return x;
  }
  if (std::isinf(top)) return top;
  double sum = 0.0;
  for (int64_t c = 0; c < classes; ++c) sum += std::exp(static_cast<double>(z[c]) - top);
  return top + std::log(sum);
}

// e^x - 1 - x in double, relatively accurate near 0.
inline double expm1_minus(double x) {
  if (std::fabs(x) > 0.25) return std::expm1(x) - x;
  double p = 0.0;
  for (int n = 14; n >= 2; --n) p = (p + 1.0) * x / n;  // x^2/2! + ... as x/2 (1 + x/3 (1 + ...)), times x below
  return p * x;
}

// The plain way for rows that reach far: E_p[d] and log E_p[e^d] by log-sum-exp in double.
template <class T>
inline DeltaMoments far_moments(const T* z, const T* d, int64_t classes, double log_norm) {
  double top = -INFINITY, mean = 0.0, sum = 0.0;
  for (int64_t c = 0; c < classes; ++c) {
    const double log_p = static_cast<double>(z[c]) - log_norm, x = static_cast<double>(d[c]);
    if (log_p == -INFINITY) continue;
    mean += std::exp(log_p) * x;
    if (log_p + x > top) top = log_p + x;
  }
  for (int64_t c = 0; c < classes; ++c) {
    const double log_p = static_cast<double>(z[c]) - log_norm;
    if (log_p != -INFINITY) sum += std::exp(log_p + static_cast<double>(d[c]) - top);
  }
  return {0.0, mean, top + std::log(sum), true};
}

// The careful way in double, scalar.
inline DeltaMoments moments(const double* z, const double* p, const double* d, int64_t classes, double log_norm) {
  double mean = 0.0, reach = 0.0, norm = 0.0;
  for (int64_t c = 0; c < classes; ++c)
    if (z[c] != -INFINITY) {
      mean += p[c] * d[c];
      norm += p[c];
      reach = std::fabs(d[c]) > reach ? std::fabs(d[c]) : reach;
    }
  if (mean != mean) return {mean, mean, mean};
  if (reach > 30.0) return far_moments(z, d, classes, log_norm);
  mean /= norm;
  double t = 0.0, r = 0.0;
  for (int64_t c = 0; c < classes; ++c)
    if (z[c] != -INFINITY) {
      t += p[c] * expm1_minus(d[c] - mean);
      r += p[c] * (d[c] - mean);
    }
  return {mean, r / norm, std::log1p((t + r) / norm)};
}

// The clean side of a sample: what its perturbations share.
template <class T>
struct CleanRow {
  const T* z;
  int64_t classes;
  double log_norm, norm = 1.0;  // log sum e^z; the weights' sum
  std::vector<T> weight;        // float32: e^(z - top), padded with zeros to whole lanes; float64: softmax. 0 where z = -inf
  CleanRow(const T* logits, int64_t count);
  bool sound() const { return std::isfinite(log_norm); }
};

template <>
inline CleanRow<double>::CleanRow(const double* logits, int64_t count)
    : z(logits), classes(count), log_norm(log_sum_exp(logits, count)), weight(static_cast<size_t>(count)) {
  for (int64_t c = 0; c < count; ++c) weight[static_cast<size_t>(c)] = std::exp(z[c] - log_norm);
}

// *top = the largest logit, *norm = sum of the weights e^(z - top); NaN where z holds NaN or +inf or nothing but -inf.
template <class F>
CLADO_INLINE void softmax_weights_body(const float* z, int64_t classes, float* weight, float* top, double* norm) {
  const F nothing = -INFINITY;
  F largest = nothing, spoiled;
  for (int64_t c = 0; c < classes; c += kLanes) {
    const F x = first_lanes(F::load_part(z + c, classes - c), classes - c, nothing);
    largest = select(x > largest, x, largest);
    spoiled = select(x == x, spoiled, x);
  }
  *top = max_lanes(largest);
  if (!(std::fabs(*top) < INFINITY) || sum_halves(spoiled) != 0.0f) {
    *top = NAN, *norm = NAN;
    return;
  }
  DoubleLanes sum;
  for (int64_t start = 0; start < classes; start += kRun * kLanes) {
    F part;
    for (int64_t c = start; c < classes && c < start + kRun * kLanes; c += kLanes) {
      const F e = first_lanes(exp_lanes(F::load_part(z + c, classes - c) - *top), classes - c);
      store(weight + c, e);
      part += e;
    }
    sum.add(part);
  }
  *norm = sum.total();
}
CLADO_LANES_KERNEL(softmax_weights, (const float* z, int64_t classes, float* weight, float* top, double* norm),
                   (z, classes, weight, top, norm))

template <>
inline CleanRow<float>::CleanRow(const float* logits, int64_t count) : z(logits), classes(count), log_norm(NAN) {
  weight.resize(static_cast<size_t>((count + kLanes - 1) / kLanes * kLanes));
  float top = 0.0f;
  softmax_weights(z, classes, weight.data(), &top, &norm);
  log_norm = static_cast<double>(top) + std::log(norm);
}

// *mean = sum of weight * d, *reach = the largest |d|, both over the classes that count.
template <class F>
CLADO_INLINE void row_mean_body(const float* weight, const float* d, int64_t classes, double* mean, float* reach) {
  DoubleLanes sum;
  F largest;
  for (int64_t start = 0; start < classes; start += kRun * kLanes) {
    F part;
    for (int64_t c = start; c < classes && c < start + kRun * kLanes; c += kLanes) {
      const F w = F::load(weight + c), counted = select(w > 0.0f, F::load_part(d + c, classes - c), F{}), size = abs(counted);
      part += w * counted;
      largest = select(size > largest, size, largest);
    }
    sum.add(part);
  }
  *mean = sum.total();
  *reach = max_lanes(largest);
}

// *t = sum of weight * (e^x - 1 - x), *r = sum of weight * x, x = d - centre; Near: no |x| is above kNear. Rows lie far apart in
// memory, so the row that comes `next` is fetched meanwhile.
template <class F, bool Near>
CLADO_INLINE void row_moments_at(const float* weight, const float* d, const float* next, int64_t classes, float centre,
                                 double* t, double* r) {
  DoubleLanes sum_t, sum_r;
  for (int64_t start = 0; start < classes; start += kRun * kLanes) {
    F part_t, part_r;
    for (int64_t c = start; c < classes && c < start + kRun * kLanes; c += kLanes) {
      const F w = F::load(weight + c), x = F::load_part(d + c, classes - c) - centre, y = select(w > 0.0f, x, F{});
      __builtin_prefetch(next + c);
      part_t += w * (Near ? near_expm1_minus(y) : expm1_minus_lanes(y));
      part_r += w * y;
    }
    sum_t.add(part_t);
    sum_r.add(part_r);
  }
  *t = sum_t.total();
  *r = sum_r.total();
}
template <class F>
CLADO_INLINE void row_moments_body(const float* weight, const float* d, const float* next, int64_t classes, float centre,
                                   bool near, double* t, double* r) {
  near ? row_moments_at<F, true>(weight, d, next, classes, centre, t, r)
       : row_moments_at<F, false>(weight, d, next, classes, centre, t, r);
}

CLADO_LANES_KERNEL(row_mean, (const float* weight, const float* d, int64_t classes, double* mean, float* reach),
                   (weight, d, classes, mean, reach))
CLADO_LANES_KERNEL(row_moments,
                   (const float* weight, const float* d, const float* next, int64_t classes, float centre, bool near, double* t,
                    double* r),
                   (weight, d, next, classes, centre, near, t, r))

// The careful way, in float32 lanes; NaN unless the sample is sound. `next`: the row asked for next, or d.
inline DeltaMoments moments(const CleanRow<float>& clean, const float* d, const float* next) {
  if (!clean.sound()) return {NAN, NAN, NAN};
  double mean = 0.0, t = 0.0, r = 0.0;
  float reach = 0.0f;
  row_mean(clean.weight.data(), d, clean.classes, &mean, &reach);
  if (mean != mean) return {mean, mean, mean};
  if (reach > 30.0f) return far_moments(clean.z, d, clean.classes, clean.log_norm);
  const float centre = static_cast<float>(mean / clean.norm);
  row_moments(clean.weight.data(), d, next, clean.classes, centre, reach + std::fabs(centre) < kNear, &t, &r);
  t /= clean.norm, r /= clean.norm;
  return {static_cast<double>(centre), r, std::log1p(t + r), false, reach};
}
inline DeltaMoments moments(const CleanRow<double>& clean, const double* d, const double*) {
  if (!clean.sound()) return {NAN, NAN, NAN};
  return moments(clean.z, clean.weight.data(), d, clean.classes, clean.log_norm);
}

}  // namespace clado
