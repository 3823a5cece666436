#include "scale_search/scale_search.h"

#include "weights.h"

namespace {

void check(const char* op, Address weight, int dtype, Address scales, int64_t rows, int64_t columns, int64_t group_size,
           const Bits& bits, int steps) {
  expect_matrix(op, dtype, rows, columns, group_size, bits);
  expect_memory(op, rows * columns, {weight, scales});
  expect_steps(op, steps);
}

}  // namespace

void bind_scale_search(py::module_& m) {
  m.def("scale_search_cpu", [](Address weight, int dtype, Address scales, Address zeros, int64_t rows, int64_t columns,
                               int64_t group_size, const Bits& bits, int steps, int threads) {
    check("scale_search_cpu", weight, dtype, scales, rows, columns, group_size, bits, steps);
    clado::scale_search_cpu(as<const void>(weight), dtype, as<float>(scales), as<int8_t>(zeros), rows, columns, group_size,
                            bits.data(), count_of(bits), steps, threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("scale_search_workspace", &clado::scale_search_workspace);
  m.def("scale_search_cuda", [](Address weight, int dtype, Address scales, Address zeros, int64_t rows, int64_t columns,
                                int64_t group_size, const Bits& bits, int steps, Address workspace, int device,
                                Address stream) {
    check("scale_search_cuda", weight, dtype, scales, rows, columns, group_size, bits, steps);
    clado::scale_search_cuda(as<const void>(weight), dtype, as<float>(scales), as<int8_t>(zeros), rows, columns, group_size,
                             bits.data(), count_of(bits), steps, as<void>(workspace), device, as<void>(stream));
  }, NoGil());
#endif
}
