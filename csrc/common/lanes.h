// Sixteen float lanes as a compiler vector: the same arithmetic at every SIMD level, cut into as many registers as the level
// has. Elementary functions are written with adds, multiplies and divides only, so their bits do not depend on a libm.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace clado {

constexpr int kLanes = 16;
using Float16x = float __attribute__((vector_size(64)));
using Int16x = int32_t __attribute__((vector_size(64)));

CLADO_INLINE Float16x splat(float x) { return Float16x{} + x; }
CLADO_INLINE Float16x load(const float* x) {
  Float16x v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
CLADO_INLINE void store(float* x, Float16x v) { std::memcpy(x, &v, sizeof v); }
CLADO_INLINE Int16x as_bits(Float16x v) {
  Int16x b;
  std::memcpy(&b, &v, sizeof b);
  return b;
}
CLADO_INLINE Float16x from_bits(Int16x b) {
  Float16x v;
  std::memcpy(&v, &b, sizeof v);
  return v;
}
// NaN in v stays NaN.
CLADO_INLINE Float16x clamp(Float16x v, float low, float high) {
  v = v < low ? splat(low) : v;
  return v > high ? splat(high) : v;
}
CLADO_INLINE Float16x abs(Float16x v) { return from_bits(as_bits(v) & 0x7fffffff); }

// Nearest integer, ties to even, for |v| < 2^22.
CLADO_INLINE Float16x round_even(Float16x v) { return (v + 12582912.0f) - 12582912.0f; }

// Sum of the lanes by halves: 8, 4, 2, 1.
CLADO_INLINE float sum_halves(Float16x v) {
  float x[kLanes];
  store(x, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) x[l] += x[l + half];
  return x[0];
}

// Sums of float lanes with double accumulators: `fn(i)` gives the vector at element i, kRun of them meet in float32 before they
// are added to the doubles. Lane l takes lane l of every vector, so the order is the same at every SIMD level.
constexpr int kRun = 8;
struct DoubleLanes {
  double lane[kLanes] = {};
  CLADO_INLINE void add(Float16x v) {
    float part[kLanes];
    store(part, v);
    for (int l = 0; l < kLanes; ++l) lane[l] += static_cast<double>(part[l]);
  }
  CLADO_INLINE double total() const {
    double x[kLanes];
    std::memcpy(x, lane, sizeof x);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) x[l] += x[l + half];
    return x[0];
  }
};

// The first `rest` of sixteen floats, zeros behind them.
CLADO_INLINE Float16x load_part(const float* x, int64_t rest) {
  if (rest >= kLanes) return load(x);
  float part[kLanes] = {};
  for (int64_t l = 0; l < rest; ++l) part[l] = x[l];
  return load(part);
}
CLADO_INLINE void store_part(float* x, Float16x v, int64_t rest) {
  if (rest >= kLanes) return store(x, v);
  float part[kLanes];
  store(part, v);
  for (int64_t l = 0; l < rest; ++l) x[l] = part[l];
}

// x = k ln 2 + r for |x| < 88: the multiple k and what is left, |r| < 0.35.
CLADO_INLINE Float16x log2_multiple(Float16x x) { return round_even(x * 1.44269504f); }
CLADO_INLINE Float16x log2_rest(Float16x x, Float16x k) {
  return (x - k * 0.693145752f) - k * 1.42860677e-6f;  // ln 2 in two parts, the first with 16 bits
}
CLADO_INLINE Float16x power_of_two(Float16x k) { return from_bits((__builtin_convertvector(k, Int16x) + 127) << 23); }

// Where k is 0 the functions below are their `near_` part: for kNear they may be called instead, with the same bits.
constexpr float kNear = 0.34f;

// (e^r - 1) - r for |r| < 0.35: Taylor series to r^8/8!, the next term is below 4e-9 of it.
CLADO_INLINE Float16x near_expm1_minus(Float16x r) {
  Float16x p = splat(1.0f / 40320);
  p = p * r + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return (p * r) * r;
}
CLADO_INLINE Float16x near_expm1(Float16x r) { return near_expm1_minus(r) + r; }

// e^x - 1 for |x| < 88, about 2 ulp also near 0.
CLADO_INLINE Float16x expm1_lanes(Float16x x) {
  const Float16x k = log2_multiple(x), scale = power_of_two(k);
  return scale * near_expm1(log2_rest(x, k)) + (scale - 1.0f);
}

// (e^x - 1) - x for |x| < 88, relatively accurate also near 0.
CLADO_INLINE Float16x expm1_minus_lanes(Float16x x) {
  const Float16x k = log2_multiple(x), r = log2_rest(x, k), scale = power_of_two(k), near = near_expm1_minus(r);
  return k == 0.0f ? near : scale * (near + r) + ((scale - 1.0f) - x);
}

// e^x for x <= 0, at least e^-87; 0 for -infinity. NaN gives what it likes.
CLADO_INLINE Float16x exp_lanes(Float16x x) {
  const Float16x y = x < -87.0f ? splat(-87.0f) : x, k = log2_multiple(y), scale = power_of_two(k);
  const Float16x e = scale * near_expm1(log2_rest(y, k)) + scale;
  return x >= -3e38f ? e : Float16x{};
}

// log(1 + x) for finite x > -1, about 3 ulp also near 0. With 1 + x = 2^k (1 + f), |f| < 0.42:
// log(1 + f) = 2 atanh(s), s = f / (2 + f).
CLADO_INLINE Float16x log1p_lanes(Float16x x) {
  const Float16x u = x + 1.0f;
  const Int16x shifted = as_bits(u) - 0x3f3504f3;  // the exponent of u / sqrt(1/2)
  const Int16x k = shifted >> 23;
  const Float16x unscale = from_bits((127 - k) << 23);
  const Float16x lost = x - (u - 1.0f);  // what rounding 1 + x lost
  const Float16x f = k == 0 ? x : (u * unscale - 1.0f) + lost * unscale;
  const Float16x s = f / (f + 2.0f), z = s * s;
  Float16x p = splat(1.0f / 11);
  p = p * z + 1.0f / 9;
  p = p * z + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
  const Float16x log_f = 2.0f * s + (2.0f * s) * (z * p);
  const Float16x kf = __builtin_convertvector(k, Float16x);
  return kf * 0.693145752f + (log_f + kf * 1.42860677e-6f);
}

}  // namespace clado
