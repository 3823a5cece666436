#include "iqp_search/iqp_search.h"

#include "iqp_program.h"

void bind_iqp_search(py::module_& m) {
  m.def("iqp_search_cpu", [](Address matrix, Address starts, Address rows, Address limits, int64_t layers, int64_t budgets,
                             Address choice, int64_t seed, int64_t work, double seconds, double target) {
    const clado::IqpProgram program = program_of(matrix, starts, rows, limits, layers, budgets);
    return clado::iqp_search_cpu(program, as<int64_t>(choice), seed, work, seconds, target);
  }, NoGil());
}
