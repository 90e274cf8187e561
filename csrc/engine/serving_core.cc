#include "engine/serving_core.h"

#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>

namespace penstock {
namespace {

wire::Cursor cursor_of(std::string_view bytes) {
  const auto* p = reinterpret_cast<const uint8_t*>(bytes.data());
  return {p, p + bytes.size()};
}

const Status kDraining{Code::kUnavailable, "the server is shutting down"};

}  // namespace

ServingCore::ServingCore(uint32_t worker, uint32_t cache_owner)
    : cache_owner_(cache_owner),
      event_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      timer_fd_(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)),
      // Ids keep rising over restarts: nanoseconds pass faster than requests come. Those of two workers are
      // four years apart.
      next_id_(static_cast<uint64_t>(wall_clock_us()) * 1000 + (uint64_t{worker % kMaxWorkers} << 57)) {
  // What a turn of the loop usually needs, so that nothing grows later.
  constexpr size_t kTurn = 4096;
  ended_.reserve(kTurn);
  delivering_.reserve(kTurn);
  dirty_.reserve(kTurn);
  to_look_.reserve(kTurn);
  touched_.reserve(64);
}

ServingCore::~ServingCore() {
  close();
  for (const auto& [id, connection] : connections_) connection->core_ = nullptr;
  if (event_fd_ >= 0) ::close(event_fd_);
  if (timer_fd_ >= 0) ::close(timer_fd_);
}

std::shared_ptr<ServedModel> ServingCore::publish(std::shared_ptr<ServedModel> model) {
  const std::lock_guard lock(models_mutex_);
  Route& route = models_[model->config().name];
  const bool same = route.champion == model;
  std::swap(route.champion, model);
  if (model != nullptr) replaced_.push_back(model);
  if (!same && route.trial.model != nullptr) {
    replaced_.push_back(std::move(route.trial.model));
    route.trial = {};
  }
  return model;
}

std::shared_ptr<ServedModel> ServingCore::retire(const std::string& name) {
  const std::lock_guard lock(models_mutex_);
  const auto at = models_.find(name);
  if (at == models_.end()) return nullptr;
  auto model = std::move(at->second.champion);
  if (at->second.trial.model != nullptr) replaced_.push_back(std::move(at->second.trial.model));
  models_.erase(at);
  replaced_.push_back(model);
  return model;
}

std::vector<std::shared_ptr<ServedModel>> ServingCore::all_models() {
  const std::lock_guard lock(models_mutex_);
  std::vector<std::shared_ptr<ServedModel>> all;
  for (const auto& [name, route] : models_) {
    all.push_back(route.champion);
    if (route.trial.model != nullptr) all.push_back(route.trial.model);
  }
  std::erase_if(replaced_, [&](const auto& model) {
    if (std::find(all.begin(), all.end(), model) != all.end()) return true;  // live again, or listed twice
    all.push_back(model);
    // This reference and the one in `all`, which the caller drops without the lock.
    return model.use_count() == 2 && model->idle();
  });
  return all;
}

std::shared_ptr<ServedModel> ServingCore::find(std::string_view name) {
  const std::lock_guard lock(models_mutex_);
  const auto at = models_.find(name);
  return at == models_.end() ? nullptr : at->second.champion;
}

bool ServingCore::find(std::string_view name, Route* route) {
  const std::lock_guard lock(models_mutex_);
  const auto at = models_.find(name);
  *route = at == models_.end() ? Route{} : at->second;
  return at != models_.end();
}

Status ServingCore::put_on_trial(const std::string& name, Trial trial) {
  {
    const std::lock_guard lock(models_mutex_);
    const auto at = models_.find(name);
    if (at != models_.end()) {
      if (Status status = may_try(*at->second.champion, trial); !status.is_ok()) return status;
      std::swap(at->second.trial, trial);
      if (trial.model != nullptr) replaced_.push_back(std::move(trial.model));
      return {};
    }
  }
  return unknown_model(name);
}

// A trial that ended meanwhile takes no rows.
std::shared_ptr<ServedModel> ServingCore::shadow_rows(const ServedModel& answered_by, const Result& result) {
  Route route;
  if (!find(answered_by.config().name, &route)) return nullptr;
  std::shared_ptr<ServedModel> model = std::move(route.trial.model);
  if (model == nullptr || route.trial.mode != TrialMode::kShadow || !same_inputs(answered_by, *model))
    return nullptr;
  model->shadow(result);
  return model;
}

std::vector<std::shared_ptr<ServedModel>> ServingCore::models() {
  const std::lock_guard lock(models_mutex_);
  std::vector<std::shared_ptr<ServedModel>> all;
  for (const auto& [name, route] : models_) all.push_back(route.champion);
  return all;
}

Status ServingCore::unknown_model(std::string_view name) {
  std::string known;
  for (const auto& model : models()) known += (known.empty() ? "" : ", ") + model->config().name;
  return Status::not_found("model '" + std::string(name) +
                           "' is unknown; expected one of: " + (known.empty() ? "none is loaded" : known));
}

std::unique_ptr<Connection> ServingCore::connect(const wire::SessionLimits& limits) {
  auto connection = std::make_unique<Connection>(this, ++last_connection_, limits);
  connections_[connection->id()] = connection.get();
  return connection;
}

void ServingCore::ended(const std::shared_ptr<ServedModel>& model, uint64_t tag, uint64_t connection) {
  const std::lock_guard lock(ended_mutex_);
  ended_.push_back({model, tag, connection});
  if (signalled_) return;
  signalled_ = true;
  signal();
}

// Under ended_mutex_.
void ServingCore::signal() {
  if (written_) return;
  written_ = true;
  const uint64_t one = 1;
  (void)!::write(event_fd_, &one, sizeof one);
}

void ServingCore::begin_read() {
  const std::lock_guard lock(ended_mutex_);
  signalled_ = true;
}

void ServingCore::end_read() {
  const std::lock_guard lock(ended_mutex_);
  signalled_ = !ended_.empty() || !delivering_.empty() || !dirty_.empty() || !touched_.empty();
  if (signalled_) signal();
}

void ServingCore::deliver_ended() {
  for (;;) {
    {
      const std::lock_guard lock(ended_mutex_);
      if (ended_.empty()) {
        signalled_ = false;
        return;
      }
      std::swap(ended_, delivering_);
    }
    for (const auto& [model, tag, id] : delivering_) {
      const auto at = connections_.find(id);
      if (at == connections_.end() || at->second->overflowed_) {
        model->abandon(tag);
        continue;
      }
      Connection& connection = *at->second;
      wire::Writer& out = connection.session_.out();
      if (!model->take(tag, &result_, connection.max_output_bytes_ - out.size())) continue;
      const uint32_t msgid = result_.target.msgid;
      connection.session_.finish(msgid);
      if (result_.status.is_ok()) {
        const StageTimes& times = result_.times;
        const wire::Timing timings[] = {{"receive", times.receive_ns},
                                        {"gather", times.gather_ns},
                                        {"queue", times.queue_ns},
                                        {"run", times.run_ns},
                                        {"total", times.total_ns}};
        wire::ScoresReply reply;
        reply.scores = result_.scores.data();
        reply.n_rows = result_.rows;
        reply.n_outputs = static_cast<uint32_t>(model->n_outputs());
        reply.version = model->config().version;
        reply.request_ids = result_.request_ids.data();
        reply.status = result_.with_status ? result_.row_status.data() : nullptr;
        if (result_.with_timings) reply.timings = timings;
        reply.as_bin_f32 = result_.as_bin;
        if (!wire::encode_scores(out, msgid, reply)) {
          const Status full{Code::kResourceExhausted, "the connection's output buffer is full"};
          (void)connection.encode_error(msgid, full, true, -1);
        }
      } else {
        (void)connection.encode_error(msgid, result_.status, is_retryable(result_.status.code),
                                      result_.retry_after_ms);
      }
      if (&connection != reading_) mark_dirty(connection);
      if (result_.target.shadowed && result_.status.is_ok()) {
        if (const auto shadow = shadow_rows(*model, result_)) arm(shadow->next_deadline());
      }
    }
    delivering_.clear();
  }
}

// Whether this read's requests wait for the end of the loop's turn.
bool ServingCore::defers(const Connection& connection, int64_t now_ns) {
  const bool close = now_ns - last_read_ns_ < kBurstGapNs && last_reader_ != connection.id();
  last_read_ns_ = now_ns;
  last_reader_ = connection.id();
  ++reads_since_wake_;
  return connection.fd_ >= 0 && (bursting_ || close);
}

void ServingCore::touch(const std::shared_ptr<ServedModel>& model) {
  if (std::find(touched_.begin(), touched_.end(), model) == touched_.end()) touched_.push_back(model);
}

void ServingCore::pump_touched() {
  for (const auto& model : touched_) {
    model->pump();
    arm(model->next_deadline());
  }
  touched_.clear();
}

// In the midst of a read: a long one would otherwise fill memory with requests before the first is scored.
void ServingCore::run_full(ServedModel& model) {
  if (!model.pump_full()) return;
  deliver_ended();
  begin_read();
}

void ServingCore::mark_dirty(Connection& connection) {
  if (connection.dirty_) return;
  connection.dirty_ = true;
  dirty_.push_back(connection.id());
}

// Sends what the dirty connections have; the ids of those that somebody else must look after.
const std::vector<uint64_t>& ServingCore::send_dirty() {
  to_look_.clear();
  for (const uint64_t id : dirty_) {
    const auto at = connections_.find(id);
    if (at == connections_.end()) continue;
    at->second->dirty_ = false;
    if (at->second->send_output()) to_look_.push_back(id);
  }
  dirty_.clear();
  return to_look_;
}

const std::vector<uint64_t>& ServingCore::wake() {
  {
    const std::lock_guard lock(ended_mutex_);
    uint64_t count;
    if (std::exchange(written_, false)) (void)!::read(event_fd_, &count, sizeof count);
    signalled_ = true;  // what ends from here on is delivered here
  }
  if (!touched_.empty()) {
    bursting_ = reads_since_wake_ > 1;
    pump_touched();
  }
  reads_since_wake_ = 0;
  deliver_ended();
  return send_dirty();
}

const std::vector<uint64_t>& ServingCore::expire() {
  uint64_t count;
  (void)!::read(timer_fd_, &count, sizeof count);
  begin_read();
  const int64_t now = mono_ns();
  for (const auto& model : all_models()) model->expire(now);
  deliver_ended();
  armed_ns_ = std::numeric_limits<int64_t>::max();
  arm(next_deadline());
  return send_dirty();
}

// Sets the one timer, unless it fires by then anyway. An early call of expire() finds nothing due and arms it
// for what is next.
void ServingCore::arm(int64_t deadline_ns) {
  if (deadline_ns >= armed_ns_) return;
  armed_ns_ = deadline_ns;
  const int64_t at = std::max<int64_t>(deadline_ns, 1);  // 0 would disarm it
  const itimerspec when{{0, 0}, {at / 1'000'000'000, at % 1'000'000'000}};
  (void)timerfd_settime(timer_fd_, TFD_TIMER_ABSTIME, &when, nullptr);
}

int64_t ServingCore::next_deadline() {
  int64_t next = std::numeric_limits<int64_t>::max();
  const std::lock_guard lock(models_mutex_);
  for (const auto& [name, route] : models_) {
    next = std::min(next, route.champion->next_deadline());
    if (route.trial.model != nullptr) next = std::min(next, route.trial.model->next_deadline());
  }
  for (const auto& model : replaced_) next = std::min(next, model->next_deadline());
  return next;
}

ServingCore::Overdue ServingCore::overdue(int64_t now_ns, int64_t idle_ns, int64_t read_ns) const {
  Overdue found;
  for (const auto& [id, connection] : connections_) {
    const Connection& c = *connection;
    if (c.stuck_since_ns_ != 0) {
      if (now_ns - c.stuck_since_ns_ >= read_ns) found.stuck.push_back(id);
    } else if (c.session_.in_flight() == 0 && now_ns - c.last_read_ns_ >= idle_ns) {
      found.idle.push_back(id);
    }
  }
  return found;
}

Status ServingCore::begin_local(bool vectors, std::string_view params, ServedModel::Scratch& scratch,
                                LocalCall* call) {
  const int64_t received_ns = mono_ns();
  const int64_t now_us = wall_clock_us();
  thread_local wire::PredictCall predict_call;
  wire::VectorsCall vectors_call;
  Status status = vectors ? wire::decode_predict_vectors(cursor_of(params), &vectors_call)
                          : wire::decode_predict(cursor_of(params), &predict_call);
  if (!status.is_ok()) return status;
  if (draining_.load(std::memory_order_relaxed)) return kDraining;
  const std::string_view name = vectors ? vectors_call.model : predict_call.model;
  Route route;
  if (!find(name, &route)) return unknown_model(name);
  call->model = vectors ? route.choose(vectors_call) : route.choose(predict_call);
  const bool shadowed = vectors ? route.shadows(vectors_call) : route.shadows(predict_call);
  const Target target{0, 0, &call->waiter, shadowed};
  const uint64_t first_id = next_ids(vectors ? vectors_call.rows : predict_call.rows);
  status = vectors ? call->model->predict_vectors(vectors_call, target, received_ns, now_us, first_id,
                                                  scratch, &call->retry_after_ms, &call->tag)
                   : call->model->predict(predict_call, params, target, received_ns, now_us, first_id,
                                          scratch, &call->retry_after_ms, &call->tag);
  if (status.is_ok()) call->model->pump();
  return status;
}

Status ServingCore::begin_local(const wire::VectorsCall& vectors, ServedModel::Scratch& scratch,
                                LocalCall* call) {
  const int64_t received_ns = mono_ns();
  Route route;
  if (!find(vectors.model, &route)) return unknown_model(vectors.model);
  call->model = route.choose(vectors);
  Status status =
      call->model->predict_vectors(vectors, {0, 0, &call->waiter}, received_ns, wall_clock_us(),
                                   next_ids(vectors.rows), scratch, &call->retry_after_ms, &call->tag);
  if (status.is_ok()) call->model->pump();
  return status;
}

void ServingCore::missed(const std::shared_ptr<ServedModel>& model, uint64_t tag) {
  {
    const std::lock_guard lock(miss_mutex_);
    missed_.push_back({model, tag});
  }
  miss_ready_.notify_one();
}

void ServingCore::missed_again(std::vector<MissTag> tags) {
  if (tags.empty()) return;
  {
    const std::lock_guard lock(miss_mutex_);
    for (MissTag& tag : tags) missed_.push_back(std::move(tag));
  }
  miss_ready_.notify_one();
}

bool ServingCore::wait_misses(int64_t timeout_ns, MissBatch* batch) {
  std::vector<MissTag> tags;
  {
    std::unique_lock lock(miss_mutex_);
    miss_ready_.wait_for(lock, std::chrono::nanoseconds(timeout_ns),
                         [this] { return closed_ || !missed_.empty(); });
    if (closed_ || missed_.empty()) return false;
    std::swap(tags, missed_);
  }
  batch->collect(tags, mono_ns());
  return !batch->waiting.empty();
}

void ServingCore::finish_misses(const MissBatch& batch, const std::vector<const uint64_t*>& rows,
                                const std::vector<const RowMeta*>& meta, uint64_t stamp,
                                ServedModel::Scratch& scratch) {
  missed_again(batch.finish(rows, meta, stamp, mono_ns(), cache_owner_, scratch));
}

void ServingCore::fail_misses(const MissBatch& batch, const Status& status) {
  for (const MissBatch::Waiting& waiting : batch.waiting)
    waiting.tag.model->fail_parked(waiting.tag.tag, status);
}

void ServingCore::close() {
  {
    const std::lock_guard lock(miss_mutex_);
    closed_ = true;
  }
  miss_ready_.notify_all();
  for (const auto& model : all_models()) model->stop();
}

}  // namespace penstock
