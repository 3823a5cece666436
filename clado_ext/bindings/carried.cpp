#include "carried/carried.h"

#include <tuple>

#include "bindings.h"

namespace {

// (streams, rows, columns, delta is bfloat16, out is bfloat16)
using Streams = std::tuple<int64_t, int64_t, int64_t, bool, bool>;

clado::Streams streams_of(const char* op, const Streams& numbers) {
  const auto [streams, rows, columns, delta_half, out_half] = numbers;
  expect_sizes(op, {streams, rows, columns});
  return {streams, rows, columns, delta_half, out_half};
}

}  // namespace

void bind_carried(py::module_& m) {
  m.def("carried_gelu_cpu", [](Address clean, Address delta, Address out, const Streams& streams, int threads) {
    clado::carried_gelu_cpu(as<const float>(clean), as<const void>(delta), as<void>(out),
                            streams_of("carried_gelu_cpu", streams), threads);
  }, NoGil());
  m.def("carried_layer_norm_cpu", [](Address clean, Address delta, Address weight, Address out, const Streams& streams,
                                     float eps, int threads) {
    clado::carried_layer_norm_cpu(as<const float>(clean), as<const void>(delta), as<const float>(weight), as<void>(out),
                                  streams_of("carried_layer_norm_cpu", streams), eps, threads);
  }, NoGil());
  m.def("carried_add_layer_norm_cpu", [](Address clean, Address residual, Address branch, Address weight, Address sum,
                                         Address out, const Streams& streams, float eps, int threads) {
    clado::carried_add_layer_norm_cpu(as<const float>(clean), as<const float>(residual), as<const void>(branch),
                                      as<const float>(weight), as<float>(sum), as<void>(out),
                                      streams_of("carried_add_layer_norm_cpu", streams), eps, threads);
  }, NoGil());
  m.def("carried_softmax_cpu", [](Address scores, Address clean, Address delta, Address out, const Streams& streams,
                                  float scale, int threads) {
    clado::carried_softmax_cpu(as<const float>(scores), as<const float>(clean), as<const void>(delta), as<void>(out),
                               streams_of("carried_softmax_cpu", streams), scale, threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("carried_gelu_cuda", [](Address clean, Address delta, Address out, const Streams& streams, int device, Address stream) {
    clado::carried_gelu_cuda(as<const float>(clean), as<const void>(delta), as<void>(out),
                             streams_of("carried_gelu_cuda", streams), device, as<void>(stream));
  }, NoGil());
  m.def("carried_layer_norm_cuda", [](Address clean, Address delta, Address weight, Address out, const Streams& streams,
                                      float eps, int device, Address stream) {
    clado::carried_layer_norm_cuda(as<const float>(clean), as<const void>(delta), as<const float>(weight), as<void>(out),
                                   streams_of("carried_layer_norm_cuda", streams), eps, device, as<void>(stream));
  }, NoGil());
  m.def("carried_add_layer_norm_cuda", [](Address clean, Address residual, Address branch, Address weight, Address sum,
                                          Address out, const Streams& streams, float eps, int device, Address stream) {
    clado::carried_add_layer_norm_cuda(as<const float>(clean), as<const float>(residual), as<const void>(branch),
                                       as<const float>(weight), as<float>(sum), as<void>(out),
                                       streams_of("carried_add_layer_norm_cuda", streams), eps, device, as<void>(stream));
  }, NoGil());
  m.def("carried_softmax_cuda", [](Address scores, Address clean, Address delta, Address out, const Streams& streams,
                                   float scale, int device, Address stream) {
    clado::carried_softmax_cuda(as<const float>(scores), as<const float>(clean), as<const void>(delta), as<void>(out),
                                streams_of("carried_softmax_cuda", streams), scale, device, as<void>(stream));
  }, NoGil());
#endif
}
