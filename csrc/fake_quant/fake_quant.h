// Quantization of a weight in several formats in one read: integers and floats mixed, each with scales and groups of its own. (On
// a GPU one read for every seven formats.)
//
// A format's group g covers columns [g * group_size, (g + 1) * group_size) of the weight. All outputs are contiguous; t = w / scale
// by true division in float32. Of an integer:
//
//   step  = round_half_even(clamp(t, -2^(bits-1) - zero, 2^(bits-1) - 1 - zero))
//   code  = step + zero, in [-2^(bits-1), 2^(bits-1) - 1]
//
// and of a float element step = the nearest value to t, ties to the even code, saturated, and code = its code as int8
// (common/elements.h). The weight's own group size is not looked at.
//
//   value = step * scale, rounded to the weight's dtype
//
// fake_quant writes values [formats.count, rows, columns] and sqerr [formats.count, rows] float64, the sum over the row of
// (value - w)^2, added as common/weights.h says with blocks that start at column 0 of the row, whatever the groups.
// quantize writes codes [formats.count, rows, columns] int8. NaN gives the value NaN and the code 0.
// quantize_weight searches the scales of integers, [bits.count, rows, groups] of the weight's group size, and zeros where that is
// not null, as scale_search.h says, and goes on as fake_quant does.
#pragma once

#include "common/weights.h"

namespace clado {

void fake_quant_cpu(const WeightView& weight, const FormatList& formats, void* values, double* sqerr, int threads);
void quantize_weight_cpu(const WeightView& weight, const BitList& bits, int steps, float* scales, int8_t* zeros, void* values,
                         double* sqerr, int threads);
void quantize_cpu(const WeightView& weight, const FormatList& formats, int8_t* codes, int threads);

// Bytes of fake_quant_cuda's `workspace` on the device; quantize_weight_cuda takes scale_search_cuda's too.
int64_t fake_quant_workspace(int64_t rows, int64_t columns, int num_formats);
void fake_quant_cuda(const WeightView& weight, const FormatList& formats, void* values, double* sqerr, void* workspace, int device,
                     void* stream);
void quantize_weight_cuda(const WeightView& weight, const BitList& bits, int steps, float* scales, int8_t* zeros, void* values,
                          double* sqerr, void* search_workspace, void* workspace, int device, void* stream);
void quantize_cuda(const WeightView& weight, const FormatList& formats, int8_t* codes, int device, void* stream);

}  // namespace clado
