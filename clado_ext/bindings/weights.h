// Checks that the bindings of the quantization kernels share.
#pragma once

#include <vector>

#include "bindings.h"
#include "scale_search/scale_search.h"

using Bits = std::vector<int32_t>;

inline int count_of(const Bits& bits) { return static_cast<int>(bits.size()); }

inline void expect_steps(const char* op, int steps) {
  expect(steps >= 1 && steps <= clado::kMaxSteps, op, "steps must lie in 1..99");
}

inline void expect_matrix(const char* op, int dtype, int64_t rows, int64_t columns, int64_t group_size, const Bits& bits) {
  expect_sizes(op, {rows, columns});
  expect(dtype >= 0 && dtype <= 2, op, "dtype must be 0 (float32), 1 (float16) or 2 (bfloat16)");
  expect(group_size >= 1, op, "group_size must be positive");
  expect(!bits.empty() && bits.size() <= 7, op, "bits must hold 1 to 7 widths");
  for (const int32_t b : bits) expect(b >= 2 && b <= 8, op, "bits must lie in 2..8");
}
