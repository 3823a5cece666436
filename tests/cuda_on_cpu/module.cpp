// The CUDA half of the native module's bindings over kernels that run by cuda_on_cpu.h. The CPU half stays unresolved (the library
// is loaded lazily) and is never called. One file, since most of the time goes into pybind11.
#include "cuda_on_cpu.h"

#include "batched_ce.cpp"
#include "bitpack.cpp"
#include "carried.cpp"
#include "compensate.cpp"
#include "fake_quant.cpp"
#include "pairwise_bce.cpp"
#include "pairwise_ce.cpp"
#include "pairwise_mse.cpp"
#include "scale_errors.cpp"
#include "scale_search.cpp"

PYBIND11_MODULE(cuda_on_cpu, m) {
  m.def("set_order", [](int kind, unsigned seed) { cuda_on_cpu::set_order(static_cast<cuda_on_cpu::Order>(kind), seed); });
  bind_batched_ce(m);
  bind_bitpack(m);
  bind_carried(m);
  bind_compensate(m);
  bind_fake_quant(m);
  bind_pairwise_bce(m);
  bind_pairwise_ce(m);
  bind_pairwise_mse(m);
  bind_scale_errors(m);
  bind_scale_search(m);
}
