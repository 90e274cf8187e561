#include "penstock/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <mutex>
#include <thread>

#include "embed/bundle_impl.h"
#include "engine/serving_core.h"

namespace penstock {
namespace {

Status no_memory() {
  return {Code::kResourceExhausted, "no memory, or no thread could be started"};
}

Status within(const char* option, double value, double least, double most) {
  if (value >= least && value <= most) return {};
  return Status::invalid(std::string(option) + " is " + std::to_string(value) + "; expected " +
                         std::to_string(least) + " to " + std::to_string(most));
}

Status check(const ServeOptions& o) {
  const struct {
    const char* name;
    double value, least, most;
  } limits[] = {{"max_batch_rows", static_cast<double>(o.max_batch_rows), 1, kMaxBatchRows},
                {"max_latency_ms", o.max_latency_ms, 1e-3, 60'000},
                {"inline_limit_us", o.inline_limit_us, 0, 60e6},
                {"max_requests", static_cast<double>(o.max_requests), 1, 1 << 20},
                {"max_queued_rows", static_cast<double>(o.max_queued_rows), 1, 1 << 24},
                {"max_rows_per_request", static_cast<double>(o.max_rows_per_request), 1, 1 << 24},
                {"low_share", o.low_share, 1e-3, 0.5}};
  for (const auto& limit : limits) {
    if (Status status = within(limit.name, limit.value, limit.least, limit.most); !status.is_ok())
      return status;
  }
  return {};
}

ServedModelConfig config_of(const Bundle& bundle, const ServeOptions& options) {
  ServedModelConfig config;
  config.name = bundle.name();
  config.version = bundle.version();
  config.lane.policy.max_batch_rows = options.max_batch_rows;
  config.lane.policy.guard_ns = 0;  // no reply is to be written
  config.lane.policy.low_every = static_cast<uint32_t>(1 / options.low_share);
  config.lane.max_requests = options.max_requests;
  config.lane.max_queued_rows = options.max_queued_rows;
  config.lane.max_rows_per_request = options.max_rows_per_request;
  config.max_resident_rows = 2 * options.max_queued_rows;
  config.max_latency_ns = static_cast<int64_t>(options.max_latency_ms * 1e6);
  config.inline_limit_ns = static_cast<int64_t>(options.inline_limit_us * 1e3);
  config.breaker.timeout_ns = 2 * config.max_latency_ns;
  config.served_capacity = 1;  // nobody drains the served rows
  return config;
}

}  // namespace

struct Engine::Impl {
  ServingCore core;
  std::mutex changing;  // one serve() or retire() at a time

  // The core forgets a replaced version once no caller has it and all is answered.
  void await_end(std::weak_ptr<ServedModel> previous, int64_t limit_ns) {
    const int64_t until = mono_ns() + limit_ns;
    for (;;) {
      (void)core.all_models();
      if (previous.expired()) return;
      if (mono_ns() >= until) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (const auto model = previous.lock()) model->stop();
  }
};

Engine::Engine(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
Engine::~Engine() = default;

Status Engine::create(std::unique_ptr<Engine>* out) noexcept try {
  out->reset(new Engine(std::make_unique<Impl>()));
  return {};
} catch (const std::exception&) {
  return no_memory();
}

Status Engine::serve(const Bundle& bundle, const ServeOptions& options) noexcept try {
  if (!bundle) return {Code::kFailedPrecondition, "no bundle is loaded"};
  if (Status status = check(options); !status.is_ok()) return status;
  const std::lock_guard lock(impl_->changing);
  auto served = std::make_shared<ServedModel>(config_of(bundle, options),
                                              make_tree_model(bundle.impl_->trees), nullptr, &impl_->core);
  if (Status status = served->warm_up(); !status.is_ok()) return status;
  served->start();
  std::shared_ptr<ServedModel> previous = impl_->core.publish(std::move(served));
  if (previous == nullptr) return {};
  const int64_t limit_ns = previous->config().max_latency_ns;
  const std::weak_ptr<ServedModel> weak = previous;
  previous.reset();
  impl_->await_end(weak, limit_ns);
  return {};
} catch (const std::exception&) {
  return no_memory();
}

Status Engine::retire(std::string_view model) noexcept try {
  const std::lock_guard lock(impl_->changing);
  std::shared_ptr<ServedModel> previous = impl_->core.retire(std::string(model));
  if (previous == nullptr) return impl_->core.unknown_model(model);
  const int64_t limit_ns = previous->config().max_latency_ns;
  const std::weak_ptr<ServedModel> weak = previous;
  previous.reset();
  impl_->await_end(weak, limit_ns);
  return {};
} catch (const std::exception&) {
  return no_memory();
}

Status Engine::predict(std::string_view model, std::span<const float> rows, size_t n, std::span<double> out,
                       const PredictOptions& options, int64_t* retry_after_ms) noexcept try {
  if (retry_after_ms != nullptr) *retry_after_ms = -1;
  if (!(options.deadline_ms >= 0)) {
    return Status::invalid("deadline_ms is " + std::to_string(options.deadline_ms) +
                           "; expected milliseconds, or 0 for the model's limit");
  }
  if (n > UINT32_MAX) return Status::invalid("n is " + std::to_string(n) + "; expected at most 2^32 - 1");
  wire::VectorsCall vectors;
  vectors.model = model;
  vectors.data = reinterpret_cast<const uint8_t*>(rows.data());
  vectors.bytes = rows.size_bytes();
  vectors.rows = static_cast<uint32_t>(n);
  vectors.options.low_priority = options.low_priority;
  // No model's limit is longer than an hour.
  vectors.options.deadline_us = static_cast<int64_t>(std::ceil(std::min(options.deadline_ms, 3.6e6) * 1e3));
  thread_local ServedModel::Scratch scratch;
  thread_local Result result;
  ServingCore::LocalCall call;
  Status status = impl_->core.begin_local(vectors, scratch, &call);
  if (!status.is_ok()) {
    if (retry_after_ms != nullptr) *retry_after_ms = call.retry_after_ms;
    return status;
  }
  if (!call.model->take(call.tag, &result)) {
    call.model->wait(call.tag, call.waiter);
    if (!call.model->take(call.tag, &result)) return {Code::kInternal, "the request was lost"};
  }
  if (!result.status.is_ok()) {
    if (retry_after_ms != nullptr) *retry_after_ms = result.retry_after_ms;
    return result.status;
  }
  if (out.size() != n * call.model->n_outputs()) {
    return Status::invalid("out has room for " + std::to_string(out.size()) + " scores; expected " +
                           std::to_string(n) + " rows of " + std::to_string(call.model->n_outputs()));
  }
  std::copy_n(result.scores.data(), out.size(), out.data());
  return status;
} catch (const std::exception&) {
  return no_memory();
}

Status Engine::stats(std::string_view model, ServeStats* out) noexcept try {
  const std::shared_ptr<ServedModel> served = impl_->core.find(model);
  if (served == nullptr) return impl_->core.unknown_model(model);
  const auto all = std::make_unique<ServedModelStats>();
  served->stats(all.get());
  const EndCounters& c = all->requests;
  *out = {
      served->config().version, c.submitted, c.in_flight, c.ok, c.rejected, c.expired, c.cancelled, c.failed};
  for (size_t rows = 1; rows <= kMaxBatchRows; ++rows) {
    out->batches += all->batches[rows];
    out->rows += rows * all->batches[rows];
  }
  return {};
} catch (const std::exception&) {
  return no_memory();
}

}  // namespace penstock
