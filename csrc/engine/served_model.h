// One live version of one model: its lane, the rows of its requests, its executor thread and its counters.
//
// A request's way: submitted (gathered, or parked until the loader has read what the caches lacked), queued
// in the lane, run in a batch, done, taken (its reply is encoded and its rows are freed). Batches run on the
// calling thread while the lane is idle and the predicted run is short (pump), else on the executor thread.
// While the circuit breaker is open (batch/breaker.h) no request is taken and those that wait end as
// UNAVAILABLE; the executor runs the probes that close it again.
//
// A lane that refuses does so before a request's rows are gathered, so that a refusal costs next to nothing.
// Connections share the request pool and the lane fairly (batch/fair_queue.h, within_share); the callers of
// this process are one peer among them.
//
// Invariants, under the lock: submitted == in_flight + ok + rejected + expired + cancelled + failed, in
// requests and in rows; each request is counted ended once, when it is taken or dropped; a tag names one
// request for ever; a batch copies rows in before it runs and scores out after, under the lock, so a request
// that ended meanwhile (even in a hung run) frees its rows at once.
// Threads: any, except where said. One mutex; the sink is called under it and must not call back.
// The code is in six files: served_admission.cc (the way in), served_parking.cc (misses), served_runs.cc
// (batches and their threads), served_edge.cc (the edge cache and equal requests), served_shadow.cc (rows
// that another version answered), served_model.cc (the rest).
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "batch/breaker.h"
#include "batch/lane.h"
#include "engine/latency.h"
#include "engine/model.h"
#include "engine/peer_table.h"
#include "engine/served_edge.h"
#include "engine/served_ring.h"
#include "engine/service_plan.h"
#include "engine/serving_meter.h"
#include "engine/trace_queue.h"
#include "engine/vector_samples.h"
#include "wire/reply.h"

namespace penstock {

int64_t mono_ns();        // CLOCK_MONOTONIC
int64_t wall_clock_us();  // UTC since 1970

struct ServedModelConfig {
  std::string name;
  std::string version;
  LaneConfig lane;  // max_flows and horizon_ns are set by the model
  BreakerConfig breaker;
  uint32_t max_resident_rows = 32768;  // of all unanswered requests
  size_t max_parked_bytes = size_t{64} << 20;
  int64_t max_latency_ns = 50'000'000;
  int64_t inline_limit_ns = 200'000;
  bool allow_replay = false;
  size_t served_capacity = 65536;
  double sample_share = 0;  // of the keys, for samples()
  size_t sample_bytes = size_t{1} << 20;
  EdgeConfig edge;
};

// Who is told that a local request ended. Guarded by the model's mutex.
struct Waiter {
  std::condition_variable ended;
  bool done = false;
};

// Where a reply goes: a connection's id and msgid, or a waiter; neither once the peer is gone, nor where the
// request is a shadow's.
struct Target {
  uint64_t connection = 0;
  uint32_t msgid = 0;
  Waiter* waiter = nullptr;
  bool shadowed = false;  // a version on trial scores the rows too, once they are answered
  bool shadow = false;    // nobody waits: the request ends by itself
};

struct EndCounters {
  uint64_t submitted = 0, in_flight = 0, ok = 0, rejected = 0, expired = 0, cancelled = 0, failed = 0;

  EndCounters& operator+=(const EndCounters& other) {
    submitted += other.submitted;
    in_flight += other.in_flight;
    ok += other.ok;
    rejected += other.rejected;
    expired += other.expired;
    cancelled += other.cancelled;
    failed += other.failed;
    return *this;
  }
};

// Of one priority class.
struct ClassStats {
  EndCounters requests, rows;
  uint64_t queued_rows = 0;
  int64_t max_wait_ns = 0;  // from arrival to the batch of a request's first row, ever
};

struct BreakerStats {
  Breaker::State state = Breaker::State::kClosed;
  bool busy = false;  // a run is in progress
  uint64_t opens = 0, probes = 0;
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
  StageTimes times;
  std::vector<double> scores;
  std::vector<uint64_t> request_ids;
  std::vector<uint8_t> row_status;
  // Only of a request that is target.shadowed and ok: its rows, and the event times of their views.
  int64_t now_us = 0;
  std::vector<float> features;
  std::vector<int64_t> event_time;
};

// In the status of a served row: a shadow scored it, and nobody was told.
inline constexpr uint8_t kShadowRow = 0x80;

struct ServedModelStats {
  EndCounters requests, rows;  // of both classes
  ClassStats high, low;
  BreakerStats breaker;
  uint64_t batches[kMaxBatchRows + 1];
  StageHistograms stages;
  LatencyHistogram run;  // by batch
  MeterReading meter;
  uint64_t inline_runs, executor_runs, parked, missed_rows, queued_rows, served_dropped, traces_dropped;
  EdgeStats edge;
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
  static constexpr uint32_t kMaxLoads = 3;  // for one request, before it does without the cache

  // Working memory of one calling thread, for any number of models.
  struct Scratch {
    ServicePlan::Scratch plan;
    GatheredRows gathered;
    std::vector<FeatureMiss> misses;
    std::vector<uint64_t> request_ids;
    wire::PredictCall resumed;
    EdgeScratch edge;
  };

  // `plan` may be null: then only vectors are served.
  ServedModel(const ServedModelConfig& config, std::unique_ptr<Model> model,
              std::shared_ptr<const ServicePlan> plan, ModelEvents* events);
  ~ServedModel();

  // Makes the edge cache of config.edge. Before warm_up(), which decides whether it is used at first.
  Status make_edge();
  // Runs batches of 1, 2, 4 ... max_batch_rows on zeros, so that run times are known. Before start().
  Status warm_up();
  void start();  // the executor thread
  // Ends what is unanswered as UNAVAILABLE and joins the executor. A run that hangs is not waited for: the
  // executor keeps the model alive until it returns, and touches nothing else.
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

  // Scores the rows that another version answered, of the same features and views, as a request of the low
  // class that nobody waits for. Only the executor runs it. What finds no room is refused and counted.
  void shadow(const Result& answered);

  // Runs what is queued, here while short, else on the executor.
  void pump();
  // Runs full batches that are cheap, here, if the executor runs none: in the midst of a long read, while
  // what they are made of is still in the processor's caches. Whether there were any.
  bool pump_full();
  void expire(int64_t now_ns);
  int64_t next_deadline();  // when expire() is next due; INT64_MAX: nothing unanswered and no run in progress
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
  bool idle();  // every request has its answer, and no batch runs

  // The loader's side of a parked request. view_misses: what it lacks, false if it ended meanwhile.
  bool parked_misses(uint64_t tag, std::vector<FeatureMiss>* misses, int64_t* now_us, bool* fill_cache);
  // words, meta: one row for each miss of parked_misses(), in order.
  void resume(uint64_t tag, const std::vector<const uint64_t*>& words, const std::vector<RowMeta>& meta,
              Scratch& scratch);
  void fail_parked(uint64_t tag, Status status);

  // The most frequent requests of one row that the edge cache saw, most frequent first;
  // config.edge.precompute at most.
  std::vector<HotInputs::Input> hot_inputs() const;
  // The feature rows that those requests lack, each once; none where the edge cache is not in use.
  std::vector<FeatureMiss> hot_misses(const std::vector<HotInputs::Input>& inputs, int64_t now_us,
                                      Scratch& scratch) const;
  // Computes those that the edge cache does not hold, in runs of their own while the lane is idle, and
  // returns how many entered it. Inputs whose feature rows are not cached are left out. Ends after limit_ns
  // at the latest, but for a run in progress. Not on the loop thread: it waits.
  size_t precompute(const std::vector<HotInputs::Input>& inputs, int64_t now_us, int64_t limit_ns,
                    Scratch& scratch);

  const ServedModelConfig& config() const { return config_; }
  const ServicePlan* plan() const { return plan_.get(); }
  ServedRing& served() { return served_; }
  VectorSamples& samples() { return samples_; }
  size_t n_features() const { return n_features_; }
  size_t n_outputs() const { return n_outputs_; }
  size_t n_views() const { return n_views_; }
  void stats(ServedModelStats* out);
  // Keeps up to `capacity` sampled requests that ended, until take_traces() moves them to `out`, which is
  // reused from call to call.
  void trace(size_t capacity);
  void take_traces(std::vector<TraceRecord>& out);
  // For tests of hangs: while held, batches go to the executor and block there.
  void hold_for_test(bool held);

 private:
  static constexpr uint32_t kNone = UINT32_MAX;
  static constexpr int64_t kLookNs = 10'000'000;
  enum class State : uint8_t { kFree, kParked, kQueued, kFollowing, kDone };
  static bool waits_apart(State state) { return state == State::kParked || state == State::kFollowing; }

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
    int64_t decoded_ns = 0, admitted_ns = 0, finished_ns = 0;  // 0: not come so far
    wire::TraceParent trace;
    int64_t now_us = 0;
    bool as_bin = false, with_timings = false;
    bool low = false;
    bool no_score = false;  // the model gave a row of it none
    Status status;
    int64_t retry_after_ms = -1;
    std::unique_ptr<Parked> parked;
    QueueLinks links;  // in parked_queue_
    uint32_t peer = kNone;
    uint32_t newer = kNone, older = kNone;  // of the peer, while unanswered
  };
  struct Requests : std::vector<Request> {
    explicit Requests(size_t n) : vector(n) {}
    QueueLinks& links(uint32_t i) { return (*this)[i].links; }
    bool before(uint32_t a, uint32_t b) const {
      const int64_t x = (*this)[a].deadline_ns;
      const int64_t y = (*this)[b].deadline_ns;
      return x != y ? x < y : a < b;
    }
  };

  struct Admission {
    Target target;
    uint32_t rows = 0;
    int64_t received_ns = 0, deadline_ns = 0, now_us = 0;
    int64_t decoded_ns = 0;  // 0: nothing is gathered
    wire::TraceParent trace;
    bool as_bin = false, with_timings = false;
    bool low = false;
  };

  static uint64_t tag_of(uint32_t index, uint32_t generation) { return uint64_t{generation} << 32 | index; }
  Request* find(uint64_t tag);
  Status check_options(const wire::Options& options, uint32_t rows, int64_t received_ns, int64_t wall_us,
                       Admission* admission) const;
  void read_request_ids(const wire::Options& options, uint32_t rows, uint64_t first_id, Scratch& scratch);
  Status refuse(Status status, uint32_t rows, bool low, int64_t received_ns);
  Status refuse_early(const Admission& admission, int64_t* retry_after_ms);
  Status unavailable(int64_t now_ns, int64_t* retry_after_ms) const;
  Status refusal(const Lane::Submitted& submitted, int64_t* retry_after_ms) const;
  Status too_many() const;
  void count_refused(Code code, uint32_t rows, bool low, int64_t received_ns);
  void look(int64_t now_ns) { look_until_ns_.store(now_ns + kLookNs, std::memory_order_relaxed); }
  Status admit(const Admission& admission, const float* rows, const uint8_t* row_status,
               const int64_t* event_time, Scratch& scratch, int64_t* retry_after_ms, uint64_t* tag);
  Status enter(uint32_t index, const float* rows, const uint8_t* row_status, const int64_t* event_time,
               Scratch& scratch, int64_t* retry_after_ms);
  Status queue_rows(uint32_t index, const float* rows, const uint8_t* row_status, const int64_t* event_time,
                    const uint64_t* ids, int64_t* retry_after_ms);
  Status queue_placed(uint32_t index, int64_t* retry_after_ms);
  void place_rows(uint32_t index, const float* rows, const uint8_t* row_status, const int64_t* event_time,
                  const uint64_t* ids);
  void fit_gathered(GatheredRows& gathered, size_t rows) const;
  Status park(const Admission& admission, std::string_view params, bool use_cache,
              const std::vector<FeatureMiss>& misses, int64_t* retry_after_ms, uint64_t* tag,
              uint64_t first_id);
  Status new_request(const Admission& admission, uint32_t* index, int64_t* retry_after_ms,
                     bool needs_run = true);
  void link(uint32_t index);
  void unlink(uint32_t index);
  void end(uint32_t index, Status status);
  void count_end(const Request& request, Code code);
  StageTimes times_of(const Request& request, int64_t now_ns) const;
  void free_request(uint32_t index);
  void copy_features(const Request& request, Result* out) const;
  void serve_row(const Request& request, uint32_t row, uint8_t flags);
  void end_shadow(uint32_t index);
  uint32_t row_at(Request& request, uint32_t index);
  void learn_from_refusal(uint32_t rows);
  void report_ended();
  void end_all(const Status& status, int64_t retry_after_ms);
  void trip(int64_t now_ns);
  void expire_locked(int64_t now_ns);
  bool anybody_waits() const;
  bool may_run() const { return (!held_ || stopping_) && (edge_ == nullptr || !edge_->precomputing); }
  void run_batch(std::unique_lock<std::mutex>& lock, bool on_executor);
  bool inline_ok() const;  // may a batch run on the thread that pumps?
  void probe(std::unique_lock<std::mutex>& lock);
  std::shared_ptr<ServedModel> executor();

  // The edge cache; edge_ is not null. With the lock held, but for the lookup.
  bool edge_in_use() const { return edge_ != nullptr && edge_->active.load(std::memory_order_relaxed); }
  bool edge_answers(const Admission& admission, const wire::PredictCall& call, uint64_t first_id,
                    Scratch& scratch, Status* status, uint64_t* tag);
  bool edge_answers(const Admission& admission, const wire::VectorsCall& call, uint64_t first_id,
                    Scratch& scratch, Status* status, uint64_t* tag);
  bool edge_is_hot(Scratch& scratch) const;
  void fit_edge(EdgeScratch& scratch, size_t rows) const;
  bool edge_lookup(const Admission& admission, const wire::Options& options, uint64_t first_id,
                   Scratch& scratch, Status* status, uint64_t* tag);
  bool edge_row_of(const HotInputs::Input& input, int64_t now_us, Scratch& scratch, Key128* key,
                   std::vector<FeatureMiss>* misses) const;
  bool edge_shares(uint32_t index, const float* rows, const uint8_t* row_status, const int64_t* event_time,
                   Scratch& scratch);
  void edge_queued(uint32_t index, Scratch& scratch);
  void edge_note_sources(uint32_t index, const Scratch& scratch);
  void edge_fill(Request& request, const Piece& piece, int64_t now_ns);
  void edge_end_with(uint32_t index, const double* scores);
  void edge_ended(uint32_t index, const Status& status);
  void edge_adopt();
  void edge_learn(int64_t elapsed_ns, size_t rows);
  void edge_warmed_up();
  void edge_stats(EdgeStats* out) const;

  const ServedModelConfig config_;
  const std::unique_ptr<Model> model_;
  const std::shared_ptr<const ServicePlan> plan_;
  ModelEvents* const events_;
  const size_t n_features_, n_outputs_, n_views_;
  const bool may_lack_scores_;

  std::mutex mutex_;
  std::condition_variable work_;
  Lane lane_;
  Breaker breaker_;
  Requests requests_;
  std::vector<uint32_t> free_requests_;
  std::vector<uint64_t> slot_tags_;  // [lane slot]
  PeerTable peers_;                  // a peer's record is its flow in the lane
  OrderedQueue parked_queue_;        // the parked and the following ones by deadline
  // Until then requests are looked at before they are gathered, since one was refused of late. Stored under
  // the lock, read without it; no partner: a stale value costs only one gathering, or one look.
  std::atomic<int64_t> look_until_ns_{0};
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
  std::unique_ptr<ServedEdge> edge_;  // null: off

  EndCounters request_counts_[2], row_counts_[2];  // [low]
  int64_t max_wait_ns_[2] = {};                    // [low]
  uint64_t batches_[kMaxBatchRows + 1] = {};
  LatencyHistogram run_;
  ServingMeter meter_;
  TraceQueue traces_;
  uint64_t inline_runs_ = 0, executor_runs_ = 0, parked_ = 0, missed_rows_ = 0;
  size_t parked_bytes_ = 0;
  bool stopping_ = false;
  bool held_ = false;
  bool executor_done_ = true;
  std::condition_variable executor_ended_;
  std::shared_ptr<ServedModel> keep_alive_;  // held for a detached executor, which takes it with it
  std::thread thread_;
  ServedRing served_;
  VectorSamples samples_;
};

}  // namespace penstock
