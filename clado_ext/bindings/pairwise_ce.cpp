#include "pairwise_ce/pairwise_ce.h"

#include "pairs.h"

void bind_pairwise_ce(py::module_& m) {
  m.def("pairwise_ce_cpu", [](const PairNumbers& numbers, const LogitNumbers& logits, Address total, Address squares, int threads) {
    const clado::Pairs pairs = pairs_of("pairwise_ce_cpu", numbers, {total, squares});
    const clado::LogitRows rows = rows_of("pairwise_ce_cpu", logits, pairs);
    clado::pairwise_ce_cpu(pairs, rows, as<double>(total), as<double>(squares), threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("pairwise_ce_workspace", [](const PairNumbers& numbers, int64_t per_sample) {
    expect(per_sample >= 1, "pairwise_ce_workspace", "rows per sample must be positive");
    return clado::pairwise_ce_workspace(pairs_of("pairwise_ce_workspace", numbers, {}), per_sample);
  });
  m.def("pairwise_ce_cuda", [](const PairNumbers& numbers, const LogitNumbers& logits, Address total, Address squares,
                               Address workspace, int device, Address stream) {
    const clado::Pairs pairs = pairs_of("pairwise_ce_cuda", numbers, {total, squares, workspace});
    const clado::LogitRows rows = rows_of("pairwise_ce_cuda", logits, pairs);
    clado::pairwise_ce_cuda(pairs, rows, as<double>(total), as<double>(squares), as<void>(workspace), device, as<void>(stream));
  }, NoGil());
#endif
}
