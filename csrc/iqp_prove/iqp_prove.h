// Branch and bound for the integer quadratic program with a convex form below its objective.
//
// Node bound: for any point x̃ and any non-negative multipliers μ, convexity gives
//     f(x) >= f(x̃) + ∇f(x̃)ᵀ(x − x̃) + μᵀ(rows·x − limits)   on every feasible x,
// whose minimum over one candidate per layer is a sum of minima. x̃ and μ come from block-coordinate descent on the layers'
// simplices under an augmented Lagrangian of the budgets. Candidates whose reduced cost exceeds the gap are removed, and what
// the budgets allow is decided in integers.
#pragma once

#include "common/iqp_program.h"

namespace clado {

// ½ xᵀQx + cᵀx + constant: convex up to `slack`, and at most ½ xᵀGx wherever x has one candidate per layer, within the budgets.
struct IqpForm {
  const double* quadratic;    // [V, V] symmetric
  const double* linear;       // [V]
  const double* multipliers;  // [budgets] >= 0, objective per unit of a budget row; where the ascent starts
  const double* removed;      // [V, V] symmetric, >= 0, zero inside layers, or null: the form is at most ½ xᵀ(G − R)x there;
                              // R is put back for candidates that a node has fixed, where it is linear
  const double* point;        // [V] >= 0, where the descent starts; a layer without any of it starts spread evenly
  double constant;
  double slack;
};

struct IqpProof {
  double bound;   // no feasible choice is below it; +infinity when there is none at all
  int64_t nodes;
  bool finished;  // every node was closed
};

// `choice`: an incumbent when choice[0] >= 0; overwritten with the best feasible choice found (choice[0] = -1: none).
// Nodes that cannot beat the incumbent by more than `tolerance` are closed. `alive` ([V]): set to 0 for candidates that the
// root proved to be in no choice better than that. The same at every number of threads unless `seconds` ends the search.
IqpProof iqp_prove_cpu(const IqpProgram& program, const IqpForm& form, int64_t* choice, uint8_t* alive, double tolerance,
                       int64_t nodes, double seconds, int threads);

}  // namespace clado
