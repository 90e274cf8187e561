// The session of one peer: what its reads ask, and the bytes that go back.
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "engine/serving_core.h"

namespace penstock {
namespace {

std::string_view bytes_of(const wire::Cursor& cursor) {
  return {reinterpret_cast<const char*>(cursor.position()),
          static_cast<size_t>(cursor.end() - cursor.position())};
}

const Status kDraining{Code::kUnavailable, "the server is shutting down"};
const Status kUnauthenticated{Code::kUnauthenticated,
                              "no valid token was given; expected auth first on the connection"};

}  // namespace

Connection::Connection(ServingCore* core, uint64_t id, const wire::SessionLimits& limits)
    : core_(core),
      id_(id),
      max_output_bytes_(limits.max_output_bytes),
      session_(limits),
      last_read_ns_(mono_ns()) {}

void Connection::touch() {
  last_read_ns_ = mono_ns();
  if (stuck_since_ns_ != 0) stuck_since_ns_ = last_read_ns_;
}

void Connection::note_progress(int64_t now_ns, bool finished_one) {
  const size_t unfinished = session_.unfinished_bytes();
  if (unfinished == 0) {
    stuck_since_ns_ = 0;
  } else if (finished_one || stuck_since_ns_ == 0 ||
             unfinished - stuck_bytes_ >= ServingCore::kProgressBytes) {
    stuck_since_ns_ = now_ns;
    stuck_bytes_ = unfinished;
  }
}

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
  const int64_t now_us = wall_clock_us();
  const bool authorized = now_us < authorized_until_us_;
  bool finished_one = false;
  last_read_ns_ = received_ns;
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
  const bool deferred = core.defers(*this, received_ns);
  ServingCore::Route route;  // of the last call; most reads ask one model
  size_t rows = 0;           // admitted since full batches were looked for
  wire::Message message;
  while (!overflowed_ && session_.next_message(&message)) {
    const uint32_t msgid = message.msgid;
    finished_one = true;
    if (message.kind == wire::MessageKind::kOther) {
      others->push_back({msgid, std::string(message.method), std::string(bytes_of(message.params))});
      if (!authorized && message.method == "auth") break;
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
    if (!authorized) {
      core.unauthenticated_.fetch_add(1, std::memory_order_relaxed);
      refuse(msgid, kUnauthenticated, -1);
      continue;
    }
    Status status = vectors ? wire::decode_predict_vectors(message.params, &core.vectors_call_)
                            : wire::decode_predict(message.params, &core.predict_call_);
    const std::string_view name = vectors ? core.vectors_call_.model : core.predict_call_.model;
    int64_t retry_after_ms = -1;
    if (status.is_ok() && core.draining_.load(std::memory_order_relaxed)) status = kDraining;
    if (status.is_ok() && (route.champion == nullptr || route.champion->config().name != name)) {
      if (!core.find(name, &route)) status = core.unknown_model(name);
    }
    if (status.is_ok()) {
      const auto& model = vectors ? route.choose(core.vectors_call_) : route.choose(core.predict_call_);
      core.touch(model);
      uint64_t tag;
      const bool shadowed = vectors ? route.shadows(core.vectors_call_) : route.shadows(core.predict_call_);
      const Target target{id_, msgid, nullptr, shadowed};
      const uint32_t asked = vectors ? core.vectors_call_.rows : core.predict_call_.rows;
      const uint64_t first_id = core.next_ids(asked);
      status = vectors ? model->predict_vectors(core.vectors_call_, target, received_ns, now_us, first_id,
                                                core.scratch_, &retry_after_ms, &tag)
                       : model->predict(core.predict_call_, bytes_of(message.params), target, received_ns,
                                        now_us, first_id, core.scratch_, &retry_after_ms, &tag);
      if (status.is_ok() && (rows += asked) >= model->config().lane.policy.max_batch_rows) {
        rows = 0;
        core.run_full(*model);
      }
    }
    if (!status.is_ok()) refuse(msgid, status, retry_after_ms);
  }
  note_progress(received_ns, finished_one);
  if (!deferred) {
    core.pump_touched();
    core.deliver_ended();
  }
  const bool later = deferred && session_.out().size() > 0;  // one write at the end of the turn
  if (later || (fd_ >= 0 ? send_output() : watched_)) core.mark_dirty(*this);
}

bool Connection::attach(int fd) {
  fd_ = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
  return fd_ >= 0;
}

bool Connection::send_output() {
  while (fd_ >= 0 && !session_.sending()) {
    const wire::Writer* out = session_.take_output();
    if (out == nullptr) return closed() || watched_;
    ssize_t sent;
    do {
      sent = ::send(fd_, out->data(), out->size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    // An error is left to the transport, which meets it again and ends the connection.
    if (sent < 0 || static_cast<size_t>(sent) < out->size()) {
      unsent_ = out;
      sent_ = sent < 0 ? 0 : static_cast<size_t>(sent);
      return true;
    }
    session_.output_sent();
  }
  return true;
}

std::string_view Connection::take_output() {
  const wire::Writer* out = std::exchange(unsent_, nullptr);
  const size_t from = std::exchange(sent_, 0);
  if (out == nullptr) out = session_.take_output();
  if (out == nullptr) return {};
  return {reinterpret_cast<const char*>(out->data()) + from, out->size() - from};
}

void Connection::output_sent() {
  session_.output_sent();
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
  if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  if (core_ == nullptr) return;
  ServingCore* core = std::exchange(core_, nullptr);
  core->connections_.erase(id_);
  if (session_.in_flight() == 0) return;
  for (const auto& model : core->all_models()) model->drop(id_);
}

}  // namespace penstock
