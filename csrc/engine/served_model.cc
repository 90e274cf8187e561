#include "engine/served_model.h"

#include <algorithm>
#include <chrono>

#include "model/tree_ensemble.h"

namespace penstock {
namespace {

class TreeModel final : public Model {
 public:
  explicit TreeModel(std::shared_ptr<const TreeEnsemble> trees)
      : trees_(std::move(trees)), scratch_(*trees_) {}
  size_t n_features() const override { return trees_->n_features(); }
  size_t n_outputs() const override { return trees_->n_outputs(); }
  Status run(const float* rows, size_t n, double* scores) override {
    trees_->predict(rows, n, trees_->n_features(), scores, scratch_);
    return {};
  }

 private:
  std::shared_ptr<const TreeEnsemble> trees_;
  TreeEnsemble::Scratch scratch_;
};

// At most what a reply takes on the wire: a float64, a request id and a status a row, and all else.
constexpr size_t kReplyBytes = 256;
constexpr size_t reply_bytes_per_row(size_t outputs) {
  return 9 * outputs + 9 + 2;
}

constexpr size_t kMaxPeers = 65'536;

// One record for each request that may be held, up to a limit: each may be of another peer.
size_t peers_of(const LaneConfig& lane) {
  return std::min(2 * size_t{lane.max_requests} + 1, kMaxPeers);
}

LaneConfig lane_config(const ServedModelConfig& config) {
  LaneConfig lane = config.lane;
  lane.max_flows = static_cast<uint32_t>(peers_of(lane));
  lane.horizon_ns = config.max_latency_ns;
  return lane;
}

}  // namespace

int64_t wall_clock_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

int64_t mono_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Status make_tree_model(const uint8_t* data, size_t size, std::unique_ptr<Model>* out) {
  std::shared_ptr<const TreeEnsemble> trees;
  if (Status status = TreeEnsemble::load(data, size, &trees); !status.is_ok()) return status;
  *out = make_tree_model(std::move(trees));
  return {};
}

std::unique_ptr<Model> make_tree_model(std::shared_ptr<const TreeEnsemble> trees) {
  return std::make_unique<TreeModel>(std::move(trees));
}

ServedModel::ServedModel(const ServedModelConfig& config, std::unique_ptr<Model> model,
                         std::shared_ptr<const ServicePlan> plan, ModelEvents* events)
    : config_(config),
      model_(std::move(model)),
      plan_(std::move(plan)),
      events_(events),
      n_features_(model_->n_features()),
      n_outputs_(model_->n_outputs()),
      n_views_(plan_ == nullptr ? 0 : plan_->n_views()),
      may_lack_scores_(model_->may_lack_scores()),
      lane_(lane_config(config)),
      breaker_(config.breaker),
      requests_(2 * size_t{config.lane.max_requests}),
      slot_tags_(lane_.slots()),
      peers_(peers_of(config.lane)),
      next_row_(config.max_resident_rows),
      free_rows_(config.max_resident_rows),
      rows_(config.max_resident_rows * n_features_),
      scores_(config.max_resident_rows * n_outputs_),
      request_ids_(config.max_resident_rows),
      row_status_(config.max_resident_rows),
      event_time_(config.max_resident_rows * n_views_),
      batch_rows_(kMaxBatchRows * n_features_),
      batch_scores_(kMaxBatchRows * n_outputs_),
      meter_(mono_ns()),
      served_(config.served_capacity, n_features_, n_outputs_, n_views_),
      samples_(plan_ == nullptr ? 0 : config.sample_share, config.sample_bytes) {
  free_requests_.reserve(requests_.size());
  for (uint32_t i = static_cast<uint32_t>(requests_.size()); i-- > 0;) free_requests_.push_back(i);
  for (uint32_t i = 0; i < config.max_resident_rows; ++i)
    next_row_[i] = i + 1 < config.max_resident_rows ? i + 1 : kNone;
  free_row_ = config.max_resident_rows == 0 ? kNone : 0;
  batch_.reserve(kMaxBatchRows);
  batch_tags_.reserve(kMaxBatchRows);
}

ServedModel::~ServedModel() {
  stop();
}

Status ServedModel::warm_up() {
  constexpr int kRounds = 3;
  for (size_t rows = 1; rows <= config_.lane.policy.max_batch_rows; rows *= 2) {
    for (int round = 0; round < kRounds; ++round) {
      std::fill(batch_rows_.begin(), batch_rows_.end(), 0.0f);
      const int64_t started = mono_ns();
      if (Status status = model_->run(batch_rows_.data(), rows, batch_scores_.data()); !status.is_ok())
        return status;
      // The first run of a size pays for cold memory and says nothing of the next ones.
      if (round == 0) continue;
      const int64_t elapsed = mono_ns() - started;
      lane_.record_run(rows, elapsed);
      if (edge_ != nullptr) edge_learn(elapsed, rows);
    }
  }
  edge_warmed_up();
  return {};
}

ServedModel::Request* ServedModel::find(uint64_t tag) {
  const auto index = static_cast<uint32_t>(tag);
  if (index >= requests_.size()) return nullptr;
  Request& request = requests_[index];
  return request.state != State::kFree && request.generation == tag >> 32 ? &request : nullptr;
}

// Adds the request to its peer's unanswered ones.
void ServedModel::link(uint32_t index) {
  Request& request = requests_[index];
  PeerRecord& peer = peers_[request.peer];
  request.newer = kNone;
  request.older = peer.newest;
  if (peer.newest != kNone) requests_[peer.newest].newer = index;
  peer.newest = index;
}

void ServedModel::unlink(uint32_t index) {
  const Request& request = requests_[index];
  (request.newer == kNone ? peers_[request.peer].newest : requests_[request.newer].older) = request.older;
  if (request.older != kNone) requests_[request.older].newer = request.newer;
}

// The request has its answer: tell whoever takes it. A request whose peer is gone is counted and freed here.
void ServedModel::end(uint32_t index, Status status) {
  Request& request = requests_[index];
  unlink(index);
  if (edge_ != nullptr) edge_ended(index, status);
  if (waits_apart(request.state)) parked_queue_.remove(requests_, index);
  if (request.parked != nullptr) {
    parked_bytes_ -= request.parked->bytes;
    peers_[request.peer].parked_bytes -= request.parked->bytes;
    request.parked.reset();
  }
  request.state = State::kDone;
  request.status = std::move(status);
  if (request.target.waiter != nullptr) {
    request.target.waiter->done = true;
    request.target.waiter->ended.notify_all();
  } else if (request.target.connection != 0) {
    events_->ended(shared_from_this(), tag_of(index, request.generation), request.target.connection);
  } else if (request.target.shadow) {
    end_shadow(index);
  } else {
    count_end(request, Code::kCancelled);
    free_request(index);
  }
}

void ServedModel::count_end(const Request& request, Code code) {
  const auto pick = [code](EndCounters& counters) -> uint64_t& {
    switch (code) {
      case Code::kOk:
        return counters.ok;
      case Code::kResourceExhausted:
      case Code::kInvalidArgument:
      case Code::kNotFound:
        return counters.rejected;
      case Code::kDeadlineExceeded:
        return counters.expired;
      case Code::kCancelled:
        return counters.cancelled;
      default:
        return counters.failed;
    }
  };
  meter_.ended(code, request.rows);
  --request_counts_[request.low].in_flight;
  ++pick(request_counts_[request.low]);
  row_counts_[request.low].in_flight -= request.rows;
  pick(row_counts_[request.low]) += request.rows;
}

void ServedModel::free_request(uint32_t index) {
  Request& request = requests_[index];
  if (request.first_row != kNone) {
    uint32_t last = request.first_row;
    while (next_row_[last] != kNone) last = next_row_[last];
    next_row_[last] = free_row_;
    free_row_ = request.first_row;
    free_rows_ += request.rows;
    request.first_row = kNone;
  }
  request.state = State::kFree;
  request.target = {};
  peers_.release(request.peer);
  free_requests_.push_back(index);
}

uint32_t ServedModel::row_at(Request& request, uint32_t index) {
  if (index < request.seek_index) {
    request.seek_index = 0;
    request.seek_row = request.first_row;
  }
  for (; request.seek_index < index; ++request.seek_index) request.seek_row = next_row_[request.seek_row];
  return request.seek_row;
}

void ServedModel::report_ended() {
  for (const Ended& ended : lane_.ended()) {
    Request* request = find(ended.tag);
    if (request == nullptr || request->state != State::kQueued) continue;
    const auto index = static_cast<uint32_t>(ended.tag);
    switch (ended.end) {
      case End::kOk:
        end(index, !request->no_score
                       ? Status{}
                       : Status{Code::kInternal, "model '" + config_.name +
                                                     "' gave a row no score that is finite and "
                                                     "of its output's kind"});
        break;
      case End::kExpired:
        end(index, {Code::kDeadlineExceeded, "no answer was possible within the deadline"});
        break;
      case End::kCancelled:
        end(index, {Code::kCancelled, "the request was cancelled"});
        break;
      default:
        if (run_failure_.code == Code::kUnavailable) request->retry_after_ms = model_->retry_after_ms();
        end(index, run_failure_);
    }
  }
  lane_.clear_ended();
  if (edge_ != nullptr) edge_adopt();
}

// Ends every unanswered request. Seldom: it looks at the whole pool.
void ServedModel::end_all(const Status& status, int64_t retry_after_ms) {
  lane_.end_all();
  lane_.clear_ended();
  for (uint32_t i = 0; i < requests_.size(); ++i) {
    if (!waits_apart(requests_[i].state) && requests_[i].state != State::kQueued) continue;
    requests_[i].retry_after_ms = retry_after_ms;
    end(i, status);
  }
  if (edge_ != nullptr) edge_->orphans.clear();  // all have ended
}

// The breaker has opened: what waits is told so, and so is what comes, before anything is done for it.
void ServedModel::trip(int64_t now_ns) {
  look(now_ns);
  int64_t retry_after_ms = -1;
  const Status status = unavailable(now_ns, &retry_after_ms);
  end_all(status, retry_after_ms);
}

void ServedModel::expire(int64_t now_ns) {
  const std::lock_guard lock(mutex_);
  expire_locked(now_ns);
}

void ServedModel::expire_locked(int64_t now_ns) {
  if (lane_.next_deadline() <= now_ns) {
    lane_.expire(now_ns);
    report_ended();
  }
  for (uint32_t i = parked_queue_.top(requests_); i != kNone && requests_[i].deadline_ns <= now_ns;
       i = parked_queue_.top(requests_)) {
    const bool parked = requests_[i].state == State::kParked;
    end(i, {Code::kDeadlineExceeded, parked ? "the features could not be loaded within the deadline"
                                            : "no answer was possible within the deadline"});
  }
  if (breaker_.check(now_ns)) trip(now_ns);
}

int64_t ServedModel::next_deadline() {
  const std::lock_guard lock(mutex_);
  const uint32_t parked = parked_queue_.top(requests_);
  const int64_t next = std::min(lane_.next_deadline(), breaker_.due_ns());
  return parked == kNone ? next : std::min(next, requests_[parked].deadline_ns);
}

bool ServedModel::cancel(uint64_t connection, uint32_t msgid) {
  const std::lock_guard lock(mutex_);
  const uint32_t peer = peers_.find(connection);
  if (peer == kNone) return false;
  for (uint32_t i = peers_[peer].newest; i != kNone; i = requests_[i].older) {
    Request& request = requests_[i];
    if (request.target.connection != connection || request.target.msgid != msgid) continue;
    if (request.state == State::kQueued) {
      (void)lane_.cancel(request.lane_slot, tag_of(i, request.generation));
      report_ended();
    } else {
      end(i, {Code::kCancelled, "the request was cancelled"});
    }
    return true;
  }
  return false;
}

void ServedModel::drop(uint64_t connection) {
  const std::lock_guard lock(mutex_);
  const uint32_t peer = peers_.find(connection);
  if (peer == kNone) return;
  for (uint32_t i = peers_[peer].newest; i != kNone;) {
    Request& request = requests_[i];
    const uint32_t older = request.older;
    request.target = {};
    if (request.state == State::kQueued) {
      (void)lane_.cancel(request.lane_slot, tag_of(i, request.generation));
    } else {
      end(i, {Code::kCancelled, ""});
    }
    i = older;
  }
  report_ended();
}

void ServedModel::wait(uint64_t tag, Waiter& waiter) {
  std::unique_lock lock(mutex_);
  while (!waiter.done) {
    const Request* request = find(tag);
    if (request == nullptr) return;
    // No run that has yet to begin can hang before that.
    const int64_t look_ns = std::min(breaker_.due_ns(), mono_ns() + config_.breaker.timeout_ns);
    const auto due = std::chrono::steady_clock::time_point(
        std::chrono::nanoseconds(std::min(request->deadline_ns, look_ns)));
    if (waiter.ended.wait_until(lock, due) == std::cv_status::timeout) expire_locked(mono_ns());
  }
}

void ServedModel::abandon(uint64_t tag) {
  const std::lock_guard lock(mutex_);
  const Request* request = find(tag);
  if (request == nullptr || request->state != State::kDone) return;
  count_end(*request, Code::kCancelled);
  free_request(static_cast<uint32_t>(tag));
}

bool ServedModel::idle() {
  const std::lock_guard lock(mutex_);
  return lane_.requests().in_flight == 0 && parked_queue_.empty() && !breaker_.running();
}

StageTimes ServedModel::times_of(const Request& request, int64_t now_ns) const {
  StageTimes times;
  times.total_ns = now_ns - request.received_ns;
  if (!request.status.is_ok()) return times;
  // What another request's run or an edge entry answered was never in the lane.
  const int64_t finished = request.finished_ns == 0 ? now_ns : request.finished_ns;
  const int64_t admitted = request.admitted_ns == 0 ? finished : request.admitted_ns;
  const int64_t decoded = request.decoded_ns == 0 ? admitted : request.decoded_ns;
  times.receive_ns = decoded - request.received_ns;
  times.gather_ns = admitted - decoded;
  times.queue_ns = std::max<int64_t>(0, finished - admitted - request.run_ns);
  times.run_ns = request.run_ns;
  times.encode_ns = now_ns - finished;
  return times;
}

bool ServedModel::take(uint64_t tag, Result* out, size_t max_bytes) {
  std::unique_lock lock(mutex_);
  Request* request = find(tag);
  if (request == nullptr || request->state != State::kDone) return false;
  const auto index = static_cast<uint32_t>(tag);
  const int64_t now = mono_ns();
  if (request->status.is_ok() && now >= request->deadline_ns) {
    request->status = {Code::kDeadlineExceeded, "the answer came after the deadline"};
  }
  if (request->status.is_ok() &&
      request->rows * reply_bytes_per_row(n_outputs_) + kReplyBytes + config_.version.size() > max_bytes) {
    request->status = {Code::kResourceExhausted, "the connection's output buffer is full"};
  }
  meter_.saw(now);
  out->times = times_of(*request, now);
  out->status = std::move(request->status);
  out->retry_after_ms = request->retry_after_ms;
  out->target = request->target;
  out->rows = request->rows;
  out->as_bin = request->as_bin;
  out->with_timings = request->with_timings;
  out->with_status = false;
  if (out->status.is_ok()) {
    out->scores.resize(request->rows * n_outputs_);
    out->request_ids.resize(request->rows);
    out->row_status.resize(request->rows);
    const std::lock_guard served(served_.mutex());
    uint32_t row = request->first_row;
    for (uint32_t r = 0; r < request->rows; ++r, row = next_row_[row]) {
      std::copy_n(&scores_[row * n_outputs_], n_outputs_, &out->scores[r * n_outputs_]);
      out->request_ids[r] = request_ids_[row];
      out->row_status[r] = row_status_[row];
      out->with_status = out->with_status || row_status_[row] != 0;
      serve_row(*request, row, 0);
    }
    if (request->target.shadowed) copy_features(*request, out);
    meter_.answered(out->times);
  }
  meter_.took(out->times.total_ns);
  if (request->trace.sampled && traces_.enabled()) {
    traces_.push({request->trace, request->received_ns, out->times, request->rows, out->status.code});
  }
  count_end(*request, out->status.code);
  free_request(index);
  lock.unlock();
  if (out->status.is_ok()) served_.help(out->rows);
  return true;
}

void ServedModel::stats(ServedModelStats* out) {
  EdgeCacheStats cached{};
  if (edge_ != nullptr) cached = edge_->cache->stats();  // a walk, so not under the lock
  const std::lock_guard lock(mutex_);
  edge_stats(&out->edge);
  out->edge.cache = cached;
  for (const bool low : {false, true}) {
    (low ? out->low : out->high) =
        ClassStats{request_counts_[low], row_counts_[low], lane_.queue(low).rows(), max_wait_ns_[low]};
  }
  out->requests = request_counts_[0];
  out->requests += request_counts_[1];
  out->rows = row_counts_[0];
  out->rows += row_counts_[1];
  out->breaker = {breaker_.state(), breaker_.running(), breaker_.opens(), breaker_.probes()};
  out->meter = meter_.read(mono_ns());
  std::copy(std::begin(batches_), std::end(batches_), out->batches);
  out->stages = meter_.stages();
  out->run = run_;
  out->inline_runs = inline_runs_;
  out->executor_runs = executor_runs_;
  out->parked = parked_;
  out->missed_rows = missed_rows_;
  out->queued_rows = lane_.queued_rows();
  out->served_dropped = served_.dropped();
  out->traces_dropped = traces_.dropped();
}

void ServedModel::trace(size_t capacity) {
  const std::lock_guard lock(mutex_);
  traces_.set_capacity(capacity);
}

void ServedModel::take_traces(std::vector<TraceRecord>& out) {
  const std::lock_guard lock(mutex_);
  traces_.take(out);
}

}  // namespace penstock
