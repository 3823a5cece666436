// Squared errors of a weight under scales that somebody else proposes: what a search of one's own needs, whatever its grid.
//
// `scales` is [count, rows, groups] float32, `errors` the same in float64. For candidate c, and group g of the weight's row r:
//
//   step  = round_half_even(clamp(w * (1 / s), low, high)),   s = scales[(c * rows + r) * groups + g]
//   error = sum over the group of (step * s - w)^2
//
// in float32, the sum as common/weights.h says with blocks that start at the group's first column. s may be negative. |s| below
// FLT_MIN counts as 0: every step is 0. A weight or a scale that is NaN, and an infinite scale, give NaN.
#pragma once

#include <cfloat>

#include "common/weights.h"

namespace clado {

constexpr int kMostStep = 1 << 16;  // of -low and high, both at least 0

constexpr float inverse_or_zero(float s) { return s > -FLT_MIN && s < FLT_MIN ? 0.0f : 1.0f / s; }

void scale_errors_cpu(const WeightView& weight, const float* scales, int64_t count, int low, int high, double* errors, int threads);

// Bytes of `workspace` on the device.
int64_t scale_errors_workspace(int64_t rows, int64_t columns, int64_t group_size, int64_t count);
void scale_errors_cuda(const WeightView& weight, const float* scales, int64_t count, int low, int high, double* errors,
                       void* workspace, int device, void* stream);

}  // namespace clado
