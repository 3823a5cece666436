// Interactions of all pairs of perturbations under additive logits, summed over samples.
//
// With p = softmax(z) and u_v = e^{d_v} / E_p[e^{d_v}] - 1, per row of logits
//
//   a_vw = log1p( sum_c p_c u_v[c] u_w[c] ) = L(z + d_v + d_w) - L(z + d_v) - L(z + d_w) + L(z)
//
// for cross-entropy with any label and for KL to softmax(z) alike; a sample's is the weighted sum over its rows (one, or one per
// position). total and squares, both [perturbations, others] float64, receive the sums of a sample's a and of its square, in sample
// order. A sum over classes below 2^-24 - 1 is taken as that; a class with z = -inf does not count. NaN or infinity spoils the rows
// and columns it belongs to, nothing else. Widths are classes, at least one.
#pragma once

#include "common/pairs.h"

namespace clado {

void pairwise_ce_cpu(const Pairs& pairs, const LogitRows& rows, double* total, double* squares, int threads);

// Bytes of `workspace` on the device, which need no initial value.
int64_t pairwise_ce_workspace(const Pairs& pairs, int64_t per_sample);
void pairwise_ce_cuda(const Pairs& pairs, const LogitRows& rows, double* total, double* squares, void* workspace, int device,
                      void* stream);

}  // namespace clado
