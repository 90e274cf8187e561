#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bind/bind.h"
#include "features/program.h"

namespace penstock::bind {

namespace {

using Names = std::vector<std::pair<std::string, std::string>>;
using Words = py::array_t<uint64_t, py::array::c_style>;

Names names_of(const std::vector<Field>& fields) {
  Names names;
  for (const Field& field : fields) names.emplace_back(field.name, dtype_name(field.dtype));
  return names;
}

void require(const Status& status) {
  if (!status.is_ok()) throw py::value_error(status.message);
}

// One column given from Python: float64, float32 or int64 values [n], bool validity [n] or None.
struct Column {
  py::array values;
  py::object valid;
  const void* data = nullptr;
  const bool* mask = nullptr;
  bool narrow = false;

  void read(size_t from, size_t n, Block* out) const {
    if (narrow) {
      std::copy_n(static_cast<const float*>(data) + from, n, out->f64);
    } else {
      std::copy_n(static_cast<const int64_t*>(data) + from, n, out->i64);  // bits, of either type
    }
    out->valid = 0;
    for (size_t r = 0; r < n; ++r) out->valid |= uint64_t{mask == nullptr || mask[from + r]} << r;
  }
};

std::vector<Column> columns_of(const py::list& given, const std::vector<Field>& fields, size_t* n) {
  if (given.size() != fields.size()) {
    throw py::value_error("got " + std::to_string(given.size()) + " columns; expected " +
                          std::to_string(fields.size()));
  }
  std::vector<Column> columns;
  for (size_t i = 0; i < fields.size(); ++i) {
    const auto pair = given[i].cast<std::pair<py::object, py::object>>();
    const bool real = is_float(fields[i].dtype);
    using F = py::array_t<double, py::array::c_style>;
    using I = py::array_t<int64_t, py::array::c_style>;
    using B = py::array_t<bool, py::array::c_style>;
    const std::string where = "column '" + fields[i].name + "'";
    const bool narrow =
        fields[i].dtype == FeatureDtype::kF32 && py::array_t<float, py::array::c_style>::check_(pair.first);
    if (!(narrow || (real ? F::check_(pair.first) : I::check_(pair.first)))) {
      throw py::value_error(where + " is not a contiguous " + (real ? "float64" : "int64") + " array");
    }
    Column column{py::reinterpret_borrow<py::array>(pair.first), pair.second};
    column.narrow = narrow;
    if (column.values.ndim() != 1) throw py::value_error(where + " is not one-dimensional");
    const auto size = static_cast<size_t>(column.values.shape(0));
    if (i == 0) *n = size;
    if (size != *n) {
      throw py::value_error(where + " has " + std::to_string(size) + " rows; expected " + std::to_string(*n));
    }
    column.data = column.values.data();
    if (!column.valid.is_none()) {
      if (!B::check_(column.valid))
        throw py::value_error(where + ": validity is not a contiguous bool array");
      const auto mask = py::reinterpret_borrow<B>(column.valid);
      if (mask.ndim() != 1 || static_cast<size_t>(mask.shape(0)) != *n) {
        throw py::value_error(where + ": validity does not have the values' length");
      }
      column.mask = mask.data();
    }
    columns.push_back(std::move(column));
  }
  return columns;
}

// New columns for Python, filled block by block.
class Output {
 public:
  Output(const std::vector<Field>& fields, size_t n) {
    for (const Field& field : fields) {
      const auto rows = static_cast<py::ssize_t>(n);
      if (is_float(field.dtype)) {
        values_.emplace_back(py::array_t<double>(rows));
      } else {
        values_.emplace_back(py::array_t<int64_t>(rows));
      }
      valid_.emplace_back(rows);
    }
  }
  void write(size_t column, size_t from, size_t n, const Block& block) {
    std::copy_n(block.i64, n, static_cast<int64_t*>(values_[column].mutable_data()) + from);
    bool* valid = valid_[column].mutable_data() + from;
    for (size_t r = 0; r < n; ++r) valid[r] = (block.valid >> r & 1) != 0;
  }
  py::list list() const {
    py::list out;
    for (size_t i = 0; i < values_.size(); ++i) out.append(py::make_tuple(values_[i], valid_[i]));
    return out;
  }

 private:
  std::vector<py::array> values_;
  std::vector<py::array_t<bool>> valid_;
};

// What a call needs besides the program, made once.
struct Buffers {
  explicit Buffers(const FeatureProgram& program)
      : in(program.inputs().size()), out(program.outputs().size()), scratch(program.make_scratch()) {}
  std::vector<Block> in, out;
  FeatureProgram::Scratch scratch;
};

struct Program {
  std::shared_ptr<const FeatureProgram> program;
  std::vector<py::str> names;  // of the inputs
  // For run_row, under the GIL. A value's __float__ or __index__ may run Python, and so let in another call,
  // which finds them taken and makes its own.
  std::unique_ptr<Buffers> buffers;
};

[[noreturn]] void refuse_value(const Field& field, py::handle value, const char* expected) {
  PyErr_Clear();
  throw py::value_error("column '" + field.name + "' is " + py::repr(value).cast<std::string>() +
                        "; expected " + expected);
}

// One Python value into row 0; None is null.
void read_value(const Field& field, py::handle value, Block* to) {
  to->valid = value.is_none() ? 0 : 1;
  PyObject* object = value.ptr();
  if (value.is_none()) {
    to->i64[0] = 0;
  } else if (is_float(field.dtype)) {
    const double number = PyFloat_CheckExact(object) ? PyFloat_AS_DOUBLE(object) : PyFloat_AsDouble(object);
    if (number == -1 && PyErr_Occurred() != nullptr) refuse_value(field, value, "a number or None");
    to->f64[0] = field.dtype == FeatureDtype::kF32 ? static_cast<double>(static_cast<float>(number)) : number;
  } else {
    long long number = 0;
    if (PyLong_Check(object)) {
      number = PyLong_AsLongLong(object);
    } else {
      const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object));
      number = index ? PyLong_AsLongLong(index.ptr()) : -1;
    }
    if (number == -1 && PyErr_Occurred() != nullptr) refuse_value(field, value, "an int64 or None");
    to->i64[0] = number;
  }
}

PyObject* value_of(const Field& field, const Block& from) {
  if ((from.valid & 1) == 0) return Py_NewRef(Py_None);
  if (is_float(field.dtype)) return PyFloat_FromDouble(from.f64[0]);
  if (field.dtype == FeatureDtype::kBool) return PyBool_FromLong(from.i64[0] != 0);
  return PyLong_FromLongLong(from.i64[0]);
}

py::tuple run_row(Program& self, const py::object& row) {
  const FeatureProgram& program = *self.program;
  auto buffers = std::move(self.buffers);  // ours until the end
  if (!buffers) buffers = std::make_unique<Buffers>(program);
  const std::vector<Field>& inputs = program.inputs();
  if (PyDict_Check(row.ptr())) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      const auto value =
          py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(row.ptr(), self.names[i].ptr()));
      if (!value && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (!value) throw py::value_error("column '" + inputs[i].name + "' is not in the row");
      read_value(inputs[i], value, &buffers->in[i]);
    }
  } else {
    const auto values = py::reinterpret_steal<py::object>(
        PySequence_Fast(row.ptr(), "row is not a list, tuple or dict of the inputs' values"));
    if (!values) throw py::error_already_set();
    if (static_cast<size_t>(PySequence_Fast_GET_SIZE(values.ptr())) != inputs.size()) {
      throw py::value_error("row has " + std::to_string(PySequence_Fast_GET_SIZE(values.ptr())) +
                            " values; expected " + std::to_string(inputs.size()));
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      // A list may shrink while a value's method runs.
      if (static_cast<size_t>(PySequence_Fast_GET_SIZE(values.ptr())) <= i) {
        throw py::value_error("row changed while it was read");
      }
      const auto value = py::reinterpret_borrow<py::object>(
          PySequence_Fast_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i)));
      read_value(inputs[i], value, &buffers->in[i]);
    }
  }
  program.run(buffers->in.data(), 1, buffers->out.data(), buffers->scratch);
  py::tuple out(program.outputs().size());
  for (size_t i = 0; i < program.outputs().size(); ++i) {
    PyTuple_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), value_of(program.outputs()[i], buffers->out[i]));
  }
  self.buffers = std::move(buffers);
  return out;
}

py::list run(const Program& self, const py::list& inputs, size_t rows) {
  const FeatureProgram& program = *self.program;
  size_t n = rows;
  const auto columns = columns_of(inputs, program.inputs(), &n);
  Output out(program.outputs(), n);
  std::vector<Block> in(columns.size()), results(program.outputs().size());
  FeatureProgram::Scratch scratch = program.make_scratch();
  for (size_t from = 0; from < n; from += kBlockRows) {
    const size_t count = std::min(kBlockRows, n - from);
    for (size_t i = 0; i < columns.size(); ++i) columns[i].read(from, count, &in[i]);
    program.run(in.data(), count, results.data(), scratch);
    for (size_t i = 0; i < results.size(); ++i) out.write(i, from, count, results[i]);
  }
  return out.list();
}

Words encode(const RowSchema& self, const py::list& given,
             const py::array_t<uint8_t, py::array::c_style>& status) {
  if (status.ndim() != 1) throw py::value_error("status is not one-dimensional");
  auto n = static_cast<size_t>(status.shape(0));
  const size_t rows = n;
  const auto columns = columns_of(given, self.fields(), &n);
  if (n != rows)
    throw py::value_error("columns have " + std::to_string(n) + " rows; status has " + std::to_string(rows));
  Words out({static_cast<py::ssize_t>(n), static_cast<py::ssize_t>(self.row_words())});
  const size_t stride = self.row_words();
  self.init(out.mutable_data(), stride, n, status.data());
  Block block;
  for (size_t from = 0; from < n; from += kBlockRows) {
    const size_t count = std::min(kBlockRows, n - from);
    for (size_t i = 0; i < columns.size(); ++i) {
      columns[i].read(from, count, &block);
      self.store(i, block, count, out.mutable_data() + from * stride, stride);
    }
  }
  return out;
}

py::list decode(const RowSchema& self, const Words& rows) {
  const size_t stride = self.row_words();
  if (rows.ndim() != 2 || static_cast<size_t>(rows.shape(1)) != stride) {
    throw py::value_error("rows are not [n, " + std::to_string(stride) + "] words");
  }
  const auto n = static_cast<size_t>(rows.shape(0));
  Output out(self.fields(), n);
  Block block;
  for (size_t from = 0; from < n; from += kBlockRows) {
    const size_t count = std::min(kBlockRows, n - from);
    for (size_t i = 0; i < self.fields().size(); ++i) {
      self.load(i, rows.data() + from * stride, stride, count, &block);
      out.write(i, from, count, block);
    }
  }
  return out.list();
}

}  // namespace

void bind_features(py::module_& m) {
  py::class_<Program>(m, "FeatureProgram", "A compiled feature program; immutable.")
      .def(py::init([](const py::bytes& data) {
             const std::string_view view = data;
             auto out = std::make_unique<Program>();
             require(FeatureProgram::parse(reinterpret_cast<const uint8_t*>(view.data()), view.size(),
                                           &out->program));
             for (const Field& field : out->program->inputs()) out->names.emplace_back(field.name);
             return out;
           }),
           py::arg("data"), "Load the bytes of compile_program; ValueError if any part of them is corrupt.")
      .def_property_readonly(
          "inputs", [](const Program& self) { return names_of(self.program->inputs()); },
          "(name, dtype) of each input column.")
      .def_property_readonly(
          "outputs", [](const Program& self) { return names_of(self.program->outputs()); },
          "(name, dtype) of each output column.")
      .def("run", &run, py::arg("inputs"), py::arg("rows") = 0,
           "inputs: a list of (values [n] float64 or int64, valid bool [n] or None) in the order of "
           "`inputs`.\n"
           "rows: the row count of a program without inputs. Returns a like list of outputs; the value of a "
           "null\n"
           "is 0. ValueError names the column that has a wrong dtype or length.")
      .def("run_row", &run_row, py::arg("row"),
           "One row, quickly: a list or tuple of the inputs' values in order, or a dict by input name. A "
           "value is\n"
           "a float, an int (times in microseconds, strings as codes), a bool, or None for null; so are the "
           "outputs,\n"
           "a tuple. ValueError names the column that has no such value.");
  py::class_<RowSchema>(m, "RowSchema", "Layout of a stored feature row.")
      .def(py::init([](const Names& names) {
             std::vector<Field> fields;
             for (const auto& [name, dtype] : names) {
               Field field{name, FeatureDtype::kF64};
               const Status status = dtype_from_name(dtype, &field.dtype);
               if (!status.is_ok()) throw py::value_error("field '" + name + "': " + status.message);
               fields.push_back(std::move(field));
             }
             RowSchema schema;
             require(RowSchema::create(std::move(fields), &schema));
             return schema;
           }),
           py::arg("fields"),
           "fields: a list of (name, dtype); ValueError for a repeated name or unknown dtype.")
      .def_property_readonly("row_words", &RowSchema::row_words, "64-bit words in a row.")
      .def_property_readonly(
          "fields", [](const RowSchema& self) { return names_of(self.fields()); },
          "(name, dtype) of each field.")
      .def("encode", &encode, py::arg("columns"), py::arg("status").noconvert(),
           "columns: a list of (values [n] float64 or int64, valid bool [n] or None); status uint8 [n].\n"
           "Returns uint64 [n, row_words].")
      .def("decode", &decode, py::arg("rows").noconvert(),
           "rows: uint64 [n, row_words]. Returns a list of (values [n], valid bool [n]).");
}

}  // namespace penstock::bind
