// How the quantization kernels read weights and add errors, on every device alike.
//
// A weight element is float32, float16 or bfloat16 and is computed on as float32. Squared errors are summed in one fixed order
// so that sums, and the scales chosen by them, have the same bits on every SIMD level, thread count and device: inside a block
// of 1024 consecutive elements lane l of 32 adds the errors of elements l, l + 32, ... in float32; the lanes are added by halves
// (16, 8, 4, 2, 1); the sums of blocks are added in order in float64.
#pragma once

#include <cstdint>
#include <cstring>

namespace clado {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

constexpr int kBlock = 1024;
constexpr int kBlockLanes = 32;

inline int64_t blocks_of(int64_t length) { return (length + kBlock - 1) / kBlock; }

// A code lies in [lowest_code(bits), highest_code(bits)] and stands for (code - zero) * scale; symmetric: zero = 0.
constexpr int lowest_code(int bits) { return -(1 << (bits - 1)); }
constexpr int highest_code(int bits) { return (1 << (bits - 1)) - 1; }

// Nearest integer, ties to even, for |v| < 2^22; never -0.
constexpr float nearest(float v) { return (v + 12582912.0f) - 12582912.0f; }

// Bit-widths by value, so that a launch needs no copy of them to the device.
constexpr int kMaxBits = 7;
struct BitList {
  int width[kMaxBits] = {};
  int count = 0;
  BitList() = default;
  BitList(const int32_t* bits, int num_bits) : count(num_bits) {
    for (int b = 0; b < num_bits; ++b) width[b] = bits[b];
  }
};

}  // namespace clado
