// Feasible local search for the integer quadratic program of common/iqp_program.h.
//
// The portfolio: descents under priced budgets from many starts, iterated local search, and annealing, all on one-layer moves
// and pair exchanges with incremental gradients. The result depends on the program, the seed and the work limit alone, unless
// the time limit ends the search first.
#pragma once

#include "common/iqp_program.h"

namespace clado {

// `choice` ([layers], candidate indices): a start when choice[0] >= 0; overwritten with the best feasible choice found.
// `work`: limit on matrix rows read; `seconds`: limit on wall time; `target`: stop at a value this low.
// Returns whether `choice` is feasible; when false, `choice` holds the one with the least relative violation that was met.
bool iqp_search_cpu(const IqpProgram& program, int64_t* choice, int64_t seed, int64_t work, double seconds, double target);

}  // namespace clado
