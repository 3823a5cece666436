// Reading and writing weights on the CPU, sixteen at a time, by integer arithmetic that needs no F16C.
#pragma once

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

CLADO_INLINE Float16x half_to_float(UInt16x h) {
  const UInt16x sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  const UInt16x normal = (rest << 13) + (112u << 23), special = (rest << 13) | 0x7f800000u;
  const UInt16x subnormal = to_unsigned(to_float((rest << 13) + 0x38800000u) - to_float(all(0x38800000u)));
  return to_float(sign | (rest >= 0x7c00u ? special : rest < 0x400u ? subnormal : normal));
}
CLADO_INLINE UInt16x float_to_half(Float16x f) {  // round half to even
  const UInt16x x = to_unsigned(f), sign = (x >> 16) & 0x8000u, rest = x & 0x7fffffffu;
  const UInt16x special = rest > 0x7f800000u ? all(0x7e00u) : all(0x7c00u);
  const UInt16x small = rest < 0x38800000u ? rest : all(0u);
  const UInt16x subnormal = to_unsigned(to_float(small) + 0.5f) - 0x3f000000u;
  const UInt16x normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  return sign | (rest >= 0x47800000u ? special : rest < 0x38800000u ? subnormal : normal);
}
CLADO_INLINE UInt16x float_to_bfloat(Float16x f) {  // round half to even
  const UInt16x x = to_unsigned(f), rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
  return (x & 0x7fffffffu) > 0x7f800000u ? all(0x7fc0u) : rounded;
}

// Sixteen weights from element i on, as float32.
template <DType D>
CLADO_INLINE Float16x load_weights(const void* weight, int64_t i) {
  if constexpr (D == DType::float32) return load(static_cast<const float*>(weight) + i);
  UShort16x h;
  std::memcpy(&h, static_cast<const uint16_t*>(weight) + i, sizeof h);
  const UInt16x x = __builtin_convertvector(h, UInt16x);
  return D == DType::float16 ? half_to_float(x) : to_float(x << 16);
}

// Writes sixteen values rounded to D from element i on; returns them as stored.
template <DType D>
CLADO_INLINE Float16x store_weights(void* weight, int64_t i, Float16x v) {
  if constexpr (D == DType::float32) {
    store(static_cast<float*>(weight) + i, v);
    return v;
  }
  const UInt16x x = D == DType::float16 ? float_to_half(v) : float_to_bfloat(v);
  const UShort16x h = __builtin_convertvector(x, UShort16x);
  std::memcpy(static_cast<uint16_t*>(weight) + i, &h, sizeof h);
  return D == DType::float16 ? half_to_float(x) : to_float(x << 16);
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

// The lanes of a block are two vectors: lane l of 32 is lane l % 16 of vector l / 16.
CLADO_INLINE float sum_block_lanes(Float16x low, Float16x high) { return sum_halves(low + high); }

}  // namespace clado
