// Reading and writing weights on the CPU, sixteen at a time, computed on as float32.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <cmath>

#include "common/lanes.h"
#include "common/weights.h"

namespace clado {

// float16 <-> float32, round half to even; a NaN keeps what fits of its payload and becomes quiet. By the instructions of a level
// (F16C) or, where it has none, by arithmetic: the same bits.
template <int W>
inline void halves_to_floats(const void* halves, Lanes<float, W>* f) {
  using UInt = Lanes<uint32_t, W>;
  uint16_t h[kLanes];
  uint32_t wide[kLanes];
  std::memcpy(h, halves, sizeof h);
  for (int l = 0; l < kLanes; ++l) wide[l] = h[l];
  const UInt x = UInt::load(wide), sign = (x & 0x8000u) << 16, rest = x & 0x7fffu, shifted = rest << 13;
  const UInt subnormal = as<uint32_t>(convert<float>(as<int32_t>(rest)) * 5.9604645e-8f);  // rest * 2^-24
  const UInt special = shifted | select(rest > 0x7c00u, UInt(0x7fc00000u), UInt(0x7f800000u));
  const UInt bits = select(rest < 0x400u, subnormal, select(rest >= 0x7c00u, special, shifted + (112u << 23)));
  *f = as<float>(sign | bits);
}
template <int W>
inline void floats_to_halves(const Lanes<float, W>& f, void* halves) {
  using UInt = Lanes<uint32_t, W>;
  const UInt x = as<uint32_t>(f), sign = (x >> 16) & 0x8000u, rest = x & 0x7fffffffu;
  const UInt special = select(rest > 0x7f800000u, ((rest >> 13) & 0x3ffu) | 0x7e00u, UInt(0x7c00u));
  const UInt normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const UInt small = as<uint32_t>(as<float>(rest) + 0.5f) - 0x3f000000u;  // the sum's low bits are the rounded steps of 2^-24
  const UInt bits = sign | select(rest < 0x38800000u, small, select(rest < 0x47800000u, normal, special));
  uint32_t wide[kLanes];
  uint16_t h[kLanes];
  store(wide, bits);
  for (int l = 0; l < kLanes; ++l) h[l] = static_cast<uint16_t>(wide[l]);
  std::memcpy(halves, h, sizeof h);
}

// bfloat16 is the upper half of a float32.
template <int W>
inline void bfloats_to_floats(const void* bfloats, Lanes<float, W>* f) {
  Lanes<uint32_t, W> x;
  for (int i = 0; i < x.kParts; ++i) {
    typename Lanes<uint32_t, W>::Shorts h;
    std::memcpy(&h, static_cast<const char*>(bfloats) + static_cast<size_t>(i) * sizeof h, sizeof h);
    x.part[i] = __builtin_convertvector(h, typename Lanes<uint32_t, W>::Part);
  }
  *f = as<float>(x << 16);
}
template <int W>
inline void upper_halves_to_bfloats(Lanes<uint32_t, W> x, void* bfloats) {
  for (int i = 0; i < x.kParts; ++i) {
    const auto h = __builtin_convertvector(x.part[i] >> 16, typename Lanes<uint32_t, W>::Shorts);
    std::memcpy(static_cast<char*>(bfloats) + static_cast<size_t>(i) * sizeof h, &h, sizeof h);
  }
}
template <int W>
CLADO_INLINE void upper_halves_to_bfloats(Lanes<uint32_t, W> x, Lanes<uint32_t, W> y, void* bfloats) {
  upper_halves_to_bfloats(x, bfloats);
  upper_halves_to_bfloats(y, static_cast<uint16_t*>(bfloats) + kLanes);
}

#if defined(__x86_64__) && defined(__GNUC__)
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
__attribute__((target("arch=x86-64-v4"))) inline void halves_to_floats(const void* halves, Lanes<float, 64>* f) {
  f->part[0] = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(halves)));
}
__attribute__((target("arch=x86-64-v4"))) inline void floats_to_halves(const Lanes<float, 64>& f, void* halves) {
  _mm256_storeu_si256(static_cast<__m256i*>(halves), _mm512_maskz_cvtps_ph(0xffff, f.part[0], kNearest));
}
__attribute__((target("arch=x86-64-v3"))) inline void halves_to_floats(const void* halves, Lanes<float, 32>* f) {
  for (int i = 0; i < 2; ++i) f->part[i] = _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(halves) + i));
}
__attribute__((target("arch=x86-64-v3"))) inline void floats_to_halves(const Lanes<float, 32>& f, void* halves) {
  for (int i = 0; i < 2; ++i)
    _mm_storeu_si128(static_cast<__m128i*>(halves) + i, _mm256_cvtps_ph(f.part[i], kNearest));
}
// GCC makes four instructions and more of a conversion between 16 and 32 bits.
__attribute__((target("arch=x86-64-v4"))) inline void bfloats_to_floats(const void* bfloats, Lanes<float, 64>* f) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(bfloats)));
  Lanes<uint32_t, 64> x;
  std::memcpy(x.part, &wide, sizeof wide);
  *f = as<float>(x << 16);
}
__attribute__((target("arch=x86-64-v4"))) inline void upper_halves_to_bfloats(Lanes<uint32_t, 64> x, void* bfloats) {
  _mm256_storeu_si256(static_cast<__m256i*>(bfloats), _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(x >> 16).part[0]));
}
__attribute__((target("arch=x86-64-v4"))) inline void upper_halves_to_bfloats(Lanes<uint32_t, 64> x, Lanes<uint32_t, 64> y,
                                                                              void* bfloats) {
  static constexpr uint16_t kOdd[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i mixed = _mm512_permutex2var_epi16((__m512i)x.part[0], _mm512_loadu_si512(kOdd), (__m512i)y.part[0]);
  _mm512_storeu_si512(bfloats, mixed);
}
__attribute__((target("arch=x86-64-v3"))) inline void upper_halves_to_bfloats(Lanes<uint32_t, 32> x, void* bfloats) {
  const auto low = (x >> 16).part[0], high = (x >> 16).part[1];
  const __m256i mixed = _mm256_packus_epi32((__m256i)low, (__m256i)high);
  _mm256_storeu_si256(static_cast<__m256i*>(bfloats), _mm256_permute4x64_epi64(mixed, 0xd8));
}
#endif

// Rounded to bfloat16, half to even; NaN becomes the quiet one. NoNaN: there is none.
template <bool NoNaN, class F>
CLADO_INLINE F round_to_bfloat(F f) {
  using UInt = typename F::UInt;
  const UInt x = as<uint32_t>(f), rounded = x + 0x7fffu + ((x >> 16) & 1u);
  return as<float>((NoNaN ? rounded : select(f == f, rounded, UInt(0x7fc00000u))) & 0xffff0000u);
}

template <DType D>
constexpr int kWeightBytes = weight_bytes(D);

template <DType D>
CLADO_INLINE const void* weights_at(const void* weight, int64_t i) {
  return static_cast<const char*>(weight) + i * kWeightBytes<D>;
}
template <DType D>
CLADO_INLINE void* weights_at(void* weight, int64_t i) {
  return static_cast<char*>(weight) + i * kWeightBytes<D>;
}

// Sixteen weights from element i on, as float32.
template <class F, DType D>
CLADO_INLINE F load_weights(const void* weight, int64_t i) {
  const void* from = weights_at<D>(weight, i);
  if constexpr (D == DType::float32) return F::load(static_cast<const float*>(from));
  F f;
  if constexpr (D == DType::bfloat16) bfloats_to_floats(from, &f);
  if constexpr (D == DType::float16) halves_to_floats(from, &f);
  return f;
}

// Rounded to D. NoNaN: none of them is NaN.
template <DType D, bool NoNaN = false, class F>
CLADO_INLINE F round_to(F v) {
  if constexpr (D == DType::float32) return v;
  if constexpr (D == DType::bfloat16) return round_to_bfloat<NoNaN>(v);
  uint16_t halves[kLanes];
  floats_to_halves(v, halves);
  halves_to_floats(halves, &v);
  return v;
}

// Writes sixteen values of D from element i on; 32.
template <DType D, class F>
CLADO_INLINE void store_weights(void* weight, int64_t i, F v) {
  void* to = weights_at<D>(weight, i);
  if constexpr (D == DType::float32) store(static_cast<float*>(to), v);
  if constexpr (D == DType::bfloat16) upper_halves_to_bfloats(as<uint32_t>(v), to);
  if constexpr (D == DType::float16) floats_to_halves(v, to);
}
template <DType D, class F>
CLADO_INLINE void store_pair(void* to, const F* v) {
  if constexpr (D == DType::bfloat16) return upper_halves_to_bfloats(as<uint32_t>(v[0]), as<uint32_t>(v[1]), to);
  store_weights<D>(to, 0, v[0]);
  store_weights<D>(to, kLanes, v[1]);
}

// |x| of a float element E, saturated, and the float that rounds it: see common/elements.h. NaN stays NaN.
template <int E, class F>
struct Magnitude {
  F a, step;
  CLADO_INLINE explicit Magnitude(F x) {
    a = abs(x);
    a = select(a > largest_value(E), F(largest_value(E)), a);
    const F normal = select(a < least_normal(E), F(least_normal(E)), a);
    step = as<float>((as<uint32_t>(normal) & 0x7f800000u) + step_shift(E));
  }
  CLADO_INLINE F rounded() const { return (a + step) - step; }
  // Of the code, without the sign.
  CLADO_INLINE typename F::Int code() const {
    const auto sum = as<int32_t>(a + step), field = as<int32_t>(step);
    return (((field >> 23) - least_step_field(E)) << mantissa_bits(E)) + (sum - field);
  }
};
template <int E, class F>
CLADO_INLINE F round_element(F x) {
  const auto sign = as<uint32_t>(x) & 0x80000000u;
  return as<float>(as<uint32_t>(Magnitude<E, F>(x).rounded()) | sign);
}
// As int8 holds it; 0 for NaN.
template <int E, class F>
CLADO_INLINE typename F::Int element_code(F x) {
  using Int = typename F::Int;
  const Int sign = (as<int32_t>(x) >> 31) & sign_code(E);
  return select(x == x, Magnitude<E, F>(x).code() + sign, Int{});
}

constexpr int padded_count(int count) { return (count + kBlockLanes - 1) / kBlockLanes * kBlockLanes; }

// A block of weights as float32, padded with zeros to whole lanes; returns the padded count.
template <class F, DType D>
CLADO_INLINE int read_typed(const void* weight, int count, float* out) {
  const int whole = count / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) store(out + i, load_weights<F, D>(weight, i));
  const int padded = padded_count(count);
  if (padded > whole) {
    alignas(64) char tail[2 * kBlockLanes * 4] = {};
    std::memcpy(tail, weights_at<D>(weight, whole), static_cast<size_t>((count - whole) * kWeightBytes<D>));
    for (int i = whole; i < padded; i += kLanes) store(out + i, load_weights<F, D>(tail, i - whole));
  }
  return padded;
}

template <class F>
CLADO_INLINE void read_block_body(const void* weight, DType dtype, int count, float* out, int* padded) {
  *padded = dtype == DType::float32   ? read_typed<F, DType::float32>(weight, count, out)
            : dtype == DType::float16 ? read_typed<F, DType::float16>(weight, count, out)
                                      : read_typed<F, DType::bfloat16>(weight, count, out);
}

// Sums of several NaN are one of them, by chance: always the same.
inline double settled(double sum) { return sum == sum ? sum : NAN; }

// The lanes of a block are two vectors: lane l of 32 is lane l % 16 of vector l / 16.
template <class F>
CLADO_INLINE float sum_block_lanes(F low, F high) {
  return sum_halves(low + high);
}

}  // namespace clado
