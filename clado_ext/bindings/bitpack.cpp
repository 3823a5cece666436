#include "bitpack/bitpack.h"

#include "weights.h"

namespace {

void check(const char* op, Address from, Address to, int64_t rows, int64_t columns, int bits) {
  expect_sizes(op, {rows, columns});
  expect_memory(op, rows * columns, {from, to});
  expect_bits(op, bits);
}

}  // namespace

void bind_bitpack(py::module_& m) {
  m.def("pack_cpu", [](Address codes, Address words, int64_t rows, int64_t columns, int bits, int threads) {
    check("pack_cpu", codes, words, rows, columns, bits);
    return clado::pack_cpu(as<const int8_t>(codes), as<int32_t>(words), rows, columns, bits, threads);
  }, NoGil());
  m.def("unpack_cpu", [](Address words, Address codes, int64_t rows, int64_t columns, int bits, int threads) {
    check("unpack_cpu", words, codes, rows, columns, bits);
    clado::unpack_cpu(as<const int32_t>(words), as<int8_t>(codes), rows, columns, bits, threads);
  }, NoGil());
#ifdef CLADO_WITH_CUDA
  m.def("pack_cuda", [](Address codes, Address words, int64_t rows, int64_t columns, int bits, int device, Address stream) {
    check("pack_cuda", codes, words, rows, columns, bits);
    clado::pack_cuda(as<const int8_t>(codes), as<int32_t>(words), rows, columns, bits, device, as<void>(stream));
  }, NoGil());
  m.def("unpack_cuda", [](Address words, Address codes, int64_t rows, int64_t columns, int bits, int device, Address stream) {
    check("unpack_cuda", words, codes, rows, columns, bits);
    clado::unpack_cuda(as<const int32_t>(words), as<int8_t>(codes), rows, columns, bits, device, as<void>(stream));
  }, NoGil());
#endif
}
