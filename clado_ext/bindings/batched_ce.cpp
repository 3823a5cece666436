#include "batched_ce/batched_ce.h"

#include "bindings.h"

void bind_batched_ce(py::module_& m) {
  m.def("batched_ce_cpu", [](Address logits, Address delta, Address target, Address increase, int64_t perturbations,
                             int64_t samples, int64_t classes, bool is_double, int threads) {
    expect_losses("batched_ce_cpu", {logits, delta, increase}, perturbations, samples, classes);
    return clado::batched_ce_cpu(as<const void>(logits), as<const void>(delta), as<const int64_t>(target), as<double>(increase),
                                 perturbations, samples, classes, is_double, threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("batched_ce_cuda", [](Address logits, Address delta, Address target, Address increase, int64_t perturbations,
                              int64_t samples, int64_t classes, bool is_double, int device, Address stream) {
    expect_losses("batched_ce_cuda", {logits, delta, increase}, perturbations, samples, classes);
    clado::batched_ce_cuda(as<const void>(logits), as<const void>(delta), as<const int64_t>(target), as<double>(increase),
                           perturbations, samples, classes, is_double, device, as<void>(stream));
  }, NoGil());
#endif
}
