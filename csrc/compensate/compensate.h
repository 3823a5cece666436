// Rounding that pays for itself: the error of every column is made up for by the columns after it (optimal brain surgeon on the
// layer loss tr((W - Q) H (W - Q)^T), column by column as in GPTQ, arXiv 2210.17323), at all widths in one pass over the columns.
//
// The weight's rows are split evenly over `factors` upper triangular factors U of inverse moments, H^-1 = U^T U, row and column
// i of which belong to column order[i] of the weight (null: column i). What lies below the diagonal is not read. For each row
// and width, with w the row as float32 and i ascending:
//
//   step   = round_half_even(clamp(w_i / scale, -2^(bits-1) - zero, 2^(bits-1) - 1 - zero)),  code = step + zero;
//            of a float element, instead of widths, the value nearest to w_i / scale and its code (common/elements.h)
//   e_i    = (w_i - step * scale) * (1 / U_ii)
//   w_j    = fma(-e_i, U_ij, w_j)  for j > i
//   loss   = sum of e_i^2 in float64, i ascending: the row's (w - q) H (w - q)^T
//
// in float32 where nothing else is said, so that codes and losses have the same bits at every SIMD level, thread count and
// device. `scales` is [bits.count, rows, groups] float32, `zeros` the same in int8 or null; a group is of consecutive columns of
// the weight, whatever the order. Codes [bits.count, rows, columns] int8 stand in the weight's own order; loss is
// [bits.count, rows]. What is not finite in a row, its scales or the factor, or a zero on the diagonal, spoils the row from there
// on: its loss is NaN or infinite, its codes lie in their range (0 for NaN).
#pragma once

#include "common/weights.h"

namespace clado {

struct Compensation {
  WeightView weight;
  BitList bits;
  int element;           // a float element, where bits.count is 1; or 0: integers of these bits
  const float* factor;   // [factors, columns, columns], its elements by `strides`
  int64_t strides[3];
  int64_t factors;       // divides the weight's rows
  const int64_t* order;  // [factors, columns] or null
  const float* scales;
  const int8_t* zeros;  // or null

  // Rows that share a factor, and their streams: a row at one width each, those of a width side by side.
  constexpr int64_t rows() const { return weight.rows / factors; }
  constexpr int64_t streams() const { return bits.count * rows(); }
  constexpr float u(int64_t f, int64_t i, int64_t j) const {
    return factor[f * strides[0] + i * strides[1] + j * strides[2]];
  }
  constexpr int64_t column(int64_t f, int64_t i) const { return order ? order[f * weight.columns + i] : i; }
};

// False, with nothing written, where an order is not a permutation of the columns.
bool compensate_cpu(const Compensation& given, int8_t* codes, double* loss, int threads);

// `workspace`: compensate_workspace(...) bytes on the device. A column that an order names twice, or a wrong one, is not looked
// for: a number that is no column makes the losses NaN, and columns that are not named get no code.
int64_t compensate_workspace(int64_t rows, int64_t columns, int num_bits);
void compensate_cuda(const Compensation& given, int8_t* codes, double* loss, void* workspace, int device, void* stream);

}  // namespace clado
