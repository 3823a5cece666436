// Scales by least squared error over a grid of shrink factors (the search of CLADO's paper), symmetric or asymmetric.
//
// Group g of the weight's row r gets, for each width b, one scale: scales[(b * rows + r) * groups + g], float32, and, where
// `zeros` is not null, one zero point in the same place of it, int8. With bottom = min(w, 0), top = max(w, 0) of a group:
//
//   symmetric    s_0 = max(top, -bottom) / (2^(bits-1) - 1),        zero = 0
//   asymmetric   s_0 = top / (2^bits - 1) - bottom / (2^bits - 1),  zero = -2^(bits-1) - round_half_even(bottom / s_0)
//
//   s_k = max(s_0 * ((100 - k) / 100), FLT_MIN), 0 <= k < steps;   1 (zero 0) for a group of zeros
//   error_k = s_k^2 * sum over the group of (round_half_even(clamp(t)) - t)^2, t = w * (1 / s_k), clamped to
//             [-2^(bits-1) - zero, 2^(bits-1) - 1 - zero]
//
// in float32, the sum as common/weights.h says, its product with s_k^2 in float64 (so that no magnitude overflows). Both ends
// of the range shrink alike, so the zero point does not depend on k.
//
// The s_k of least error is taken, the smallest k among equals. A group that holds NaN or infinity gets NaN (zero 0).
#pragma once

#include <cfloat>

#include "common/weights.h"

namespace clado {

constexpr int kMostSteps = 99;

// The grid of one group at one width, from its extremes (bottom <= 0 <= top, finite, not both 0).
struct Grid {
  float first;  // s_0, at least FLT_MIN
  int zero;
  float low, high;  // limits of a step

  constexpr Grid(float bottom, float top, int bits, bool symmetric) : first(0), zero(0), low(0), high(0) {
    const float codes = static_cast<float>((1 << bits) - 1);
    first = symmetric ? (top > -bottom ? top : -bottom) / static_cast<float>(highest_code(bits)) : top / codes - bottom / codes;
    if (!symmetric) {
      const int shift = static_cast<int>(nearest(bottom / (first > FLT_MIN ? first : FLT_MIN)));  // -(2^bits - 1) .. 0
      zero = lowest_code(bits) - shift;
      zero = zero > highest_code(bits) ? highest_code(bits) : zero;
    }
    low = static_cast<float>(lowest_code(bits) - zero), high = static_cast<float>(highest_code(bits) - zero);
  }
  constexpr float scale(int k) const {
    const float s = first * (static_cast<float>(100 - k) / 100.0f);
    return s > FLT_MIN ? s : FLT_MIN;
  }
};

void scale_search_cpu(const WeightView& weight, const BitList& bits, int steps, float* scales, int8_t* zeros, int threads);
// One row of it, on the calling thread.
void scale_search_row_cpu(const WeightView& weight, int64_t row, const BitList& bits, int steps, float* scales, int8_t* zeros);

// `workspace`: scale_search_workspace(...) bytes on the device.
int64_t scale_search_workspace(int64_t rows, int64_t columns, int64_t group_size, int num_bits, int steps);
void scale_search_cuda(const WeightView& weight, const BitList& bits, int steps, float* scales, int8_t* zeros, void* workspace,
                       int device, void* stream);

}  // namespace clado
