// Binding of the backends that are no trees: an ONNX model, a Python callable over fixed buffers, and a child
// process.
//
// A PythonModel's run takes the GIL to enter and leave; rows are copied in and scores out without it. Its
// Python references may be dropped by a thread that holds locks of the core, so they are released by a
// pending call of the main thread, which needs no GIL to ask for.
#include "bind/backends.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>

#include "base/text.h"
#include "engine/child_channel.h"
#include "engine/onnx_session.h"
#include "engine/score_rule.h"

namespace penstock::bind {
namespace {

constexpr size_t kMaxText = 1024;

struct Held {
  py::object run, rows, scores;
};

int release(void* held) {
  delete static_cast<Held*>(held);
  return 0;
}

// The text of a Python exception, as "Type: message", bounded. Needs the GIL; leaves no exception set.
std::string text_of(const py::error_already_set& error) {
  try {
    std::string text = py::cast<std::string>(error.type().attr("__name__")) + ": " +
                       py::cast<std::string>(py::str(error.value()));
    cut_text(&text, kMaxText);
    return text;
  } catch (const std::exception&) {
    PyErr_Clear();
    return "an exception without a readable text";
  }
}

ScoreRule make_rule(size_t width, std::optional<int> column, bool probability) {
  if (width < 1 || width > (1 << 16)) throw py::value_error("width is " + std::to_string(width));
  const int served = column.value_or(-1);
  if (column.has_value() && (served < 0 || static_cast<size_t>(served) >= width))
    throw py::value_error("column is " + std::to_string(served) + "; expected one of " +
                          std::to_string(width));
  return {width, served, probability};
}

// A callable over fixed buffers: run(n) scores the first n rows of `rows` into the first n of `scores`.
class PythonCalls {
 public:
  PythonCalls(py::function run, const py::array& rows, const py::array& scores, const ScoreRule& rule)
      : rule_(rule), held_(new Held{std::move(run), rows, scores}) {
    const auto shaped = [](const py::array& a, size_t width) {
      return a.ndim() == 2 && a.shape(0) == static_cast<py::ssize_t>(kMaxBatchRows) &&
             a.shape(1) == static_cast<py::ssize_t>(width) && (a.flags() & py::array::c_style) != 0 &&
             a.writeable();
    };
    if (!py::isinstance<py::array_t<float>>(rows) || rows.ndim() != 2 ||
        !shaped(rows, static_cast<size_t>(rows.shape(1))))
      throw py::value_error("rows is no writable float32 [64, F]");
    if (!py::isinstance<py::array_t<double>>(scores) || !shaped(scores, rule.width))
      throw py::value_error("scores is no writable float64 [64, width]");
    n_features_ = static_cast<size_t>(rows.shape(1));
    rows_ = static_cast<float*>(held_->rows.cast<py::array>().mutable_data());
    scores_ = static_cast<const double*>(held_->scores.cast<py::array>().data());
  }
  PythonCalls(const PythonCalls&) = delete;
  PythonCalls& operator=(const PythonCalls&) = delete;
  ~PythonCalls() {
    // Full is its queue only while the main thread runs no Python; the references then live on.
    Held* const held = held_.release();
    if (Py_IsInitialized() != 0) (void)Py_AddPendingCall(&release, held);
  }

  size_t n_features() const { return n_features_; }
  const ScoreRule& rule() const { return rule_; }

  // Not with the GIL held.
  Status run(const float* rows, size_t n, double* scores) {
    std::memcpy(rows_, rows, n * n_features_ * sizeof(float));
    if (Status status = call(n); !status.is_ok()) return status;
    rule_.apply(scores_, n, scores);
    return {};
  }

 private:
  Status call(size_t n) {
    const struct Counted {
      Counted() { g_python_runs.fetch_add(1, std::memory_order_relaxed); }
      ~Counted() { g_python_runs.fetch_sub(1, std::memory_order_relaxed); }
    } counted;
    const py::gil_scoped_acquire gil;
    try {
      held_->run(n);
      return {};
    } catch (const py::error_already_set& error) {
      return {Code::kInternal, "the model raised " + text_of(error)};
    }
  }

  const ScoreRule rule_;
  std::unique_ptr<Held> held_;
  size_t n_features_ = 0;
  float* rows_ = nullptr;
  const double* scores_ = nullptr;
};

// One run for a caller in Python: float64 [n, outputs], or (code, message).
template <class Backend>
py::object run_once(Backend& self, const py::array_t<float, py::array::c_style>& rows) {
  if (rows.ndim() != 2 || rows.shape(0) < 1 || rows.shape(0) > static_cast<py::ssize_t>(kMaxBatchRows) ||
      rows.shape(1) != static_cast<py::ssize_t>(self.n_features()))
    throw py::value_error("rows is no float32 [1..64, " + std::to_string(self.n_features()) + "]");
  const auto n = static_cast<size_t>(rows.shape(0));
  py::array_t<double> scores({n, self.rule().n_outputs()});
  Status status;
  {
    const float* from = rows.data();
    double* to = scores.mutable_data();
    const py::gil_scoped_release release;
    status = self.run(from, n, to);
  }
  if (!status.is_ok()) return py::make_tuple(code_name(status.code), status.message);
  return scores;
}

std::shared_ptr<OnnxSession> open_onnx(const py::bytes& model, std::string library, std::string input,
                                       std::string output, size_t n_features, size_t width, bool flat,
                                       bool wide, std::optional<int> column, bool probability, int threads) {
  if (n_features < 1) throw py::value_error("n_features is 0");
  const OnnxSession::Spec spec{.library = std::move(library),
                               .input = std::move(input),
                               .output = std::move(output),
                               .n_features = n_features,
                               .flat = flat,
                               .wide = wide,
                               .threads = threads,
                               .rule = make_rule(width, column, probability)};
  char* data = nullptr;
  py::ssize_t size = 0;
  if (PyBytes_AsStringAndSize(model.ptr(), &data, &size) != 0) throw py::error_already_set();
  std::shared_ptr<OnnxSession> made;
  Status status;
  {
    const py::gil_scoped_release release;
    status = OnnxSession::open(data, static_cast<size_t>(size), spec, &made);
  }
  if (status.code == Code::kFailedPrecondition) throw std::runtime_error(status.message);
  if (!status.is_ok()) throw py::value_error(status.message);
  return made;
}

}  // namespace

std::unique_ptr<Model> make_backend_model(const py::handle& given) {
  if (py::isinstance<PythonCalls>(given))
    return std::make_unique<ForeignModel<PythonCalls>>(given.cast<std::shared_ptr<PythonCalls>>());
  if (py::isinstance<ChildChannel>(given))
    return std::make_unique<ChildModel>(given.cast<std::shared_ptr<ChildChannel>>());
  if (py::isinstance<OnnxSession>(given))
    return std::make_unique<OnnxModel>(given.cast<std::shared_ptr<OnnxSession>>());
  throw py::type_error(
      "model is neither the bytes of trees.bin nor an OnnxSession nor a PythonModel nor a ChildChannel");
}

void bind_backends(py::module_& m) {
  py::class_<OnnxSession, std::shared_ptr<OnnxSession>>(
      m, "OnnxSession", "An ONNX model on onnxruntime's CPU provider, run without the GIL.")
      .def(py::init(&open_onnx), py::arg("model"), py::kw_only(), py::arg("library"), py::arg("input"),
           py::arg("output"), py::arg("n_features"), py::arg("width"), py::arg("flat"), py::arg("wide"),
           py::arg("column") = py::none(), py::arg("probability") = false, py::arg("threads") = 1,
           "model: the bytes of a ModelProto that takes `input`, float32 [n, n_features], and gives "
           "`output`,\n"
           "[n] if flat, else [n, width], float64 if wide, else float32. library: libonnxruntime.so.\n"
           "column: the one that is served; None: all. ValueError: the model is refused; RuntimeError: the\n"
           "library is.")
      .def("run", &run_once<OnnxSession>, py::arg("rows").noconvert(),
           "Scores float64 [n, outputs] of float32 [n, F], n in 1..64, or (code, message). One caller at "
           "once.")
      .def("interrupt", &OnnxSession::interrupt,
           "Ends a run in progress at its next operator; no run succeeds after.");
  py::class_<PythonCalls, std::shared_ptr<PythonCalls>>(
      m, "PythonModel", "A model in this process that is called under the GIL, over buffers made once.")
      .def(py::init([](py::function run, const py::array& rows, const py::array& scores,
                       std::optional<int> column, bool probability) {
             const size_t width = scores.ndim() == 2 ? static_cast<size_t>(scores.shape(1)) : 0;
             return std::make_shared<PythonCalls>(std::move(run), rows, scores,
                                                  make_rule(width, column, probability));
           }),
           py::arg("run"), py::arg("rows"), py::arg("scores"), py::kw_only(), py::arg("column") = py::none(),
           py::arg("probability") = false,
           "run(n) scores rows[:n], float32 [64, F], into scores[:n], float64 [64, width].\n"
           "column: the one that is served; None: all.")
      .def("run", &run_once<PythonCalls>, py::arg("rows").noconvert(),
           "Scores float64 [n, outputs] of float32 [n, F], n in 1..64, or (code, message). One caller at "
           "once.");
  py::class_<ChildChannel, std::shared_ptr<ChildChannel>>(
      m, "ChildChannel", "The shared memory and the doorbell of a model in a child process.")
      .def(py::init([](size_t n_features, size_t width, std::optional<int> column, bool probability,
                       double run_timeout_s) {
             if (n_features < 1) throw py::value_error("n_features is 0");
             if (!(run_timeout_s > 0 && run_timeout_s < 1e9))
               throw py::value_error("run_timeout_s is not positive");
             std::shared_ptr<ChildChannel> made;
             const Status status = ChildChannel::create(n_features, make_rule(width, column, probability),
                                                        static_cast<int64_t>(run_timeout_s * 1e9), &made);
             if (!status.is_ok()) throw std::runtime_error(status.message);
             return made;
           }),
           py::arg("n_features"), py::arg("width"), py::kw_only(), py::arg("column") = py::none(),
           py::arg("probability") = false, py::arg("run_timeout_s"))
      .def_property_readonly("memory_fd", &ChildChannel::memory_fd)
      .def_property_readonly("alarm_fd", &ChildChannel::alarm_fd)
      .def_property_readonly("reason",
                             [](ChildChannel& self) {
                               const py::gil_scoped_release release;
                               return self.reason();
                             })
      .def("read_alarm", &ChildChannel::read_alarm)
      .def(
          "attach",
          [](ChildChannel& self, int socket, int pidfd, double restart_s) {
            self.attach(socket, pidfd, static_cast<int64_t>(restart_s * 1e9));
          },
          py::arg("socket"), py::arg("pidfd"), py::arg("restart_s"), py::call_guard<py::gil_scoped_release>(),
          "Takes both descriptors over; pidfd may be -1. Another child would be ready restart_s after its "
          "end.")
      .def("detach", &ChildChannel::detach, py::arg("reason"), py::call_guard<py::gil_scoped_release>())
      .def(
          "expect_after",
          [](ChildChannel& self, double s) { self.expect_after(static_cast<int64_t>(s * 1e9)); },
          py::arg("seconds"))
      .def("close", &ChildChannel::close)
      .def("run", &run_once<ChildChannel>, py::arg("rows").noconvert(),
           "Scores float64 [n, outputs] of float32 [n, F], n in 1..64, or (code, message).")
      .def_static(
          "layout",
          [](size_t n_features, size_t width) {
            return py::make_tuple(ChildChannel::scores_offset(n_features),
                                  ChildChannel::text_offset(n_features, width),
                                  ChildChannel::block_bytes(n_features, width));
          },
          py::arg("n_features"), py::arg("width"),
          "Offsets of scores and of text, and the size of the block.");
}

}  // namespace penstock::bind
