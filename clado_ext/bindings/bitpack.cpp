#include "bitpack/bitpack.h"

#include "bindings.h"

void bind_bitpack(py::module_& m) {
  m.def("pack_cpu", [](Address codes, Address words, int64_t rows, int64_t columns, int bits, int threads) {
    return clado::pack_cpu(as<const int8_t>(codes), as<int32_t>(words), rows, columns, bits, threads);
  }, NoGil());
  m.def("unpack_cpu", [](Address words, Address codes, int64_t rows, int64_t columns, int bits, int threads) {
    clado::unpack_cpu(as<const int32_t>(words), as<int8_t>(codes), rows, columns, bits, threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("pack_cuda", [](Address codes, Address words, int64_t rows, int64_t columns, int bits, int device, Address stream) {
    clado::pack_cuda(as<const int8_t>(codes), as<int32_t>(words), rows, columns, bits, device, as<void>(stream));
  }, NoGil());
  m.def("unpack_cuda", [](Address words, Address codes, int64_t rows, int64_t columns, int bits, int device, Address stream) {
    clado::unpack_cuda(as<const int32_t>(words), as<int8_t>(codes), rows, columns, bits, device, as<void>(stream));
  }, NoGil());
#endif
}
