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

#include "common/lanes.h"

namespace clado {

struct DeltaMoments {
  double mean;      // m
  double residue;   // r
  double log1p_tr;  // log1p(T + r), so that log E_p[e^d] = m + log1p_tr
  bool far = false;  // the row reaches far: m = 0 and r = E_p[d]
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

// Sums over one row in float32 lanes with float64 accumulators; `p` and `d` hold `classes` entries, p is 0 where z = -inf.
struct LaneSums {
  double norm = 0.0, mean = 0.0, t = 0.0, r = 0.0;
  float reach = 0.0f;
};

CLADO_INLINE Float16x load_part(const float* x, int64_t rest) {
  if (rest >= kLanes) return load(x);
  float part[kLanes] = {};
  for (int64_t l = 0; l < rest; ++l) part[l] = x[l];
  return load(part);
}

// First pass: norm, mean (not yet divided) and reach. Second pass, around `centre`: t and r.
CLADO_INLINE void lane_sums_body(const float* p, const float* d, int64_t classes, float centre, bool first, LaneSums* out) {
  DoubleLanes a, b;
  Float16x reach{};
  for (int64_t c = 0; c < classes; c += kLanes) {
    const Float16x weight = load_part(p + c, classes - c), x = load_part(d + c, classes - c);
    if (first) {
      const Float16x counted = weight > 0.0f ? x : Float16x{}, size = abs(counted);
      a.add(weight);
      b.add(weight * counted);
      reach = size > reach ? size : reach;
    } else {
      const Float16x y = weight > 0.0f ? x - centre : Float16x{};
      a.add(weight * expm1_minus_lanes(y));
      b.add(weight * y);
    }
  }
  if (first) {
    out->norm = a.total();
    out->mean = b.total();
    float lanes[kLanes];
    store(lanes, reach);
    for (const float x : lanes) out->reach = x > out->reach ? x : out->reach;
  } else {
    out->t = a.total();
    out->r = b.total();
  }
}
CLADO_SIMD_KERNEL(lane_sums, (const float* p, const float* d, int64_t classes, float centre, bool first, LaneSums* out),
                  (p, d, classes, centre, first, out))

// The careful way in float32 lanes.
inline DeltaMoments moments(const float* z, const float* p, const float* d, int64_t classes, double log_norm) {
  LaneSums sums;
  lane_sums(p, d, classes, 0.0f, true, &sums);
  if (sums.mean != sums.mean) return {sums.mean, sums.mean, sums.mean};
  if (sums.reach > 30.0f) return far_moments(z, d, classes, log_norm);
  const float centre = static_cast<float>(sums.mean / sums.norm);
  lane_sums(p, d, classes, centre, false, &sums);
  const double r = sums.r / sums.norm;
  return {static_cast<double>(centre), r, std::log1p(sums.t / sums.norm + r)};
}

// p = softmax(z), 0 where z = -inf.
template <class T>
inline void softmax_row(const T* z, int64_t classes, double log_norm, T* p) {
  for (int64_t c = 0; c < classes; ++c) p[c] = static_cast<T>(std::exp(static_cast<double>(z[c]) - log_norm));
}

}  // namespace clado
