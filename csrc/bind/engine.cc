// Binding of csrc/engine. Calls of the loop thread hold the GIL: they take microseconds. Calls that wait
// (a local predict that could not run inline, the loader, warm-up, stopping) release it.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "engine/serving_core.h"

namespace penstock::bind {
namespace {

using namespace py::literals;

void require(const Status& status) {
  if (!status.is_ok()) throw py::value_error(status.message);
}

std::vector<PlanColumn> plan_columns(const py::handle& given) {
  std::vector<PlanColumn> columns;
  for (const auto& [name, dtype] : py::cast<std::vector<std::pair<std::string, std::string>>>(given)) {
    PlanColumn column{name, FeatureDtype::kF64};
    require(dtype_from_name(dtype, &column.dtype));
    columns.push_back(std::move(column));
  }
  return columns;
}

std::shared_ptr<const ServicePlan> make_plan(const py::dict& given) {
  ServicePlanSpec spec;
  spec.entities = plan_columns(given["entities"]);
  spec.inputs = plan_columns(given["inputs"]);
  spec.request_source = py::cast<std::string>(given["request_source"]);
  spec.error_on_missing = py::cast<bool>(given["error_on_missing"]);
  const auto seed = py::cast<std::string>(given["key_seed"]);
  if (seed.size() != sizeof spec.key_seed) throw py::value_error("key_seed is not 16 bytes");
  std::copy(seed.begin(), seed.end(), spec.key_seed);
  const auto program = py::cast<std::string>(given["program"]);
  require(
      FeatureProgram::parse(reinterpret_cast<const uint8_t*>(program.data()), program.size(), &spec.program));
  for (const py::handle& item : py::cast<py::list>(given["views"])) {
    const auto given_view = py::cast<py::dict>(item);
    PlanView view;
    view.name = py::cast<std::string>(given_view["name"]);
    view.cache = py::cast<std::shared_ptr<FeatureCache>>(given_view["cache"]);
    for (PlanColumn& column : plan_columns(given_view["fields"]))
      view.fields.push_back({std::move(column.name), column.dtype});
    view.key_columns = py::cast<std::vector<uint32_t>>(given_view["key_columns"]);
    spec.views.push_back(std::move(view));
  }
  std::shared_ptr<const ServicePlan> plan;
  require(ServicePlan::create(std::move(spec), &plan));
  return plan;
}

std::shared_ptr<ServedModel> load(ServingCore& core, const std::string& name, const std::string& version,
                                  const py::bytes& trees, const py::object& plan, size_t max_batch_rows,
                                  double max_latency_ms, double guard_ms, int64_t inline_limit_us,
                                  uint32_t max_rows_per_request, uint32_t max_requests,
                                  uint32_t max_queued_rows, bool allow_replay, size_t served_capacity) {
  const auto within = [](const char* setting, double value, double least, double most) {
    if (value >= least && value <= most) return;
    throw py::value_error(std::string(setting) + " is " + py::cast<std::string>(py::str(py::float_(value))) +
                          "; expected " + py::cast<std::string>(py::str(py::float_(least))) + " to " +
                          py::cast<std::string>(py::str(py::float_(most))));
  };
  within("max_batch_rows", static_cast<double>(max_batch_rows), 1, kMaxBatchRows);
  within("max_latency_ms", max_latency_ms, 1e-3, 1e9);
  within("guard_ms", guard_ms, 0, 1e9);
  within("inline_limit_us", static_cast<double>(inline_limit_us), 0, 1e12);
  within("max_requests", max_requests, 1, 1 << 24);
  within("max_queued_rows", max_queued_rows, 1, 1 << 28);
  ServedModelConfig config;
  config.name = name;
  config.version = version;
  config.lane.policy.max_batch_rows = max_batch_rows;
  config.lane.policy.guard_ns = static_cast<int64_t>(guard_ms * 1e6);
  config.lane.max_requests = max_requests;
  config.lane.max_queued_rows = max_queued_rows;
  config.lane.max_rows_per_request = max_rows_per_request;
  config.max_resident_rows = 2 * max_queued_rows;
  config.max_latency_ns = static_cast<int64_t>(max_latency_ms * 1e6);
  config.inline_limit_ns = inline_limit_us * 1000;
  config.allow_replay = allow_replay;
  config.served_capacity = served_capacity;
  const auto data = static_cast<std::string_view>(trees);
  std::unique_ptr<Model> model;
  require(make_tree_model(reinterpret_cast<const uint8_t*>(data.data()), data.size(), &model));
  std::shared_ptr<const ServicePlan> compiled;
  if (!plan.is_none()) {
    compiled = make_plan(py::cast<py::dict>(plan));
    if (compiled->n_features() != model->n_features()) {
      throw py::value_error("the service has " + std::to_string(compiled->n_features()) +
                            " features; the model takes " + std::to_string(model->n_features()));
    }
  }
  auto served = std::make_shared<ServedModel>(config, std::move(model), std::move(compiled), &core);
  const py::gil_scoped_release release;
  require(served->warm_up());
  served->start();
  return served;
}

py::dict counters(const EndCounters& c) {
  return py::dict("submitted"_a = c.submitted, "in_flight"_a = c.in_flight, "ok"_a = c.ok,
                  "rejected"_a = c.rejected, "expired"_a = c.expired, "cancelled"_a = c.cancelled,
                  "failed"_a = c.failed);
}

py::dict latency(const LatencyHistogram& h) {
  return py::dict("count"_a = h.count(), "sum_ns"_a = h.sum(), "p50_ns"_a = h.quantile(0.5),
                  "p90_ns"_a = h.quantile(0.9), "p99_ns"_a = h.quantile(0.99),
                  "p999_ns"_a = h.quantile(0.999), "max_ns"_a = h.max());
}

py::dict stats(ServedModel& self) {
  auto s = std::make_unique<ServedModelStats>();
  self.stats(s.get());
  py::dict batches;
  for (size_t n = 1; n <= kMaxBatchRows; ++n) {
    if (s->batches[n] != 0) batches[py::int_(n)] = s->batches[n];
  }
  return py::dict("requests"_a = counters(s->requests), "rows"_a = counters(s->rows), "batches"_a = batches,
                  "latency"_a = latency(s->total), "queue"_a = latency(s->queue), "run"_a = latency(s->run),
                  "inline_runs"_a = s->inline_runs, "executor_runs"_a = s->executor_runs,
                  "parked"_a = s->parked, "missed_rows"_a = s->missed_rows, "queued_rows"_a = s->queued_rows,
                  "served_dropped"_a = s->served_dropped);
}

py::tuple drain(ServedModel& self, size_t n) {
  ServedRing& ring = self.served();
  const auto rows = static_cast<py::ssize_t>(std::min(n, ring.size()));
  const auto width = [](size_t w) { return static_cast<py::ssize_t>(w); };
  py::array_t<uint64_t> ids(rows);
  py::array_t<int64_t> now(rows);
  py::array_t<uint8_t> status(rows);
  py::array_t<double> scores({rows, width(ring.outputs())});
  py::array_t<float> features({rows, width(ring.features())});
  py::array_t<int64_t> event_time({rows, width(ring.views())});
  ServedRing::Out out{ids.mutable_data(),    now.mutable_data(),      status.mutable_data(),
                      scores.mutable_data(), features.mutable_data(), event_time.mutable_data()};
  {
    const py::gil_scoped_release release;
    ring.drain(static_cast<size_t>(rows), out);  // one drainer: the rows counted are still there
  }
  return py::make_tuple(ids, now, features, scores, status, event_time);
}

ServedModel::Scratch& local_scratch() {
  thread_local const auto scratch = std::make_unique<ServedModel::Scratch>();
  return *scratch;
}

py::tuple failure(const Status& status, int64_t retry_after_ms) {
  return py::make_tuple(code_name(status.code), status.message,
                        retry_after_ms < 0 ? py::object(py::none()) : py::object(py::int_(retry_after_ms)));
}

// (scores float64 [n, outputs], version, request_ids uint64 [n], status uint8 [n] or None, timings dict), or
// (code, message, retry_after_ms).
py::tuple call_local(ServingCore& core, bool vectors, const py::bytes& params) {
  ServingCore::LocalCall call;
  const Status status =
      core.begin_local(vectors, static_cast<std::string_view>(params), local_scratch(), &call);
  if (!status.is_ok()) return failure(status, call.retry_after_ms);
  thread_local Result result;
  if (!call.model->take(call.tag, &result)) {
    const py::gil_scoped_release release;
    call.model->wait(call.tag, call.waiter);
    if (!call.model->take(call.tag, &result)) result.status = {Code::kInternal, "the request was lost"};
  }
  if (!result.status.is_ok()) return failure(result.status, result.retry_after_ms);
  const auto rows = static_cast<py::ssize_t>(result.rows);
  const auto outputs = static_cast<py::ssize_t>(call.model->n_outputs());
  py::object row_status = py::none();
  if (result.with_status) row_status = py::array_t<uint8_t>(rows, result.row_status.data());
  return py::make_tuple(
      py::array_t<double>({rows, outputs}, result.scores.data()), call.model->config().version,
      py::array_t<uint64_t>(rows, result.request_ids.data()), row_status,
      py::dict("queue"_a = result.queue_ns, "run"_a = result.run_ns, "total"_a = result.total_ns));
}

struct PyMisses {
  MissBatch batch;
};

py::object wait_misses(ServingCore& core, double timeout_s) {
  auto misses = std::make_unique<PyMisses>();
  bool found;
  {
    const py::gil_scoped_release release;
    found = core.wait_misses(static_cast<int64_t>(timeout_s * 1e9), &misses->batch);
  }
  if (!found) return py::none();
  return py::cast(std::move(misses));
}

py::list miss_views(const PyMisses& self) {
  py::list views;
  for (const MissBatch::View& view : self.batch.views) {
    const auto n = static_cast<py::ssize_t>(view.keys.size());
    const py::array_t<uint64_t> keys({n, py::ssize_t{2}},
                                     reinterpret_cast<const uint64_t*>(view.keys.data()));
    views.append(py::make_tuple(view.name, keys, py::array_t<int64_t>(n, view.now_us.data())));
  }
  return views;
}

void finish_misses(ServingCore& core, const PyMisses& misses, const py::list& loaded, uint64_t stamp) {
  using Words = py::array_t<uint64_t, py::array::c_style | py::array::forcecast>;
  using Metas = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
  static_assert(sizeof(RowMeta) == 4 * sizeof(int64_t));
  if (loaded.size() != misses.batch.views.size()) throw py::value_error("expected rows of every view");
  std::vector<std::pair<Words, Metas>> kept;
  std::vector<const uint64_t*> rows;
  std::vector<const RowMeta*> metas;
  for (size_t v = 0; v < loaded.size(); ++v) {
    const MissBatch::View& view = misses.batch.views[v];
    const auto pair = py::cast<std::pair<Words, Metas>>(loaded[v]);
    const auto n = static_cast<py::ssize_t>(view.keys.size());
    if (pair.first.ndim() != 2 || pair.first.shape(0) != n || pair.first.shape(1) != view.row_words ||
        pair.second.ndim() != 2 || pair.second.shape(0) != n || pair.second.shape(1) != 4) {
      throw py::value_error("rows of view '" + view.name + "' have another shape than its keys ask for");
    }
    kept.push_back(pair);
    rows.push_back(pair.first.data());
    metas.push_back(reinterpret_cast<const RowMeta*>(pair.second.data()));
  }
  const py::gil_scoped_release release;
  core.finish_misses(misses.batch, rows, metas, stamp, local_scratch());
}

Code code_of(const std::string& name) {
  for (uint8_t code = 1; code <= static_cast<uint8_t>(Code::kInternal); ++code) {
    if (name == code_name(static_cast<Code>(code))) return static_cast<Code>(code);
  }
  throw py::value_error("code is " + name + "; expected a canonical code");
}

void bind_connection(py::module_& m) {
  py::class_<Connection>(m, "Connection", "One peer. Every call belongs to the loop thread.")
      .def_property_readonly("id", &Connection::id)
      .def(
          "get_buffer",
          [](Connection& self, py::ssize_t hint) {
            static uint8_t none;
            const std::span<uint8_t> room =
                self.session().get_buffer(hint > 0 ? static_cast<size_t>(hint) : wire::Session::kChunk);
            return py::memoryview::from_memory(room.empty() ? &none : room.data(),
                                               static_cast<py::ssize_t>(room.size()), false);
          },
          py::arg("sizehint") = -1, py::keep_alive<0, 1>(),
          "Writable memoryview for the next read; valid until the next get_buffer. Empty: no room.")
      .def(
          "received",
          [](Connection& self, size_t n) {
            std::vector<Connection::Call> others;
            self.received(n, &others);
            py::list calls;
            for (const Connection::Call& call : others)
              calls.append(py::make_tuple(call.msgid, call.method, py::bytes(call.params)));
            return calls;
          },
          py::arg("n"),
          "n bytes were read into the last get_buffer: answers the predict calls in them and returns the\n"
          "other requests as (msgid, method, params as MessagePack bytes).")
      .def(
          "reply",
          [](Connection& self, uint32_t msgid, const py::bytes& result) {
            return self.reply(msgid, static_cast<std::string_view>(result));
          },
          py::arg("msgid"), py::arg("result"),
          "Answer with a MessagePack value. False: not in flight, or it does not fit and the answer is\n"
          "RESOURCE_EXHAUSTED.")
      .def(
          "reply_error",
          [](Connection& self, uint32_t msgid, const std::string& code, const std::string& message,
             bool retryable, std::optional<int64_t> retry_after_ms) {
            return self.reply_error(msgid, {code_of(code), message}, retryable, retry_after_ms.value_or(-1));
          },
          py::arg("msgid"), py::arg("code"), py::arg("message"), py::arg("retryable"),
          py::arg("retry_after_ms") = py::none())
      .def(
          "refuse",
          [](Connection& self, const std::string& code, const std::string& message) {
            return wire::encode_error(self.session().out(), std::nullopt, {code_of(code), message},
                                      is_retryable(code_of(code)));
          },
          py::arg("code"), py::arg("message"), "Append an error that answers no request (msgid nil).")
      .def(
          "goaway",
          [](Connection& self, uint64_t grace_ms) {
            return wire::encode_goaway(self.session().out(), grace_ms);
          },
          py::arg("grace_ms"))
      .def(
          "take_output",
          [](Connection& self) -> py::object {
            const wire::Writer* out = self.session().take_output();
            if (out == nullptr) return py::none();
            return py::bytes(reinterpret_cast<const char*>(out->data()), out->size());
          },
          "Bytes to send, or None when there are none or earlier ones are not sent yet.")
      .def(
          "output_sent", [](Connection& self) { self.session().output_sent(); },
          "The bytes of take_output are sent.")
      .def_property_readonly("pending_output_bytes",
                             [](Connection& self) { return self.session().pending_output_bytes(); })
      .def_property_readonly("in_flight", [](Connection& self) { return self.session().in_flight(); })
      .def_property_readonly("closed", &Connection::closed)
      .def_property_readonly("dropped_notifications",
                             [](Connection& self) { return self.session().dropped(); })
      .def("drop", &Connection::drop, "The peer is gone: its requests are cancelled.");
}

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<ServedModel, std::shared_ptr<ServedModel>>(
      m, "ServedModel", "One live version of a model: lane, executor thread, counters.")
      .def_property_readonly("name", [](const ServedModel& self) { return self.config().name; })
      .def_property_readonly("version", [](const ServedModel& self) { return self.config().version; })
      .def_property_readonly("n_features", &ServedModel::n_features)
      .def_property_readonly("n_outputs", &ServedModel::n_outputs)
      .def("stats", &stats, "Counters, batch sizes (rows: runs) and latency quantiles, by name.")
      .def("drain", &drain, py::arg("n") = size_t{65536},
           "Up to n rows answered OK and not drained yet: (request_ids uint64 [n], now_us int64 [n],\n"
           "features float32 [n, F], scores float64 [n, K], status uint8 [n], event_time int64 [n, V]).\n"
           "One thread at a time.")
      .def(
          "count_in",
          [](ServedModel& self, py::array_t<uint64_t, 0>& word) {
            if (word.size() != 1 || !word.writeable())
              throw py::value_error("word is no writable uint64 array of one element");
            self.served().count_in(word.mutable_data());
          },
          py::arg("word").noconvert(), py::keep_alive<1, 2>(),
          "Add every row answered OK to word, uint64 [1], from now on. Before the version is live.")
      .def("stop", &ServedModel::stop, py::call_guard<py::gil_scoped_release>(),
           "End what is unanswered as UNAVAILABLE and join the executor.")
      .def("_hold", &ServedModel::hold_for_test, py::arg("held"),
           "For tests: while held, batches block on the executor as in a model that hangs.");
  bind_connection(m);
  py::class_<PyMisses>(m, "MissBatch", "Rows that parked requests lack.")
      .def_property_readonly("views", &miss_views,
                             "[(view, keys uint64 [n, 2], now_us int64 [n])] to load; n may be 0.");
  py::class_<ServingCore>(m, "ServingCore", "Live models, connections and the loader's queue.")
      .def(py::init<uint32_t, uint32_t>(), py::arg("worker") = 0, py::arg("cache_owner") = 0,
           "worker: index among the processes that serve together, 0 to 63: their request ids are apart.\n"
           "cache_owner: the process's number as a writer of shared feature caches.")
      .def("load", &load, py::arg("name"), py::arg("version"), py::arg("trees"), py::arg("plan") = py::none(),
           py::kw_only(), py::arg("max_batch_rows") = kMaxBatchRows, py::arg("max_latency_ms") = 50.0,
           py::arg("guard_ms") = 0.5, py::arg("inline_limit_us") = 200,
           py::arg("max_rows_per_request") = 4096, py::arg("max_requests") = 4096,
           py::arg("max_queued_rows") = 16384, py::arg("allow_replay") = false,
           py::arg("served_capacity") = size_t{65536}, py::keep_alive<0, 1>(),
           "Load trees.bin bytes as a model version, warm it up and start it; it is not live yet.\n"
           "plan: None, or a dict of entities, inputs [(name, dtype)], request_source, views [{name, cache,\n"
           "fields, key_columns}], program, key_seed, error_on_missing. ValueError says what is wrong.")
      .def("publish", &ServingCore::publish, py::arg("model"),
           "Make it the live version of its name; returns the one before it, still running, or None.")
      .def("retire", &ServingCore::retire, py::arg("name"))
      .def("live", &ServingCore::models, "The live models.")
      .def(
          "connection",
          [](ServingCore& self, size_t max_message_bytes, uint32_t max_depth, uint32_t max_in_flight,
             size_t max_output_bytes) {
            return self.connect({{max_message_bytes, max_depth}, max_in_flight, max_output_bytes});
          },
          py::arg("max_message_bytes"), py::arg("max_depth"), py::arg("max_in_flight"),
          py::arg("max_output_bytes"), py::keep_alive<0, 1>())
      .def_property_readonly("event_fd", &ServingCore::event_fd)
      .def("wake", &ServingCore::wake, "Encode replies of ended requests; ids of connections with output.")
      .def("expire", &ServingCore::expire, "Answer what is due; ids of connections with output.")
      .def("next_deadline_ns", &ServingCore::next_deadline)
      .def("drain", &ServingCore::drain, "Refuse new predict calls from now on.")
      .def("call", &call_local, py::arg("vectors"), py::arg("params"),
           "predict (or predict_vectors) on this thread; params as MessagePack bytes. Returns (scores\n"
           "float64 [n, K], version, request_ids uint64 [n], status uint8 [n] | None, timings) or (code,\n"
           "message, retry_after_ms | None).")
      .def("wait_misses", &wait_misses, py::arg("timeout_s"), "A MissBatch, or None.")
      .def("finish_misses", &finish_misses, py::arg("misses"), py::arg("rows"), py::arg("stamp"),
           "rows: [(words uint64 [n, row_words], meta int64 [n, 4])], one pair for each of misses.views.")
      .def(
          "fail_misses",
          [](ServingCore& self, const PyMisses& misses, const std::string& code, const std::string& message) {
            self.fail_misses(misses.batch, {code_of(code), message});
          },
          py::arg("misses"), py::arg("code"), py::arg("message"))
      .def("close", &ServingCore::close, py::call_guard<py::gil_scoped_release>());
}

}  // namespace penstock::bind
