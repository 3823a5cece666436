// Reading and writing weights on the GPU, and the fixed summation order of common/weights.h by a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/cuda.cuh"
#include "common/weights.h"

namespace clado {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void round_to(float x, float* to) { *to = x; }
__device__ inline void round_to(float x, __half* to) { *to = __float2half_rn(x); }
__device__ inline void round_to(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
// Two at once, which is one instruction.
__device__ inline void round_to(float x, float y, float* to) { to[0] = x, to[1] = y; }
__device__ inline void round_to(float x, float y, __half* to) {
  const __half2 both = __floats2half2_rn(x, y);
  to[0] = both.x, to[1] = both.y;
}
__device__ inline void round_to(float x, float y, __nv_bfloat16* to) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  to[0] = both.x, to[1] = both.y;
}
template <class T, int N>
__device__ Pack<T, N> rounded(const float* x) {
  Pack<T, N> pack;
  if constexpr (N == 1)
    round_to(x[0], pack.at);
  else
#pragma unroll
    for (int k = 0; k < N; k += 2) round_to(x[k], x[k + 1], pack.at + k);
  return pack;
}

// launch(T{}) with the type of `dtype`.
template <class Launch>
void with_type(DType dtype, Launch launch) {
  if (dtype == DType::float32) return launch(float{});
  if (dtype == DType::float16) return launch(__half{});
  launch(__nv_bfloat16{});
}

// NaN stays NaN, which fminf and fmaxf would drop.
__device__ inline float clamp_code(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

// |x| of a float element, saturated, and the float that rounds it: see common/elements.h. NaN stays NaN.
struct Magnitude {
  float a, step;
  __device__ Magnitude(float x, int element) {
    const float largest = largest_value(element), least = least_normal(element);
    a = fabsf(x);
    a = a > largest ? largest : a;
    step = __uint_as_float((__float_as_uint(a < least ? least : a) & 0x7f800000u) + step_shift(element));
  }
};
__device__ inline float round_element(float x, int element) {
  const Magnitude m(x, element);
  return __uint_as_float(__float_as_uint((m.a + m.step) - m.step) | (__float_as_uint(x) & 0x80000000u));
}
// As int8 holds it; x is not NaN.
__device__ inline int8_t element_code(float x, int element) {
  const Magnitude m(x, element);
  const int field = static_cast<int>(__float_as_uint(m.step)), sum = static_cast<int>(__float_as_uint(m.a + m.step));
  const int code = (((field >> 23) - least_step_field(element)) << mantissa_bits(element)) + (sum - field);
  return static_cast<int8_t>(code + (__float_as_uint(x) >> 31 ? sign_code(element) : 0));
}

// Sum of the 32 lanes by halves, in lane 0.
__device__ inline float sum_block_lanes(float lane) {
  for (int half = kBlockLanes / 2; half > 0; half /= 2) lane += __shfl_down_sync(0xffffffffu, lane, half);
  return lane;
}

}  // namespace clado
