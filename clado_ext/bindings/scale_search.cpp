#include "scale_search/scale_search.h"

#include <vector>

#include "bindings.h"

using Bits = std::vector<int32_t>;

void bind_scale_search(py::module_& m) {
  m.def("scale_search_cpu", [](Address weight, int dtype, Address scales, Address zeros, int64_t rows, int64_t columns,
                               int64_t group_size, const Bits& bits, int steps, int threads) {
    clado::scale_search_cpu(as<const void>(weight), dtype, as<float>(scales), as<int8_t>(zeros), rows, columns, group_size,
                            bits.data(), static_cast<int>(bits.size()), steps, threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("scale_search_workspace", &clado::scale_search_workspace);
  m.def("scale_search_cuda", [](Address weight, int dtype, Address scales, Address zeros, int64_t rows, int64_t columns,
                                int64_t group_size, const Bits& bits, int steps, Address workspace, int device,
                                Address stream) {
    clado::scale_search_cuda(as<const void>(weight), dtype, as<float>(scales), as<int8_t>(zeros), rows, columns, group_size,
                             bits.data(), static_cast<int>(bits.size()), steps, as<void>(workspace), device,
                             as<void>(stream));
  }, NoGil());
#endif
}
