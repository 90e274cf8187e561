// An engine inside this process: serves bundles by name, with the deadlines, batching, priorities and
// admission of the server, without Python, sockets or prints.
//
// Callers on several threads share batches. A batch runs on a caller's thread while the model is idle and the
// run is predicted to be short, else on the model's executor thread. Every call may come from any thread;
// nothing throws. The engine must outlive the calls made of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "penstock/bundle.h"
#include "penstock/status.h"

namespace penstock {

// How one bundle is served. The defaults are the server's.
struct ServeOptions {
  size_t max_batch_rows = 64;        // 1 to 64
  double max_latency_ms = 50;        // the limit of each request, at most 60000
  double inline_limit_us = 200;      // a shorter predicted run may start on a caller's thread
  uint32_t max_requests = 4096;      // unanswered of high priority, 1 to 2^20; of low priority: half as many
  uint32_t max_queued_rows = 16384;  // waiting rows, likewise, 1 to 2^24
  uint32_t max_rows_per_request = 4096;
  double low_share = 0.125;  // of the batches for low priority while both wait, 0.001 to 0.5
};

struct PredictOptions {
  double deadline_ms = 0;  // from the call on; 0, or more than max_latency_ms: that
  bool low_priority = false;
};

struct ServeStats {
  std::string version;
  // Of the live version. submitted == in_flight + ok + rejected + expired + cancelled + failed.
  uint64_t submitted = 0, in_flight = 0, ok = 0, rejected = 0, expired = 0, cancelled = 0, failed = 0;
  uint64_t batches = 0, rows = 0;  // runs, and rows in them
};

class Engine {
 public:
  // RESOURCE_EXHAUSTED: no memory.
  static Status create(std::unique_ptr<Engine>* out) noexcept;
  ~Engine();  // ends every model
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Warms the bundle up and lets it answer to its name. The version before it answers what it has and ends
  // before this returns, at most after its max_latency_ms. INVALID_ARGUMENT names an option out of its range.
  Status serve(const Bundle& bundle, const ServeOptions& options = {}) noexcept;
  // The name answers NOT_FOUND from now on; what it has is still answered.
  Status retire(std::string_view model) noexcept;

  // Waits for the scores of n rows: rows [n, inputs], NaN is a missing value; out [n, outputs], untouched
  // unless the status is OK. A status with is_retryable(code) may set *retry_after_ms, else it is -1.
  //   INVALID_ARGUMENT     a span has another size, or an option is out of its range
  //   NOT_FOUND            nothing is served under that name
  //   DEADLINE_EXCEEDED    there was no answer in time
  //   RESOURCE_EXHAUSTED   too much waits to answer this in time
  //   UNAVAILABLE          the model fails or hangs, or was retired
  // An OK call allocates nothing once its thread has made one of as many rows.
  Status predict(std::string_view model, std::span<const float> rows, size_t n, std::span<double> out,
                 const PredictOptions& options = {}, int64_t* retry_after_ms = nullptr) noexcept;

  Status stats(std::string_view model, ServeStats* out) noexcept;

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl) noexcept;
  std::unique_ptr<Impl> impl_;
};

}  // namespace penstock
