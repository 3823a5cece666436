#include "iqp_prove/iqp_prove.h"

#include "iqp_program.h"

namespace {

// (addresses of quadratic, linear, multipliers, removed, point; constant, slack)
using Form = std::tuple<Address, Address, Address, Address, Address, double, double>;

clado::IqpForm form_of(const Form& numbers) {
  const auto [quadratic, linear, multipliers, removed, point, constant, slack] = numbers;
  return {as<const double>(quadratic), as<const double>(linear), as<const double>(multipliers), as<const double>(removed),
          as<const double>(point),     constant,                 slack};
}

}  // namespace

void bind_iqp_prove(py::module_& m) {
  m.def("iqp_prove_cpu", [](const Program& program, const Form& form, Address choice, Address alive, Address outcome, double tolerance,
                            int64_t nodes, double seconds, int threads) {
    const clado::IqpProof proof = clado::iqp_prove_cpu(program_of(program), form_of(form), as<int64_t>(choice), as<uint8_t>(alive),
                                                       tolerance, nodes, seconds, threads);
    double* out = as<double>(outcome);
    out[0] = proof.bound, out[1] = static_cast<double>(proof.nodes), out[2] = proof.finished;
  }, NoGil());
}
