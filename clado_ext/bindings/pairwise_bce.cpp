#include "pairwise_bce/pairwise_bce.h"

#include "pairs.h"

void bind_pairwise_bce(py::module_& m) {
  m.def("pairwise_bce_cpu", [](const PairNumbers& numbers, const LogitNumbers& logits, Address total, Address squares, int threads) {
    const clado::Pairs pairs = pairs_of("pairwise_bce_cpu", numbers, {total, squares});
    expect(pairs.width == 1, "pairwise_bce_cpu", "the width must be 1");
    const clado::LogitRows rows = rows_of("pairwise_bce_cpu", logits, pairs);
    clado::pairwise_bce_cpu(pairs, rows, as<double>(total), as<double>(squares), threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("pairwise_bce_workspace", [](const PairNumbers& numbers, int64_t per_sample) {
    expect(per_sample >= 1, "pairwise_bce_workspace", "rows per sample must be positive");
    return clado::pairwise_bce_workspace(pairs_of("pairwise_bce_workspace", numbers, {}), per_sample);
  });
  m.def("pairwise_bce_cuda", [](const PairNumbers& numbers, const LogitNumbers& logits, Address total, Address squares,
                               Address workspace, int device, Address stream) {
    const clado::Pairs pairs = pairs_of("pairwise_bce_cuda", numbers, {total, squares, workspace});
    expect(pairs.width == 1, "pairwise_bce_cuda", "the width must be 1");
    const clado::LogitRows rows = rows_of("pairwise_bce_cuda", logits, pairs);
    clado::pairwise_bce_cuda(pairs, rows, as<double>(total), as<double>(squares), as<void>(workspace), device, as<void>(stream));
  }, NoGil());
#endif
}
