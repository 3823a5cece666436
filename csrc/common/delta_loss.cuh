// common/delta_loss.h on the GPU: the moments of one row by one warp. float32 rows in float32 with sums that meet in double,
// float64 rows and rows that reach far all in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/cuda.cuh"

namespace clado {

struct WarpMoments {
  double mean, residue, log1p_tr;
  bool far = false;    // the row reaches far
  float reach = 0.0f;  // of a float32 row that does not: no |d| is above it
  __device__ double kl() const { return log1p_tr - residue; }
  __device__ double log_mean_exp() const { return mean + log1p_tr; }
};

// ---- in double ----

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
    return {0.0, mean, top + log(warp_sum(t)), true};
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

// ---- in float32: a block of kRowWarps warps takes one sample and several of its perturbations ----

constexpr int kRowWarps = 8;
constexpr int kKept = 4096;  // weights in shared memory; further ones are computed again wherever they are needed
constexpr int kChain = 4;    // packs that meet in float32 before they are added to a double
constexpr float kNear = 0.34f, kMiddle = 1.0f;

// How far a whole row lies from its centre, so that no element has to ask.
enum class Range { near, middle, any };
template <Range R>
using RangeIs = std::integral_constant<Range, R>;
template <class Run>
__device__ auto by_range(float farthest, Run run) {
  if (farthest < kNear) return run(RangeIs<Range::near>());
  if (farthest < kMiddle) return run(RangeIs<Range::middle>());
  return run(RangeIs<Range::any>());
}

// e^(z - top); a class at -inf counts nothing, any other at least a little, so that its NaN is seen.
__device__ inline float softmax_weight(float z, float top) {
  return z == -INFINITY ? 0.0f : fmaxf(expf(z - top), 1.1754944e-38f);
}

struct CleanRow {
  const float *z, *kept;
  int64_t classes;
  float top;
  double norm, log_norm;  // norm: sum of the weights; both NaN when z holds NaN or +inf, or nothing but -inf

  __device__ bool sound() const { return isfinite(log_norm); }

  // Of classes c to c + N - 1; `Kept`: all are.
  template <int N, bool Kept>
  __device__ Pack<float, N> weights(int64_t c) const {
    if (Kept || c < kKept) return load_pack<float, N>(kept + c);
    Pack<float, N> w = load_pack<float, N>(z + c);
#pragma unroll
    for (int k = 0; k < N; ++k) w.at[k] = softmax_weight(w.at[k], top);
    return w;
  }

  // By all threads of the block; `room` is shared memory of kKept floats.
  __device__ void read(const float* logits, int64_t count, float* room) {
    __shared__ float tops[kRowWarps];
    __shared__ double sums[kRowWarps];
    const int thread = threadIdx.y * 32 + threadIdx.x;
    z = logits, kept = room, classes = count, top = -INFINITY, norm = 0.0;
    for (int64_t c = thread; c < classes; c += 32 * kRowWarps) top = fmaxf(top, z[c]);
    top = warp_max(top);
    tops[threadIdx.y] = top;
    __syncthreads();
    for (int w = 0; w < kRowWarps; ++w) top = fmaxf(top, tops[w]);
    for (int64_t c = thread; c < classes; c += 32 * kRowWarps) {
      const float w = softmax_weight(z[c], top);
      norm += z[c] == z[c] ? static_cast<double>(w) : NAN;
      if (c < kKept) room[c] = w;
    }
    norm = warp_sum(norm);
    sums[threadIdx.y] = norm;
    __syncthreads();
    norm = 0.0;
    for (int w = 0; w < kRowWarps; ++w) norm += sums[w];
    if (!(fabsf(top) < INFINITY)) norm = NAN;
    log_norm = static_cast<double>(top) + log(norm);
  }
};

// (e^x - 1) - x by its Taylor series: to x^8/8! for |x| < kNear, to x^12/12! for |x| < kMiddle; the next term is below 4e-9 of it.
template <Range R>
__device__ float expm1_minus(float x) {
  if (R == Range::any && fabsf(x) >= kNear) return expm1f(x) - x;
  float p = 1.0f / 40320;
  if constexpr (R == Range::middle) {
    float q = __fmaf_rn(1.0f / 479001600, x, 1.0f / 39916800);
    q = __fmaf_rn(q, x, 1.0f / 3628800);
    q = __fmaf_rn(q, x, 1.0f / 362880);
    p = __fmaf_rn(q, x, p);
  }
  p = __fmaf_rn(p, x, 1.0f / 5040);
  p = __fmaf_rn(p, x, 1.0f / 720);
  p = __fmaf_rn(p, x, 1.0f / 120);
  p = __fmaf_rn(p, x, 1.0f / 24);
  p = __fmaf_rn(p, x, 1.0f / 6);
  p = __fmaf_rn(p, x, 0.5f);
  return p * x * x;
}
template <Range R>
__device__ float expm1_in(float x) {
  return R == Range::any && fabsf(x) >= kNear ? expm1f(x) : expm1_minus<R>(x) + x;
}

// run(weights, changes) for the packs of a row, kChain at a time so that as many loads are under way; zeros beyond its end.
template <int N, bool Kept, class Run>
__device__ void for_packs(const CleanRow& clean, const float* d, Run run) {
  for (int64_t start = threadIdx.x * N; start < clean.classes; start += kChain * 32 * N) {
    Pack<float, N> w[kChain], x[kChain];
#pragma unroll
    for (int i = 0; i < kChain; ++i) {
      const int64_t c = start + i * 32 * N;
      w[i] = x[i] = Pack<float, N>{};
      if (c < clean.classes) w[i] = clean.weights<N, Kept>(c), x[i] = load_pack<float, N>(d + c);
    }
    run(w, x);
  }
}

// The moments of a row of a sound sample by one warp, N elements at a time.
template <int N, bool Kept>
__device__ WarpMoments warp_moments(const CleanRow& clean, const float* d) {
  double mean = 0.0;
  float reach = 0.0f;
  for_packs<N, Kept>(clean, d, [&](const auto& w, const auto& x) {
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < kChain * N; ++i) {
      const float weight = w[i / N].at[i % N], counted = weight > 0.0f ? x[i / N].at[i % N] : 0.0f;
      part = __fmaf_rn(weight, counted, part);
      reach = fmaxf(reach, fabsf(counted));
    }
    mean += static_cast<double>(part);
  });
  mean = warp_sum(mean);
  reach = warp_max(reach);
  if (mean != mean) return {mean, mean, mean};
  if (reach > 30.0f) return warp_moments(clean.z, d, clean.classes, clean.log_norm);
  const float centre = static_cast<float>(mean / clean.norm);
  double t = 0.0, r = 0.0;
  by_range(reach + fabsf(centre), [&](auto range) {
    for_packs<N, Kept>(clean, d, [&](const auto& w, const auto& x) {
      float part_t = 0.0f, part_r = 0.0f;
#pragma unroll
      for (int i = 0; i < kChain * N; ++i) {
        const float weight = w[i / N].at[i % N], y = weight > 0.0f ? x[i / N].at[i % N] - centre : 0.0f;
        part_t = __fmaf_rn(weight, expm1_minus<decltype(range)::value>(y), part_t);
        part_r = __fmaf_rn(weight, y, part_r);
      }
      t += static_cast<double>(part_t);
      r += static_cast<double>(part_r);
    });
  });
  t = warp_sum(t) / clean.norm;
  r = warp_sum(r) / clean.norm;
  return {static_cast<double>(centre), r, log1p(t + r), false, reach};
}

// launch(N, Kept) as types, for rows of logits and changes.
template <class Launch>
void with_packs(const float* z, const float* d, int64_t classes, Launch launch) {
  const auto at = [&](auto n) { classes <= kKept ? launch(n, std::true_type()) : launch(n, std::false_type()); };
  if (classes % 4 == 0 && is_aligned(z, 16) && is_aligned(d, 16))
    at(std::integral_constant<int, 4>());
  else
    at(std::integral_constant<int, 1>());
}

}  // namespace clado
