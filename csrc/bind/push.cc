// Pushed events from Python's lists straight into event tables: what `features/push_coding.py` prepares for a
// source. A push of a few events is all overhead, so one call checks and codes its columns and another
// appends them to a view; unless there are many rows to append, both hold the GIL, so no other Python thread
// comes between. What is not of the plain kinds here, a wrong value included, is refused as a whole without
// an error: the caller's slow path then decides.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <limits>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/key.h"
#include "bind/bind.h"
#include "features/event_table.h"
#include "features/row.h"

namespace penstock::bind {
namespace {

constexpr size_t kHoldGil = 64;             // rows that are appended without letting go of the interpreter
constexpr size_t kColumnBytes = 64;         // of a logged column beside its values
constexpr int64_t kExact64 = 1LL << 53;     // integers up to here are exact as float64
constexpr int64_t kExact32 = 1LL << 24;     // and as float32
constexpr int64_t kUnknownTime = kTimeMin;  // known-at of an event whose `created` is null

struct Column {
  std::string name;
  FeatureDtype dtype = FeatureDtype::kF64;
  bool required = false;
};

struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
using Codes = std::unordered_map<std::string, int64_t, StringHash, std::equal_to<>>;

// One column of a push. Texts are Python's own; `views` points into them.
struct Coded {
  std::vector<Word> words;
  std::vector<std::string_view> views;
  py::list texts;
  std::vector<uint8_t> valid;  // empty where nothing is null

  bool is_valid(size_t row) const { return valid.empty() || valid[row] != 0; }
};

struct View {
  std::shared_ptr<EventTable> table;
  std::vector<uint32_t> keys;  // columns
  std::vector<uint32_t> raw;   // columns
  std::vector<bool> coded;     // of each of `raw`: it is a string
  std::vector<Codes> codes;    // of each of `raw`, where it is one
  size_t n_texts = 0;          // value columns of the table
};

struct Rows {
  size_t n = 0;
  size_t bytes = 0;
  std::vector<Coded> columns;
  std::vector<std::vector<Word>> codes;  // of the string inputs of each view, one after the other
};

struct Coder {
  std::vector<Column> columns;
  int32_t time = 0, created = -1, event_id = -1, deleted = -1;
  uint8_t seed[16] = {};
  std::vector<View> views;

  int32_t find(const py::handle& name) const {
    if (!PyUnicode_CheckExact(name.ptr())) return -1;
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(name.ptr(), &size);
    if (text == nullptr) {
      PyErr_Clear();
      return -1;
    }
    for (size_t c = 0; c < columns.size(); ++c) {
      if (columns[c].name == std::string_view(text, static_cast<size_t>(size)))
        return static_cast<int32_t>(c);
    }
    return -1;
  }
};

bool read_int(PyObject* value, int64_t* out) {
  if (!PyLong_CheckExact(value)) return false;
  int overflow = 0;
  const long long found = PyLong_AsLongLongAndOverflow(value, &overflow);
  *out = found;
  return overflow == 0;
}

// A value of the dtype that the slow path takes with the same result; false for any other.
bool read_number(PyObject* value, FeatureDtype dtype, Word* out) {
  switch (dtype) {
    case FeatureDtype::kF32:
    case FeatureDtype::kF64: {
      const bool narrow = dtype == FeatureDtype::kF32;
      int64_t whole = 0;
      if (PyFloat_CheckExact(value)) {
        out->f = PyFloat_AS_DOUBLE(value);
      } else if (read_int(value, &whole) && whole <= (narrow ? kExact32 : kExact64) &&
                 whole >= -(narrow ? kExact32 : kExact64)) {
        out->f = static_cast<double>(whole);
      } else {
        return false;
      }
      if (narrow) out->f = static_cast<double>(static_cast<float>(out->f));
      return true;
    }
    case FeatureDtype::kBool:
      if (!PyBool_Check(value)) return false;
      out->i = value == Py_True;
      return true;
    case FeatureDtype::kTimestamp:
      return read_int(value, &out->i) && out->i != kTimeMin && out->i != kTimeMax;
    case FeatureDtype::kI64:
    case FeatureDtype::kDuration:
      return read_int(value, &out->i);
    case FeatureDtype::kString:
      break;
  }
  return false;
}

bool read_text(PyObject* value, std::string_view* out) {
  if (!PyUnicode_CheckExact(value)) return false;
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(value, &size);
  if (text == nullptr) {
    PyErr_Clear();
    return false;
  }
  *out = {text, static_cast<size_t>(size)};
  return true;
}

bool read_column(const Column& column, PyObject* const* values, size_t n, Coded* out) {
  const bool text = column.dtype == FeatureDtype::kString;
  if (text) {
    out->views.resize(n);
    out->texts = py::list(n);
  } else {
    out->words.resize(n);
  }
  for (size_t r = 0; r < n; ++r) {
    PyObject* value = values[r];
    if (value == Py_None) {
      if (column.required) return false;
      if (out->valid.empty()) out->valid.assign(n, 1);
      out->valid[r] = 0;
      if (text) {
        out->texts[r] = py::none();
      } else {
        out->words[r].i = 0;
      }
    } else if (text) {
      if (!read_text(value, &out->views[r])) return false;
      out->texts[r] = py::reinterpret_borrow<py::object>(value);
    } else if (!read_number(value, column.dtype, &out->words[r])) {
      return false;
    }
  }
  return true;
}

// The values of a column as given: those of a list or tuple, or a scalar.
bool values_of(PyObject* given, PyObject* const** values, size_t* n, PyObject** scalar) {
  if (PyList_CheckExact(given) || PyTuple_CheckExact(given)) {
    *values = PySequence_Fast_ITEMS(given);
    *n = static_cast<size_t>(PySequence_Fast_GET_SIZE(given));
    return true;
  }
  const bool plain = given == Py_None || PyBool_Check(given) || PyLong_CheckExact(given) ||
                     PyFloat_CheckExact(given) || PyUnicode_CheckExact(given);
  *scalar = given;
  *values = scalar;
  *n = 1;
  return plain;
}

// The codes of a view's string inputs; false if one has a text that the view has not met.
bool code_texts(const View& view, const Rows& rows, std::vector<Word>* out) {
  for (size_t i = 0; i < view.raw.size(); ++i) {
    if (!view.coded[i]) continue;
    const Coded& column = rows.columns[view.raw[i]];
    for (size_t r = 0; r < rows.n; ++r) {
      Word code{.i = 0};
      if (column.is_valid(r)) {
        const auto found = view.codes[i].find(column.views[r]);
        if (found == view.codes[i].end()) return false;
        code.i = found->second;
      }
      out->push_back(code);
    }
  }
  return true;
}

py::object code(const Coder& self, const py::object& given) {
  if (!PyDict_CheckExact(given.ptr())) return py::none();
  auto rows = std::make_unique<Rows>();
  rows->columns.resize(self.columns.size());
  std::vector<bool> there(self.columns.size());
  PyObject *name = nullptr, *value = nullptr;
  Py_ssize_t at = 0;
  while (PyDict_Next(given.ptr(), &at, &name, &value) != 0) {
    const int32_t c = self.find(name);
    if (c < 0) return py::none();
    const Column& column = self.columns[static_cast<size_t>(c)];
    PyObject* scalar = nullptr;
    PyObject* const* values = nullptr;
    size_t n = 0;
    if (!values_of(value, &values, &n, &scalar) || n == 0 || (rows->n != 0 && n != rows->n))
      return py::none();
    rows->n = n;
    Coded& coded = rows->columns[static_cast<size_t>(c)];
    if (!read_column(column, values, n, &coded)) return py::none();
    there[static_cast<size_t>(c)] = true;
    rows->bytes += kColumnBytes + n * sizeof(Word);
    for (const std::string_view text : coded.views) rows->bytes += text.size();
  }
  if (rows->n == 0) return py::none();
  for (size_t c = 0; c < there.size(); ++c) {
    if (there[c]) continue;
    if (static_cast<int32_t>(c) != self.deleted) return py::none();
    rows->columns[c].words.assign(rows->n, Word{.i = 0});
  }
  for (const View& view : self.views) {
    rows->codes.emplace_back();
    if (!code_texts(view, *rows, &rows->codes.back())) return py::none();
  }
  return py::cast(std::move(rows));
}

Key128 key_of(const std::vector<uint32_t>& columns, const Coder& self, const Rows& rows, size_t row,
              KeyHasher* hasher) {
  if (columns.empty()) return {0, 0};
  hasher->reset();
  for (const uint32_t c : columns) {
    if (self.columns[c].dtype == FeatureDtype::kString) {
      hasher->add_str(rows.columns[c].views[row]);
    } else {
      hasher->add_int(rows.columns[c].words[row].i);
    }
  }
  return hasher->finish();
}

std::vector<uint64_t> keys_of(const std::vector<uint32_t>& columns, const Coder& self, const Rows& rows) {
  std::vector<uint64_t> words;
  words.reserve(2 * rows.n);
  KeyHasher hasher(self.seed);
  for (size_t r = 0; r < rows.n; ++r) {
    const Key128 key = key_of(columns, self, rows, r, &hasher);
    words.push_back(key.lo);
    words.push_back(key.hi);
  }
  return words;
}

py::array_t<uint64_t> keys(const Coder& self, size_t view, const Rows& rows) {
  const std::vector<uint64_t> words = keys_of(self.views.at(view).keys, self, rows);
  py::array_t<uint64_t> out({static_cast<py::ssize_t>(rows.n), py::ssize_t{2}});
  std::copy(words.begin(), words.end(), out.mutable_data());
  return out;
}

// Whether the view has met new keys.
bool append(const Coder& self, size_t view_at, const Rows& rows, int64_t arrival_us) {
  const View& view = self.views.at(view_at);
  const size_t n = rows.n;
  EventRows events;
  events.n = n;
  const std::vector<uint64_t> key_words = keys_of(view.keys, self, rows);
  events.keys.words = key_words.data();
  const auto ints = [&](int32_t c) { return &rows.columns[static_cast<size_t>(c)].words[0].i; };
  events.event_time = ints(self.time);
  std::vector<int64_t> known(n, arrival_us);
  if (self.created >= 0) {
    const Coded& created = rows.columns[static_cast<size_t>(self.created)];
    for (size_t r = 0; r < n; ++r) known[r] = created.is_valid(r) ? created.words[r].i : kUnknownTime;
  }
  events.known_at = known.data();
  std::vector<uint64_t> ids;
  if (self.event_id >= 0) {
    ids = keys_of({static_cast<uint32_t>(self.event_id)}, self, rows);
    events.event_ids = ids.data();
  }
  const auto deleted = std::make_unique<bool[]>(n);
  if (self.deleted >= 0) {
    for (size_t r = 0; r < n; ++r) deleted[r] = ints(self.deleted)[r] != 0;
    events.deleted = deleted.get();
  }
  std::vector<RawColumn> raw;
  size_t coded = 0;
  for (size_t i = 0; i < view.raw.size(); ++i) {
    const Coded& column = rows.columns[view.raw[i]];
    RawColumn out;
    out.values = view.coded[i] ? rows.codes[view_at].data() + n * coded++ : column.words.data();
    if (!column.valid.empty()) out.valid = reinterpret_cast<const bool*>(column.valid.data());
    raw.push_back(out);
  }
  const size_t before = view.table->n_keys();
  std::vector<Key128> touched;
  Status status;
  const std::vector<std::vector<std::string>> no_texts(view.n_texts);
  if (n <= kHoldGil) {
    status = view.table->append(events, raw, no_texts, &touched);
  } else {
    const py::gil_scoped_release released;
    status = view.table->append(events, raw, no_texts, &touched);
  }
  if (!status.is_ok()) throw py::value_error(status.message);
  return view.table->n_keys() > before;
}

// (values, valid or None) of a column: a list of str or None, or an array of its dtype.
py::tuple column(const Coder& self, size_t at, const Rows& rows) {
  const Coded& coded = rows.columns.at(at);
  const auto n = static_cast<py::ssize_t>(rows.n);
  py::object valid = py::none();
  if (!coded.valid.empty()) {
    py::array_t<bool> flags(n);
    for (size_t r = 0; r < rows.n; ++r) flags.mutable_data()[r] = coded.valid[r] != 0;
    valid = flags;
  }
  const auto filled = [&](auto made, auto&& value) {
    for (size_t r = 0; r < rows.n; ++r) made.mutable_data()[r] = value(coded.words[r]);
    return py::make_tuple(made, valid);
  };
  switch (self.columns[at].dtype) {
    case FeatureDtype::kString:
      return py::make_tuple(coded.texts, valid);
    case FeatureDtype::kF32:
      return filled(py::array_t<float>(n), [](Word w) { return static_cast<float>(w.f); });
    case FeatureDtype::kF64:
      return filled(py::array_t<double>(n), [](Word w) { return w.f; });
    case FeatureDtype::kBool:
      return filled(py::array_t<bool>(n), [](Word w) { return w.i != 0; });
    default:
      return filled(py::array_t<int64_t>(n), [](Word w) { return w.i; });
  }
}

using ColumnTuple = std::tuple<std::string, std::string, bool>;
using ViewTuple = std::tuple<py::object, std::vector<uint32_t>, std::vector<uint32_t>, size_t>;

std::unique_ptr<Coder> make(const std::vector<ColumnTuple>& columns, int32_t time, int32_t created,
                            int32_t event_id, int32_t deleted, const py::bytes& seed,
                            const std::vector<ViewTuple>& views) {
  auto self = std::make_unique<Coder>();
  for (const auto& [name, dtype, required] : columns) {
    Column column{name, FeatureDtype::kF64, required};
    const Status status = dtype_from_name(dtype, &column.dtype);
    if (!status.is_ok()) throw py::value_error("column '" + name + "': " + status.message);
    self->columns.push_back(std::move(column));
  }
  const auto role = [&](int32_t c, bool needed) {
    if (c < (needed ? 0 : -1) || c >= static_cast<int32_t>(columns.size()))
      throw py::value_error("column " + std::to_string(c) + " is not one of " +
                            std::to_string(columns.size()));
    return c;
  };
  self->time = role(time, true);
  self->created = role(created, false);
  self->event_id = role(event_id, false);
  self->deleted = role(deleted, false);
  const auto text = static_cast<std::string_view>(seed);
  if (text.size() != sizeof self->seed) throw py::value_error("seed is not 16 bytes");
  std::memcpy(self->seed, text.data(), text.size());
  for (const auto& [table, keys, raw, n_texts] : views) {
    View view{event_table_of(table), keys, raw, {}, {}, n_texts};
    for (const uint32_t c : keys) role(static_cast<int32_t>(c), true);
    for (const uint32_t c : raw) {
      role(static_cast<int32_t>(c), true);
      view.coded.push_back(self->columns[c].dtype == FeatureDtype::kString);
      view.codes.emplace_back();
    }
    self->views.push_back(std::move(view));
  }
  return self;
}

}  // namespace

void bind_push(py::module_& m) {
  py::class_<Rows>(m, "PushedRows", "Events of one push, checked and coded.")
      .def_readonly("n", &Rows::n, "How many.")
      .def_readonly("bytes", &Rows::bytes, "About their size in the log.");
  py::class_<Coder>(m, "PushCoder", "Codes the pushes of one source. Any thread.")
      .def(
          py::init(&make), py::kw_only(), py::arg("columns"), py::arg("time"), py::arg("created"),
          py::arg("event_id"), py::arg("deleted"), py::arg("seed"), py::arg("views"),
          "columns: (name, dtype, whether it must not be null). time, created, event_id, deleted: which of\n"
          "them, -1: none. seed: of the key hash. views: (EventTable, its key columns, its raw columns, how\n"
          "many value columns it has). ValueError where they do not fit.")
      .def("code", &code, py::arg("rows"),
           "rows: dict of columns as lists, tuples or scalars. PushedRows; None where anything is wrong or "
           "not\n"
           "of the plain kinds: int, float, bool, str and None, times as int microseconds, known texts.")
      .def("keys", &keys, py::arg("view"), py::arg("rows"), "Entity keys uint64[n, 2] of a view.")
      .def("append", &append, py::arg("view"), py::arg("rows"), py::arg("arrival_us"),
           "Append to a view's table; whether it has new keys. ValueError if the table is full.")
      .def("column", &column, py::arg("at"), py::arg("rows"),
           "(values, valid bool[n] or None) of a column: a list of str, or an array of its dtype.")
      .def(
          "n_texts",
          [](const Coder& self, size_t view, size_t raw) { return self.views.at(view).codes.at(raw).size(); },
          py::arg("view"), py::arg("raw"), "Texts known of a raw column of a view.")
      .def(
          "add_texts",
          [](Coder& self, size_t view, size_t raw, const std::vector<std::string>& texts) {
            Codes& codes = self.views.at(view).codes.at(raw);
            for (const std::string& text : texts) codes.emplace(text, static_cast<int64_t>(codes.size()));
          },
          py::arg("view"), py::arg("raw"), py::arg("texts"),
          "Further texts of a raw column of a view, in the order of their codes.");
}

}  // namespace penstock::bind
