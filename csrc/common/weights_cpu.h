// Reading and writing weights on the CPU. float32 and bfloat16 are converted sixteen at a time inside the kernels; float16 goes
// through a block of floats, since only F16C, which a kernel common to all levels cannot name, converts it fast.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "common/lanes.h"
#include "common/weights.h"

namespace clado {

using UInt16x = uint32_t __attribute__((vector_size(64)));
using UShort16x = uint16_t __attribute__((vector_size(32)));

CLADO_INLINE UInt16x to_unsigned(Float16x v) {
  UInt16x b;
  std::memcpy(&b, &v, sizeof b);
  return b;
}
CLADO_INLINE Float16x to_float(UInt16x b) {
  Float16x v;
  std::memcpy(&v, &b, sizeof v);
  return v;
}
CLADO_INLINE UInt16x all(uint32_t x) { return UInt16x{} + x; }

CLADO_INLINE UInt16x float_to_bfloat(Float16x f) {  // round half to even
  const UInt16x x = to_unsigned(f), rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
  return (x & 0x7fffffffu) > 0x7f800000u ? all(0x7fc0u) : rounded;
}

// Sixteen weights from element i on, as float32.
template <DType D>
CLADO_INLINE Float16x load_weights(const void* weight, int64_t i) {
  static_assert(D != DType::float16);
  if constexpr (D == DType::float32) return load(static_cast<const float*>(weight) + i);
  UShort16x h;
  std::memcpy(&h, static_cast<const uint16_t*>(weight) + i, sizeof h);
  return to_float(__builtin_convertvector(h, UInt16x) << 16);
}

// Writes sixteen values rounded to D from element i on; returns them as stored.
template <DType D>
CLADO_INLINE Float16x store_weights(void* weight, int64_t i, Float16x v) {
  static_assert(D != DType::float16);
  if constexpr (D == DType::float32) {
    store(static_cast<float*>(weight) + i, v);
    return v;
  }
  const UInt16x x = float_to_bfloat(v);
  const UShort16x h = __builtin_convertvector(x, UShort16x);
  std::memcpy(static_cast<uint16_t*>(weight) + i, &h, sizeof h);
  return to_float(x << 16);
}

template <DType D>
constexpr int kWeightBytes = D == DType::float32 ? 4 : 2;

template <DType D>
CLADO_INLINE const void* weights_at(const void* weight, int64_t i) {
  return static_cast<const char*>(weight) + i * kWeightBytes<D>;
}
template <DType D>
CLADO_INLINE void* weights_at(void* weight, int64_t i) {
  return static_cast<char*>(weight) + i * kWeightBytes<D>;
}

// float16 <-> float32 by arithmetic, round half to even; a NaN keeps what fits of its payload and becomes quiet, as F16C has it.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  float f = 0.0f;
  uint32_t bits = rest >= 0x7c00u ? (rest << 13) | (rest > 0x7c00u ? 0x7fc00000u : 0x7f800000u) : (rest << 13) + (112u << 23);
  if (rest < 0x400u) {  // subnormal: rest * 2^-24
    f = static_cast<float>(rest) * 5.9604645e-8f;
    std::memcpy(&bits, &f, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline uint16_t float_to_half(float f) {
  uint32_t x = 0;
  std::memcpy(&x, &f, sizeof x);
  const uint32_t sign = (x >> 16) & 0x8000u, rest = x & 0x7fffffffu;
  uint32_t out = rest > 0x7f800000u ? 0x7e00u | ((rest >> 13) & 0x3ffu) : 0x7c00u;
  if (rest < 0x38800000u) {  // below the smallest normal: the sum leaves the rounded steps of 2^-24 in its low bits
    float small = 0.0f;
    std::memcpy(&small, &rest, sizeof small);
    small += 0.5f;
    std::memcpy(&out, &small, sizeof out);
    out -= 0x3f000000u;
  } else if (rest < 0x47800000u) {
    out = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | out);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("arch=x86-64-v3"))) inline int halves_to_floats_f16c(const uint16_t* h, float* f, int count) {
  int i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(f + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + i))));
  return i;
}
__attribute__((target("arch=x86-64-v3"))) inline int floats_to_halves_f16c(const float* f, uint16_t* h, int count) {
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i x = _mm256_cvtps_ph(_mm256_loadu_ps(f + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(h + i), x);
  }
  return i;
}
#else
inline int halves_to_floats_f16c(const uint16_t*, float*, int) { return 0; }
inline int floats_to_halves_f16c(const float*, uint16_t*, int) { return 0; }
#endif

inline void halves_to_floats(const void* halves, float* f, int count) {
  const auto* h = static_cast<const uint16_t*>(halves);
  for (int i = simd_level() == Simd::base ? 0 : halves_to_floats_f16c(h, f, count); i < count; ++i) f[i] = half_to_float(h[i]);
}
inline void floats_to_halves(const float* f, void* halves, int count) {
  auto* h = static_cast<uint16_t*>(halves);
  for (int i = simd_level() == Simd::base ? 0 : floats_to_halves_f16c(f, h, count); i < count; ++i) h[i] = float_to_half(f[i]);
}

// The lanes of a block are two vectors: lane l of 32 is lane l % 16 of vector l / 16.
CLADO_INLINE float sum_block_lanes(Float16x low, Float16x high) { return sum_halves(low + high); }

}  // namespace clado
