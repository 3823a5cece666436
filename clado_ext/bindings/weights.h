// How the bindings of the quantization kernels take a weight and its widths, with the checks of them.
#pragma once

#include <tuple>
#include <vector>

#include "bindings.h"
#include "common/weights.h"

inline void expect_bits(const char* op, int bits) {
  expect_range(op, "bits", bits, clado::kLeastBits, clado::kMostBits);
}

// Bits of an integer, or a float element.
inline void expect_element(const char* op, int element) {
  if (clado::is_float(element))
    expect_range(op, "element", element, clado::kE2M1, clado::kE5M2);
  else
    expect_bits(op, element);
}

using Widths = std::vector<int>;

inline clado::BitList bits_of(const char* op, const Widths& bits) {
  expect_range(op, "the number of widths", static_cast<int64_t>(bits.size()), 1, clado::kMostWidths);
  clado::BitList list;
  for (const int width : bits) {
    expect_bits(op, width);
    list.width[list.count++] = width;
  }
  return list;
}

// (address, dtype, rows, columns, row stride, group size)
using Weight = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t>;

inline clado::WeightView weight_of(const char* op, const Weight& numbers) {
  const auto [data, dtype, rows, columns, row_stride, group_size] = numbers;
  expect_range(op, "dtype", dtype, static_cast<int>(clado::DType::float32), static_cast<int>(clado::DType::bfloat16));
  expect_sizes(op, {rows, columns, row_stride});
  expect(group_size >= 1, op, "group_size must be positive");
  expect_memory(op, rows * columns, {data});
  return {as<const void>(data), static_cast<clado::DType>(dtype), rows, columns, row_stride, group_size};
}

// (element, group size, address of scales, address of zeros or 0) each
using Formats = std::vector<std::tuple<int, int64_t, Address, Address>>;

inline clado::FormatList formats_of(const char* op, const clado::WeightView& weight, const Formats& formats) {
  expect_range(op, "the number of formats", static_cast<int64_t>(formats.size()), 1, clado::kMostFormats);
  clado::FormatList list;
  for (const auto& [element, group_size, scales, zeros] : formats) {
    expect_element(op, element);
    expect(group_size >= 1, op, "group_size must be positive");
    expect(zeros == 0 || !clado::is_float(element), op, "zeros must be those of an integer");
    expect_memory(op, weight.rows * weight.columns, {scales});
    list.at[list.count++] = {element, group_size, as<const float>(scales), as<const int8_t>(zeros)};
  }
  return list;
}
// No null address of an output beside a weight with elements.
inline void expect_memory(const char* op, const clado::WeightView& weight, std::initializer_list<Address> addresses) {
  expect_memory(op, weight.rows * weight.columns, addresses);
}
