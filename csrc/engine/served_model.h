// One live version of one model: its lane, the rows of its requests, its executor thread and its counters.
//
// A request's way: submitted (gathered, or parked until the loader has read what the caches lacked), queued
// in the lane, run in a batch, done, taken (its reply is encoded and its rows are freed). Batches run on the
// calling thread while the lane is idle and the predicted run is short (pump), else on the executor thread.
//
// Invariants, under the lock: submitted == in_flight + ok + rejected + expired + cancelled + failed, in
// requests and in rows; each request is counted ended once, when it is taken or dropped; a tag names one
// request for ever; a batch copies rows in before it runs and scores out after, under the lock, so a request
// that ended meanwhile (even in a hung run) frees its rows at once.
// Threads: any, except where said. One mutex; the sink is called under it and must not call back.
// The code is in three files: served_admission.cc (the way in), served_parking.cc (misses), served_model.cc
// (the rest).
#pragma once

#include <condition_variable>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "batch/lane.h"
#include "engine/latency.h"
#include "engine/model.h"
#include "engine/served_ring.h"
#include "engine/service_plan.h"
#include "wire/reply.h"

namespace penstock {

int64_t mono_ns();  // CLOCK_MONOTONIC

struct ServedModelConfig {
  std::string name;
  std::string version;
  LaneConfig lane;
  uint32_t max_resident_rows = 32768;  // of all unanswered requests
  size_t max_parked_bytes = size_t{64} << 20;
  int64_t max_latency_ns = 50'000'000;
  int64_t inline_limit_ns = 200'000;
  bool allow_replay = false;
  size_t served_capacity = 65536;
};

// Who is told that a local request ended. Guarded by the model's mutex.
struct Waiter {
  std::condition_variable ended;
  bool done = false;
};

// Where a reply goes: a connection's id and msgid, or a waiter; neither once the peer is gone.
struct Target {
  uint64_t connection = 0;
  uint32_t msgid = 0;
  Waiter* waiter = nullptr;
};

struct EndCounters {
  uint64_t submitted = 0, in_flight = 0, ok = 0, rejected = 0, expired = 0, cancelled = 0, failed = 0;
};

// The reply of a request, as take() leaves it; reused from call to call.
struct Result {
  Status status;
  int64_t retry_after_ms = -1;
  Target target;
  uint32_t rows = 0;
  bool as_bin = false;
  bool with_timings = false;
  bool with_status = false;
  int64_t queue_ns = 0, run_ns = 0, total_ns = 0;
  std::vector<double> scores;
  std::vector<uint64_t> request_ids;
  std::vector<uint8_t> row_status;
};

struct ServedModelStats {
  EndCounters requests, rows;
  uint64_t batches[kMaxBatchRows + 1];
  LatencyHistogram total, queue, run;
  uint64_t inline_runs, executor_runs, parked, missed_rows, queued_rows, served_dropped;
};

class ServedModel;

// Told of requests that ended or wait for the loader. Called with the model's lock held.
class ModelEvents {
 public:
  virtual ~ModelEvents() = default;
  virtual void ended(const std::shared_ptr<ServedModel>& model, uint64_t tag, uint64_t connection) = 0;
  virtual void missed(const std::shared_ptr<ServedModel>& model, uint64_t tag) = 0;
};

class ServedModel : public std::enable_shared_from_this<ServedModel> {
 public:
  static constexpr uint32_t kMaxLoads = 3;  // loads for one request before it is UNAVAILABLE

  // Working memory of one calling thread, for any number of models.
  struct Scratch {
    ServicePlan::Scratch plan;
    GatheredRows gathered;
    std::vector<FeatureMiss> misses;
    std::vector<uint64_t> request_ids;
    wire::PredictCall resumed;
  };

  // `plan` may be null: then only vectors are served.
  ServedModel(const ServedModelConfig& config, std::unique_ptr<Model> model,
              std::shared_ptr<const ServicePlan> plan, ModelEvents* events);
  ~ServedModel();

  // Runs batches of 1, 2, 4 ... max_batch_rows on zeros, so that run times are known. Before start().
  Status warm_up();
  void start();  // the executor thread
  // Ends what is unanswered as UNAVAILABLE and joins the executor.
  void stop();

  // Each admits or parks a request, or returns why not (retry_after_ms is set when a hint is known). The
  // caller pumps after a burst. `params` is the call's own bytes, copied if the request is parked. wall_us is
  // request time unless options.now says otherwise. first_id: ids of rows whose ids the caller did not give.
  Status predict(const wire::PredictCall& call, std::string_view params, const Target& target,
                 int64_t received_ns, int64_t wall_us, uint64_t first_id, Scratch& scratch,
                 int64_t* retry_after_ms, uint64_t* tag);
  Status predict_vectors(const wire::VectorsCall& call, const Target& target, int64_t received_ns,
                         int64_t wall_us, uint64_t first_id, Scratch& scratch, int64_t* retry_after_ms,
                         uint64_t* tag);

  // Runs what is queued, here while short, else on the executor.
  void pump();
  void expire(int64_t now_ns);
  int64_t next_deadline();  // INT64_MAX: nothing unanswered
  // Ends the request of a connection; false if there is none unanswered.
  bool cancel(uint64_t connection, uint32_t msgid);
  // The peer is gone: its requests end cancelled and are not reported.
  void drop(uint64_t connection);
  // Waits until the local request has ended, at most to its deadline, when it expires it.
  void wait(uint64_t tag, Waiter& waiter);
  // Fills the reply and frees the request; false if it was dropped. Each ended tag is taken once. A reply
  // that may need more than max_bytes on the wire becomes RESOURCE_EXHAUSTED.
  bool take(uint64_t tag, Result* out, size_t max_bytes = SIZE_MAX);
  // In place of take() where the peer is gone: the request is cancelled, its rows are not served.
  void abandon(uint64_t tag);
  bool idle();  // every request has its answer, and nothing runs

  // The loader's side of a parked request. view_misses: what it lacks, false if it ended meanwhile.
  bool parked_misses(uint64_t tag, std::vector<FeatureMiss>* misses, int64_t* now_us, bool* fill_cache);
  // words, meta: one row for each miss of parked_misses(), in order.
  void resume(uint64_t tag, const std::vector<const uint64_t*>& words, const std::vector<RowMeta>& meta,
              Scratch& scratch);
  void fail_parked(uint64_t tag, Status status);

  const ServedModelConfig& config() const { return config_; }
  const ServicePlan* plan() const { return plan_.get(); }
  ServedRing& served() { return served_; }
  size_t n_features() const { return n_features_; }
  size_t n_outputs() const { return n_outputs_; }
  void stats(ServedModelStats* out);
  // For tests of hangs: while held, batches go to the executor and block there.
  void hold_for_test(bool held);

 private:
  static constexpr uint32_t kNone = UINT32_MAX;
  enum class State : uint8_t { kFree, kParked, kQueued, kDone };

  struct Parked {
    std::string params;
    std::vector<FeatureMiss> misses;
    Overlay overlay;
    uint64_t first_id = 0;
    uint32_t loads = 0;
    bool use_cache = true;
    size_t bytes = 0;  // what it counts for in parked_bytes_
  };

  struct Request {
    uint32_t generation = 0;
    State state = State::kFree;
    Target target;
    uint32_t rows = 0;
    uint32_t first_row = kNone;
    uint32_t lane_slot = Lane::kNoSlot;
    uint32_t seek_index = 0;  // the row of the chain last found, so that pieces in order need no walk
    uint32_t seek_row = kNone;
    int64_t received_ns = 0, deadline_ns = 0, formed_ns = 0, run_ns = 0;
    int64_t now_us = 0;
    bool as_bin = false, with_timings = false;
    bool no_score = false;  // the model gave a row of it none
    Status status;
    int64_t retry_after_ms = -1;
    std::unique_ptr<Parked> parked;
    uint32_t newer = kNone, older = kNone;  // the unanswered requests by deadline
  };

  struct Admission {
    Target target;
    uint32_t rows = 0;
    int64_t received_ns = 0, deadline_ns = 0, now_us = 0;
    bool as_bin = false, with_timings = false;
  };

  static uint64_t tag_of(uint32_t index, uint32_t generation) { return uint64_t{generation} << 32 | index; }
  Request* find(uint64_t tag);
  Status check_options(const wire::Options& options, uint32_t rows, int64_t received_ns, int64_t wall_us,
                       Admission* admission) const;
  void read_request_ids(const wire::Options& options, uint32_t rows, uint64_t first_id, Scratch& scratch);
  Status refuse(const Status& status, uint32_t rows);
  Status admit(const Admission& admission, const float* rows, const uint8_t* row_status,
               const int64_t* event_time, const uint64_t* ids, int64_t* retry_after_ms, uint64_t* tag);
  Status queue_rows(uint32_t index, const float* rows, const uint8_t* row_status, const int64_t* event_time,
                    const uint64_t* ids, int64_t* retry_after_ms);
  Status park(const Admission& admission, std::string_view params, bool use_cache,
              const std::vector<FeatureMiss>& misses, int64_t* retry_after_ms, uint64_t* tag,
              uint64_t first_id);
  Status new_request(const Admission& admission, uint32_t* index);
  void link(uint32_t index);
  void unlink(uint32_t index);
  void end(uint32_t index, Status status);
  void count_end(const Request& request, Code code);
  void free_request(uint32_t index);
  uint32_t row_at(Request& request, uint32_t index);
  void learn_from_refusal(uint32_t rows);
  void report_ended();
  void expire_locked(int64_t now_ns);
  void run_batch(std::unique_lock<std::mutex>& lock, bool on_executor);
  void executor();

  const ServedModelConfig config_;
  const std::unique_ptr<Model> model_;
  const std::shared_ptr<const ServicePlan> plan_;
  ModelEvents* const events_;
  const size_t n_features_, n_outputs_, n_views_;
  const bool may_lack_scores_;

  std::mutex mutex_;
  std::condition_variable work_;
  Lane lane_;
  std::vector<Request> requests_;
  std::vector<uint32_t> free_requests_;
  std::vector<uint64_t> slot_tags_;  // [lane slot]
  uint32_t newest_ = kNone, oldest_ = kNone;
  // Rows, chained through next_row_.
  std::vector<uint32_t> next_row_;
  uint32_t free_row_ = kNone;
  uint32_t free_rows_ = 0;
  std::vector<float> rows_;
  std::vector<double> scores_;
  std::vector<uint64_t> request_ids_;
  std::vector<uint8_t> row_status_;
  std::vector<int64_t> event_time_;
  // The running batch.
  std::vector<Piece> batch_;
  std::vector<uint64_t> batch_tags_;
  std::vector<float> batch_rows_;
  std::vector<double> batch_scores_;
  Status run_failure_;                // of the last run that failed
  std::vector<Lane::Named> dropped_;  // of one drop()

  EndCounters request_counts_, row_counts_;
  uint64_t batches_[kMaxBatchRows + 1] = {};
  LatencyHistogram total_, queue_, run_;
  uint64_t inline_runs_ = 0, executor_runs_ = 0, parked_ = 0, missed_rows_ = 0;
  size_t parked_bytes_ = 0;
  bool stopping_ = false;
  bool held_ = false;
  std::thread thread_;
  ServedRing served_;
};

}  // namespace penstock
