#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "drift/histogram.h"

namespace penstock::bind {
namespace {

using Floats = py::array_t<float, py::array::c_style>;

void raise_if_bad(const Status& status) {
  if (!status.is_ok()) throw py::value_error(status.message);
}

std::unique_ptr<HistogramCounts> make_counts(const py::list& columns) {
  std::vector<HistogramColumn> parsed;
  for (size_t j = 0; j < columns.size(); ++j) {
    const py::handle item = columns[j];
    const std::string name = "columns[" + std::to_string(j) + "]";
    HistogramColumn column;
    if (py::isinstance<py::int_>(item)) {
      const auto codes = item.cast<long long>();
      if (codes < 1 || codes > static_cast<long long>(HistogramSpec::kMaxCodes)) {
        throw py::value_error(name + " is " + std::to_string(codes) + "; expected 1 to " +
                              std::to_string(HistogramSpec::kMaxCodes) + " codes");
      }
      column.n_codes = static_cast<uint32_t>(codes);
    } else if (Floats::check_(item) && py::reinterpret_borrow<py::array>(item).ndim() == 1) {
      const auto edges = py::reinterpret_borrow<Floats>(item);
      column.edges.assign(edges.data(), edges.data() + edges.size());
    } else {
      throw py::value_error(name + ": expected a contiguous 1-D float32 array of edges or a number of codes");
    }
    parsed.push_back(std::move(column));
  }
  std::shared_ptr<const HistogramSpec> spec;
  raise_if_bad(HistogramSpec::create(parsed, &spec));
  return std::make_unique<HistogramCounts>(std::move(spec));
}

}  // namespace

void bind_drift(py::module_& m) {
  py::class_<HistogramCounts>(
      m, "HistogramCounts",
      "Counts per column: fine bins (e[k-1], e[k]] or codes, then missing, unseen, -inf, +inf. "
      "One writer at a time.")
      .def(py::init(&make_counts), py::arg("columns"),
           "columns: per column a float32 array of strictly increasing finite edges, or the int number of "
           "codes of a categorical column. Raises ValueError.")
      .def(
          "count",
          [](HistogramCounts& self, const Floats& rows) {
            const size_t width = self.spec().n_columns();
            if (rows.ndim() != 2 || static_cast<size_t>(rows.shape(1)) != width) {
              throw py::value_error("rows: expected shape [n, " + std::to_string(width) + "]");
            }
            const float* data = rows.data();
            const auto n = static_cast<size_t>(rows.shape(0));
            // The caller keeps other threads off these counts; nobody else needs to wait for them.
            const py::gil_scoped_release release;
            self.count(data, n, width);
          },
          py::arg("rows").noconvert(), "Adds float32 rows [n, columns]. Raises ValueError on another shape.")
      .def(
          "snapshot",
          [](const HistogramCounts& self) {
            py::array_t<uint64_t> out(static_cast<py::ssize_t>(self.spec().n_slots()));
            self.snapshot(out.mutable_data());
            return out;
          },
          "A copy of all counts, uint64 [slots].")
      .def(
          "merge",
          [](HistogramCounts& self, const HistogramCounts& other) { raise_if_bad(self.merge(other)); },
          py::arg("other"), "Adds other's counts. Raises ValueError, unchanged, when the specs differ.")
      .def("clear", &HistogramCounts::clear, "Sets every count to zero.");
}

}  // namespace penstock::bind
