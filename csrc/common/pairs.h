// What the kernels of all pairs of perturbations read.
#pragma once

#include <cstdint>

namespace clado {

// How two sets of perturbations change the output. Not owned, contiguous; on the device of the kernel.
struct Pairs {
  const void* delta;  // [perturbations, rows, width]
  const void* other;  // [others, rows, width]; null: the perturbations again, and what comes out is symmetric
  int64_t perturbations, others, rows, width;
  bool is_double;  // both are float64, else float32
  bool symmetric() const { return other == nullptr; }
};

// Clean logits of the rows. A sample is `per_sample` rows one after the other, its interaction the weighted sum over them.
struct LogitRows {
  const void* logits;    // [rows, width], of the dtype of the changes
  const double* weight;  // [rows], at least 0; null: 1. A row of weight 0 counts nothing whatever it holds
  int64_t per_sample;    // divides the rows
};

}  // namespace clado
