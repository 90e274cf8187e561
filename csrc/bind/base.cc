#include "base/cpu.h"
#include "bind/bind.h"

namespace penstock::bind {

Code code_of(const std::string& name) {
  for (uint8_t code = 1; code <= static_cast<uint8_t>(Code::kInternal); ++code) {
    if (name == code_name(static_cast<Code>(code))) return static_cast<Code>(code);
  }
  throw py::value_error("code is " + name + "; expected a canonical code");
}

void bind_base(py::module_& m) {
  m.def(
      "cpu_level", [] { return static_cast<int>(cpu_level()); },
      "Instruction-set path in force: 0 portable, 1 AVX2, 2 AVX-512.");
  m.def(
      "force_cpu_level",
      [](int level) {
        if (level < 0 || level > 2) {
          throw py::value_error("level is " + std::to_string(level) + "; expected 0, 1 or 2");
        }
        return static_cast<int>(force_cpu_level(static_cast<CpuLevel>(level)));
      },
      py::arg("level"), "Lower the path in force (tests, benchmarks); returns the path that now holds.");
}

}  // namespace penstock::bind
