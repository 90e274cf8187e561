// The runs of a ServedModel: batches on the calling thread and on the executor, probes, and how it stops.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "engine/served_model.h"

namespace penstock {
namespace {

constexpr int64_t kStopLook = 1'000'000'000;  // how often stop() looks at a run that it waits for

}  // namespace

void ServedModel::start() {
  executor_done_ = false;
  thread_ = std::thread([this] {
    // The last reference to the model may go with a detached executor, after its last use of it.
    const std::shared_ptr<ServedModel> last = executor();
  });
}

void ServedModel::stop() {
  std::unique_lock lock(mutex_);
  if (stopping_) return;
  stopping_ = true;
  held_ = false;
  end_all({Code::kUnavailable, "model '" + config_.name + "' was unloaded"}, -1);
  work_.notify_all();
  lock.unlock();
  model_->interrupt();
  lock.lock();
  if (!thread_.joinable()) return;
  while (!executor_done_ && !breaker_.hung()) {
    const int64_t due = std::min(breaker_.due_ns(), mono_ns() + kStopLook);
    executor_ended_.wait_until(lock, std::chrono::steady_clock::time_point(std::chrono::nanoseconds(due)));
    (void)breaker_.check(mono_ns());
  }
  if (!executor_done_) keep_alive_ = weak_from_this().lock();
  const bool detached = keep_alive_ != nullptr;
  lock.unlock();
  detached ? thread_.detach() : thread_.join();
}

bool ServedModel::anybody_waits() const {
  for (const uint64_t tag : batch_tags_) {
    const Request& request = requests_[static_cast<uint32_t>(tag)];
    if (request.generation == tag >> 32 && request.state == State::kQueued) return true;
  }
  return false;
}

void ServedModel::run_batch(std::unique_lock<std::mutex>& lock, bool on_executor) {
  const int64_t formed = mono_ns();
  const std::span<const Piece> pieces = lane_.next_batch(formed);
  batch_.assign(pieces.begin(), pieces.end());
  report_ended();
  if (batch_.empty()) return;
  batch_tags_.clear();
  size_t n = 0;
  int64_t latest = 0;
  for (const Piece& piece : batch_) {
    Request& request = requests_[static_cast<uint32_t>(slot_tags_[piece.slot])];
    batch_tags_.push_back(slot_tags_[piece.slot]);
    latest = std::max(latest, request.deadline_ns);
    if (request.formed_ns == 0) {
      request.formed_ns = formed;
      max_wait_ns_[request.low] = std::max(max_wait_ns_[request.low], formed - request.received_ns);
    }
    uint32_t row = row_at(request, piece.first_row);
    for (uint32_t r = 0; r < piece.rows; ++r, ++n) {
      std::copy_n(&rows_[row * n_features_], n_features_, &batch_rows_[n * n_features_]);
      if (r + 1 < piece.rows) row = next_row_[row];
    }
  }
  breaker_.started(formed, lane_.run_time().predict(n));
  meter_.run_began(formed);
  const bool waits = on_executor && !may_run();
  if (waits) work_.wait(lock, [this] { return may_run(); });
  const int64_t started = mono_ns();
  // The thread may have stood still since the batch was formed: no run for those who all would get their
  // answer too late, or have it.
  if (started >= latest || (waits && !anybody_waits())) {
    const bool opened = breaker_.finished(started, true).opened;
    meter_.ran(started, started);
    lane_.finish(batch_, started, started, true, false);
    report_ended();
    if (opened) trip(started);
    return;
  }
  ++batches_[n];
  ++(on_executor ? executor_runs_ : inline_runs_);
  lock.unlock();
  Status status = model_->run(batch_rows_.data(), n, batch_scores_.data());
  const bool run_ok = status.is_ok();
  const int64_t finished = mono_ns();
  lock.lock();
  run_.add(finished - started);
  meter_.ran(started, finished);
  size_t from = 0;
  for (size_t p = 0; p < batch_.size(); ++p) {
    const Piece& piece = batch_[p];
    Request* request = find(batch_tags_[p]);
    if (request != nullptr && request->state == State::kQueued) {
      request->run_ns += finished - started;
      request->finished_ns = finished;
      uint32_t row = row_at(*request, piece.first_row);
      for (uint32_t r = 0; r < piece.rows; ++r) {
        const double* scores = &batch_scores_[(from + r) * n_outputs_];
        std::copy_n(scores, n_outputs_, &scores_[row * n_outputs_]);
        if (may_lack_scores_ &&
            !std::all_of(scores, scores + n_outputs_, [](double s) { return std::isfinite(s); }))
          request->no_score = true;
        if (r + 1 < piece.rows) row = next_row_[row];
      }
      if (edge_ != nullptr && run_ok && !request->no_score) edge_fill(*request, piece, finished);
    }
    from += piece.rows;
  }
  const Breaker::Outcome outcome = breaker_.finished(finished, run_ok);
  if (edge_ != nullptr && !outcome.hung) edge_learn(finished - started, n);
  if (!run_ok) run_failure_ = std::move(status);
  lane_.finish(batch_, started, finished, run_ok, !outcome.hung);
  report_ended();
  if (outcome.opened && !stopping_) trip(finished);
  if (!breaker_.closed()) work_.notify_one();  // the executor probes
}

// A batch of zeros that nobody waits for: does the model answer again? Nothing else runs meanwhile, since
// nothing is admitted while the breaker is not closed.
void ServedModel::probe(std::unique_lock<std::mutex>& lock) {
  const size_t n = config_.lane.policy.max_batch_rows;
  breaker_.probe();
  breaker_.started(mono_ns(), lane_.run_time().predict(n));
  std::fill(batch_rows_.begin(), batch_rows_.end(), 0.0f);
  work_.wait(lock, [this] { return may_run(); });
  lock.unlock();
  const int64_t started = mono_ns();
  const Status status = model_->run(batch_rows_.data(), n, batch_scores_.data());
  const int64_t finished = mono_ns();
  lock.lock();
  const bool hung = breaker_.finished(finished, status.is_ok()).hung;
  if (status.is_ok() && !hung) lane_.record_run(n, finished - started);
}

void ServedModel::pump() {
  std::unique_lock lock(mutex_);
  InlineBudget budget(config_.inline_limit_ns);
  while (lane_.queued_rows() > 0 && lane_.running_batches() == 0 && !stopping_) {
    const size_t rows = std::min<size_t>(lane_.queued_rows(), config_.lane.policy.max_batch_rows);
    if (!budget.take(lane_.run_time().predict(rows)) || !inline_ok()) {
      work_.notify_one();
      return;
    }
    run_batch(lock, false);
  }
}

bool ServedModel::pump_full() {
  std::unique_lock lock(mutex_);
  const size_t full = config_.lane.policy.max_batch_rows;
  const InlineBudget budget(config_.inline_limit_ns);
  bool ran = false;
  while (lane_.queued_rows() >= full && lane_.running_batches() == 0 && !stopping_ && inline_ok() &&
         budget.is_cheap(lane_.run_time().predict(full))) {
    run_batch(lock, false);
    ran = true;
  }
  return ran;
}

bool ServedModel::inline_ok() const {
  return !held_ && model_->inline_ok() && (edge_ == nullptr || !edge_->precomputing);
}

// Returns what a detached executor must let go last.
std::shared_ptr<ServedModel> ServedModel::executor() {
  std::unique_lock lock(mutex_);
  const auto has_work = [this] {
    return stopping_ || (lane_.queued_rows() > 0 && lane_.running_batches() == 0);
  };
  while (!stopping_) {
    const int64_t probe_at = breaker_.probe_at_ns();
    if (probe_at == Breaker::kNever) {
      work_.wait(lock, [&] { return has_work() || breaker_.probe_at_ns() != Breaker::kNever; });
    } else {
      work_.wait_until(lock, std::chrono::steady_clock::time_point(std::chrono::nanoseconds(probe_at)),
                       has_work);
    }
    if (stopping_) break;
    if (mono_ns() >= breaker_.probe_at_ns()) {
      probe(lock);
    } else if (has_work()) {
      run_batch(lock, true);
    }
  }
  executor_done_ = true;
  executor_ended_.notify_all();
  return std::move(keep_alive_);
}

void ServedModel::hold_for_test(bool held) {
  {
    const std::lock_guard lock(mutex_);
    held_ = held;
  }
  work_.notify_all();
}

}  // namespace penstock
