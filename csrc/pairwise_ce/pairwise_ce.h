// Interactions of all pairs of perturbations under additive logits, summed over samples.
//
// With p = softmax(z) and u_v = e^{d_v} / E_p[e^{d_v}] - 1, per sample
//
//   a_vw = log1p( sum_c p_c u_v[c] u_w[c] ) = L(z + d_v + d_w) - L(z + d_v) - L(z + d_w) + L(z)
//
// for cross-entropy with any label and for KL to softmax(z) alike. total and squares, both [perturbations, perturbations]
// float64 and symmetric, receive the sums of a and of a^2 over the samples, in sample order. A sum over classes below
// 2^-24 - 1 is taken as that. NaN or infinity spoils the rows and columns it belongs to, nothing else.
#pragma once

#include "common/logits.h"

namespace clado {

void pairwise_ce_cpu(const LogitChanges& changes, double* total, double* squares, int threads);

// Bytes of `workspace` on the device, which need no initial value.
int64_t pairwise_ce_workspace(int64_t perturbations, int64_t samples, int64_t classes, bool is_double);
void pairwise_ce_cuda(const LogitChanges& changes, double* total, double* squares, void* workspace, int device, void* stream);

}  // namespace clado
