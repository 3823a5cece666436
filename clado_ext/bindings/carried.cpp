#include "carried/carried.h"

#include "bindings.h"

void bind_carried(py::module_& m) {
  m.def("carried_gelu_cpu", [](Address clean, Address delta, Address out, int64_t streams, int64_t size, bool delta_half,
                               bool out_half, int threads) {
    clado::carried_gelu_cpu(as<const float>(clean), as<const void>(delta), as<void>(out), streams, size, delta_half, out_half, threads);
  }, NoGil());
  m.def("carried_layer_norm_cpu", [](Address clean, Address delta, Address weight, Address out, int64_t streams, int64_t rows,
                                     int64_t columns, float eps, bool delta_half, bool out_half, int threads) {
    clado::carried_layer_norm_cpu(as<const float>(clean), as<const void>(delta), as<const float>(weight), as<void>(out), streams,
                                  rows, columns, eps, delta_half, out_half, threads);
  }, NoGil());
  m.def("carried_add_layer_norm_cpu", [](Address clean, Address residual, Address branch, Address weight, Address sum, Address out,
                                         int64_t streams, int64_t rows, int64_t columns, float eps, bool branch_half, bool out_half,
                                         int threads) {
    clado::carried_add_layer_norm_cpu(as<const float>(clean), as<const float>(residual), as<const void>(branch), as<const float>(weight),
                                      as<float>(sum), as<void>(out), streams, rows, columns, eps, branch_half, out_half, threads);
  }, NoGil());
  m.def("carried_softmax_cpu", [](Address scores, Address clean, Address delta, Address out, int64_t streams, int64_t rows,
                                  int64_t columns, float scale, bool delta_half, bool out_half, int threads) {
    clado::carried_softmax_cpu(as<const float>(scores), as<const float>(clean), as<const void>(delta), as<void>(out), streams, rows,
                               columns, scale, delta_half, out_half, threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("carried_gelu_cuda", [](Address clean, Address delta, Address out, int64_t streams, int64_t size, bool delta_half,
                                bool out_half, int device, Address stream) {
    clado::carried_gelu_cuda(as<const float>(clean), as<const void>(delta), as<void>(out), streams, size, delta_half, out_half, device,
                             as<void>(stream));
  }, NoGil());
  m.def("carried_layer_norm_cuda", [](Address clean, Address delta, Address weight, Address out, int64_t streams, int64_t rows,
                                      int64_t columns, float eps, bool delta_half, bool out_half, int device, Address stream) {
    clado::carried_layer_norm_cuda(as<const float>(clean), as<const void>(delta), as<const float>(weight), as<void>(out), streams,
                                   rows, columns, eps, delta_half, out_half, device, as<void>(stream));
  }, NoGil());
  m.def("carried_add_layer_norm_cuda", [](Address clean, Address residual, Address branch, Address weight, Address sum, Address out,
                                          int64_t streams, int64_t rows, int64_t columns, float eps, bool branch_half, bool out_half,
                                          int device, Address stream) {
    clado::carried_add_layer_norm_cuda(as<const float>(clean), as<const float>(residual), as<const void>(branch),
                                       as<const float>(weight), as<float>(sum), as<void>(out), streams, rows, columns, eps, branch_half,
                                       out_half, device, as<void>(stream));
  }, NoGil());
  m.def("carried_softmax_cuda", [](Address scores, Address clean, Address delta, Address out, int64_t streams, int64_t rows,
                                   int64_t columns, float scale, bool delta_half, bool out_half, int device, Address stream) {
    clado::carried_softmax_cuda(as<const float>(scores), as<const float>(clean), as<const void>(delta), as<void>(out), streams, rows,
                                columns, scale, delta_half, out_half, device, as<void>(stream));
  }, NoGil());
#endif
}
