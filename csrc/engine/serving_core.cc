#include "engine/serving_core.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>

namespace penstock {
namespace {

int64_t wall_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

wire::Cursor cursor_of(std::string_view bytes) {
  const auto* p = reinterpret_cast<const uint8_t*>(bytes.data());
  return {p, p + bytes.size()};
}

std::string_view bytes_of(const wire::Cursor& cursor) {
  return {reinterpret_cast<const char*>(cursor.position()),
          static_cast<size_t>(cursor.end() - cursor.position())};
}

const Status kDraining{Code::kUnavailable, "the server is shutting down"};

}  // namespace

void Connection::refuse(uint32_t msgid, const Status& status, int64_t retry_after_ms) {
  session_.finish(msgid);
  (void)encode_error(msgid, status, is_retryable(status.code), retry_after_ms);
}

// A request that gets no answer at all would wait for ever: without room for the error the connection ends.
bool Connection::encode_error(std::optional<uint32_t> msgid, const Status& status, bool retryable,
                              int64_t retry_after_ms) {
  if (!wire::encode_error(session_.out(), msgid, status, retryable, retry_after_ms)) overflowed_ = true;
  return !overflowed_;
}

void Connection::received(size_t n, std::vector<Call>* others) {
  if (core_ == nullptr || overflowed_) return;
  ServingCore& core = *core_;
  const int64_t received_ns = mono_ns();
  const int64_t now_us = wall_us();
  session_.advance(n);
  core.begin_read();
  core.reading_ = this;
  struct EndOfRead {  // however the read ends, also by an exception, the next completion must wake the loop
    ServingCore& core;
    ~EndOfRead() {
      core.reading_ = nullptr;
      core.end_read();
    }
  } end_of_read{core};
  std::shared_ptr<ServedModel> model;  // of the last call; most reads ask one model
  wire::Message message;
  while (!overflowed_ && session_.next_message(&message)) {
    const uint32_t msgid = message.msgid;
    if (message.kind == wire::MessageKind::kOther) {
      others->push_back({msgid, std::string(message.method), std::string(bytes_of(message.params))});
      continue;
    }
    if (message.kind == wire::MessageKind::kBad) {
      (void)encode_error(message.has_msgid ? std::optional<uint32_t>(msgid) : std::nullopt, message.status,
                         is_retryable(message.status.code),
                         message.status.code == Code::kResourceExhausted ? 1 : -1);
      continue;
    }
    if (message.kind == wire::MessageKind::kCancel) {
      for (const auto& live : core.all_models()) {
        if (live->cancel(id_, msgid)) break;
      }
      continue;
    }
    const bool vectors = message.kind == wire::MessageKind::kPredictVectors;
    if (!vectors && message.kind != wire::MessageKind::kPredict) continue;
    Status status = vectors ? wire::decode_predict_vectors(message.params, &core.vectors_call_)
                            : wire::decode_predict(message.params, &core.predict_call_);
    const std::string_view name = vectors ? core.vectors_call_.model : core.predict_call_.model;
    int64_t retry_after_ms = -1;
    if (status.is_ok() && core.draining_.load(std::memory_order_relaxed)) status = kDraining;
    if (status.is_ok() && (model == nullptr || model->config().name != name)) {
      if (model != nullptr) model->pump();
      model = core.find(name);
      if (model == nullptr) status = core.unknown_model(name);
    }
    if (status.is_ok()) {
      uint64_t tag;
      const Target target{id_, msgid, nullptr};
      const uint64_t first_id = core.next_ids(vectors ? core.vectors_call_.rows : core.predict_call_.rows);
      status = vectors ? model->predict_vectors(core.vectors_call_, target, received_ns, now_us, first_id,
                                                core.scratch_, &retry_after_ms, &tag)
                       : model->predict(core.predict_call_, bytes_of(message.params), target, received_ns,
                                        now_us, first_id, core.scratch_, &retry_after_ms, &tag);
    }
    if (!status.is_ok()) refuse(msgid, status, retry_after_ms);
  }
  if (model != nullptr) model->pump();
  core.deliver_ended();
}

bool Connection::reply(uint32_t msgid, std::string_view result) {
  if (!session_.finish(msgid)) return false;
  wire::Writer& out = session_.out();
  const bool retryable = out.size() > 0;  // alone in the buffer it would not fit either
  if (wire::encode_raw_result(out, msgid, result)) return true;
  const Status full{Code::kResourceExhausted, "the result does not fit the connection's output buffer"};
  (void)encode_error(msgid, full, retryable, -1);
  return false;
}

bool Connection::reply_error(uint32_t msgid, const Status& status, bool retryable, int64_t retry_after_ms) {
  return session_.finish(msgid) && encode_error(msgid, status, retryable, retry_after_ms);
}

void Connection::drop() {
  if (core_ == nullptr) return;
  ServingCore* core = std::exchange(core_, nullptr);
  core->connections_.erase(id_);
  if (session_.in_flight() == 0) return;
  for (const auto& model : core->all_models()) model->drop(id_);
}

ServingCore::ServingCore(uint32_t worker, uint32_t cache_owner)
    : cache_owner_(cache_owner),
      event_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      // Ids keep rising over restarts: nanoseconds pass faster than requests come. Those of two workers are
      // four years apart.
      next_id_(static_cast<uint64_t>(wall_us()) * 1000 + (uint64_t{worker % kMaxWorkers} << 57)) {}

ServingCore::~ServingCore() {
  close();
  for (const auto& [id, connection] : connections_) connection->core_ = nullptr;
  if (event_fd_ >= 0) ::close(event_fd_);
}

std::shared_ptr<ServedModel> ServingCore::publish(std::shared_ptr<ServedModel> model) {
  const std::lock_guard lock(models_mutex_);
  std::swap(models_[model->config().name], model);
  if (model != nullptr) replaced_.push_back(model);
  return model;
}

std::shared_ptr<ServedModel> ServingCore::retire(const std::string& name) {
  const std::lock_guard lock(models_mutex_);
  const auto at = models_.find(name);
  if (at == models_.end()) return nullptr;
  auto model = std::move(at->second);
  models_.erase(at);
  replaced_.push_back(model);
  return model;
}

std::vector<std::shared_ptr<ServedModel>> ServingCore::all_models() {
  const std::lock_guard lock(models_mutex_);
  std::vector<std::shared_ptr<ServedModel>> all;
  for (const auto& [name, model] : models_) all.push_back(model);
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
  return at == models_.end() ? nullptr : at->second;
}

std::vector<std::shared_ptr<ServedModel>> ServingCore::models() {
  const std::lock_guard lock(models_mutex_);
  std::vector<std::shared_ptr<ServedModel>> all;
  for (const auto& [name, model] : models_) all.push_back(model);
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

void ServingCore::signal() {
  const uint64_t one = 1;
  (void)!::write(event_fd_, &one, sizeof one);
}

void ServingCore::begin_read() {
  const std::lock_guard lock(ended_mutex_);
  signalled_ = true;
}

void ServingCore::end_read() {
  const std::lock_guard lock(ended_mutex_);
  signalled_ = !ended_.empty() || !delivering_.empty() || !dirty_.empty();
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
      const bool had_output = out.size() > 0;
      if (result_.status.is_ok()) {
        const wire::Timing timings[] = {
            {"queue", result_.queue_ns}, {"run", result_.run_ns}, {"total", result_.total_ns}};
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
      if (!had_output && &connection != reading_) dirty_.push_back(connection.id());
    }
    delivering_.clear();
  }
}

std::vector<uint64_t> ServingCore::take_dirty() {
  return std::exchange(dirty_, {});
}

std::vector<uint64_t> ServingCore::wake() {
  uint64_t count;
  (void)!::read(event_fd_, &count, sizeof count);
  deliver_ended();
  return take_dirty();
}

std::vector<uint64_t> ServingCore::expire() {
  begin_read();
  const int64_t now = mono_ns();
  for (const auto& model : all_models()) model->expire(now);
  deliver_ended();
  return take_dirty();
}

int64_t ServingCore::next_deadline() {
  int64_t next = std::numeric_limits<int64_t>::max();
  const std::lock_guard lock(models_mutex_);
  for (const auto& [name, model] : models_) next = std::min(next, model->next_deadline());
  for (const auto& model : replaced_) next = std::min(next, model->next_deadline());
  return next;
}

Status ServingCore::begin_local(bool vectors, std::string_view params, ServedModel::Scratch& scratch,
                                LocalCall* call) {
  const int64_t received_ns = mono_ns();
  const int64_t now_us = wall_us();
  thread_local wire::PredictCall predict_call;
  wire::VectorsCall vectors_call;
  Status status = vectors ? wire::decode_predict_vectors(cursor_of(params), &vectors_call)
                          : wire::decode_predict(cursor_of(params), &predict_call);
  if (!status.is_ok()) return status;
  if (draining_.load(std::memory_order_relaxed)) return kDraining;
  const std::string_view name = vectors ? vectors_call.model : predict_call.model;
  call->model = find(name);
  if (call->model == nullptr) return unknown_model(name);
  const Target target{0, 0, &call->waiter};
  const uint64_t first_id = next_ids(vectors ? vectors_call.rows : predict_call.rows);
  status = vectors ? call->model->predict_vectors(vectors_call, target, received_ns, now_us, first_id,
                                                  scratch, &call->retry_after_ms, &call->tag)
                   : call->model->predict(predict_call, params, target, received_ns, now_us, first_id,
                                          scratch, &call->retry_after_ms, &call->tag);
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
