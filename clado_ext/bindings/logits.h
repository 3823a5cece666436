// How the bindings of the loss kernels take logits and their changes, with the checks of them.
#pragma once

#include <tuple>

#include "bindings.h"
#include "common/logits.h"

// (address of the logits, of the changes, perturbations, samples, classes, whether they are float64)
using Changes = std::tuple<Address, Address, int64_t, int64_t, int64_t, bool>;

// `outputs`: their addresses, and that of a workspace.
inline clado::LogitChanges changes_of(const char* op, const Changes& numbers, std::initializer_list<Address> outputs) {
  const auto [logits, delta, perturbations, samples, classes, is_double] = numbers;
  expect_sizes(op, {perturbations, samples});
  expect(classes >= 1, op, "classes must be positive");
  expect_memory(op, perturbations * samples, {logits, delta});
  expect_memory(op, perturbations * samples, outputs);
  return {as<const void>(logits), as<const void>(delta), perturbations, samples, classes, is_double};
}
