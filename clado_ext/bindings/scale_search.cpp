#include "scale_search/scale_search.h"

#include "weights.h"

namespace {

// (address or 0, rows of it)
using Importances = std::tuple<Address, int64_t>;

clado::Importance importance_of(const char* op, const clado::WeightView& weight, const Importances& numbers) {
  const auto [importance, count] = numbers;
  expect(count >= 1 && weight.rows % count == 0, op, "the rows of importance must divide those of the weight");
  return {as<const float>(importance), count};
}

}  // namespace

void bind_scale_search(py::module_& m) {
  m.attr("MOST_STEPS") = clado::kMostSteps;
  m.def("scale_search_cpu", [](const Weight& numbers, const Widths& bits, int steps, const Importances& importance,
                               Address scales, Address zeros, int threads) {
    const char* op = "scale_search_cpu";
    const auto weight = weight_of(op, numbers);
    expect_range(op, "steps", steps, 1, clado::kMostSteps);
    expect_memory(op, weight, {scales});
    return clado::scale_search_cpu(weight, importance_of(op, weight, importance), bits_of(op, bits), steps, as<float>(scales),
                                   as<int8_t>(zeros), threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("scale_search_workspace", &clado::scale_search_workspace);
  m.def("scale_search_cuda", [](const Weight& numbers, const Widths& bits, int steps, const Importances& importance,
                                Address scales, Address zeros, Address workspace, int device, Address stream) {
    const char* op = "scale_search_cuda";
    const auto weight = weight_of(op, numbers);
    expect_range(op, "steps", steps, 1, clado::kMostSteps);
    expect_memory(op, weight, {scales});
    clado::scale_search_cuda(weight, importance_of(op, weight, importance), bits_of(op, bits), steps, as<float>(scales),
                             as<int8_t>(zeros), as<void>(workspace), device, as<void>(stream));
  }, NoGil());
#endif
}
