#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "bind/bind.h"
#include "features/event_table.h"

namespace penstock::bind {

namespace {

using Keys = py::array_t<uint64_t, py::array::c_style>;
using Times = py::array_t<int64_t, py::array::c_style>;
using Flags = py::array_t<bool, py::array::c_style>;

constexpr size_t kHoldGil = 16;  // rows that are read without letting go of the interpreter

void require(const Status& status) {
  if (!status.is_ok()) throw py::value_error(status.message);
}

// An array of exactly that type and shape, or an error that names it; keeps it alive in `held`.
template <class T>
const T* checked(const py::object& given, const char* name, size_t n, size_t columns,
                 std::vector<py::object>* held) {
  using Array = py::array_t<T, py::array::c_style>;
  const auto shape = [&](const py::array& array) {
    if (columns == 0) return array.ndim() == 1 && static_cast<size_t>(array.shape(0)) == n;
    return array.ndim() == 2 && static_cast<size_t>(array.shape(0)) == n &&
           static_cast<size_t>(array.shape(1)) == columns;
  };
  if (!Array::check_(given) || !shape(py::reinterpret_borrow<py::array>(given))) {
    throw py::value_error(std::string(name) + " is not a contiguous array of its type and " +
                          std::to_string(n) + " rows");
  }
  held->push_back(given);
  return static_cast<const T*>(py::reinterpret_borrow<py::array>(given).data());
}

template <class T>
const T* optional_array(const py::dict& given, const char* name, size_t n, size_t columns,
                        std::vector<py::object>* held) {
  if (!given.contains(name) || given[name].is_none()) return nullptr;
  return checked<T>(given[name], name, n, columns, held);
}

EventRows rows_of(const py::dict& given, std::vector<py::object>* held) {
  EventRows rows;
  if (!Times::check_(given["event_time"]))
    throw py::value_error("event_time is not a contiguous int64 array");
  rows.n = static_cast<size_t>(py::reinterpret_borrow<py::array>(given["event_time"]).size());
  rows.event_time = checked<int64_t>(given["event_time"], "event_time", rows.n, 0, held);
  const py::object keys = given["keys"];
  rows.keys.single = Times::check_(keys);
  rows.keys.words = rows.keys.single
                        ? reinterpret_cast<const uint64_t*>(checked<int64_t>(keys, "keys", rows.n, 0, held))
                        : checked<uint64_t>(keys, "keys", rows.n, 2, held);
  rows.null_keys = optional_array<bool>(given, "null_keys", rows.n, 0, held);
  rows.known_at = optional_array<int64_t>(given, "known_at", rows.n, 0, held);
  rows.event_ids = optional_array<uint64_t>(given, "event_ids", rows.n, 2, held);
  rows.null_ids = optional_array<bool>(given, "null_ids", rows.n, 0, held);
  rows.deleted = optional_array<bool>(given, "deleted", rows.n, 0, held);
  return rows;
}

std::vector<RawColumn> raw_of(const py::list& given, size_t n, std::vector<py::object>* held) {
  std::vector<RawColumn> columns;
  for (const py::handle item : given) {
    const auto [values, valid] = item.cast<std::pair<py::object, py::object>>();
    const std::string name = "column " + std::to_string(columns.size());
    RawColumn column;
    if (py::array_t<float, py::array::c_style>::check_(values)) {
      column.narrow = true;
      column.values = checked<float>(values, name.c_str(), n, 0, held);
    } else if (py::array_t<double, py::array::c_style>::check_(values)) {
      column.values = checked<double>(values, name.c_str(), n, 0, held);
    } else {
      column.values = checked<int64_t>(values, name.c_str(), n, 0, held);
    }
    if (!valid.is_none()) column.valid = checked<bool>(valid, (name + ": validity").c_str(), n, 0, held);
    columns.push_back(column);
  }
  return columns;
}

std::shared_ptr<const FeatureProgram> program_of(const py::object& given) {
  if (given.is_none()) return nullptr;
  const std::string_view view = py::reinterpret_borrow<py::bytes>(given);
  std::shared_ptr<const FeatureProgram> out;
  require(FeatureProgram::parse(reinterpret_cast<const uint8_t*>(view.data()), view.size(), &out));
  return out;
}

using Texts = std::vector<std::optional<std::vector<std::string>>>;

std::vector<std::vector<std::string>> texts_of(const Texts& given) {
  std::vector<std::vector<std::string>> out;
  for (const auto& texts : given) out.push_back(texts.value_or(std::vector<std::string>{}));
  return out;
}

Keys keys_of(const std::vector<Key128>& keys) {
  Keys out({static_cast<py::ssize_t>(keys.size()), py::ssize_t{2}});
  uint64_t* to = out.mutable_data();
  for (size_t i = 0; i < keys.size(); ++i) {
    to[2 * i] = keys[i].lo;
    to[2 * i + 1] = keys[i].hi;
  }
  return out;
}

Keys sorted_keys(std::vector<Key128> keys) {
  std::sort(keys.begin(), keys.end(),
            [](const Key128& a, const Key128& b) { return a.hi != b.hi ? a.hi < b.hi : a.lo < b.lo; });
  return keys_of(keys);
}

struct Table {
  std::vector<py::object> held;  // the arrays that the table refers to
  std::unique_ptr<EventTable> table;
  std::vector<bool> real;  // of each feature
};

using WindowTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, bool>;
using AggregateTuple = std::tuple<uint8_t, int32_t, uint32_t, int64_t>;

std::shared_ptr<Table> make(const py::object& plain, std::vector<uint32_t> plain_inputs,
                            const py::object& values, std::vector<uint32_t> value_inputs,
                            const std::vector<WindowTuple>& windows,
                            const std::vector<AggregateTuple>& aggregates,
                            const std::vector<std::tuple<bool, uint32_t, bool>>& features, int64_t ttl,
                            int64_t tick, bool as_known, bool tiles, const py::dict& events,
                            const py::list& raw, const Texts& texts, unsigned threads) {
  auto self = std::make_shared<Table>();
  ViewSpec spec;
  spec.plain = program_of(plain);
  spec.plain_inputs = std::move(plain_inputs);
  spec.values = program_of(values);
  spec.value_inputs = std::move(value_inputs);
  for (const auto& text : texts) spec.value_texts.push_back(text.has_value());
  for (const auto& [enters, leaves, every, lag, tile, known] : windows) {
    spec.windows.push_back({enters, leaves, every, lag, tile, known, -1});
  }
  for (const auto& [kind, value, window, param] : aggregates) {
    if (kind >= kAggregateKinds) throw py::value_error("kind is " + std::to_string(kind));
    spec.aggregates.push_back({static_cast<AggregateKind>(kind), value, false, window, param});
  }
  for (const auto& [aggregate, at, real] : features) {
    spec.features.push_back({aggregate, at});
    self->real.push_back(real);
  }
  spec.ttl = ttl;
  spec.tick = tick;
  spec.as_known = as_known;
  spec.store_tiles = tiles;
  const EventRows rows = rows_of(events, &self->held);
  std::vector<RawColumn> columns = raw_of(raw, rows.n, &self->held);
  auto given_texts = texts_of(texts);
  Status status;
  {
    const py::gil_scoped_release released;
    status = EventTable::create(std::move(spec), rows, std::move(columns), std::move(given_texts), threads,
                                &self->table);
  }
  require(status);
  return self;
}

py::tuple rows_at(const Table& self, const Keys& keys, const Times& now, const py::object& nulls,
                  const py::object& known_by, unsigned threads) {
  RowsAsked asked;
  std::vector<py::object> held;
  asked.n = static_cast<size_t>(now.shape(0));
  asked.keys = checked<uint64_t>(keys, "keys", asked.n, 2, &held);
  asked.now = checked<int64_t>(now, "now", asked.n, 0, &held);
  if (!nulls.is_none()) asked.nulls = checked<bool>(nulls, "nulls", asked.n, 0, &held);
  if (!known_by.is_none()) asked.known_by = checked<int64_t>(known_by, "known_by", asked.n, 0, &held);
  const auto n = static_cast<py::ssize_t>(asked.n);
  py::array_t<uint8_t> status(n);
  Times meta({n, py::ssize_t{4}});
  RowsFound found;
  found.status = status.mutable_data();
  found.meta = meta.mutable_data();
  py::list columns;
  for (const bool real : self.real) {
    Flags valid(n);
    py::array values = real ? py::array(py::array_t<double>(n)) : py::array(py::array_t<int64_t>(n));
    found.values.push_back(static_cast<Word*>(values.mutable_data()));
    found.valid.push_back(valid.mutable_data());
    columns.append(py::make_tuple(std::move(values), std::move(valid)));
  }
  if (asked.n <= kHoldGil) {
    self.table->rows_at(asked, found, 1);
  } else {
    const py::gil_scoped_release released;
    self.table->rows_at(asked, found, threads);
  }
  return py::make_tuple(columns, status, meta);
}

Keys append(Table& self, const py::dict& events, const py::list& raw, const Texts& texts) {
  std::vector<py::object> held;
  const EventRows rows = rows_of(events, &held);
  const std::vector<RawColumn> columns = raw_of(raw, rows.n, &held);
  const auto given_texts = texts_of(texts);
  std::vector<Key128> keys;
  Status status;
  {
    const py::gil_scoped_release released;
    status = self.table->append(rows, columns, given_texts, &keys);
  }
  require(status);
  return keys_of(keys);
}

}  // namespace

std::shared_ptr<EventTable> event_table_of(const py::handle& given) {
  const auto table = given.cast<std::shared_ptr<Table>>();
  return {table, table->table.get()};
}

void bind_events(py::module_& m) {
  py::class_<Table, std::shared_ptr<Table>>(m, "EventTable",
                                            "The events of a view by key, and its stored rows at any time.")
      .def(
          py::init(&make), py::kw_only(), py::arg("plain"), py::arg("plain_inputs"), py::arg("values"),
          py::arg("value_inputs"), py::arg("windows"), py::arg("aggregates"), py::arg("features"),
          py::arg("ttl"), py::arg("tick"), py::arg("as_known"), py::arg("tiles"), py::arg("events"),
          py::arg("raw"), py::arg("texts"), py::arg("threads"),
          "plain, values: programs of the plain features and of the aggregated values, or None; *_inputs:\n"
          "the column in `raw` of each of their inputs. windows: (enters, leaves, every, lag, tile, "
          "as_known)\n"
          "in microseconds. aggregates: (kind, value or -1, window, parameter). features: (whether an\n"
          "aggregate, which, whether float64). events: arrays keys (int64[n], or uint64[n, 2]), event_time,\n"
          "known_at, null_keys, event_ids, null_ids, deleted. raw: (float32, float64 or int64 [n], bool [n]\n"
          "or None). texts: of each aggregated value, those of its codes, or None. The arrays are referred\n"
          "to, not copied. ValueError where they do not fit.")
      .def(
          "rows_at", &rows_at, py::arg("keys").noconvert(), py::arg("now").noconvert(), py::arg("nulls"),
          py::arg("known_by"), py::arg("threads") = 1,
          "Rows of keys uint64[n, 2] at the times now int64[n]: a list of (values, valid), status uint8[n],\n"
          "meta int64[n, 4].")
      .def("append", &append, py::arg("events"), py::arg("raw"), py::arg("texts"),
           "Add events behind those there are; `texts` are new ones, behind the old. Returns the distinct\n"
           "keys uint64[k, 2].")
      .def(
          "erase",
          [](Table& self, uint64_t lo, uint64_t hi) {
            const py::gil_scoped_release released;
            return self.table->erase({lo, hi});
          },
          py::arg("lo"), py::arg("hi"), "Forget the events of a key; False if it was unknown.")
      .def(
          "changed_keys",
          [](const Table& self, int64_t start, int64_t end) {
            std::vector<Key128> keys;
            {
              const py::gil_scoped_release released;
              self.table->changed_keys(start, end, &keys);
            }
            return sorted_keys(std::move(keys));
          },
          py::arg("start"), py::arg("end"),
          "Keys uint64[k, 2], ascending, whose row may differ between the two times.")
      .def(
          "keys",
          [](const Table& self) {
            std::vector<Key128> keys;
            self.table->keys(&keys);
            return sorted_keys(std::move(keys));
          },
          "The distinct keys uint64[m, 2], ascending.")
      .def(
          "source_rows",
          [](const Table& self) {
            std::vector<int64_t> rows;
            self.table->source_rows(&rows);
            Times out(static_cast<py::ssize_t>(rows.size()));
            std::copy(rows.begin(), rows.end(), out.mutable_data());
            return out;
          },
          "One source row int64[k] of each key that the source has events of, erased keys left out.")
      .def(
          "newest_events",
          [](const Table& self, const Keys& keys, int64_t now) {
            std::vector<py::object> held;
            const auto n = static_cast<size_t>(keys.shape(0));
            const uint64_t* words = checked<uint64_t>(keys, "keys", n, 2, &held);
            Times out(static_cast<py::ssize_t>(n));
            int64_t* to = out.mutable_data();
            const py::gil_scoped_release released;
            self.table->newest_events(words, n, now, to);
            return out;
          },
          py::arg("keys").noconvert(), py::arg("now"),
          "Time int64[k] of the newest event by `now` of each key uint64[k, 2], or INT64_MIN.")
      .def_property_readonly(
          "n_keys", [](const Table& self) { return self.table->n_keys(); }, "Distinct keys, erased ones too.")
      .def_property_readonly(
          "n_events", [](const Table& self) { return self.table->n_events(); }, "Events held.");
}

}  // namespace penstock::bind
