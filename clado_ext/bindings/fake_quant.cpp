#include "fake_quant/fake_quant.h"

#include "weights.h"

void bind_fake_quant(py::module_& m) {
  m.def("fake_quant_cpu", [](Address weight, int dtype, Address scales, Address zeros, Address values, Address sqerr,
                             int64_t rows, int64_t columns, int64_t group_size, const Bits& bits, int threads) {
    expect_matrix("fake_quant_cpu", dtype, rows, columns, group_size, bits);
    expect_memory("fake_quant_cpu", rows * columns, {weight, scales, values, sqerr});
    clado::fake_quant_cpu(as<const void>(weight), dtype, as<const float>(scales), as<const int8_t>(zeros), as<void>(values),
                          as<double>(sqerr), rows, columns, group_size, bits.data(), count_of(bits), threads);
  }, NoGil());
  m.def("quantize_weight_cpu", [](Address weight, int dtype, Address scales, Address zeros, Address values, Address sqerr,
                                  int64_t rows, int64_t columns, int64_t group_size, const Bits& bits, int steps, int threads) {
    expect_matrix("quantize_weight_cpu", dtype, rows, columns, group_size, bits);
    expect_memory("quantize_weight_cpu", rows * columns, {weight, scales, values, sqerr});
    expect_steps("quantize_weight_cpu", steps);
    clado::quantize_weight_cpu(as<const void>(weight), dtype, as<float>(scales), as<int8_t>(zeros), as<void>(values),
                               as<double>(sqerr), rows, columns, group_size, bits.data(), count_of(bits), steps, threads);
  }, NoGil());
  m.def("quantize_cpu", [](Address weight, int dtype, Address scales, Address zeros, Address codes, int64_t rows,
                           int64_t columns, int64_t group_size, const Bits& bits, int threads) {
    expect_matrix("quantize_cpu", dtype, rows, columns, group_size, bits);
    expect_memory("quantize_cpu", rows * columns, {weight, scales, codes});
    clado::quantize_cpu(as<const void>(weight), dtype, as<const float>(scales), as<const int8_t>(zeros), as<int8_t>(codes),
                        rows, columns, group_size, bits.data(), count_of(bits), threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("fake_quant_cuda", [](Address weight, int dtype, Address scales, Address zeros, Address values, Address sqerr,
                              int64_t rows, int64_t columns, int64_t group_size, const Bits& bits, Address block_errors,
                              int device, Address stream) {
    expect_matrix("fake_quant_cuda", dtype, rows, columns, group_size, bits);
    expect_memory("fake_quant_cuda", rows * columns, {weight, scales, values, sqerr, block_errors});
    clado::fake_quant_cuda(as<const void>(weight), dtype, as<const float>(scales), as<const int8_t>(zeros), as<void>(values),
                           as<double>(sqerr), rows, columns, group_size, bits.data(), count_of(bits), as<float>(block_errors),
                           device, as<void>(stream));
  }, NoGil());
  // Both kernels queued by one call.
  m.def("quantize_weight_cuda", [](Address weight, int dtype, Address scales, Address zeros, Address values, Address sqerr,
                                   int64_t rows, int64_t columns, int64_t group_size, const Bits& bits, int steps,
                                   Address workspace, Address block_errors, int device, Address stream) {
    expect_matrix("quantize_weight_cuda", dtype, rows, columns, group_size, bits);
    expect_memory("quantize_weight_cuda", rows * columns, {weight, scales, values, sqerr, workspace, block_errors});
    expect_steps("quantize_weight_cuda", steps);
    clado::scale_search_cuda(as<const void>(weight), dtype, as<float>(scales), as<int8_t>(zeros), rows, columns, group_size,
                             bits.data(), count_of(bits), steps, as<void>(workspace), device, as<void>(stream));
    clado::fake_quant_cuda(as<const void>(weight), dtype, as<const float>(scales), as<const int8_t>(zeros), as<void>(values),
                           as<double>(sqerr), rows, columns, group_size, bits.data(), count_of(bits), as<float>(block_errors),
                           device, as<void>(stream));
  }, NoGil());
  m.def("quantize_cuda", [](Address weight, int dtype, Address scales, Address zeros, Address codes, int64_t rows,
                            int64_t columns, int64_t group_size, const Bits& bits, int device, Address stream) {
    expect_matrix("quantize_cuda", dtype, rows, columns, group_size, bits);
    expect_memory("quantize_cuda", rows * columns, {weight, scales, codes});
    clado::quantize_cuda(as<const void>(weight), dtype, as<const float>(scales), as<const int8_t>(zeros), as<int8_t>(codes),
                         rows, columns, group_size, bits.data(), count_of(bits), device, as<void>(stream));
  }, NoGil());
#endif
}
