// What a weight is to the quantization kernels, and how they read it and add errors, on every device alike.
//
// A weight element is float32, float16 or bfloat16 and is computed on as float32. Squared errors are summed in one fixed order
// so that sums, and the scales chosen by them, have the same bits on every SIMD level, thread count and device: inside a block
// of 1024 consecutive elements lane l of 32 adds the errors of elements l, l + 32, ... in float32; the lanes are added by halves
// (16, 8, 4, 2, 1); the sums of blocks are added in order in float64.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/elements.h"

namespace clado {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };
constexpr int weight_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// A weight [rows, columns] in place, cut into groups of columns that share a scale. Not owned; on the device of the kernel.
struct WeightView {
  const void* data;    // element (0, 0)
  DType dtype;
  int64_t rows, columns;
  int64_t row_stride;  // elements from one row to the next; those of a row lie side by side
  int64_t group_size;  // columns of a group, at least 1; the last group of a row may be shorter

  constexpr int64_t groups() const { return (columns + group_size - 1) / group_size; }
  const void* at(int64_t row, int64_t column) const {
    return static_cast<const char*>(data) + (row * row_stride + column) * weight_bytes(dtype);
  }
};

constexpr int kBlock = 1024;
constexpr int kBlockLanes = 32;

constexpr int64_t blocks_of(int64_t length) { return (length + kBlock - 1) / kBlock; }

// A code lies in [lowest_code(bits), highest_code(bits)] and stands for (code - zero) * scale; symmetric: zero = 0.
constexpr int lowest_code(int bits) { return -(1 << (bits - 1)); }
constexpr int highest_code(int bits) { return (1 << (bits - 1)) - 1; }

// Nearest integer, ties to even, for |v| < 2^22; never -0.
constexpr float nearest(float v) { return (v + 12582912.0f) - 12582912.0f; }

// A weight is quantized to elements whose values are multiples of a scale for every group of columns.
struct Format {
  int element;           // bits of an integer, or a float element: common/elements.h
  int64_t group_size;    // columns of a group, at least 1; the last group of a row may be shorter
  const float* scales;   // [rows, groups]
  const int8_t* zeros;   // [rows, groups] of an integer, or null for zeros

  constexpr int64_t groups(int64_t columns) const { return (columns + group_size - 1) / group_size; }
};
// Formats by value, so that a launch needs no copy of them to the device.
constexpr int kMostFormats = 16;
struct FormatList {
  Format at[kMostFormats] = {};
  int count = 0;
};

// Bit-widths of integer codes, and a list of them by value, so that a launch needs no copy of it to the device.
constexpr int kLeastBits = 2, kMostBits = 8, kMostWidths = kMostBits - kLeastBits + 1;
struct BitList {
  int width[kMostWidths] = {};
  int count = 0;
};

// Widths whose scales, and zeros where they are not null, are [bits.count, rows, groups].
inline FormatList formats_of(const WeightView& weight, const BitList& bits, const float* scales, const int8_t* zeros) {
  FormatList list;
  const int64_t apart = weight.rows * weight.groups();
  for (; list.count < bits.count; ++list.count) {
    const int64_t at = list.count * apart;
    list.at[list.count] = {bits.width[list.count], weight.group_size, scales + at, zeros ? zeros + at : nullptr};
  }
  return list;
}

}  // namespace clado
