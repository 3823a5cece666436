// How the bindings of iqp_search and iqp_prove take their program.
#pragma once

#include <tuple>

#include "bindings.h"
#include "common/iqp_program.h"

// (addresses of matrix, starts, rows, limits; layers, budgets)
using Program = std::tuple<Address, Address, Address, Address, int64_t, int64_t>;

inline clado::IqpProgram program_of(const Program& numbers) {
  const auto [matrix, starts, rows, limits, layers, budgets] = numbers;
  return {as<const double>(matrix), as<const int64_t>(starts), as<const int64_t>(rows), as<const int64_t>(limits), layers, budgets};
}
