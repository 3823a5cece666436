#include "pairwise_mse/pairwise_mse.h"

#include "pairs.h"

void bind_pairwise_mse(py::module_& m) {
  m.def("pairwise_mse_cpu", [](const PairNumbers& numbers, Address weight, Address total, Address squares, int threads) {
    const clado::Pairs pairs = pairs_of("pairwise_mse_cpu", numbers, {total, squares});
    clado::pairwise_mse_cpu(pairs, as<const void>(weight), as<double>(total), as<double>(squares), threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("pairwise_mse_workspace", [](const PairNumbers& numbers) {
    return clado::pairwise_mse_workspace(pairs_of("pairwise_mse_workspace", numbers, {}));
  });
  m.def("pairwise_mse_cuda", [](const PairNumbers& numbers, Address weight, Address total, Address squares, Address workspace,
                                int device, Address stream) {
    const clado::Pairs pairs = pairs_of("pairwise_mse_cuda", numbers, {total, squares, workspace});
    clado::pairwise_mse_cuda(pairs, as<const void>(weight), as<double>(total), as<double>(squares), as<void>(workspace), device,
                             as<void>(stream));
  }, NoGil());
#endif
}
