// Scales of symmetric quantization by least squared error over a grid of shrink factors (the search of CLADO's paper).
//
// `weight` is [rows, columns], contiguous. Every row is cut into groups of `group_size` consecutive columns (the last may be
// shorter); group g of row r gets, for each of `num_bits` widths, one scale: scales[(b * rows + r) * groups + g], float32.
//
//   s_k = max(absmax / (2^(bits-1) - 1) * ((100 - k) / 100), FLT_MIN), 0 <= k < steps;   1 for a group of zeros
//   error_k = s_k^2 * sum over the group of (clamp(round_half_even(t)) - t)^2, t = w * (1 / s_k)
//
// in float32, the sum as common/weights.h says, its product with s_k^2 in float64 (so that no magnitude overflows).
//
// The s_k of least error is taken, the smallest k among equals. A group that holds NaN or infinity gets NaN.
#pragma once

#include <cfloat>

#include "common/weights.h"

namespace clado {

constexpr int kMaxSteps = 99;

void scale_search_cpu(const void* weight, int dtype, float* scales, int64_t rows, int64_t columns, int64_t group_size,
                      const int32_t* bits, int num_bits, int steps, int threads);

// `workspace`: scale_search_workspace(...) bytes on the device.
int64_t scale_search_workspace(int64_t rows, int64_t columns, int64_t group_size, int num_bits, int steps);
void scale_search_cuda(const void* weight, int dtype, float* scales, int64_t rows, int64_t columns, int64_t group_size,
                       const int32_t* bits, int num_bits, int steps, void* workspace, int device, void* stream);

}  // namespace clado
