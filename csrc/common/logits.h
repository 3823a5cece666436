// What the loss kernels read: clean logits, and how every perturbation changes them.
#pragma once

#include <cstdint>

namespace clado {

// Not owned, contiguous; on the device of the kernel. A class with z = -inf does not count.
struct LogitChanges {
  const void* logits;  // z [samples, classes]
  const void* delta;   // d [perturbations, samples, classes]
  int64_t perturbations, samples, classes;
  bool is_double;  // both are float64, else float32
};

}  // namespace clado
