// Quantization of a weight at several bit-widths in one read.
//
// `scales` is [bits.count, rows, groups] float32 and `zeros` the same in int8, or null for symmetric quantization (all zero);
// group g covers columns [g * group_size, (g + 1) * group_size) of the weight. All outputs are contiguous.
//
//   step  = round_half_even(clamp(w / scale, -2^(bits-1) - zero, 2^(bits-1) - 1 - zero))      true division in float32
//   code  = step + zero, in [-2^(bits-1), 2^(bits-1) - 1]
//   value = step * scale, rounded to the weight's dtype
//
// fake_quant writes values [bits.count, rows, columns] and sqerr [bits.count, rows] float64, the sum over the row of
// (value - w)^2, added as common/weights.h says with blocks that start at column 0 of the row, whatever the groups.
// quantize writes codes [bits.count, rows, columns] int8. NaN gives the value NaN and the code 0.
// quantize_weight searches the scales, and zeros where that is not null, as scale_search.h says, and goes on as fake_quant does.
#pragma once

#include "common/weights.h"

namespace clado {

void fake_quant_cpu(const WeightView& weight, const BitList& bits, const float* scales, const int8_t* zeros, void* values,
                    double* sqerr, int threads);
void quantize_weight_cpu(const WeightView& weight, const BitList& bits, int steps, float* scales, int8_t* zeros, void* values,
                         double* sqerr, int threads);
void quantize_cpu(const WeightView& weight, const BitList& bits, const float* scales, const int8_t* zeros, int8_t* codes,
                  int threads);

// Bytes of fake_quant_cuda's `workspace` on the device; quantize_weight_cuda takes scale_search_cuda's too.
int64_t fake_quant_workspace(int64_t rows, int64_t columns, int num_bits);
void fake_quant_cuda(const WeightView& weight, const BitList& bits, const float* scales, const int8_t* zeros, void* values,
                     double* sqerr, void* workspace, int device, void* stream);
void quantize_weight_cuda(const WeightView& weight, const BitList& bits, int steps, float* scales, int8_t* zeros, void* values,
                          double* sqerr, void* search_workspace, void* workspace, int device, void* stream);
void quantize_cuda(const WeightView& weight, const BitList& bits, const float* scales, const int8_t* zeros, int8_t* codes,
                   int device, void* stream);

}  // namespace clado
