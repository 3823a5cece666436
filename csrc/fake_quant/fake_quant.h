// Quantization of a weight at several bit-widths in one read.
//
// `weight` is [rows, columns], contiguous; `scales` is [num_bits, rows, groups] float32 and `zeros` the same in int8, or null
// for symmetric quantization (all zero); group g covers columns [g * group_size, (g + 1) * group_size).
//
//   step  = round_half_even(clamp(w / scale, -2^(bits-1) - zero, 2^(bits-1) - 1 - zero))      true division in float32
//   code  = step + zero, in [-2^(bits-1), 2^(bits-1) - 1]
//   value = step * scale, rounded to the weight's dtype
//
// fake_quant writes values [num_bits, rows, columns] and sqerr [num_bits, rows] float64, the sum over the row of
// (value - w)^2, added as common/weights.h says with blocks that start at column 0 of the row, whatever the groups.
// quantize writes codes [num_bits, rows, columns] int8. NaN gives the value NaN and the code 0.
// quantize_weight searches the scales, and zeros where that is not null, as scale_search.h says, and goes on as fake_quant does.
#pragma once

#include "common/weights.h"

namespace clado {

void fake_quant_cpu(const void* weight, int dtype, const float* scales, const int8_t* zeros, void* values, double* sqerr,
                    int64_t rows, int64_t columns, int64_t group_size, const int32_t* bits, int num_bits, int threads);
void quantize_weight_cpu(const void* weight, int dtype, float* scales, int8_t* zeros, void* values, double* sqerr,
                         int64_t rows, int64_t columns, int64_t group_size, const int32_t* bits, int num_bits, int steps,
                         int threads);
void quantize_cpu(const void* weight, int dtype, const float* scales, const int8_t* zeros, int8_t* codes, int64_t rows,
                  int64_t columns, int64_t group_size, const int32_t* bits, int num_bits, int threads);

// `block_errors`: workspace of num_bits * rows * blocks_of(columns) floats on the device.
void fake_quant_cuda(const void* weight, int dtype, const float* scales, const int8_t* zeros, void* values, double* sqerr,
                     int64_t rows, int64_t columns, int64_t group_size, const int32_t* bits, int num_bits, float* block_errors,
                     int device, void* stream);
void quantize_cuda(const void* weight, int dtype, const float* scales, const int8_t* zeros, int8_t* codes, int64_t rows,
                   int64_t columns, int64_t group_size, const int32_t* bits, int num_bits, int device, void* stream);

}  // namespace clado
