#include "engine/served_model.h"

#include <algorithm>
#include <chrono>
#include <cmath>

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
      may_lack_scores_(model_->may_lack_scores()),
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
  dropped_.reserve(config.lane.max_requests);
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
  model_->interrupt();
  if (thread_.joinable()) thread_.join();
}

ServedModel::Request* ServedModel::find(uint64_t tag) {
  const auto index = static_cast<uint32_t>(tag);
  if (index >= requests_.size()) return nullptr;
  Request& request = requests_[index];
  return request.state != State::kFree && request.generation == tag >> 32 ? &request : nullptr;
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
  Status status = model_->run(batch_rows_.data(), n, batch_scores_.data());
  const bool run_ok = status.is_ok();
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
        const double* scores = &batch_scores_[(from + r) * n_outputs_];
        std::copy_n(scores, n_outputs_, &scores_[row * n_outputs_]);
        if (may_lack_scores_ &&
            !std::all_of(scores, scores + n_outputs_, [](double s) { return std::isfinite(s); }))
          request->no_score = true;
        if (r + 1 < piece.rows) row = next_row_[row];
      }
    }
    from += piece.rows;
  }
  if (!status.is_ok()) run_failure_ = std::move(status);
  lane_.finish(batch_, started, finished, run_ok);
  report_ended();
}

void ServedModel::pump() {
  std::unique_lock lock(mutex_);
  int64_t budget_ns = config_.inline_limit_ns;
  while (lane_.queued_rows() > 0 && lane_.running_batches() == 0 && !stopping_) {
    const size_t rows = std::min<size_t>(lane_.queued_rows(), config_.lane.policy.max_batch_rows);
    const int64_t predicted = lane_.run_time().predict(rows);
    if (held_ || predicted > budget_ns || !model_->inline_ok()) {
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
  dropped_.clear();
  for (uint32_t i = newest_; i != kNone;) {
    Request& request = requests_[i];
    const uint32_t older = request.older;
    if (request.target.connection == connection) {
      request.target = {};
      if (request.state == State::kQueued) {
        dropped_.push_back({request.lane_slot, tag_of(i, request.generation)});
      } else {
        end(i, {Code::kCancelled, ""});
      }
    }
    i = older;
  }
  lane_.cancel_all(dropped_);
  report_ended();
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
    request->status = {Code::kResourceExhausted, "the connection's output buffer is full"};
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
