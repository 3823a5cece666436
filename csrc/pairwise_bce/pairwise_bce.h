// Interactions of all pairs of perturbations of logits under binary cross-entropy, summed over samples.
//
// A row is one logit z, of the class that may be, against a class at 0; what pairwise_ce gives for [0, z] and [0, d] is
//
//   a_vw = log1p( p (1 - p) e_v e_w / ((1 + p e_v) (1 + p e_w)) ),  p = sigmoid(z), e = expm1(d)
//        = log1p( s_v s_w ),  s = sinh(d / 2) / cosh((z + d) / 2)
//
// where s is computed without a difference, from h = e^{-|d| / 2}:
//
//   |s| = (1 - h^2) / (e^{z / 2} + e^{-z / 2} h^2) for d > 0,  (1 - h^2) / (e^{-z / 2} + e^{z / 2} h^2) for d < 0
//
// A sample's interaction is the weighted sum over its rows; total and squares, both [perturbations, others] float64, receive the
// sums of it and of its square, in sample order. Edges of float32 (float64 goes further): s_v s_w below 2^-24 - 1 is taken as that
// (-16.6 nats, in float64 too), above 2^126 as that (87 nats: a saturated z that both changes turn over), |d| above 174 as that, and
// a z beyond 177, or infinite, is certain and adds nothing. NaN in z spoils all, a change that is NaN or infinite its rows and
// columns. The width is 1.
#pragma once

#include "common/pairs.h"

namespace clado {

void pairwise_bce_cpu(const Pairs& pairs, const LogitRows& rows, double* total, double* squares, int threads);

// Bytes of `workspace` on the device, which need no initial value.
int64_t pairwise_bce_workspace(const Pairs& pairs, int64_t per_sample);
void pairwise_bce_cuda(const Pairs& pairs, const LogitRows& rows, double* total, double* squares, void* workspace, int device,
                       void* stream);

}  // namespace clado
