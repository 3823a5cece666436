// What an element of a weight is stored as: an integer code, or a float of few bits (OCP FP8 and MX 1.0).
//
// A float element has its sign in the top bit of its code, then the exponent, then the mantissa; exponents below the least make
// subnormals. Rounding goes to the nearest value, ties to the even code, and what lies beyond the largest value becomes that one:
// no code of an infinity or NaN is ever made. Zero keeps its sign.
//
//   e2m1   0, 0.5, 1, 1.5, 2, 3, 4, 6               codes of 4 bits, 0 … 15
//   e4m3   up to 448, steps of 2^-9 near zero       codes of 8 bits, stored as int8
//   e5m2   up to 57344, steps of 2^-16 near zero
#pragma once

#include <cstdint>

namespace clado {

// An integer element is its bits, 2 to 8.
enum Element : int { kE2M1 = 16, kE4M3 = 17, kE5M2 = 18 };

constexpr bool is_float(int element) { return element >= kE2M1; }
constexpr int mantissa_bits(int element) { return element == kE2M1 ? 1 : element == kE4M3 ? 3 : 2; }
constexpr int least_exponent(int element) { return element == kE2M1 ? 0 : element == kE4M3 ? -6 : -14; }
constexpr float largest_value(int element) { return element == kE2M1 ? 6.0f : element == kE4M3 ? 448.0f : 57344.0f; }
// What the sign adds to a code that is held as int8.
constexpr int sign_code(int element) { return element == kE2M1 ? 8 : -128; }

// |x| is rounded by the sum with a float that has the element's step as its last bit: it is 2^kShift times the power of two below
// |x|, or below the least normal value. The sum's last bits then count the steps.
constexpr uint32_t step_shift(int element) { return static_cast<uint32_t>(23 - mantissa_bits(element)) << 23; }
constexpr float least_normal(int element) { return element == kE2M1 ? 1.0f : element == kE4M3 ? 0x1p-6f : 0x1p-14f; }
// The exponent field of that float where |x| is at most the least normal value.
constexpr int least_step_field(int element) { return least_exponent(element) + 127 + 23 - mantissa_bits(element); }

// 2^k for -127 <= k <= 127.
constexpr float two_to(int k) {
  float power = 1.0f, step = 0x1p64f;
  for (int bit = 64; bit > 0; bit /= 2, step = bit == 0 ? 1.0f : static_cast<float>(1ull << bit)) {
    if (k >= bit) power *= step, k -= bit;
    if (k <= -bit) power /= step, k += bit;
  }
  return power;
}
// The k of 2^k <= x < 2^(k + 1) for finite x > 0.
constexpr int exponent_of(float x) {
  int k = 0;
  if (x < 0x1p-126f) x *= 0x1p64f, k -= 64;
  float step = 0x1p64f;
  for (int bit = 64; bit > 0; bit /= 2, step = bit == 0 ? 1.0f : static_cast<float>(1ull << bit)) {
    if (x >= step)
      x /= step, k += bit;
    else if (x * step < 2.0f)
      x *= step, k -= bit;
  }
  return k;
}

// Codes 1 … 126 of e4m3 without a sign, the scales of nvfp4: 2^-9 … 448.
constexpr int kLargestScaleCode = 126;
constexpr float scale_of_code(int code) {
  return code < 8 ? static_cast<float>(code) * 0x1p-9f : static_cast<float>((8 + code % 8) << (code / 8)) * 0x1p-10f;
}
// The code nearest to x, ties to even; NaN gives 1.
constexpr int code_of_scale(float x) {
  if (!(x > 0x1p-9f)) return 1;
  if (x >= 448.0f) return kLargestScaleCode;
  const int k = exponent_of(x), exponent = k < -6 ? -6 : k;
  const float steps = x / two_to(exponent - 3);  // below 16
  return (exponent + 6) * 8 + static_cast<int>((steps + 12582912.0f) - 12582912.0f);
}

}  // namespace clado
