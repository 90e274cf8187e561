// Binding of csrc/load. run_load() releases the GIL and takes it a few times a second to look for signals.
#include "load/load.h"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "bind/bind.h"

namespace penstock::bind {
namespace {

using namespace load;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> span_of(const std::optional<Array<T>>& array) {
  if (!array.has_value()) return {};
  return {array->data(), static_cast<size_t>(array->size())};
}

template <class Enum>
Enum one_of(const char* what, const std::string& name,
            std::initializer_list<std::pair<const char*, Enum>> all) {
  std::string expected;
  for (const auto& [known, value] : all) {
    if (name == known) return value;
    expected += (expected.empty() ? "" : ", ") + std::string(known);
  }
  throw py::value_error(std::string(what) + " is '" + name + "'; expected one of " + expected);
}

const char* phase_name(Phase phase) {
  constexpr const char* kNames[] = {"connect", "warmup", "window", "drain", "done"};
  return kNames[static_cast<size_t>(phase)];
}

py::dict dict_of(const Report& report) {
  py::dict outcomes;
  for (size_t i = 0; i < kOutcomes; ++i) {
    const auto& books = report.outcomes[i];
    if (books.latency.count() == 0) continue;
    py::dict one;
    one["latency"] = books.latency;
    one["from_send"] = books.from_send.count() == 0 ? books.latency : books.from_send;
    outcomes[outcome_name(i)] = one;
  }
  py::list series;
  for (const Second& second : report.series) {
    series.append(py::make_tuple(second.answers_ok, second.answers_not_ok, second.max_ns));
  }
  py::dict result;
  result["outcomes"] = outcomes;
  result["http_statuses"] = report.http_statuses;
  result["other_errors"] = report.other_errors;
  result["window_s"] = report.window_s;
  result["due"] = report.due;
  result["sent"] = report.sent;
  result["unsent"] = report.unsent;
  result["unanswered"] = report.unanswered;
  result["transport_errors"] = report.transport_errors;
  result["shed"] = report.shed;
  result["held_back"] = report.held_back;
  result["answers_in_window"] = report.answers_in_window;
  result["good"] = report.good;
  result["broken_connections"] = report.broken_connections;
  result["reconnects"] = report.reconnects;
  result["unexpected"] = report.unexpected;
  result["bytes_sent"] = report.bytes_sent;
  result["bytes_received"] = report.bytes_received;
  result["max_error"] = report.max_error;
  result["thread_cpu_s"] = report.thread_cpu_s;
  result["stopped"] = report.stopped;
  result["series"] = series;
  return result;
}

py::dict run_load(const std::string& address, const py::buffer& requests, const Array<uint64_t>& offsets,
                  const std::string& protocol, const std::optional<Array<uint32_t>>& order,
                  const std::optional<Array<double>>& expected, uint32_t scores_per_request, double tolerance,
                  const std::string& body_format, const std::string& json_key, const py::bytes& fixed_reply,
                  const py::bytes& greeting, uint32_t connections, uint32_t in_flight, double rate,
                  bool poisson, bool shed, uint64_t seed, double warmup_s, double duration_s, double drain_s,
                  double tick_us, double goodput_ms, double reconnect_s, bool series,
                  const std::optional<py::function>& watch) {
  Options options;
  options.address = address;
  options.protocol = one_of<Protocol>(
      "protocol", protocol,
      {{"rpc", Protocol::kMsgpackRpc}, {"http", Protocol::kHttp}, {"fixed", Protocol::kFixed}});
  options.body = one_of<BodyFormat>("body_format", body_format,
                                    {{"none", BodyFormat::kNone},
                                     {"f32", BodyFormat::kFloat32},
                                     {"f64", BodyFormat::kFloat64},
                                     {"f32-tail", BodyFormat::kFloat32Tail},
                                     {"json", BodyFormat::kJson},
                                     {"msgpack", BodyFormat::kMsgpack}});
  options.json_key = json_key;
  options.fixed_reply = fixed_reply;
  options.greeting = greeting;
  options.connections = connections;
  options.depth = in_flight;
  options.rate = rate;
  options.poisson = poisson;
  options.shed = shed;
  options.seed = seed;
  options.warmup_s = warmup_s;
  options.duration_s = duration_s;
  options.drain_s = drain_s;
  options.tick_us = tick_us;
  options.goodput_ms = goodput_ms;
  options.reconnect_s = reconnect_s;
  options.series = series;
  const py::buffer_info info = requests.request();
  if (info.ndim != 1 || info.itemsize != 1) throw py::value_error("requests are no bytes");
  Requests input;
  input.bytes = {static_cast<const uint8_t*>(info.ptr), static_cast<size_t>(info.size)};
  input.offsets = {offsets.data(), static_cast<size_t>(offsets.size())};
  input.order = span_of(order);
  input.expected = span_of(expected);
  input.scores_per_request = scores_per_request;
  input.tolerance = tolerance;
  const Watch look = [&](const Progress& progress) {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!watch.has_value()) return true;
    const py::object more =
        (*watch)(phase_name(progress.phase), progress.seconds, progress.ok, progress.failed);
    return more.is_none() || more.cast<bool>();
  };
  auto report = std::make_unique<Report>();
  Status status;
  {
    py::gil_scoped_release release;
    status = run(options, input, look, report.get());
  }
  if (status.code == Code::kInvalidArgument) throw py::value_error(status.message);
  if (!status.is_ok()) {
    PyErr_SetString(PyExc_ConnectionError, status.message.c_str());
    throw py::error_already_set();
  }
  return dict_of(*report);
}

}  // namespace

void bind_load(py::module_& m) {
  py::class_<HdrHistogram>(m, "HdrHistogram",
                           "Latencies in nanoseconds, exact to three significant digits. One thread.")
      .def(py::init<>())
      .def(
          "add",
          [](HdrHistogram& self, const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& ns) {
            for (py::ssize_t i = 0; i < ns.size(); ++i) self.add(ns.data()[i]);
          },
          py::arg("ns"), "Add every value of an int64 array.")
      .def("quantile", &HdrHistogram::quantile, py::arg("q"),
           "The largest value of the bucket that holds the ceil(q * count)-th smallest; 0 if empty.")
      .def("count_up_to", &HdrHistogram::count_up_to, py::arg("ns"),
           "Values in the buckets up to that of `ns`.")
      .def_property_readonly("count", &HdrHistogram::count)
      .def_property_readonly("min", &HdrHistogram::min)
      .def_property_readonly("max", &HdrHistogram::max)
      .def_property_readonly("mean", &HdrHistogram::mean);
  m.def("run_load", &run_load, py::arg("address"), py::arg("requests"), py::arg("offsets"), py::kw_only(),
        py::arg("protocol") = "rpc", py::arg("order") = py::none(), py::arg("expected") = py::none(),
        py::arg("scores_per_request") = 1, py::arg("tolerance") = 1e-5, py::arg("body_format") = "none",
        py::arg("json_key") = "", py::arg("fixed_reply") = py::bytes(), py::arg("greeting") = py::bytes(),
        py::arg("connections") = 1, py::arg("in_flight") = 1, py::arg("rate") = 0.0,
        py::arg("poisson") = false, py::arg("shed") = false, py::arg("seed") = 0, py::arg("warmup_s") = 1.0,
        py::arg("duration_s") = 5.0, py::arg("drain_s") = 2.0, py::arg("tick_us") = 50.0,
        py::arg("goodput_ms") = 50.0, py::arg("reconnect_s") = 0.1, py::arg("series") = false,
        py::arg("watch") = py::none(),
        "Load a server (csrc/load/load.h) and return what came of it. ValueError: an option is wrong; "
        "ConnectionError: no connection. watch(phase, seconds, ok, failed): False ends the run.");
}

}  // namespace penstock::bind
