// How the bindings of iqp_search and iqp_prove take their program.
#pragma once

#include "bindings.h"
#include "common/iqp_program.h"

inline clado::IqpProgram program_of(Address matrix, Address starts, Address rows, Address limits, int64_t layers, int64_t budgets) {
  return {as<const double>(matrix), as<const int64_t>(starts), as<const int64_t>(rows), as<const int64_t>(limits), layers, budgets};
}
