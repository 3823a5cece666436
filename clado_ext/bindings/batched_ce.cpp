#include "batched_ce/batched_ce.h"

#include "logits.h"

void bind_batched_ce(py::module_& m) {
  m.def("batched_ce_cpu", [](const Changes& changes, Address target, Address increase, int threads) {
    return clado::batched_ce_cpu(changes_of("batched_ce_cpu", changes, {increase}), as<const int64_t>(target), as<double>(increase),
                                 threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("batched_ce_cuda", [](const Changes& changes, Address target, Address increase, int device, Address stream) {
    clado::batched_ce_cuda(changes_of("batched_ce_cuda", changes, {increase}), as<const int64_t>(target), as<double>(increase), device,
                           as<void>(stream));
  }, NoGil());
#endif
}
