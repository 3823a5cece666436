// The native module knows no torch: addresses, sizes, strides in elements, dtype codes, device, stream and threads are integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace py = pybind11;

using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_batched_ce(py::module_& m);
void bind_bitpack(py::module_& m);
void bind_fake_quant(py::module_& m);
void bind_iqp_prove(py::module_& m);
void bind_iqp_search(py::module_& m);
void bind_pairwise_ce(py::module_& m);
void bind_scale_search(py::module_& m);
