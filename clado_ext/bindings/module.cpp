#include "bindings.h"
#include "common/simd.h"
#include "common/weights.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels of clado_ext as plain functions of addresses and sizes; use the torch ops in clado_ext instead.";
  m.attr("version") = CLADO_VERSION;
#ifdef CLADO_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.attr("FLOAT32") = static_cast<int>(clado::DType::float32);
  m.attr("FLOAT16") = static_cast<int>(clado::DType::float16);
  m.attr("BFLOAT16") = static_cast<int>(clado::DType::bfloat16);
  m.attr("LEAST_BITS") = clado::kLeastBits;
  m.attr("MOST_BITS") = clado::kMostBits;
  m.attr("E2M1") = static_cast<int>(clado::kE2M1);
  m.attr("E4M3") = static_cast<int>(clado::kE4M3);
  m.attr("E5M2") = static_cast<int>(clado::kE5M2);
  m.attr("MOST_FORMATS") = clado::kMostFormats;
  m.def("simd_level", [] { return static_cast<int>(clado::simd_level()); }, "SIMD level in use: 0 base, 1 AVX2, 2 AVX-512.");
  m.def("set_simd", [](int level) { return static_cast<int>(clado::set_simd(static_cast<clado::Simd>(level))); },
        py::arg("level"), "Lowers the SIMD level for this process; returns the level in use.");
  bind_batched_ce(m);
  bind_bitpack(m);
  bind_carried(m);
  bind_compensate(m);
  bind_fake_quant(m);
  bind_iqp_prove(m);
  bind_iqp_search(m);
  bind_pairwise_bce(m);
  bind_pairwise_ce(m);
  bind_pairwise_mse(m);
  bind_scale_errors(m);
  bind_scale_search(m);
}
