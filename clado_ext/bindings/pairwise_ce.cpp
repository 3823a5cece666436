#include "pairwise_ce/pairwise_ce.h"

#include "bindings.h"

void bind_pairwise_ce(py::module_& m) {
  m.def("pairwise_ce_workspace_cpu", &clado::pairwise_ce_workspace_cpu);
  m.def("pairwise_ce_cpu", [](Address logits, Address delta, Address total, Address squares, Address workspace,
                              int64_t perturbations, int64_t samples, int64_t classes, bool is_double, int threads) {
    clado::pairwise_ce_cpu(as<const void>(logits), as<const void>(delta), as<double>(total), as<double>(squares),
                           as<void>(workspace), perturbations, samples, classes, is_double, threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("pairwise_ce_workspace_cuda", &clado::pairwise_ce_workspace_cuda);
  m.def("pairwise_ce_cuda", [](Address logits, Address delta, Address total, Address squares, Address workspace,
                               int64_t perturbations, int64_t samples, int64_t classes, bool is_double, int device, Address stream) {
    clado::pairwise_ce_cuda(as<const void>(logits), as<const void>(delta), as<double>(total), as<double>(squares),
                            as<void>(workspace), perturbations, samples, classes, is_double, device, as<void>(stream));
  }, NoGil());
#endif
}
