// Loss increase of every perturbation on every sample, from clean logits and logit changes.
//
// `logits` [samples, classes] and `delta` [perturbations, samples, classes], both of one dtype (float32, or float64 with
// `is_double`), contiguous; `target` [samples] int64 or null. increase [perturbations, samples] float64, in nats:
//
//   target null:   KL(p || softmax(z + d)) = log E_p[e^d] - E_p[d],   p = softmax(z)
//   else:          cross-entropy(z + d, y) - cross-entropy(z, y) = log E_p[e^d] - d[y]
//
// How it stays accurate for tiny d is said in common/delta_loss.h. A class with z = -inf does not count.
#pragma once

#include <cstdint>

namespace clado {

// Returns false when a target lies outside [0, classes).
bool batched_ce_cpu(const void* logits, const void* delta, const int64_t* target, double* increase, int64_t perturbations,
                    int64_t samples, int64_t classes, bool is_double, int threads);

// A target outside [0, classes) gives NaN.
void batched_ce_cuda(const void* logits, const void* delta, const int64_t* target, double* increase, int64_t perturbations,
                     int64_t samples, int64_t classes, bool is_double, int device, void* stream);

}  // namespace clado
