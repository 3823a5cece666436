// Sixteen lanes of 32 bits: the same arithmetic at every SIMD level, in as many vectors as the level's registers take. (One
// 64-byte compiler vector would be shorter, but where it is wider than a register GCC cuts its comparisons into scalars.)
// Elementary functions are written with adds, multiplies and divides only, so their bits do not depend on a libm.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace clado {

constexpr int kLanes = 16;

template <class T, int Width>
struct Lanes {
  typedef T Part __attribute__((vector_size(Width)));  // one register
  typedef uint16_t Shorts __attribute__((vector_size(Width / 2)));  // as many 16-bit integers
  using Int = Lanes<int32_t, Width>;
  using UInt = Lanes<uint32_t, Width>;
  static constexpr int kWidth = Width, kParts = kLanes * 4 / Width, kPartLanes = kLanes / kParts;

  Part part[kParts];

  CLADO_INLINE Lanes() : part{} {}  // zeros
  CLADO_INLINE Lanes(T x) {  // implicit: a scalar stands in all lanes
    for (Part& p : part) p = Part{} + x;
  }
  static CLADO_INLINE Lanes load(const T* x) {
    Lanes v;
    for (int i = 0; i < kParts; ++i) std::memcpy(&v.part[i], x + i * kPartLanes, sizeof(Part));
    return v;
  }
  // The first `rest` of sixteen, zeros behind them.
  static CLADO_INLINE Lanes load_part(const T* x, int64_t rest) {
    if (rest >= kLanes) return load(x);
    T some[kLanes] = {};
    for (int64_t l = 0; l < rest; ++l) some[l] = x[l];
    return load(some);
  }

#define CLADO_OPERATOR(op)                                               \
  friend CLADO_INLINE Lanes operator op(Lanes a, Lanes b) {              \
    for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] op b.part[i]; \
    return a;                                                            \
  }
  CLADO_OPERATOR(+)
  CLADO_OPERATOR(-)
  CLADO_OPERATOR(*)
  CLADO_OPERATOR(/)
  CLADO_OPERATOR(&)
  CLADO_OPERATOR(|)
#undef CLADO_OPERATOR
  friend CLADO_INLINE Lanes& operator+=(Lanes& a, Lanes b) { return a = a + b; }
  friend CLADO_INLINE Lanes operator-(Lanes a) {
    for (Part& p : a.part) p = -p;
    return a;
  }
  friend CLADO_INLINE Lanes operator<<(Lanes a, int n) {
    for (Part& p : a.part) p = p << n;
    return a;
  }
  friend CLADO_INLINE Lanes operator>>(Lanes a, int n) {
    for (Part& p : a.part) p = p >> n;
    return a;
  }

  // -1 where the comparison holds, else 0.
#define CLADO_COMPARISON(op)                                                \
  friend CLADO_INLINE Int operator op(Lanes a, Lanes b) {                   \
    Int mask;                                                               \
    for (int i = 0; i < kParts; ++i) mask.part[i] = a.part[i] op b.part[i]; \
    return mask;                                                            \
  }
  CLADO_COMPARISON(<)
  CLADO_COMPARISON(>)
  CLADO_COMPARISON(>=)
  CLADO_COMPARISON(==)
#undef CLADO_COMPARISON
};

// CLADO_LANES_KERNEL(name, (int* x, long n), (x, n)) is CLADO_SIMD_KERNEL for a body that is a template of the level's float
// lanes: name_body<F>(x, n).
#define CLADO_FLOATS(width) <::clado::Lanes<float, width>>
#define CLADO_LANES_KERNEL(name, params, args) \
  CLADO_STAMP(name, params, args, CLADO_FLOATS(64), CLADO_FLOATS(32), CLADO_FLOATS(16))

template <class T, int W>
CLADO_INLINE Lanes<T, W> select(Lanes<int32_t, W> mask, Lanes<T, W> a, Lanes<T, W> b) {
  for (int i = 0; i < a.kParts; ++i) a.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  return a;
}
template <class T, int W>
CLADO_INLINE void store(T* x, Lanes<T, W> v) {
  for (int i = 0; i < v.kParts; ++i) std::memcpy(x + i * v.kPartLanes, &v.part[i], sizeof v.part[i]);
}
template <class T, int W>
CLADO_INLINE void store_part(T* x, Lanes<T, W> v, int64_t rest) {
  if (rest >= kLanes) return store(x, v);
  T some[kLanes];
  store(some, v);
  for (int64_t l = 0; l < rest; ++l) x[l] = some[l];
}
// The same bits as lanes of another type; the same numbers.
template <class To, class T, int W>
CLADO_INLINE Lanes<To, W> as(Lanes<T, W> v) {
  Lanes<To, W> out;
  std::memcpy(out.part, v.part, sizeof out.part);
  return out;
}
template <class To, class T, int W>
CLADO_INLINE Lanes<To, W> convert(Lanes<T, W> v) {
  Lanes<To, W> out;
  for (int i = 0; i < v.kParts; ++i) out.part[i] = __builtin_convertvector(v.part[i], typename Lanes<To, W>::Part);
  return out;
}

// NaN in v stays NaN.
template <class F>
CLADO_INLINE F clamp(F v, F low, F high) {
  v = select(v < low, low, v);
  return select(v > high, high, v);
}
template <class F>
CLADO_INLINE F clamp(F v, float low, float high) {
  return clamp(v, F(low), F(high));
}
template <class F>
CLADO_INLINE F abs(F v) {
  return as<float>(as<int32_t>(v) & 0x7fffffff);
}

// Nearest integer, ties to even, for |v| < 2^22.
template <class F>
CLADO_INLINE F round_even(F v) {
  return (v + 12582912.0f) - 12582912.0f;
}

// Sum of the lanes by halves: 8, 4, 2, 1.
template <class F>
CLADO_INLINE float sum_halves(F v) {
  float x[kLanes];
  store(x, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) x[l] += x[l + half];
  return x[0];
}
template <class F>
CLADO_INLINE float max_lanes(F v) {
  float x[kLanes];
  store(x, v);
  float top = x[0];
  for (int l = 1; l < kLanes; ++l) top = x[l] > top ? x[l] : top;
  return top;
}
// The first `count` lanes of v, `other` beyond.
template <class F>
CLADO_INLINE F first_lanes(F v, int64_t count, F other = F{}) {
  if (count >= kLanes) return v;
  constexpr int32_t kIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(F::Int::load(kIndex) < static_cast<int32_t>(count), v, other);
}

// a * b + c, rounded once. Fused at every level (base asks the C library), so the bits agree; written with intrinsics since
// contraction is off.
template <int W>
inline Lanes<float, W> multiply_add(const Lanes<float, W>& a, const Lanes<float, W>& b, Lanes<float, W> c) {
  for (int i = 0; i < c.kParts; ++i)
    for (int l = 0; l < c.kPartLanes; ++l) c.part[i][l] = std::fma(a.part[i][l], b.part[i][l], c.part[i][l]);
  return c;
}
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("arch=x86-64-v4"))) inline Lanes<float, 64> multiply_add(const Lanes<float, 64>& a, const Lanes<float, 64>& b,
                                                                               Lanes<float, 64> c) {
  c.part[0] = _mm512_fmadd_ps(a.part[0], b.part[0], c.part[0]);
  return c;
}
__attribute__((target("arch=x86-64-v3"))) inline Lanes<float, 32> multiply_add(const Lanes<float, 32>& a, const Lanes<float, 32>& b,
                                                                               Lanes<float, 32> c) {
  for (int i = 0; i < 2; ++i) c.part[i] = _mm256_fmadd_ps(a.part[i], b.part[i], c.part[i]);
  return c;
}
#endif
// c_0 + x (c_1 + x (c_2 + …)) by fused multiply-adds.
template <class F, int N>
CLADO_INLINE F polynomial(const float (&c)[N], F x) {
  F p = c[N - 1];
  for (int i = N - 2; i >= 0; --i) p = multiply_add(p, x, F(c[i]));
  return p;
}

// Sums of float lanes with double accumulators: kRun vectors meet in float32 before they are added to the doubles. Lane l takes
// lane l of every vector, so the order is the same at every SIMD level.
constexpr int kRun = 8;
struct DoubleLanes {
  double lane[kLanes] = {};
  template <class F>
  CLADO_INLINE void add(F v) {
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

// x = k ln 2 + r for |x| < 88: the multiple k and what is left, |r| < 0.35.
template <class F>
CLADO_INLINE F log2_multiple(F x) {
  return round_even(x * 1.44269504f);
}
template <class F>
CLADO_INLINE F log2_rest(F x, F k) {
  return (x - k * 0.693145752f) - k * 1.42860677e-6f;  // ln 2 in two parts, the first with 16 bits
}
template <class F>
CLADO_INLINE F power_of_two(F k) {
  return as<float>((convert<int32_t>(k) + 127) << 23);
}

// Where k is 0 the functions below are their `near_` part: for kNear they may be called instead, with the same bits.
constexpr float kNear = 0.34f;

// (e^r - 1) - r for |r| < 0.35: Taylor series to r^8/8!, the next term is below 4e-9 of it.
template <class F>
CLADO_INLINE F near_expm1_minus(F r) {
  F p = 1.0f / 40320;
  p = p * r + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return (p * r) * r;
}
template <class F>
CLADO_INLINE F near_expm1(F r) {
  return near_expm1_minus(r) + r;
}

// e^x - 1 for |x| < 88, about 2 ulp also near 0.
template <class F>
CLADO_INLINE F expm1_lanes(F x) {
  const F k = log2_multiple(x), scale = power_of_two(k);
  return scale * near_expm1(log2_rest(x, k)) + (scale - 1.0f);
}

// (e^x - 1) - x for |x| < 88, relatively accurate also near 0.
template <class F>
CLADO_INLINE F expm1_minus_lanes(F x) {
  const F k = log2_multiple(x), r = log2_rest(x, k), scale = power_of_two(k), near = near_expm1_minus(r);
  return select(k == 0.0f, near, scale * (near + r) + ((scale - 1.0f) - x));
}

// e^x for x <= 0, at least e^-87; 0 for -infinity. NaN gives what it likes.
template <class F>
CLADO_INLINE F exp_lanes(F x) {
  const F y = select(x < -87.0f, F(-87.0f), x), k = log2_multiple(y), scale = power_of_two(k);
  const F e = scale * near_expm1(log2_rest(y, k)) + scale;
  return select(x >= -3e38f, e, F{});
}

// log(1 + x) for finite x > -1, about 3 ulp also near 0. With 1 + x = 2^k (1 + f), |f| < 0.42:
// log(1 + f) = 2 atanh(s), s = f / (2 + f).
template <class F>
CLADO_INLINE F log1p_lanes(F x) {
  using Int = typename F::Int;
  const F u = x + 1.0f;
  const Int shifted = as<int32_t>(u) - 0x3f3504f3;  // the exponent of u / sqrt(1/2)
  const Int k = shifted >> 23;
  const F unscale = as<float>((Int(127) - k) << 23);
  const F lost = x - (u - 1.0f);  // what rounding 1 + x lost
  const F f = select(k == 0, x, (u * unscale - 1.0f) + lost * unscale);
  const F s = f / (f + 2.0f), z = s * s;
  F p = 1.0f / 11;
  p = p * z + 1.0f / 9;
  p = p * z + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
  const F log_f = 2.0f * s + (2.0f * s) * (z * p);
  const F kf = convert<float>(k);
  return kf * 0.693145752f + (log_f + kf * 1.42860677e-6f);
}

}  // namespace clado
