#include "engine/served_model.h"

#include <algorithm>
#include <chrono>
#include <cstring>

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

constexpr int64_t kEndOfTimeUs = 253'402'300'800'000'000;  // the year 10000

Status exhausted(std::string text) {
  return {Code::kResourceExhausted, std::move(text)};
}

int64_t to_ms_up(int64_t ns) {
  return (ns + 999'999) / 1'000'000;
}

}  // namespace

int64_t mono_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Status make_tree_model(const uint8_t* data, size_t size, std::unique_ptr<Model>* out) {
  std::shared_ptr<const TreeEnsemble> trees;
  if (Status status = TreeEnsemble::load(data, size, &trees); !status.is_ok()) return status;
  *out = std::make_unique<TreeModel>(std::move(trees));
  return {};
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
      lane_(config.lane),
      requests_(2 * size_t{config.lane.max_requests}),
      slot_tags_(config.lane.max_requests),
      next_row_(config.max_resident_rows),
      free_rows_(config.max_resident_rows),
      rows_(config.max_resident_rows * n_features_),
      scores_(config.max_resident_rows * n_outputs_),
      request_ids_(config.max_resident_rows),
      row_status_(config.max_resident_rows),
      event_time_(config.max_resident_rows * n_views_),
      batch_rows_(kMaxBatchRows * n_features_),
      batch_scores_(kMaxBatchRows * n_outputs_),
      served_(config.served_capacity, n_features_, n_outputs_, n_views_) {
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
      if (round > 0) lane_.record_run(rows, mono_ns() - started);
    }
  }
  return {};
}

void ServedModel::start() {
  thread_ = std::thread([this] { executor(); });
}

void ServedModel::stop() {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
    stopping_ = true;
    held_ = false;
    while (oldest_ != kNone) end(oldest_, {Code::kUnavailable, "model '" + config_.name + "' was unloaded"});
    lane_.clear_ended();
  }
  work_.notify_all();
  if (thread_.joinable()) thread_.join();
}

ServedModel::Request* ServedModel::find(uint64_t tag) {
  const auto index = static_cast<uint32_t>(tag);
  if (index >= requests_.size()) return nullptr;
  Request& request = requests_[index];
  return request.state != State::kFree && request.generation == tag >> 32 ? &request : nullptr;
}

Status ServedModel::check_options(const wire::Options& options, uint32_t rows, int64_t received_ns,
                                  int64_t wall_us, Admission* admission) const {
  if (rows == 0) return Status::invalid("the request has 0 rows; expected at least 1");
  if (rows > config_.lane.max_rows_per_request) {
    return Status::invalid("the request has " + std::to_string(rows) + " rows; expected at most " +
                           std::to_string(config_.lane.max_rows_per_request));
  }
  if (options.has_now && !config_.allow_replay) {
    return {Code::kFailedPrecondition, "options.now is given, but serving.allow_replay is false"};
  }
  if (options.has_now && (options.now_us < 0 || options.now_us >= kEndOfTimeUs)) {
    return Status::invalid("options.now is " + std::to_string(options.now_us) +
                           "; expected microseconds of the years 1970 to 9999");
  }
  int64_t limit_ns = config_.max_latency_ns;
  if (options.deadline_us > 0 && options.deadline_us < limit_ns / 1000) limit_ns = options.deadline_us * 1000;
  admission->rows = rows;
  admission->received_ns = received_ns;
  admission->deadline_ns = received_ns + limit_ns;
  admission->now_us = options.has_now ? options.now_us : wall_us;
  admission->with_timings = options.timings;
  return {};
}

void ServedModel::read_request_ids(const wire::Options& options, uint32_t rows, uint64_t first_id,
                                   Scratch& scratch) {
  scratch.request_ids.resize(std::max<size_t>(scratch.request_ids.size(), rows));
  wire::Cursor list = options.request_id_list;
  for (uint32_t r = 0; r < rows; ++r) {
    uint64_t id = first_id + r;
    if (options.request_ids == wire::RequestIds::kOne) id = options.request_id;
    if (options.request_ids == wire::RequestIds::kList) (void)list.read_uint(&id);
    scratch.request_ids[r] = id;
  }
}

Status ServedModel::refuse(const Status& status, uint32_t rows) {
  const std::lock_guard lock(mutex_);
  ++request_counts_.submitted;
  ++request_counts_.rejected;
  row_counts_.submitted += rows;
  row_counts_.rejected += rows;
  return status;
}

Status ServedModel::predict(const wire::PredictCall& call, std::string_view params, const Target& target,
                            int64_t received_ns, int64_t wall_us, uint64_t first_id, Scratch& scratch,
                            int64_t* retry_after_ms, uint64_t* tag) {
  Admission admission{.target = target};
  Status status = check_options(call.options, call.rows, received_ns, wall_us, &admission);
  if (status.is_ok() && plan_ == nullptr) {
    status = {Code::kFailedPrecondition,
              "model '" + config_.name + "' has no feature service; expected a call of predict_vectors"};
  }
  const bool use_cache = !call.options.no_cache;
  if (status.is_ok()) {
    status = plan_->gather(call, admission.now_us, received_ns, use_cache, nullptr, scratch.plan,
                           &scratch.gathered, &scratch.misses);
  }
  if (!status.is_ok()) return refuse(status, call.rows);
  if (!scratch.misses.empty())
    return park(admission, params, use_cache, scratch.misses, retry_after_ms, tag, first_id);
  read_request_ids(call.options, call.rows, first_id, scratch);
  return admit(admission, scratch.gathered.rows.data(), scratch.gathered.status.data(),
               scratch.gathered.event_time.data(), scratch.request_ids.data(), retry_after_ms, tag);
}

Status ServedModel::predict_vectors(const wire::VectorsCall& call, const Target& target, int64_t received_ns,
                                    int64_t wall_us, uint64_t first_id, Scratch& scratch,
                                    int64_t* retry_after_ms, uint64_t* tag) {
  Admission admission{.target = target, .as_bin = true};
  Status status = check_options(call.options, call.rows, received_ns, wall_us, &admission);
  if (status.is_ok() && call.bytes != call.rows * n_features_ * sizeof(float)) {
    status =
        Status::invalid("data is of " + std::to_string(call.bytes) + " bytes; expected " +
                        std::to_string(call.rows) + " rows of " + std::to_string(n_features_) + " float32");
  }
  if (!status.is_ok()) return refuse(status, call.rows);
  GatheredRows& gathered = scratch.gathered;
  const size_t n = call.rows;
  if (gathered.rows.size() < n * n_features_) gathered.rows.resize(n * n_features_);
  if (gathered.status.size() < n) gathered.status.resize(n);
  if (gathered.event_time.size() < n * n_views_) gathered.event_time.resize(n * n_views_);
  std::memcpy(gathered.rows.data(), call.data, call.bytes);
  std::fill_n(gathered.status.begin(), n, uint8_t{0});
  std::fill_n(gathered.event_time.begin(), n * n_views_, std::numeric_limits<int64_t>::min());
  read_request_ids(call.options, call.rows, first_id, scratch);
  return admit(admission, gathered.rows.data(), gathered.status.data(), gathered.event_time.data(),
               scratch.request_ids.data(), retry_after_ms, tag);
}

Status ServedModel::new_request(const Admission& admission, uint32_t* index) {
  ++request_counts_.submitted;
  row_counts_.submitted += admission.rows;
  if (stopping_ || free_requests_.empty()) {
    ++request_counts_.rejected;
    row_counts_.rejected += admission.rows;
    if (stopping_) return {Code::kUnavailable, "model '" + config_.name + "' was unloaded"};
    return exhausted("too many requests are unanswered; at most " + std::to_string(requests_.size()));
  }
  ++request_counts_.in_flight;
  row_counts_.in_flight += admission.rows;
  *index = free_requests_.back();
  free_requests_.pop_back();
  Request& request = requests_[*index];
  ++request.generation;
  request.target = admission.target;
  request.rows = admission.rows;
  request.first_row = kNone;
  request.lane_slot = Lane::kNoSlot;
  request.received_ns = admission.received_ns;
  request.deadline_ns = admission.deadline_ns;
  request.formed_ns = request.run_ns = 0;
  request.now_us = admission.now_us;
  request.as_bin = admission.as_bin;
  request.with_timings = admission.with_timings;
  request.status = {};
  request.retry_after_ms = -1;
  return {};
}

Status ServedModel::admit(const Admission& admission, const float* rows, const uint8_t* row_status,
                          const int64_t* event_time, const uint64_t* ids, int64_t* retry_after_ms,
                          uint64_t* tag) {
  const std::lock_guard lock(mutex_);
  uint32_t index = kNone;
  if (Status status = new_request(admission, &index); !status.is_ok()) return status;
  Status status = queue_rows(index, rows, row_status, event_time, ids, retry_after_ms);
  if (!status.is_ok()) {
    count_end(requests_[index], status.code);
    free_request(index);
    return status;
  }
  link(index);
  *tag = tag_of(index, requests_[index].generation);
  return {};
}

// What an idle lane refuses, it refuses for its predicted run time alone. Were the slow runs behind that
// prediction a passing trouble of the machine, no run would ever correct it: so each such refusal counts as
// a run of half the predicted time, and a lane that refuses all is tried again after a window of them. Never
// so short that the trial would run on the loop thread.
void ServedModel::learn_from_refusal(uint32_t rows) {
  if (lane_.queued_rows() > 0 || lane_.running_batches() > 0 || rows > config_.lane.max_queued_rows) return;
  const auto most = static_cast<uint32_t>(config_.lane.policy.max_batch_rows);
  for (const uint32_t n : {std::min(rows, most), rows > most ? rows % most : 0}) {
    const int64_t predicted = n == 0 ? 0 : lane_.run_time().predict(n);
    if (predicted > config_.inline_limit_ns)
      lane_.record_run(n, std::max(config_.inline_limit_ns + 1, predicted / 2));
  }
}

// Hands a request's rows to the lane. On a refusal the request holds no rows.
Status ServedModel::queue_rows(uint32_t index, const float* rows, const uint8_t* row_status,
                               const int64_t* event_time, const uint64_t* ids, int64_t* retry_after_ms) {
  Request& request = requests_[index];
  if (request.rows > free_rows_) {
    return exhausted("too many rows are unanswered; at most " + std::to_string(config_.max_resident_rows));
  }
  const int64_t now = mono_ns();
  if (now >= request.deadline_ns)
    return {Code::kDeadlineExceeded, "the deadline passed before the request could be queued"};
  const Lane::Submitted submitted =
      lane_.submit(tag_of(index, request.generation), request.rows, request.deadline_ns, now);
  if (submitted.slot == Lane::kNoSlot) {
    learn_from_refusal(request.rows);
    *retry_after_ms = to_ms_up(submitted.retry_after_ns);
    return exhausted("the queue of model '" + config_.name + "' is too long for the request's deadline");
  }
  request.lane_slot = submitted.slot;
  slot_tags_[submitted.slot] = tag_of(index, request.generation);
  request.state = State::kQueued;
  request.first_row = free_row_;
  request.seek_index = 0;
  request.seek_row = free_row_;
  uint32_t last = kNone;
  for (uint32_t r = 0; r < request.rows; ++r) {
    const uint32_t at = free_row_;
    free_row_ = next_row_[at];
    std::copy_n(rows + r * n_features_, n_features_, &rows_[at * n_features_]);
    if (n_views_ != 0) std::copy_n(event_time + r * n_views_, n_views_, &event_time_[at * n_views_]);
    row_status_[at] = row_status[r];
    request_ids_[at] = ids[r];
    last = at;
  }
  next_row_[last] = kNone;
  free_rows_ -= request.rows;
  return {};
}

Status ServedModel::park(const Admission& admission, std::string_view params, bool use_cache,
                         const std::vector<FeatureMiss>& misses, int64_t* retry_after_ms, uint64_t* tag,
                         uint64_t first_id) {
  const std::lock_guard lock(mutex_);
  uint32_t index = kNone;
  if (Status status = new_request(admission, &index); !status.is_ok()) return status;
  Request& request = requests_[index];
  const size_t bytes =
      params.size() + misses.size() * sizeof(FeatureMiss) + n_views_ * request.rows * sizeof(int64_t);
  if (parked_bytes_ + bytes > config_.max_parked_bytes) {
    *retry_after_ms = 1;
    Status status = exhausted("too many requests wait for the feature store");
    count_end(request, status.code);
    free_request(index);
    return status;
  }
  request.parked = std::make_unique<Parked>();
  request.parked->params.assign(params);
  request.parked->misses = misses;
  request.parked->use_cache = use_cache;
  request.parked->first_id = first_id;
  request.parked->overlay.index.assign(n_views_ * request.rows, -1);
  request.state = State::kParked;
  request.parked->bytes = bytes;
  parked_bytes_ += bytes;
  ++parked_;
  missed_rows_ += misses.size();
  link(index);
  *tag = tag_of(index, request.generation);
  events_->missed(shared_from_this(), *tag);
  return {};
}

// Deadlines mostly rise, so the search from the newest end is short.
void ServedModel::link(uint32_t index) {
  Request& request = requests_[index];
  uint32_t after = newest_;
  while (after != kNone && requests_[after].deadline_ns > request.deadline_ns) after = requests_[after].older;
  request.older = after;
  request.newer = after == kNone ? oldest_ : requests_[after].newer;
  (request.newer == kNone ? newest_ : requests_[request.newer].older) = index;
  (after == kNone ? oldest_ : requests_[after].newer) = index;
}

void ServedModel::unlink(uint32_t index) {
  const Request& request = requests_[index];
  (request.newer == kNone ? newest_ : requests_[request.newer].older) = request.older;
  (request.older == kNone ? oldest_ : requests_[request.older].newer) = request.newer;
}

// The request has its answer: tell whoever takes it. A request whose peer is gone is counted and freed here.
void ServedModel::end(uint32_t index, Status status) {
  Request& request = requests_[index];
  unlink(index);
  if (request.parked != nullptr) {
    parked_bytes_ -= request.parked->bytes;
    request.parked.reset();
  }
  request.state = State::kDone;
  request.status = std::move(status);
  if (request.target.waiter != nullptr) {
    request.target.waiter->done = true;
    request.target.waiter->ended.notify_all();
  } else if (request.target.connection != 0) {
    events_->ended(shared_from_this(), tag_of(index, request.generation), request.target.connection);
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
  --request_counts_.in_flight;
  ++pick(request_counts_);
  row_counts_.in_flight -= request.rows;
  pick(row_counts_) += request.rows;
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
        end(index, {});
        break;
      case End::kExpired:
        end(index, {Code::kDeadlineExceeded, "no answer was possible within the deadline"});
        break;
      case End::kCancelled:
        end(index, {Code::kCancelled, "the request was cancelled"});
        break;
      default:
        end(index, {Code::kInternal, "the run of model '" + config_.name + "' failed"});
    }
  }
  lane_.clear_ended();
}

void ServedModel::run_batch(std::unique_lock<std::mutex>& lock, bool on_executor) {
  const int64_t formed = mono_ns();
  const std::span<const Piece> pieces = lane_.next_batch(formed);
  batch_.assign(pieces.begin(), pieces.end());
  report_ended();
  if (batch_.empty()) return;
  batch_tags_.clear();
  size_t n = 0;
  for (const Piece& piece : batch_) {
    Request& request = requests_[static_cast<uint32_t>(slot_tags_[piece.slot])];
    batch_tags_.push_back(slot_tags_[piece.slot]);
    if (request.formed_ns == 0) request.formed_ns = formed;
    uint32_t row = row_at(request, piece.first_row);
    for (uint32_t r = 0; r < piece.rows; ++r, ++n) {
      std::copy_n(&rows_[row * n_features_], n_features_, &batch_rows_[n * n_features_]);
      if (r + 1 < piece.rows) row = next_row_[row];
    }
  }
  ++batches_[n];
  ++(on_executor ? executor_runs_ : inline_runs_);
  if (on_executor) work_.wait(lock, [this] { return !held_ || stopping_; });
  lock.unlock();
  const int64_t started = mono_ns();
  const Status status = model_->run(batch_rows_.data(), n, batch_scores_.data());
  const int64_t finished = mono_ns();
  lock.lock();
  run_.add(finished - started);
  size_t from = 0;
  for (size_t p = 0; p < batch_.size(); ++p) {
    const Piece& piece = batch_[p];
    Request* request = find(batch_tags_[p]);
    if (request != nullptr && request->state == State::kQueued) {
      request->run_ns += finished - started;
      uint32_t row = row_at(*request, piece.first_row);
      for (uint32_t r = 0; r < piece.rows; ++r) {
        std::copy_n(&batch_scores_[(from + r) * n_outputs_], n_outputs_, &scores_[row * n_outputs_]);
        if (r + 1 < piece.rows) row = next_row_[row];
      }
    }
    from += piece.rows;
  }
  lane_.finish(batch_, started, finished, status.is_ok());
  report_ended();
}

void ServedModel::pump() {
  std::unique_lock lock(mutex_);
  int64_t budget_ns = config_.inline_limit_ns;
  while (lane_.queued_rows() > 0 && lane_.running_batches() == 0 && !stopping_) {
    const size_t rows = std::min<size_t>(lane_.queued_rows(), config_.lane.policy.max_batch_rows);
    const int64_t predicted = lane_.run_time().predict(rows);
    if (held_ || predicted > budget_ns) {
      work_.notify_one();
      return;
    }
    budget_ns -= predicted;
    run_batch(lock, false);
  }
}

void ServedModel::executor() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock,
               [this] { return stopping_ || (lane_.queued_rows() > 0 && lane_.running_batches() == 0); });
    if (stopping_) return;
    run_batch(lock, true);
  }
}

void ServedModel::expire(int64_t now_ns) {
  const std::lock_guard lock(mutex_);
  expire_locked(now_ns);
}

void ServedModel::expire_locked(int64_t now_ns) {
  if (oldest_ == kNone || requests_[oldest_].deadline_ns > now_ns) return;
  lane_.expire(now_ns);
  report_ended();
  while (oldest_ != kNone && requests_[oldest_].deadline_ns <= now_ns) {
    end(oldest_, {Code::kDeadlineExceeded, "the features could not be loaded within the deadline"});
  }
}

int64_t ServedModel::next_deadline() {
  const std::lock_guard lock(mutex_);
  return oldest_ == kNone ? std::numeric_limits<int64_t>::max() : requests_[oldest_].deadline_ns;
}

bool ServedModel::cancel(uint64_t connection, uint32_t msgid) {
  const std::lock_guard lock(mutex_);
  for (uint32_t i = newest_; i != kNone; i = requests_[i].older) {
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
  for (uint32_t i = newest_; i != kNone;) {
    Request& request = requests_[i];
    const uint32_t older = request.older;
    if (request.target.connection == connection) {
      request.target = {};
      if (request.state == State::kQueued) {
        (void)lane_.cancel(request.lane_slot, tag_of(i, request.generation));
        report_ended();
      } else {
        end(i, {Code::kCancelled, ""});
      }
    }
    i = older;
  }
}

void ServedModel::wait(uint64_t tag, Waiter& waiter) {
  std::unique_lock lock(mutex_);
  while (!waiter.done) {
    const Request* request = find(tag);
    if (request == nullptr) return;
    const auto due = std::chrono::steady_clock::time_point(std::chrono::nanoseconds(request->deadline_ns));
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
  return oldest_ == kNone && lane_.running_batches() == 0;
}

bool ServedModel::take(uint64_t tag, Result* out, size_t max_bytes) {
  const std::lock_guard lock(mutex_);
  Request* request = find(tag);
  if (request == nullptr || request->state != State::kDone) return false;
  const auto index = static_cast<uint32_t>(tag);
  const int64_t now = mono_ns();
  if (request->status.is_ok() && now >= request->deadline_ns) {
    request->status = {Code::kDeadlineExceeded, "the answer came after the deadline"};
  }
  if (request->status.is_ok() &&
      request->rows * reply_bytes_per_row(n_outputs_) + kReplyBytes + config_.version.size() > max_bytes) {
    request->status = exhausted("the connection's output buffer is full");
  }
  out->status = std::move(request->status);
  out->retry_after_ms = request->retry_after_ms;
  out->target = request->target;
  out->rows = request->rows;
  out->as_bin = request->as_bin;
  out->with_timings = request->with_timings;
  out->queue_ns = request->formed_ns == 0 ? 0 : request->formed_ns - request->received_ns;
  out->run_ns = request->run_ns;
  out->total_ns = now - request->received_ns;
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
      served_.push(request_ids_[row], request->now_us, row_status_[row], &scores_[row * n_outputs_],
                   &rows_[row * n_features_], n_views_ == 0 ? nullptr : &event_time_[row * n_views_]);
    }
    queue_.add(out->queue_ns);
  }
  total_.add(out->total_ns);
  count_end(*request, out->status.code);
  free_request(index);
  return true;
}

bool ServedModel::parked_misses(uint64_t tag, std::vector<FeatureMiss>* misses, int64_t* now_us,
                                bool* fill_cache) {
  const std::lock_guard lock(mutex_);
  const Request* request = find(tag);
  if (request == nullptr || request->state != State::kParked) return false;
  *misses = request->parked->misses;
  *now_us = request->now_us;
  *fill_cache = request->parked->use_cache;
  return true;
}

void ServedModel::resume(uint64_t tag, const std::vector<const uint64_t*>& words,
                         const std::vector<RowMeta>& meta, Scratch& scratch) {
  // The parked part is taken out, so that the rows are gathered without the lock.
  std::unique_ptr<Parked> parked;
  uint32_t rows;
  int64_t now_us;
  {
    const std::lock_guard lock(mutex_);
    Request* request = find(tag);
    if (request == nullptr || request->state != State::kParked) return;
    parked = std::move(request->parked);
    parked_bytes_ -= parked->bytes;
    rows = request->rows;
    now_us = request->now_us;
  }
  for (size_t m = 0; m < parked->misses.size(); ++m) {
    const FeatureMiss& miss = parked->misses[m];
    Overlay& overlay = parked->overlay;
    overlay.index[size_t{miss.view} * rows + miss.row] = static_cast<int64_t>(overlay.words.size());
    overlay.words.emplace_back(words[m], words[m] + plan_->row_words(miss.view));
    overlay.meta.push_back(meta[m]);
  }
  ++parked->loads;
  const auto* bytes = reinterpret_cast<const uint8_t*>(parked->params.data());
  Status status = decode_predict({bytes, bytes + parked->params.size()}, &scratch.resumed);
  if (status.is_ok()) {
    status = plan_->gather(scratch.resumed, now_us, mono_ns(), parked->use_cache, &parked->overlay,
                           scratch.plan, &scratch.gathered, &scratch.misses);
  }
  if (status.is_ok()) read_request_ids(scratch.resumed.options, rows, parked->first_id, scratch);

  const std::lock_guard lock(mutex_);
  Request* request = find(tag);
  if (request == nullptr || request->state != State::kParked) return;  // it ended meanwhile
  const auto index = static_cast<uint32_t>(tag);
  if (status.is_ok() && !scratch.misses.empty()) {
    // Rows that were cached before have gone: load those too, a bounded number of times.
    if (parked->loads >= kMaxLoads) {
      end(index, {Code::kUnavailable, "rows leave the feature cache faster than they are loaded"});
      return;
    }
    missed_rows_ += scratch.misses.size();
    parked->misses = scratch.misses;
    parked_bytes_ += parked->bytes;
    request->parked = std::move(parked);
    events_->missed(shared_from_this(), tag);
    return;
  }
  if (status.is_ok()) {
    status =
        queue_rows(index, scratch.gathered.rows.data(), scratch.gathered.status.data(),
                   scratch.gathered.event_time.data(), scratch.request_ids.data(), &request->retry_after_ms);
  }
  if (!status.is_ok()) {
    end(index, status);
  } else {
    work_.notify_one();
  }
}

void ServedModel::fail_parked(uint64_t tag, Status status) {
  const std::lock_guard lock(mutex_);
  const Request* request = find(tag);
  if (request == nullptr || request->state != State::kParked) return;
  end(static_cast<uint32_t>(tag), std::move(status));
}

void ServedModel::stats(ServedModelStats* out) {
  const std::lock_guard lock(mutex_);
  out->requests = request_counts_;
  out->rows = row_counts_;
  std::copy(std::begin(batches_), std::end(batches_), out->batches);
  out->total = total_;
  out->queue = queue_;
  out->run = run_;
  out->inline_runs = inline_runs_;
  out->executor_runs = executor_runs_;
  out->parked = parked_;
  out->missed_rows = missed_rows_;
  out->queued_rows = lane_.queued_rows();
  out->served_dropped = served_.dropped();
}

void ServedModel::hold_for_test(bool held) {
  {
    const std::lock_guard lock(mutex_);
    held_ = held;
  }
  work_.notify_all();
}

}  // namespace penstock
