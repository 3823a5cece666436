// Interactions of all pairs of perturbations under squared error and additive outputs, summed over samples.
//
// A row is a sample's whole output, whatever the target:
//
//   a_vw = 2 sum_m weight_m d_v[m] d_w[m] = L(y + d_v + d_w) - L(y + d_v) - L(y + d_w) + L(y),  L(y) = sum_m weight_m (y - t)_m^2
//
// weight [rows, width], of the dtype of the changes, at least 0, or null: 1. An element of weight 0 counts nothing whatever it holds.
// total and squares, both [perturbations, others] float64, receive the sums of a and of a^2 in sample order. float32 products meet
// in float32 for 128 elements and then in double, in a fixed order. NaN or infinity spoils the rows and columns it belongs to.
#pragma once

#include "common/pairs.h"

namespace clado {

void pairwise_mse_cpu(const Pairs& pairs, const void* weight, double* total, double* squares, int threads);

// Bytes of `workspace` on the device, which need no initial value.
int64_t pairwise_mse_workspace(const Pairs& pairs);
void pairwise_mse_cuda(const Pairs& pairs, const void* weight, double* total, double* squares, void* workspace, int device,
                       void* stream);

}  // namespace clado
