#include "iqp_prove/iqp_prove.h"

#include "iqp_program.h"

void bind_iqp_prove(py::module_& m) {
  m.def("iqp_prove_cpu", [](Address matrix, Address starts, Address rows, Address limits, int64_t layers, int64_t budgets,
                            Address quadratic, Address linear, Address multipliers, Address removed, Address point, double constant, double slack,
                            Address choice, Address alive, Address outcome, double tolerance, int64_t nodes, double seconds) {
    const clado::IqpProgram program = program_of(matrix, starts, rows, limits, layers, budgets);
    const clado::IqpForm form{as<const double>(quadratic), as<const double>(linear), as<const double>(multipliers),
                              as<const double>(removed),         as<const double>(point),  constant, slack};
    const clado::IqpProof proof =
        clado::iqp_prove_cpu(program, form, as<int64_t>(choice), as<uint8_t>(alive), tolerance, nodes, seconds);
    double* out = as<double>(outcome);
    out[0] = proof.bound, out[1] = static_cast<double>(proof.nodes), out[2] = proof.finished;
  }, NoGil());
}
