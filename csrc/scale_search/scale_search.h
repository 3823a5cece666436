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
// With importance the sum is that of h * (...)^2. h is the element's importance times a power of four, the one that brings the
// largest importance beside a weight that is not zero into [1, 4) (or as near as 4^63 does), 0 beside a weight of zero. Where
// that largest one is 0, no step is better than another, and the group is searched as without importance.
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

// What an element's squared error counts, finite and not negative: [count, columns] float32, count divides the weight's rows, and
// as many rows, one after the other, share one of it. Null data: all count 1.
struct Importance {
  const float* data = nullptr;
  int64_t count = 1;

  constexpr int64_t rows_each(const WeightView& weight) const { return weight.rows / count; }
  const float* at(const WeightView& weight, int64_t row, int64_t column) const {
    return data ? data + row / rows_each(weight) * weight.columns + column : nullptr;
  }
};

// The power of four that brings `largest` > 0 into [1, 4), at most 4^63.
constexpr float leveller(float largest) {
  const float steps[] = {0x1p64f, 0x1p32f, 0x1p16f, 0x1p8f, 0x1p4f, 0x1p2f};
  float factor = 1.0f;
  for (const float step : steps) {
    if (largest >= step)
      largest /= step, factor /= step;
    else if (largest * step < 4.0f)
      largest *= step, factor *= step;
  }
  return factor;
}
constexpr int kMostLevelled = 4;  // what h stays below

// False, with nothing written, where importance is negative or not finite.
bool scale_search_cpu(const WeightView& weight, const Importance& importance, const BitList& bits, int steps, float* scales,
                      int8_t* zeros, int threads);
// One row without importance, on the calling thread.
void scale_search_row_cpu(const WeightView& weight, int64_t row, const BitList& bits, int steps, float* scales, int8_t* zeros);

// `workspace`: scale_search_workspace(...) bytes on the device. A group beside an importance that is negative or not finite gets
// NaN (zero 0).
int64_t scale_search_workspace(int64_t rows, int64_t columns, int64_t group_size, int num_bits, int steps);
void scale_search_cuda(const WeightView& weight, const Importance& importance, const BitList& bits, int steps, float* scales,
                       int8_t* zeros, void* workspace, int device, void* stream);

}  // namespace clado
