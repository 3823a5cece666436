#include "scale_errors/scale_errors.h"

#include "weights.h"

namespace {

// (address of the scales, candidates, lowest step, highest step)
using Proposed = std::tuple<Address, int64_t, int, int>;

void expect_proposed(const char* op, const clado::WeightView& weight, const Proposed& proposed, Address errors) {
  const auto [scales, count, low, high] = proposed;
  expect_sizes(op, {count});
  expect_range(op, "low", low, -clado::kMostStep, 0);
  expect_range(op, "high", high, 0, clado::kMostStep);
  expect_memory(op, weight.rows * weight.columns * count, {scales, errors});
}

}  // namespace

void bind_scale_errors(py::module_& m) {
  m.attr("MOST_STEP") = clado::kMostStep;
  m.def("scale_errors_cpu", [](const Weight& numbers, const Proposed& proposed, Address errors, int threads) {
    const char* op = "scale_errors_cpu";
    const auto weight = weight_of(op, numbers);
    expect_proposed(op, weight, proposed, errors);
    const auto [scales, count, low, high] = proposed;
    clado::scale_errors_cpu(weight, as<const float>(scales), count, low, high, as<double>(errors), threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("scale_errors_workspace", &clado::scale_errors_workspace);
  m.def("scale_errors_cuda",
        [](const Weight& numbers, const Proposed& proposed, Address errors, Address workspace, int device, Address stream) {
    const char* op = "scale_errors_cuda";
    const auto weight = weight_of(op, numbers);
    expect_proposed(op, weight, proposed, errors);
    const auto [scales, count, low, high] = proposed;
    clado::scale_errors_cuda(weight, as<const float>(scales), count, low, high, as<double>(errors), as<void>(workspace), device,
                             as<void>(stream));
  }, NoGil());
#endif
}
