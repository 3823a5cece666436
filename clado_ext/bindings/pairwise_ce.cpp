#include "pairwise_ce/pairwise_ce.h"

#include "logits.h"

void bind_pairwise_ce(py::module_& m) {
  m.def("pairwise_ce_cpu", [](const Changes& changes, Address total, Address squares, int threads) {
    clado::pairwise_ce_cpu(changes_of("pairwise_ce_cpu", changes, {total, squares}), as<double>(total), as<double>(squares), threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("pairwise_ce_workspace", &clado::pairwise_ce_workspace);
  m.def("pairwise_ce_cuda", [](const Changes& changes, Address total, Address squares, Address workspace, int device, Address stream) {
    clado::pairwise_ce_cuda(changes_of("pairwise_ce_cuda", changes, {total, squares, workspace}), as<double>(total),
                            as<double>(squares), as<void>(workspace), device, as<void>(stream));
  }, NoGil());
#endif
}
