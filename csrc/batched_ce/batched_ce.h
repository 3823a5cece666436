// Loss increase of every perturbation on every sample, from clean logits and logit changes.
//
// `target` [samples] int64 or null. increase [perturbations, samples] float64, in nats:
//
//   target null:   KL(p || softmax(z + d)) = log E_p[e^d] - E_p[d],   p = softmax(z)
//   else:          cross-entropy(z + d, y) - cross-entropy(z, y) = log E_p[e^d] - d[y]
//
// How it stays accurate for tiny d is said in common/delta_loss.h.
#pragma once

#include "common/logits.h"

namespace clado {

// Returns false when a target lies outside [0, classes).
bool batched_ce_cpu(const LogitChanges& changes, const int64_t* target, double* increase, int threads);

// A target outside [0, classes) gives NaN.
void batched_ce_cuda(const LogitChanges& changes, const int64_t* target, double* increase, int device, void* stream);

}  // namespace clado
