// The integer quadratic program that iqp_search and iqp_prove work on: min ½ xᵀGx over x with one candidate per layer and
// rows·x <= limits. A layer may have any number of candidates, and another number than its neighbour.
#pragma once

#include <cstdint>

namespace clado {

// Views, not owned. V = starts[layers] candidates, layer-major; every layer has at least one.
struct IqpProgram {
  const double* matrix;   // [V, V] finite, symmetric, zero between different candidates of one layer
  const int64_t* starts;  // [layers + 1] ascending, starts[0] = 0
  const int64_t* rows;    // [budgets, V]; sums over layers stay within int64
  const int64_t* limits;  // [budgets]
  int64_t layers;
  int64_t budgets;
};

}  // namespace clado
