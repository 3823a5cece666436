// common/delta_loss.h by one warp: the same moments in double, for rows in global memory.
#pragma once

#include <cmath>
#include <cstdint>

namespace clado {

struct WarpMoments {
  double mean, residue, log1p_tr;
  __device__ double kl() const { return log1p_tr - residue; }
  __device__ double log_mean_exp() const { return mean + log1p_tr; }
};

__device__ inline double warp_sum(double x) {
  for (int half = 16; half > 0; half /= 2) x += __shfl_xor_sync(0xffffffffu, x, half);
  return x;
}
__device__ inline double warp_max(double x) {
  for (int half = 16; half > 0; half /= 2) x = fmax(x, __shfl_xor_sync(0xffffffffu, x, half));
  return x;
}

// log sum exp of a row; NaN when it holds NaN or +inf, or nothing but -inf.
template <class T>
__device__ double warp_log_sum_exp(const T* z, int64_t classes) {
  double top = -INFINITY, sum = 0.0;
  for (int64_t c = threadIdx.x; c < classes; c += 32) top = fmax(top, static_cast<double>(z[c]));
  top = warp_max(top);
  for (int64_t c = threadIdx.x; c < classes; c += 32) sum += exp(static_cast<double>(z[c]) - top);
  return top + log(warp_sum(sum));
}

__device__ inline double expm1_minus(double x) {
  if (fabs(x) > 0.25) return expm1(x) - x;
  double p = 0.0;
  for (int n = 14; n >= 2; --n) p = (p + 1.0) * x / n;
  return p * x;
}

template <class T>
__device__ WarpMoments warp_moments(const T* z, const T* d, int64_t classes, double log_norm) {
  double mean = 0.0, top = -INFINITY, norm = 0.0, reach = 0.0;
  for (int64_t c = threadIdx.x; c < classes; c += 32) {
    const double log_p = static_cast<double>(z[c]) - log_norm, x = static_cast<double>(d[c]);
    if (log_p == -INFINITY) continue;
    const double p = exp(log_p);
    mean += p * x;
    norm += p;
    top = fmax(top, log_p + x);
    reach = fmax(reach, fabs(x));
  }
  mean = warp_sum(mean);
  norm = warp_sum(norm);
  top = warp_max(top);
  reach = warp_max(reach);
  if (mean != mean) return {mean, mean, mean};
  double t = 0.0, r = 0.0;
  if (reach > 30.0) {  // cancels nothing: the plain log-sum-exp
    for (int64_t c = threadIdx.x; c < classes; c += 32) {
      const double log_p = static_cast<double>(z[c]) - log_norm;
      if (log_p != -INFINITY) t += exp(log_p + static_cast<double>(d[c]) - top);
    }
    return {0.0, mean, top + log(warp_sum(t))};
  }
  mean /= norm;
  for (int64_t c = threadIdx.x; c < classes; c += 32) {
    const double log_p = static_cast<double>(z[c]) - log_norm, x = static_cast<double>(d[c]) - mean;
    if (log_p == -INFINITY) continue;
    const double p = exp(log_p);
    t += p * expm1_minus(x);
    r += p * x;
  }
  t = warp_sum(t) / norm;
  r = warp_sum(r) / norm;
  return {mean, r, log1p(t + r)};
}

}  // namespace clado
