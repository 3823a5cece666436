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

// (element, group size, rule, address of the tensor's scale or 0, address of scales, address of zeros or 0) each
using Targets = std::vector<std::tuple<int, int64_t, int, Address, Address, Address>>;

clado::TargetList targets_of(const char* op, const clado::WeightView& weight, const Targets& targets) {
  expect_range(op, "the number of targets", static_cast<int64_t>(targets.size()), 1, clado::kMostFormats);
  clado::TargetList list;
  for (const auto& [element, group_size, rule, tensor_scale, scales, zeros] : targets) {
    expect_element(op, element);
    expect_range(op, "rule", rule, static_cast<int>(clado::ScaleRule::any), static_cast<int>(clado::ScaleRule::e4m3));
    const auto by = static_cast<clado::ScaleRule>(rule);
    expect(group_size >= 1, op, "group_size must be positive");
    expect(clado::is_float(element) ? zeros == 0 : by == clado::ScaleRule::any, op, "zeros and rule must be those of the element");
    expect((by == clado::ScaleRule::e4m3) == (tensor_scale != 0), op, "a tensor's scale must come with the rule e4m3 alone");
    expect_memory(op, weight, {scales});
    list.at[list.count++] = {element, group_size, by, as<const float>(tensor_scale), as<float>(scales), as<int8_t>(zeros)};
  }
  return list;
}

}  // namespace

void bind_scale_search(py::module_& m) {
  m.attr("MOST_STEPS") = clado::kMostSteps;
  m.attr("ANY_SCALE") = static_cast<int>(clado::ScaleRule::any);
  m.attr("POWER_OF_TWO") = static_cast<int>(clado::ScaleRule::power_of_two);
  m.attr("E4M3_SCALE") = static_cast<int>(clado::ScaleRule::e4m3);
  m.def("scale_search_cpu", [](const Weight& numbers, const Targets& targets, int steps, const Importances& importance,
                               int threads) {
    const char* op = "scale_search_cpu";
    const auto weight = weight_of(op, numbers);
    expect_range(op, "steps", steps, 1, clado::kMostSteps);
    return clado::scale_search_cpu(weight, importance_of(op, weight, importance), targets_of(op, weight, targets), steps, threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("scale_search_workspace", &clado::scale_search_workspace);
  m.def("scale_search_cuda", [](const Weight& numbers, const Targets& targets, int steps, const Importances& importance,
                                Address workspace, int device, Address stream) {
    const char* op = "scale_search_cuda";
    const auto weight = weight_of(op, numbers);
    expect_range(op, "steps", steps, 1, clado::kMostSteps);
    clado::scale_search_cuda(weight, importance_of(op, weight, importance), targets_of(op, weight, targets), steps,
                             as<void>(workspace), device, as<void>(stream));
  }, NoGil());
#endif
}
