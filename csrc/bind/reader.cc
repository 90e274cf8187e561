// Binding of engine/feature_reader. Calls hold the GIL: they take microseconds.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "engine/feature_reader.h"

namespace penstock::bind {
namespace {

thread_local FeatureReader::Work thread_work;

void require(const Status& status) {
  if (!status.is_ok()) throw py::value_error(status.message);
}

float* rows_of(const py::object& out, size_t rows, size_t features) {
  using Floats = py::array_t<float, py::array::c_style>;
  if (Floats::check_(out)) {
    auto array = py::reinterpret_borrow<py::array>(out);
    if (array.ndim() == 2 && array.writeable() && static_cast<size_t>(array.shape(0)) == rows &&
        static_cast<size_t>(array.shape(1)) == features) {
      return static_cast<float*>(array.mutable_data());
    }
  }
  std::string given = py::str(py::type::of(out).attr("__name__"));
  if (py::isinstance<py::array>(out))
    given = std::string(py::str(out.attr("dtype"))) + std::string(py::str(out.attr("shape")));
  throw py::value_error("out is " + given + "; expected a writable C-contiguous float32[" +
                        std::to_string(rows) + ", " + std::to_string(features) + "]");
}

py::list keys_of(const FeatureReader& reader, const std::vector<FeatureMiss>& misses) {
  std::vector<std::vector<uint64_t>> keys(reader.plan().n_views());
  for (const FeatureMiss& miss : misses) {
    keys[miss.view].push_back(miss.key.lo);
    keys[miss.view].push_back(miss.key.hi);
  }
  py::list found;
  for (const auto& words : keys) {
    py::array_t<uint64_t> array({static_cast<py::ssize_t>(words.size() / 2), py::ssize_t{2}});
    std::copy(words.begin(), words.end(), array.mutable_data());
    found.append(array);
  }
  return found;
}

// Adds what `load` returned: (rows, meta) of each view, in the order of its misses.
void add_loaded(const FeatureReader& reader, const py::list& loaded, const std::vector<FeatureMiss>& misses,
                size_t rows, Overlay* overlay) {
  using Words = py::array_t<uint64_t, py::array::c_style>;
  using Metas = py::array_t<int64_t, py::array::c_style>;
  const size_t views = reader.plan().n_views();
  if (loaded.size() != views) throw py::value_error("load returned another number of views");
  std::vector<std::pair<Words, Metas>> given;
  for (const py::handle& item : loaded) {
    const auto pair = item.cast<std::pair<py::object, py::object>>();
    if (!Words::check_(pair.first) || !Metas::check_(pair.second))
      throw py::value_error("load returned no uint64 rows and int64 meta");
    given.emplace_back(py::reinterpret_borrow<Words>(pair.first), py::reinterpret_borrow<Metas>(pair.second));
  }
  std::vector<py::ssize_t> next(views, 0);
  for (const FeatureMiss& miss : misses) {
    const auto& [words, meta] = given[miss.view];
    const py::ssize_t at = next[miss.view]++;
    const auto width = static_cast<py::ssize_t>(reader.plan().row_words(miss.view));
    if (words.ndim() != 2 || meta.ndim() != 2 || at >= words.shape(0) || at >= meta.shape(0) ||
        words.shape(1) != width || meta.shape(1) != 4) {
      throw py::value_error("load returned other rows than those it was asked for");
    }
    const uint64_t* row = words.data(at, 0);
    const int64_t* m = meta.data(at, 0);
    overlay->index[miss.view * rows + miss.row] = static_cast<int64_t>(overlay->words.size());
    overlay->words.emplace_back(row, row + width);
    overlay->meta.push_back({m[0], m[1], m[2], m[3]});
  }
}

constexpr size_t kHoldGil = 16;  // rows that are computed without letting go of the interpreter
constexpr unsigned kThreads = 2;

// Rows may leave their cache between two reads; what was computed for this read stays, so each try needs
// less.
void compute(const FeatureReader& self, int64_t now_us, int64_t mono_ns, uint64_t stamp, float* to,
             FeatureReader::Work& work) {
  for (bool first = true; !work.misses.empty(); first = false) {
    if (work.misses.size() <= kHoldGil) {
      self.compute(now_us, mono_ns, stamp, 1, first, work);
    } else {
      const py::gil_scoped_release released;
      self.compute(now_us, mono_ns, stamp, kThreads, first, work);
    }
    require(self.read(now_us, mono_ns, &work.computed, work, to));
  }
}

py::object read(const FeatureReader& self, const py::bytes& params, int64_t now_us, int64_t mono_ns,
                const py::object& given, uint64_t stamp, const py::object& load) {
  FeatureReader::Work& work = thread_work;
  const auto bytes = static_cast<std::string_view>(params);
  const auto* data = reinterpret_cast<const uint8_t*>(bytes.data());
  require(self.parse(data, bytes.size(), work));
  const size_t rows = work.call.rows, features = self.plan().n_features();
  const py::object out = given.is_none()
                             ? py::object(py::array_t<float>(
                                   {static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(features)}))
                             : given;
  float* to = rows_of(out, rows, features);
  require(self.read(now_us, mono_ns, nullptr, work, to));
  if (self.has_tables()) {
    compute(self, now_us, mono_ns, stamp, to, work);
    return out;
  }
  Overlay overlay;
  overlay.index.assign(self.plan().n_views() * rows, -1);
  while (!work.misses.empty()) {
    const std::vector<FeatureMiss> misses = work.misses;  // `load` may read on this thread itself
    const auto loaded = py::list(load(keys_of(self, misses)));
    add_loaded(self, loaded, misses, rows, &overlay);
    require(self.parse(data, bytes.size(), work));
    require(self.read(now_us, mono_ns, &overlay, work, to));
  }
  return out;
}

}  // namespace

void bind_reader(py::module_& m) {
  py::class_<FeatureReader, std::shared_ptr<FeatureReader>>(
      m, "FeatureReader", "Reads a feature service into float32 rows through feature caches.")
      .def(
          py::init([](const py::dict& plan, const py::list& tables) {
            std::vector<std::shared_ptr<const EventTable>> found;
            for (const py::handle& table : tables) found.push_back(event_table_of(table));
            auto made = service_plan_of(plan);
            if (!found.empty() && found.size() != made->n_views()) {
              throw py::value_error("tables has " + std::to_string(found.size()) +
                                    " event tables; the plan has " + std::to_string(made->n_views()) +
                                    " views");
            }
            for (size_t v = 0; v < found.size(); ++v) {
              if (found[v]->n_features() != made->row_schema(v).fields().size())
                throw py::value_error("the event table of view '" + made->view(v).name +
                                      "' has other features");
            }
            return std::make_shared<FeatureReader>(std::move(made), std::move(found));
          }),
          py::arg("plan"), py::arg("tables") = py::list(),
          "plan: as ServingCore.load takes it. tables: the EventTable of each of its views, from which rows\n"
          "are computed that no cache has, or none. Raises ValueError.")
      .def("read", &read, py::arg("params"), py::arg("now_us"), py::arg("mono_ns"), py::arg("out"),
           py::arg("stamp"), py::arg("load"),
           "params: MessagePack [any text, entities, inputs or nil]. Fills out float32[rows, features] (a "
           "new\n"
           "array if None) and returns it. Rows that no cache has are computed, and put into it under\n"
           "`stamp`. Without tables, load(keys) is asked for them: given keys uint64[k, 2] by view, it "
           "returns\n"
           "(rows uint64[k, row_words], meta int64[k, 4]) by view. Raises ValueError naming the column, row "
           "or\n"
           "array, and what load raises.");
}

}  // namespace penstock::bind
