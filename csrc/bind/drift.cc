#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "drift/drift_panes.h"
#include "drift/histogram.h"

namespace penstock::bind {
namespace {

using Floats = py::array_t<float, py::array::c_style>;

void raise_if_bad(const Status& status) {
  if (!status.is_ok()) throw py::value_error(status.message);
}

std::shared_ptr<const HistogramSpec> make_spec(const py::list& columns) {
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
  return spec;
}

using Times = py::array_t<int64_t, py::array::c_style>;
using Scores = py::array_t<double, py::array::c_style>;

size_t add_rows(DriftPanes& self, const Times& now_us, const Floats& rows, const Scores& scores) {
  const py::ssize_t n = now_us.size();
  const size_t width = self.inputs().n_columns();
  if (now_us.ndim() != 1 || rows.ndim() != 2 || scores.ndim() != 1 || rows.shape(0) != n ||
      static_cast<size_t>(rows.shape(1)) != width || scores.size() != n) {
    throw py::value_error("expected now_us [n], rows [n, " + std::to_string(width) + "] and scores [n]");
  }
  const int64_t* times = now_us.data();
  if (std::any_of(times, times + n, [](int64_t t) { return t < 0; })) {
    throw py::value_error("now_us has a negative time; expected 0 to 2**63 - 1");
  }
  const float* values = rows.data();
  const double* first = scores.data();
  const py::gil_scoped_release release;
  return self.add(times, values, width, first, 1, static_cast<size_t>(n));
}

py::tuple window(DriftPanes& self, std::optional<int64_t> last, int64_t panes) {
  py::array_t<uint64_t> inputs(static_cast<py::ssize_t>(self.inputs().n_slots()));
  py::array_t<uint64_t> score(static_cast<py::ssize_t>(self.score().n_slots()));
  uint64_t* const input_counts = inputs.mutable_data();
  uint64_t* const score_counts = score.mutable_data();
  std::fill_n(input_counts, self.inputs().n_slots(), uint64_t{0});
  std::fill_n(score_counts, self.score().n_slots(), uint64_t{0});
  DriftPanes::Window found;
  {
    const py::gil_scoped_release release;
    found = self.window(last, panes, input_counts, score_counts);
  }
  return py::make_tuple(found.last, found.n, found.rows, found.late, found.expired, inputs, score);
}

}  // namespace

void bind_drift(py::module_& m) {
  py::class_<HistogramCounts>(
      m, "HistogramCounts",
      "Counts per column: fine bins (e[k-1], e[k]] or codes, then missing, unseen, -inf, +inf. "
      "One writer at a time.")
      .def(py::init(
               [](const py::list& columns) { return std::make_unique<HistogramCounts>(make_spec(columns)); }),
           py::arg("columns"),
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
  py::class_<DriftPanes, std::shared_ptr<DriftPanes>>(
      m, "DriftPanes",
      "Drift counts of served rows by pane of request time. Any thread; the GIL is not held while it counts.")
      .def(
          py::init([](const py::list& columns, const py::list& score, int64_t pane_us, int64_t window_us) {
            std::shared_ptr<DriftPanes> made;
            raise_if_bad(DriftPanes::create(make_spec(columns), make_spec(score), pane_us, window_us, &made));
            return made;
          }),
          py::arg("columns"), py::arg("score"), py::kw_only(), py::arg("pane_us"), py::arg("window_us"),
          "columns, score: as of HistogramCounts; one column of score. Raises ValueError.")
      .def("add", &add_rows, py::arg("now_us").noconvert(), py::arg("rows").noconvert(),
           py::arg("scores").noconvert(),
           "Count rows float32 [n, columns] with request times int64 [n] >= 0 and float64 scores [n]; "
           "returns\n"
           "how many came too late. Raises ValueError.")
      .def("window", &window, py::arg("last"), py::arg("panes"),
           "(last, n, rows, late, expired, inputs uint64 [slots], score uint64 [slots]) of the panes up to\n"
           "`last` (None: the newest held; -1 when there is none). rows, late and expired are since the "
           "start.")
      .def(
          "merge", [](DriftPanes& self, DriftPanes& other) { raise_if_bad(self.merge(other)); },
          py::arg("other"), "Add what other holds. Raises ValueError, unchanged, where they do not fit.");
}

}  // namespace penstock::bind
