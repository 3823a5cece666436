#include "compensate/compensate.h"

#include <algorithm>

#include "weights.h"

namespace {

// (addresses of the factors and the order, factors, the three strides of the factors)
using Factors = std::tuple<Address, Address, int64_t, int64_t, int64_t, int64_t>;

// `bits`: widths of integers, or one float element.
clado::Compensation given_of(const char* op, const Weight& numbers, const Widths& bits, const Factors& factors, Address scales,
                             Address zeros) {
  const auto weight = weight_of(op, numbers);
  const auto [factor, order, count, apart, down, right] = factors;
  expect(count >= 1 && weight.rows % count == 0, op, "the number of factors must divide the rows");
  expect(std::min({apart, down, right}) >= 0, op, "the strides of the factors must not be negative");
  expect_memory(op, weight, {factor, scales});
  const bool floats = bits.size() == 1 && clado::is_float(bits[0]);
  if (floats) expect_element(op, bits[0]);
  expect(!floats || zeros == 0, op, "zeros must be those of integers");
  return {weight,  bits_of(op, floats ? Widths{clado::kMostBits} : bits),
          floats ? bits[0] : 0,
          as<const float>(factor),
          {apart, down, right},
          count,
          as<const int64_t>(order),
          as<const float>(scales),
          as<const int8_t>(zeros)};
}

}  // namespace

void bind_compensate(py::module_& m) {
  m.def("compensate_cpu", [](const Weight& weight, const Widths& bits, const Factors& factors, Address scales, Address zeros,
                             Address codes, Address loss, int threads) {
    const char* op = "compensate_cpu";
    const auto given = given_of(op, weight, bits, factors, scales, zeros);
    expect_memory(op, given.weight, {codes, loss});
    return clado::compensate_cpu(given, as<int8_t>(codes), as<double>(loss), threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("compensate_workspace", &clado::compensate_workspace);
  m.def("compensate_cuda", [](const Weight& weight, const Widths& bits, const Factors& factors, Address scales, Address zeros,
                              Address codes, Address loss, Address workspace, int device, Address stream) {
    const char* op = "compensate_cuda";
    const auto given = given_of(op, weight, bits, factors, scales, zeros);
    expect_memory(op, given.weight, {codes, loss, workspace});
    clado::compensate_cuda(given, as<int8_t>(codes), as<double>(loss), as<void>(workspace), device, as<void>(stream));
  }, NoGil());
#endif
}
