// Scales by least squared error over a grid of candidates (the search of CLADO's paper), for integers and floats mixed.
//
// A target is an element with groups of its own. Group g of the weight's row r gets one scale, scales[r * groups + g] float32, and,
// where `zeros` is not null, one zero point in the same place of it, int8. With bottom = min(w, 0), top = max(w, 0) and
// absmax = max(top, -bottom) of a group, the candidates s_k, 0 <= k < count, fall with k:
//
//   integer, symmetric    s_0 = absmax / (2^(bits-1) - 1),                     zero = 0
//   integer, asymmetric   s_0 = top / (2^bits - 1) - bottom / (2^bits - 1),    zero = -2^(bits-1) - round_half_even(bottom / s_0)
//   float element         s_0 = absmax / largest
//
//   any            s_k = max(s_0 * ((100 - k) / 100), FLT_MIN), count = steps; 1 (zero 0) for a group of zeros
//   power_of_two   powers of two in 2^-127 ... 2^127 around p = 2^(floor(log2(absmax)) - floor(log2(largest))), as OCP MX 1.0 has
//                  it: p alone for one step, else from 2p down to the last that is at least p * (101 - steps) / 100;
//                  1 for a group of zeros
//   e4m3           positive values of e4m3 over the tensor's scale t around c = e4m3(s_0 * t): c / t alone for one step, else from
//                  8 codes above c (twice its value, at most 448) down to the code nearest to c * (101 - steps) / 100; the least
//                  positive one for a group of zeros
//
//   error_k = s_k^2 * sum over the group of (round(t) - t)^2, t = w * (1 / s_k), rounded and clamped as fake_quant.h says
//
// in float32, the sum as common/weights.h says, its product with s_k^2 in float64 (so that no magnitude overflows). Both ends
// of the range shrink alike, so the zero point does not depend on k.
//
// With importance the sum is that of h * (...)^2. h is the element's importance times a power of four, the one that brings the
// largest importance beside a weight that is not zero into [1, 4) (or as near as 4^63 does), 0 beside a weight of zero. Where
// that largest one is 0, no step is better than another, and the group is searched as without importance.
//
// The s_k of least error is taken, the smallest k among equals. A group that holds NaN or infinity, or lies below a tensor scale of
// NaN, gets NaN (zero 0).
#pragma once

#include <cfloat>

#include "common/weights.h"

namespace clado {

constexpr int kMostSteps = 99;

// Where the scale of a group comes from; its float32 value is what is written.
enum class ScaleRule : int { any = 0, power_of_two = 1, e4m3 = 2 };

struct Target {
  int element;                // bits of an integer, or a float element: common/elements.h
  int64_t group_size;         // columns of a group
  ScaleRule rule;             // any for integers
  const float* tensor_scale;  // of the rule e4m3: one float32
  float* scales;              // [rows, groups]
  int8_t* zeros;              // [rows, groups] of an asymmetric integer, or null

  constexpr int64_t groups(int64_t columns) const { return (columns + group_size - 1) / group_size; }
};
struct TargetList {
  Target at[kMostFormats] = {};
  int count = 0;
};
// Widths whose scales, and zeros where they are not null, are [bits.count, rows, groups].
inline TargetList targets_of(const WeightView& weight, const BitList& bits, float* scales, int8_t* zeros) {
  TargetList list;
  const int64_t apart = weight.rows * weight.groups();
  for (; list.count < bits.count; ++list.count) {
    const int64_t at = list.count * apart;
    int8_t* const own = zeros ? zeros + at : nullptr;
    list.at[list.count] = {bits.width[list.count], weight.group_size, ScaleRule::any, nullptr, scales + at, own};
  }
  return list;
}
// Targets from `first` on that share their groups.
inline int run_of(const TargetList& list, int first) {
  int last = first + 1;
  while (last < list.count && list.at[last].group_size == list.at[first].group_size) ++last;
  return last;
}

// Candidates of a target under so many steps, at most.
constexpr int most_candidates(int steps) { return steps + 8; }

// The candidates of one group and target, from the group's extremes (bottom <= 0 <= top, finite, not both 0).
struct Grid {
  float first;          // s_0, at least FLT_MIN, of the rule any
  int zero, count;
  float low, high;      // limits of a step
  int code;             // of the largest candidate: exponent or e4m3 code
  ScaleRule rule;
  float tensor_scale;

  constexpr Grid(float bottom, float top, int element, bool symmetric, ScaleRule by, float below, int steps)
      : first(0), zero(0), count(steps), low(0), high(0), code(0), rule(by), tensor_scale(below) {
    const float absmax = top > -bottom ? top : -bottom;
    if (!is_float(element)) {
      const float codes = static_cast<float>((1 << element) - 1);
      first = symmetric ? absmax / static_cast<float>(highest_code(element)) : top / codes - bottom / codes;
      if (!symmetric) {
        const int shift = static_cast<int>(nearest(bottom / (first > FLT_MIN ? first : FLT_MIN)));  // -(2^bits - 1) .. 0
        zero = lowest_code(element) - shift;
        zero = zero > highest_code(element) ? highest_code(element) : zero;
      }
      low = static_cast<float>(lowest_code(element) - zero), high = static_cast<float>(highest_code(element) - zero);
      return;
    }
    high = largest_value(element), low = -high;
    first = absmax / high;
    if (rule == ScaleRule::any) return;
    const bool power = rule == ScaleRule::power_of_two;
    const int own = power ? bounded(exponent_of(absmax) - exponent_of(high)) : code_of_scale(first * tensor_scale);
    code = own, count = 1;
    if (steps == 1) return;
    const float share = static_cast<float>(101 - steps) / 100.0f;
    const int more = exponent_of(share), up = two_to(more) < share ? more + 1 : more;  // share <= 2^up
    const int last = power ? bounded(own + up) : code_of_scale(scale_of_code(own) * share);
    code = power ? bounded(own + 1) : own + 8 < kLargestScaleCode ? own + 8 : kLargestScaleCode;
    count = code - last + 1;
  }
  static constexpr int bounded(int exponent) { return exponent < -127 ? -127 : exponent > 127 ? 127 : exponent; }

  constexpr float scale(int k) const {
    if (rule == ScaleRule::any) {
      const float s = first * (static_cast<float>(100 - k) / 100.0f);
      return s > FLT_MIN ? s : FLT_MIN;
    }
    return rule == ScaleRule::power_of_two ? two_to(code - k) : scale_of_code(code - k) / tensor_scale;
  }
  // Of a group of zeros.
  static constexpr float of_zeros(ScaleRule rule, float tensor_scale) {
    return rule == ScaleRule::e4m3 ? scale_of_code(1) / tensor_scale : 1.0f;
  }
  // What rounding a sum of squares of `counted` elements may hide, as a share of steps: see Search.
  constexpr float room() const { return 1e-4f * (high > 256.0f ? high / 256.0f : 1.0f); }
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

// False, with nothing written, where importance is negative or not finite. The weight's own group size is not looked at.
bool scale_search_cpu(const WeightView& weight, const Importance& importance, const TargetList& targets, int steps, int threads);
// One row without importance, on the calling thread.
void scale_search_row_cpu(const WeightView& weight, int64_t row, const TargetList& targets, int steps);

// `workspace`: scale_search_workspace(...) bytes on the device, the most that a target's group size asks for. A group beside an
// importance that is negative or not finite gets NaN (zero 0).
int64_t scale_search_workspace(int64_t rows, int64_t columns, int64_t group_size, int num_targets, int steps);
void scale_search_cuda(const WeightView& weight, const Importance& importance, const TargetList& targets, int steps, void* workspace,
                       int device, void* stream);

}  // namespace clado
