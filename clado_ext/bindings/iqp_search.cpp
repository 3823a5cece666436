#include "iqp_search/iqp_search.h"

#include "iqp_program.h"

void bind_iqp_search(py::module_& m) {
  m.def("iqp_search_cpu", [](const Program& program, Address choice, int64_t seed, int64_t work, double seconds, double target) {
    return clado::iqp_search_cpu(program_of(program), as<int64_t>(choice), seed, work, seconds, target);
  }, NoGil());
}
