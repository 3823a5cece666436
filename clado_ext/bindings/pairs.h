// How the bindings of the kernels of all pairs take their arguments, with the checks of them.
#pragma once

#include <tuple>

#include "bindings.h"
#include "common/pairs.h"

// (address of the changes, of the other side's or 0, perturbations, others, rows, width, whether they are float64)
using PairNumbers = std::tuple<Address, Address, int64_t, int64_t, int64_t, int64_t, bool>;
// (address of the logits, of the weights or 0, rows per sample)
using LogitNumbers = std::tuple<Address, Address, int64_t>;

// `outputs`: their addresses, and that of a workspace.
inline clado::Pairs pairs_of(const char* op, const PairNumbers& numbers, std::initializer_list<Address> outputs) {
  const auto [delta, other, perturbations, others, rows, width, is_double] = numbers;
  expect_sizes(op, {perturbations, others, rows});
  expect(width >= 1, op, "the width must be positive");
  expect(other != 0 || others == perturbations, op, "others must be as many as the perturbations without an address of their own");
  expect_memory(op, perturbations * rows, {delta});
  expect_memory(op, perturbations * others, outputs);
  return {as<const void>(delta), as<const void>(other), perturbations, others, rows, width, is_double};
}

inline clado::LogitRows rows_of(const char* op, const LogitNumbers& numbers, const clado::Pairs& pairs) {
  const auto [logits, weight, per_sample] = numbers;
  expect(per_sample >= 1 && pairs.rows % per_sample == 0, op, "rows per sample must divide the rows");
  expect_memory(op, pairs.perturbations * pairs.rows, {logits});
  return {as<const void>(logits), as<const double>(weight), per_sample};
}
