// The native module knows no torch: addresses, sizes, strides in elements, dtype codes, device, stream and threads are integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace py = pybind11;

using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

// Memory cannot be checked here, numbers can: ValueError("op: …") unless `holds`.
inline void expect(bool holds, const char* op, const char* must) {
  if (!holds) throw std::invalid_argument(std::string(op) + ": " + must);
}
inline void expect_range(const char* op, const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  throw std::invalid_argument(std::string(op) + ": " + name + " must lie in " + std::to_string(low) + ".." + std::to_string(high));
}
inline void expect_sizes(const char* op, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) expect(size >= 0, op, "sizes must not be negative");
}
// No null address where there are elements.
inline void expect_memory(const char* op, int64_t elements, std::initializer_list<Address> addresses) {
  for (const Address address : addresses) expect(elements == 0 || address != 0, op, "addresses must not be null");
}

void bind_batched_ce(py::module_& m);
void bind_bitpack(py::module_& m);
void bind_carried(py::module_& m);
void bind_compensate(py::module_& m);
void bind_fake_quant(py::module_& m);
void bind_iqp_prove(py::module_& m);
void bind_iqp_search(py::module_& m);
void bind_pairwise_bce(py::module_& m);
void bind_pairwise_ce(py::module_& m);
void bind_pairwise_mse(py::module_& m);
void bind_scale_errors(py::module_& m);
void bind_scale_search(py::module_& m);
