// Reading and writing weights on the CPU, 1024 elements at a time, by integer arithmetic that needs no F16C.
#pragma once

#include "common/lanes.h"
#include "common/weights.h"

namespace clado {

CLADO_INLINE float bits_to_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, sizeof f);
  return f;
}
CLADO_INLINE uint32_t float_to_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, sizeof b);
  return b;
}

CLADO_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  const uint32_t normal = (rest << 13) + (112u << 23), special = (rest << 13) | 0x7f800000u;
  const uint32_t subnormal = float_to_bits(bits_to_float(0x38800000u + (rest << 13)) - bits_to_float(0x38800000u));
  const uint32_t magnitude = rest >= 0x7c00u ? special : rest < 0x400u ? subnormal : normal;
  return bits_to_float(sign | magnitude);
}
CLADO_INLINE uint16_t float_to_half(float f) {  // round half to even
  const uint32_t x = float_to_bits(f), sign = (x >> 16) & 0x8000u, rest = x & 0x7fffffffu;
  const uint32_t special = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t subnormal = float_to_bits(bits_to_float(rest < 0x38800000u ? rest : 0u) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  return static_cast<uint16_t>(sign | (rest >= 0x47800000u ? special : rest < 0x38800000u ? subnormal : normal));
}
CLADO_INLINE float bfloat_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
CLADO_INLINE uint16_t float_to_bfloat(float f) {  // round half to even
  const uint32_t x = float_to_bits(f);
  const uint32_t rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((x & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Elements [first, first + count) of `weight` as float32, padded with zeros to a multiple of 32.
CLADO_INLINE void read_block(const void* weight, DType dtype, int64_t first, int count, float* out) {
  if (dtype == DType::float32) {
    std::memcpy(out, static_cast<const float*>(weight) + first, sizeof(float) * static_cast<size_t>(count));
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(weight) + first;
    if (dtype == DType::float16)
      for (int i = 0; i < count; ++i) out[i] = half_to_float(source[i]);
    else
      for (int i = 0; i < count; ++i) out[i] = bfloat_to_float(source[i]);
  }
  for (int i = count; i % kBlockLanes != 0; ++i) out[i] = 0.0f;
}

// Writes `count` values rounded to dtype; `values` then holds them as stored.
CLADO_INLINE void write_block(void* weight, DType dtype, int64_t first, int count, float* values) {
  if (dtype == DType::float32) {
    std::memcpy(static_cast<float*>(weight) + first, values, sizeof(float) * static_cast<size_t>(count));
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(weight) + first;
  for (int i = 0; i < count; ++i) {
    const uint16_t stored = dtype == DType::float16 ? float_to_half(values[i]) : float_to_bfloat(values[i]);
    target[i] = stored;
    values[i] = dtype == DType::float16 ? half_to_float(stored) : bfloat_to_float(stored);
  }
}

// The lanes of a block are two vectors: lane l of 32 is lane l % 16 of vector l / 16.
CLADO_INLINE float sum_block_lanes(Float16x low, Float16x high) { return sum_halves(low + high); }

}  // namespace clado
