// Binding of csrc/engine. Calls of the loop thread hold the GIL: they take microseconds. Calls that wait
// (a local predict that could not run inline, the loader, warm-up, stopping) release it.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind/backends.h"
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
    if (given_view.contains("rows_of")) view.rows_of = py::cast<std::string>(given_view["rows_of"]);
    for (PlanColumn& column : plan_columns(given_view["fields"]))
      view.fields.push_back({std::move(column.name), column.dtype});
    view.key_columns = py::cast<std::vector<uint32_t>>(given_view["key_columns"]);
    spec.views.push_back(std::move(view));
  }
  std::shared_ptr<const ServicePlan> plan;
  require(ServicePlan::create(std::move(spec), &plan));
  return plan;
}

EdgeConfig edge_config(const py::dict& given) {
  EdgeConfig edge;
  const auto mode = py::cast<std::string>(given["mode"]);
  if (mode != "off" && mode != "auto" && mode != "on")
    throw py::value_error("edge mode is " + mode + "; expected off, auto or on");
  edge.mode = mode == "off" ? EdgeMode::kOff : mode == "on" ? EdgeMode::kOn : EdgeMode::kAuto;
  edge.capacity = py::cast<uint64_t>(given["capacity"]);
  edge.ttl_ns = py::cast<int64_t>(given["ttl_ns"]);
  edge.precompute = py::cast<uint32_t>(given["precompute"]);
  const auto seed = py::cast<std::string>(given["seed"]);
  if (seed.size() != sizeof edge.seed) throw py::value_error("edge seed is not 16 bytes");
  std::copy(seed.begin(), seed.end(), edge.seed);
  return edge;
}

std::shared_ptr<ServedModel> load(ServingCore& core, const std::string& name, const std::string& version,
                                  const py::object& given, const py::object& plan, size_t max_batch_rows,
                                  double max_latency_ms, double guard_ms, int64_t inline_limit_us,
                                  uint32_t max_rows_per_request, uint32_t max_requests,
                                  uint32_t max_queued_rows, bool allow_replay, size_t served_capacity,
                                  double low_share, std::optional<double> breaker_timeout_ms,
                                  double breaker_probe_ms, uint32_t breaker_failures, const py::object& edge,
                                  double sample_share, size_t sample_bytes) {
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
  within("low_share", low_share, 1e-3, 0.5);
  const double timeout_ms = breaker_timeout_ms.value_or(2 * max_latency_ms);
  within("breaker_timeout_ms", timeout_ms, 1e-3, 2e9);
  within("breaker_probe_ms", breaker_probe_ms, 1e-3, 1e9);
  within("breaker_failures", breaker_failures, 1, 1e9);
  within("sample_share", sample_share, 0, 1);
  within("sample_bytes", static_cast<double>(sample_bytes), 0, 1 << 30);
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
  config.sample_share = sample_share;
  config.sample_bytes = sample_bytes;
  if (!edge.is_none()) config.edge = edge_config(py::cast<py::dict>(edge));
  config.lane.policy.low_every = static_cast<uint32_t>(1 / low_share);
  config.breaker.timeout_ns = static_cast<int64_t>(timeout_ms * 1e6);
  config.breaker.probe_ns = static_cast<int64_t>(breaker_probe_ms * 1e6);
  config.breaker.failures = breaker_failures;
  std::unique_ptr<Model> model;
  if (py::isinstance<py::bytes>(given)) {
    const auto data = static_cast<std::string_view>(py::reinterpret_borrow<py::bytes>(given));
    require(make_tree_model(reinterpret_cast<const uint8_t*>(data.data()), data.size(), &model));
  } else {
    model = make_backend_model(given);
  }
  std::shared_ptr<const ServicePlan> compiled;
  if (!plan.is_none()) {
    compiled = make_plan(py::cast<py::dict>(plan));
    if (compiled->n_features() != model->n_features()) {
      throw py::value_error("the service has " + std::to_string(compiled->n_features()) +
                            " features; the model takes " + std::to_string(model->n_features()));
    }
  }
  // The last owner may hold the GIL, for which a run in progress may wait: it lets go of it to stop the
  // model.
  const auto destroy = [](ServedModel* model) {
    if (PyGILState_Check() == 0) {
      delete model;
      return;
    }
    const py::gil_scoped_release release;
    delete model;
  };
  std::shared_ptr<ServedModel> served(new ServedModel(config, std::move(model), std::move(compiled), &core),
                                      destroy);
  require(served->make_edge());
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
  py::list at_most;  // 1, 2, 5, 10, ... 1e6 us
  for (uint64_t decade = 1; decade <= 1'000'000; decade *= 10) {
    for (const uint64_t edge_us : {decade, 2 * decade, 5 * decade}) {
      if (edge_us <= 1'000'000) at_most.append(py::make_tuple(edge_us, h.count_at_most(1000 * edge_us)));
    }
  }
  return py::dict("count"_a = h.count(), "sum_ns"_a = h.sum(), "p50_ns"_a = h.quantile(0.5),
                  "p90_ns"_a = h.quantile(0.9), "p99_ns"_a = h.quantile(0.99),
                  "p999_ns"_a = h.quantile(0.999), "max_ns"_a = h.max(), "le_us"_a = at_most);
}

py::object ratio(uint64_t part, uint64_t whole) {
  if (whole == 0) return py::none();
  return py::float_(static_cast<double>(part) / static_cast<double>(whole));
}

py::dict objectives(const MeterReading& m) {
  const MeterWindow &s = m.short_window, &l = m.long_window;
  return py::dict("met"_a = m.met, "due"_a = m.due, "attainment"_a = ratio(m.met, m.due),
                  "attainment_10s"_a = ratio(s.met, s.due), "attainment_60s"_a = ratio(l.met, l.due));
}

py::dict goodput(const MeterReading& m) {
  const auto rate = [](uint64_t count, const MeterWindow& window) {
    return window.seconds > 0 ? static_cast<double>(count) / window.seconds : 0.0;
  };
  const MeterWindow &s = m.short_window, &l = m.long_window;
  return py::dict("requests_per_s_10s"_a = rate(s.met, s), "requests_per_s_60s"_a = rate(l.met, l),
                  "rows_per_s_10s"_a = rate(s.met_rows, s), "rows_per_s_60s"_a = rate(l.met_rows, l));
}

py::dict class_stats(const ClassStats& c) {
  return py::dict("requests"_a = counters(c.requests), "rows"_a = counters(c.rows),
                  "queued_rows"_a = c.queued_rows, "max_wait_ns"_a = c.max_wait_ns);
}

py::dict breaker_stats(const BreakerStats& b) {
  constexpr const char* kNames[] = {"closed", "open", "half_open"};
  return py::dict("state"_a = kNames[static_cast<uint8_t>(b.state)], "busy"_a = b.busy, "opens"_a = b.opens,
                  "probes"_a = b.probes);
}

ServedModel::Scratch& local_scratch() {
  thread_local const auto scratch = std::make_unique<ServedModel::Scratch>();
  return *scratch;
}

py::dict edge_stats(const EdgeStats& e) {
  const EdgeCacheStats& c = e.cache;
  return py::dict("enabled"_a = e.enabled, "active"_a = e.active, "hits"_a = c.hits, "misses"_a = c.misses,
                  "expired"_a = c.expired, "stale"_a = c.stale, "admitted"_a = c.admitted,
                  "rejected"_a = c.rejected, "coalesced"_a = e.coalesced, "precomputed"_a = e.precomputed,
                  "size"_a = c.size, "capacity"_a = c.capacity, "bytes"_a = c.bytes);
}

py::dict stats(ServedModel& self) {
  auto s = std::make_unique<ServedModelStats>();
  self.stats(s.get());
  py::dict batches;
  for (size_t n = 1; n <= kMaxBatchRows; ++n) {
    if (s->batches[n] != 0) batches[py::int_(n)] = s->batches[n];
  }
  const StageHistograms& h = s->stages;
  const py::dict stages("receive"_a = latency(h.receive), "gather"_a = latency(h.gather),
                        "queue"_a = latency(h.queue), "run"_a = latency(h.run),
                        "encode"_a = latency(h.encode), "total"_a = latency(h.total),
                        "refuse"_a = latency(h.refuse));
  const double limit_ns = static_cast<double>(self.config().max_latency_ns);
  const VectorSamples::Counts samples = self.samples().counts();
  return py::dict("requests"_a = counters(s->requests), "rows"_a = counters(s->rows), "batches"_a = batches,
                  "latency"_a = stages["total"], "stages"_a = stages, "run"_a = latency(s->run),
                  "slo"_a = objectives(s->meter), "goodput"_a = goodput(s->meter),
                  "busy_ratio"_a = s->meter.busy_ratio,
                  "queue_delay_ratio"_a = static_cast<double>(s->meter.queue_delay_p95_ns) / limit_ns,
                  "inline_runs"_a = s->inline_runs, "executor_runs"_a = s->executor_runs,
                  "parked"_a = s->parked, "missed_rows"_a = s->missed_rows, "queued_rows"_a = s->queued_rows,
                  "served_dropped"_a = s->served_dropped, "traces_dropped"_a = s->traces_dropped,
                  "samples"_a = samples.added, "samples_dropped"_a = samples.dropped,
                  "classes"_a = py::dict("high"_a = class_stats(s->high), "low"_a = class_stats(s->low)),
                  "breaker"_a = breaker_stats(s->breaker), "edge"_a = edge_stats(s->edge));
}

struct PyHotInputs {
  std::vector<HotInputs::Input> inputs;
};

// [(view, keys uint64 [n, 2])]
py::list hot_misses(const ServedModel& self, const PyHotInputs& hot, int64_t now_us) {
  std::vector<FeatureMiss> misses;
  {
    const py::gil_scoped_release release;
    misses = self.hot_misses(hot.inputs, now_us, local_scratch());
  }
  py::list views;
  for (uint32_t v = 0; self.plan() != nullptr && v < self.plan()->n_views(); ++v) {
    std::vector<Key128> keys;
    for (const FeatureMiss& miss : misses) {
      if (miss.view == v) keys.push_back(miss.key);
    }
    if (keys.empty()) continue;
    const py::array_t<uint64_t> array({static_cast<py::ssize_t>(keys.size()), py::ssize_t{2}},
                                      reinterpret_cast<const uint64_t*>(keys.data()));
    views.append(py::make_tuple(self.plan()->view(v).loaded_as(), array));
  }
  return views;
}

py::list drain_traces(ServedModel& self) {
  std::vector<TraceRecord> records;
  self.take_traces(records);
  py::list found;
  for (const TraceRecord& r : records) {
    found.append(py::make_tuple(r.parent.trace_high, r.parent.trace_low, r.parent.span, r.received_ns,
                                r.times.receive_ns, r.times.gather_ns, r.times.queue_ns, r.times.run_ns,
                                r.times.encode_ns, r.times.total_ns, r.rows, code_name(r.code)));
  }
  return found;
}

py::list drain_samples(ServedModel& self) {
  const std::vector<uint8_t>& bytes = self.samples().take();
  const auto features = static_cast<py::ssize_t>(self.n_features());
  py::list found;
  for (size_t at = 0; at < bytes.size();) {
    int64_t times[2];
    uint32_t sizes[2];  // rows, bytes of params
    std::memcpy(times, &bytes[at], sizeof times);
    std::memcpy(sizes, &bytes[at + sizeof times], sizeof sizes);
    at += sizeof times + sizeof sizes;
    const py::bytes params(reinterpret_cast<const char*>(&bytes[at]), sizes[1]);
    at += sizes[1];
    py::array_t<float> rows({static_cast<py::ssize_t>(sizes[0]), features});
    const auto size = static_cast<size_t>(rows.nbytes());
    std::memcpy(rows.mutable_data(), bytes.data() + at, size);
    at += size;
    found.append(py::make_tuple(times[0], times[1], params, rows));
  }
  return found;
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

py::tuple failure(const Status& status, int64_t retry_after_ms) {
  return py::make_tuple(code_name(status.code), status.message,
                        retry_after_ms < 0 ? py::object(py::none()) : py::object(py::int_(retry_after_ms)));
}

template <class T>
py::array_t<T> array_of(const std::vector<T>& values, size_t n) {
  py::array_t<T> made(static_cast<py::ssize_t>(n));
  std::copy_n(values.data(), n, made.mutable_data());
  return made;
}

// (scores float64 [n] or [n, outputs], version, request_ids uint64 [n], status uint8 [n] or None, timings
// dict or None), or (code, message, retry_after_ms).
py::tuple call_local(ServingCore& core, bool vectors, const py::bytes& params, bool timings) {
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
  core.shadow(*call.model, result);
  const size_t outputs = call.model->n_outputs();
  py::array scores = array_of(result.scores, result.rows * outputs);
  if (outputs > 1)
    scores = scores.reshape({static_cast<py::ssize_t>(result.rows), static_cast<py::ssize_t>(outputs)});
  py::object row_status = py::none();
  if (result.with_status) row_status = array_of(result.row_status, result.rows);
  py::object stages = py::none();
  if (timings)
    stages = py::dict("receive"_a = result.times.receive_ns, "gather"_a = result.times.gather_ns,
                      "queue"_a = result.times.queue_ns, "run"_a = result.times.run_ns,
                      "total"_a = result.times.total_ns);
  return py::make_tuple(std::move(scores), call.model->config().version,
                        array_of(result.request_ids, result.rows), std::move(row_status), std::move(stages));
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

}  // namespace

std::shared_ptr<const ServicePlan> service_plan_of(const py::dict& given) {
  return make_plan(given);
}

void bind_engine(py::module_& m) {
  py::class_<PyHotInputs>(m, "HotInputs", "Requests, encoded, most frequent first.")
      .def("__len__", [](const PyHotInputs& self) { return self.inputs.size(); });
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
           "One thread at a time. Drift has counted them.")
      .def("drain_samples", &drain_samples,
           "The sampled vectors since the last call: [(now_us, wall clock us when they were made, params of\n"
           "the predict call, float32 [n, F])]. One thread at a time.")
      .def(
          "count_drift",
          [](ServedModel& self, std::shared_ptr<DriftPanes> panes) {
            if (panes->inputs().n_columns() != self.n_features()) {
              throw py::value_error("panes have " + std::to_string(panes->inputs().n_columns()) +
                                    " inputs; expected " + std::to_string(self.n_features()));
            }
            self.served().count_drift(std::move(panes));
          },
          py::arg("panes"),
          "Count every row answered OK in these DriftPanes. Before it is published. Raises ValueError.")
      .def("trace", &ServedModel::trace, py::arg("capacity"),
           "Keep up to `capacity` requests with a sampled traceparent that ended; more are dropped and "
           "counted.")
      .def("drain_traces", &drain_traces,
           "Those requests: [(trace id's high and low uint64, parent span uint64, received monotonic ns, "
           "then\n"
           "ns of receive, gather, queue, run, encode, total, then rows, code)].")
      .def("idle", &ServedModel::idle, "Every request has its answer, and nothing runs.")
      .def(
          "hot_inputs", [](const ServedModel& self) { return PyHotInputs{self.hot_inputs()}; },
          "The most frequent requests of one row that the edge cache saw.")
      .def("hot_misses", &hot_misses, py::arg("hot"), py::arg("now_us"),
           "[(view, keys uint64 [n, 2])]: the feature rows that these requests lack.")
      .def(
          "precompute",
          [](ServedModel& self, const PyHotInputs& hot, int64_t now_us, double limit_s) {
            const py::gil_scoped_release release;
            return self.precompute(hot.inputs, now_us, static_cast<int64_t>(limit_s * 1e9), local_scratch());
          },
          py::arg("hot"), py::arg("now_us"), py::arg("limit_s"),
          "Compute those that the edge cache lacks and whose features are cached; how many. Waits for an\n"
          "idle lane, limit_s at most.")
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
      .def("load", &load, py::arg("name"), py::arg("version"), py::arg("model"), py::arg("plan") = py::none(),
           py::kw_only(), py::arg("max_batch_rows") = kMaxBatchRows, py::arg("max_latency_ms") = 50.0,
           py::arg("guard_ms") = 0.5, py::arg("inline_limit_us") = 200,
           py::arg("max_rows_per_request") = 4096, py::arg("max_requests") = 4096,
           py::arg("max_queued_rows") = 16384, py::arg("allow_replay") = false,
           py::arg("served_capacity") = size_t{65536}, py::arg("low_share") = 0.125,
           py::arg("breaker_timeout_ms") = py::none(), py::arg("breaker_probe_ms") = 1000.0,
           py::arg("breaker_failures") = 5, py::arg("edge") = py::none(), py::arg("sample_share") = 0.0,
           py::arg("sample_bytes") = size_t{1} << 20, py::keep_alive<0, 1>(),
           "Load a model version (trees.bin bytes, an OnnxSession, PythonModel or ChildChannel), warm it up\n"
           "and start it; it is not live yet.\n"
           "plan: None, or a dict of entities, inputs [(name, dtype)], request_source, views [{name, cache,\n"
           "fields, key_columns}], program, key_seed, error_on_missing. edge: None, or a dict of mode (off, "
           "auto\n"
           "or on), capacity, ttl_ns, precompute, seed. sample_share: of the keys whose feature vectors are "
           "kept for\n"
           "drain_samples(), in sample_bytes at most. ValueError says what is wrong.")
      .def("publish", &ServingCore::publish, py::arg("model"),
           "Make it the live version of its name; returns the one before it, still running, or None. Ends a "
           "trial.")
      .def(
          "put_on_trial",
          [](ServingCore& self, const std::string& name, std::shared_ptr<ServedModel> model, bool shadow,
             double share) {
            if (!(share >= 0 && share <= 1))
              throw py::value_error("share is " + std::to_string(share) + "; expected 0 to 1");
            const auto whole = static_cast<double>(Trial::kWhole);
            require(
                self.put_on_trial(name, {std::move(model), shadow ? TrialMode::kShadow : TrialMode::kCanary,
                                         static_cast<uint32_t>(share * whole + 0.5)}));
          },
          py::arg("name"), py::arg("model"), py::arg("shadow") = false, py::arg("share") = 0.0,
          "Let a version (None: none) take part in that share of the sticky keys: it answers them, or "
          "scores\n"
          "them unseen as a shadow. In place of the trial before. ValueError if the name is not live, or a "
          "shadow takes other inputs.")
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
      .def_property_readonly("timer_fd", &ServingCore::timer_fd)
      .def("wake", &ServingCore::wake, py::call_guard<GiveWay>(),
           "event_fd is readable: run what reads left, encode replies of ended requests and send them. Ids "
           "of\n"
           "connections whose output somebody else must look after.")
      .def("expire", &ServingCore::expire, py::call_guard<GiveWay>(),
           "timer_fd is readable: answer what is due, then as wake.")
      .def_property_readonly("unauthenticated", &ServingCore::unauthenticated)
      .def(
          "overdue",
          [](const ServingCore& core, double idle_s, double read_s) {
            constexpr double kMost = 1e9;  // seconds; also what infinity becomes
            const auto found = core.overdue(mono_ns(), static_cast<int64_t>(std::min(idle_s, kMost) * 1e9),
                                            static_cast<int64_t>(std::min(read_s, kMost) * 1e9));
            return py::make_tuple(found.idle, found.stuck);
          },
          py::arg("idle_s"), py::arg("read_s"),
          "Ids of connections that sent nothing for idle_s and wait for nothing, and of those whose "
          "unfinished\n"
          "message made no progress for read_s.")
      .def("drain", &ServingCore::drain, "Refuse new predict calls from now on.")
      .def("call", &call_local, py::arg("vectors"), py::arg("params"), py::arg("timings") = true,
           "predict (or predict_vectors) on this thread; params as MessagePack bytes. Returns (scores\n"
           "float64 [n], [n, K] for K outputs, version, request_ids uint64 [n], status uint8 [n] | None,\n"
           "timings | None) or (code, message, retry_after_ms | None).")
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
