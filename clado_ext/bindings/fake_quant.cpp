#include "fake_quant/fake_quant.h"

#include "scale_search/scale_search.h"
#include "weights.h"

void bind_fake_quant(py::module_& m) {
  m.def("fake_quant_cpu", [](const Weight& numbers, const Formats& formats, Address values, Address sqerr, int threads) {
    const char* op = "fake_quant_cpu";
    const auto weight = weight_of(op, numbers);
    expect_memory(op, weight, {values, sqerr});
    clado::fake_quant_cpu(weight, formats_of(op, weight, formats), as<void>(values), as<double>(sqerr), threads);
  }, NoGil());
  m.def("quantize_weight_cpu", [](const Weight& numbers, const Widths& bits, int steps, Address scales, Address zeros,
                                  Address values, Address sqerr, int threads) {
    const char* op = "quantize_weight_cpu";
    const auto weight = weight_of(op, numbers);
    expect_range(op, "steps", steps, 1, clado::kMostSteps);
    expect_memory(op, weight, {scales, values, sqerr});
    clado::quantize_weight_cpu(weight, bits_of(op, bits), steps, as<float>(scales), as<int8_t>(zeros), as<void>(values),
                               as<double>(sqerr), threads);
  }, NoGil());
  m.def("quantize_cpu", [](const Weight& numbers, const Formats& formats, Address codes, int threads) {
    const char* op = "quantize_cpu";
    const auto weight = weight_of(op, numbers);
    expect_memory(op, weight, {codes});
    clado::quantize_cpu(weight, formats_of(op, weight, formats), as<int8_t>(codes), threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("fake_quant_workspace", &clado::fake_quant_workspace);
  m.def("fake_quant_cuda", [](const Weight& numbers, const Formats& formats, Address values, Address sqerr, Address workspace,
                              int device, Address stream) {
    const char* op = "fake_quant_cuda";
    const auto weight = weight_of(op, numbers);
    expect_memory(op, weight, {values, sqerr, workspace});
    clado::fake_quant_cuda(weight, formats_of(op, weight, formats), as<void>(values), as<double>(sqerr), as<void>(workspace),
                           device, as<void>(stream));
  }, NoGil());
  m.def("quantize_weight_cuda", [](const Weight& numbers, const Widths& bits, int steps, Address scales, Address zeros,
                                   Address values, Address sqerr, Address search_workspace, Address workspace, int device,
                                   Address stream) {
    const char* op = "quantize_weight_cuda";
    const auto weight = weight_of(op, numbers);
    expect_range(op, "steps", steps, 1, clado::kMostSteps);
    expect_memory(op, weight, {scales, values, sqerr, search_workspace, workspace});
    clado::quantize_weight_cuda(weight, bits_of(op, bits), steps, as<float>(scales), as<int8_t>(zeros), as<void>(values),
                                as<double>(sqerr), as<void>(search_workspace), as<void>(workspace), device, as<void>(stream));
  }, NoGil());
  m.def("quantize_cuda", [](const Weight& numbers, const Formats& formats, Address codes, int device, Address stream) {
    const char* op = "quantize_cuda";
    const auto weight = weight_of(op, numbers);
    expect_memory(op, weight, {codes});
    clado::quantize_cuda(weight, formats_of(op, weight, formats), as<int8_t>(codes), device, as<void>(stream));
  }, NoGil());
#endif
}
