#include "pairwise_ce/pairwise_ce.h"

#include "bindings.h"

void bind_pairwise_ce(py::module_& m) {
  m.def("pairwise_ce_cpu", [](Address logits, Address delta, Address total, Address squares, int64_t perturbations,
                              int64_t samples, int64_t classes, bool is_double, int threads) {
    expect_losses("pairwise_ce_cpu", {logits, delta, total, squares}, perturbations, samples, classes);
    clado::pairwise_ce_cpu(as<const void>(logits), as<const void>(delta), as<double>(total), as<double>(squares),
                           perturbations, samples, classes, is_double, threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("pairwise_ce_workspace", &clado::pairwise_ce_workspace);
  m.def("pairwise_ce_cuda", [](Address logits, Address delta, Address total, Address squares, int64_t perturbations,
                               int64_t samples, int64_t classes, bool is_double, Address workspace, int device,
                               Address stream) {
    expect_losses("pairwise_ce_cuda", {logits, delta, total, squares, workspace}, perturbations, samples, classes);
    clado::pairwise_ce_cuda(as<const void>(logits), as<const void>(delta), as<double>(total), as<double>(squares),
                            perturbations, samples, classes, is_double, as<void>(workspace), device, as<void>(stream));
  }, NoGil());
#endif
}
