// The live models by name, the connections, and the ways between them: replies of ended requests to their
// connections, misses of parked requests to the loader.
//
// Threads: connections, received(), wake() and expire() belong to the loop thread. call_local(), publishing,
// stats and the loader's calls may come from any thread. Ended requests of connections are queued and one
// eventfd write wakes the loop, unless a wake is pending already or the loop is in received() and will look
// itself. Lock order: models_mutex_, a model's lock, then ended_mutex_ or miss_mutex_.
//
// A read is served at once while reads come one by one. When several connections have sent something by the
// time the loop looks, what they ask waits for the end of that turn of the loop (the wake), so that it runs
// as one batch: the turn's sockets are read first, as they became readable before the eventfd did.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/miss_batch.h"
#include "engine/route.h"
#include "engine/served_model.h"
#include "wire/session.h"

namespace penstock {

class ServingCore;

// One peer's session. Loop thread only.
class Connection {
 public:
  Connection(ServingCore* core, uint64_t id, const wire::SessionLimits& limits);
  ~Connection() { drop(); }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  struct Call {
    uint32_t msgid;
    std::string method;
    std::string params;
  };

  uint64_t id() const { return id_; }
  wire::Session& session() { return session_; }
  // `n` bytes arrived in the last get_buffer(): answers what can be answered now and adds every request that
  // is not a predict call to `others`.
  void received(size_t n, std::vector<Call>* others);
  // Replies go straight to this connected socket from now on. The descriptor is duplicated: the owner of `fd`
  // may close it, and its number may be used again, before the connection hears of it. False: no descriptor
  // is free, and the caller sends as before.
  bool attach(int fd);
  // Sends what waits. Whether somebody else must look: bytes are left that the socket does not take (they
  // come with the next take_output()), the session is over, or it is watched.
  bool send_output();
  // The bytes to send, from the first that is not sent, or nothing when earlier ones are still being sent.
  std::string_view take_output();
  void output_sent();
  // From now on wake() tells of every output of this connection.
  void watch() { watched_ = true; }
  // Answer a request that received() returned; false if it is not in flight or the output is full. A result
  // that does not fit is answered RESOURCE_EXHAUSTED.
  bool reply(uint32_t msgid, std::string_view result);
  bool reply_error(uint32_t msgid, const Status& status, bool retryable, int64_t retry_after_ms);
  // The peer is gone. Its requests are cancelled and nothing is sent.
  void drop();
  bool dropped() const { return core_ == nullptr; }
  // Flush, then hang up: the framing is broken, or a request could not even be refused for want of room.
  bool closed() const { return session_.closed() || overflowed_; }

  // Predict calls are UNAUTHENTICATED from `until_us` on (wall clock; 0: at once; kForever: never, as at
  // first). While they are, received() stops after each `auth` request, which it returns as any other: the
  // caller decides on it and calls received(0) for what came behind it.
  static constexpr int64_t kForever = std::numeric_limits<int64_t>::max();
  void authorize(int64_t until_us) { authorized_until_us_ = until_us; }
  // The peer was kept waiting by us: its silence counts from now on.
  void touch();

 private:
  friend class ServingCore;
  void note_progress(int64_t now_ns, bool finished_one);
  void refuse(uint32_t msgid, const Status& status, int64_t retry_after_ms);
  bool encode_error(std::optional<uint32_t> msgid, const Status& status, bool retryable,
                    int64_t retry_after_ms);

  ServingCore* core_;
  const uint64_t id_;
  const size_t max_output_bytes_;
  wire::Session session_;
  bool overflowed_ = false;
  bool watched_ = false;
  bool dirty_ = false;  // is in the core's list of those with output
  int fd_ = -1;
  const wire::Writer* unsent_ = nullptr;  // taken from the session, sent up to sent_
  size_t sent_ = 0;
  int64_t authorized_until_us_ = kForever;
  int64_t last_read_ns_;
  // Since when the unfinished message at the end of the input makes no progress; 0 where there is none.
  int64_t stuck_since_ns_ = 0;
  size_t stuck_bytes_ = 0;  // that it had then
};

class ServingCore : public ModelEvents {
 public:
  // The versions that answer to a name.
  struct Route {
    std::shared_ptr<ServedModel> champion;
    Trial trial;  // of a version, or without one

    template <class Call>
    const std::shared_ptr<ServedModel>& choose(const Call& call) const {
      const bool canary = trial.model != nullptr && trial.mode == TrialMode::kCanary;
      return canary && takes_part(trial, call) ? trial.model : champion;
    }
    // Whether a shadow is to score the call's rows too.
    template <class Call>
    bool shadows(const Call& call) const {
      return trial.model != nullptr && trial.mode == TrialMode::kShadow && takes_part(trial, call);
    }
  };

  static constexpr uint32_t kMaxWorkers = 64;

  // worker: index of this process among those that serve together, below kMaxWorkers; their request ids are
  // apart. cache_owner: its number as a writer of the feature caches.
  explicit ServingCore(uint32_t worker = 0, uint32_t cache_owner = 0);
  ~ServingCore() override;
  ServingCore(const ServingCore&) = delete;
  ServingCore& operator=(const ServingCore&) = delete;

  // The model answers to its name from now on. The version before it is returned, still running, or null. A
  // trial compares a version with the live one: another live one ends it.
  std::shared_ptr<ServedModel> publish(std::shared_ptr<ServedModel> model);
  // Puts a version on trial beside the live one of its name, in place of the one before it; a trial without a
  // model ends it. NOT_FOUND: no version of that name is live. FAILED_PRECONDITION: a shadow that takes other
  // inputs than the live one, or the live one itself.
  Status put_on_trial(const std::string& name, Trial trial);
  std::shared_ptr<ServedModel> retire(const std::string& name);
  std::shared_ptr<ServedModel> find(std::string_view name);
  bool find(std::string_view name, Route* route);
  std::vector<std::shared_ptr<ServedModel>> models();
  // The live ones and those replaced that somebody holds or that have unanswered requests.
  std::vector<std::shared_ptr<ServedModel>> all_models();
  Status unknown_model(std::string_view name);

  std::unique_ptr<Connection> connect(const wire::SessionLimits& limits);
  int event_fd() const { return event_fd_; }  // readable: wake() is due
  int timer_fd() const { return timer_fd_; }  // readable: expire() is due
  // Runs what reads left for the end of the turn, encodes the replies of ended requests and sends them. The
  // ids of connections whose output somebody else must look after; valid until the next call.
  const std::vector<uint64_t>& wake();
  // Answers what is due, then as wake().
  const std::vector<uint64_t>& expire();
  // Connections that sent nothing for `idle_ns` and wait for nothing, and those whose unfinished message grew
  // by less than kProgressBytes in `read_ns`.
  struct Overdue {
    std::vector<uint64_t> idle, stuck;
  };
  static constexpr size_t kProgressBytes = size_t{64} << 10;
  Overdue overdue(int64_t now_ns, int64_t idle_ns, int64_t read_ns) const;
  // Predict calls refused for want of a token. Any thread.
  uint64_t unauthenticated() const { return unauthenticated_.load(std::memory_order_relaxed); }
  // New predict calls are UNAVAILABLE from now on.
  void drain() { draining_.store(true, std::memory_order_relaxed); }

  // A call on the caller's thread. Until wait_local() has returned the waiter must stay where it is.
  struct LocalCall {
    std::shared_ptr<ServedModel> model;
    Waiter waiter;
    uint64_t tag = 0;
    int64_t retry_after_ms = -1;
  };
  // What begin_local() began was taken with this result: its rows go to the shadow that wants them.
  void shadow(const ServedModel& answered_by, const Result& result) {
    if (result.target.shadowed && result.status.is_ok()) (void)shadow_rows(answered_by, result);
  }
  Status begin_local(bool vectors, std::string_view params, ServedModel::Scratch& scratch, LocalCall* call);
  // Of a caller who needs no decoding; `vectors` may go when this has returned.
  Status begin_local(const wire::VectorsCall& vectors, ServedModel::Scratch& scratch, LocalCall* call);

  // The loader: waits up to timeout_ns for misses; false when there are none or the core is closed.
  bool wait_misses(int64_t timeout_ns, MissBatch* batch);
  // rows[v], meta[v]: a row for each key of view v.
  void finish_misses(const MissBatch& batch, const std::vector<const uint64_t*>& rows,
                     const std::vector<const RowMeta*>& meta, uint64_t stamp, ServedModel::Scratch& scratch);
  void fail_misses(const MissBatch& batch, const Status& status);

  // Stops every model. Connections may still be dropped afterwards.
  void close();

  void ended(const std::shared_ptr<ServedModel>& model, uint64_t tag, uint64_t connection) override;
  void missed(const std::shared_ptr<ServedModel>& model, uint64_t tag) override;

 private:
  friend class Connection;
  struct EndedRequest {
    std::shared_ptr<ServedModel> model;
    uint64_t tag;
    uint64_t connection;
  };

  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };

  void missed_again(std::vector<MissTag> tags);
  uint64_t next_ids(uint32_t rows) { return next_id_.fetch_add(rows, std::memory_order_relaxed); }
  static constexpr int64_t kBurstGapNs = 30'000;  // reads of two connections this close are one burst

  void begin_read();
  void end_read();
  bool defers(const Connection& connection, int64_t now_ns);
  void touch(const std::shared_ptr<ServedModel>& model);
  void pump_touched();
  void run_full(ServedModel& model);
  void deliver_ended();
  std::shared_ptr<ServedModel> shadow_rows(const ServedModel& answered_by, const Result& result);
  void mark_dirty(Connection& connection);
  const std::vector<uint64_t>& send_dirty();
  void arm(int64_t deadline_ns);
  int64_t next_deadline();
  void signal();

  std::mutex models_mutex_;
  std::unordered_map<std::string, Route, Hash, std::equal_to<>> models_;
  std::vector<std::shared_ptr<ServedModel>> replaced_;  // each until nobody else has it and all is answered

  const uint32_t cache_owner_;
  int event_fd_;
  int timer_fd_;
  std::mutex ended_mutex_;
  std::vector<EndedRequest> ended_;
  bool signalled_ = false;                // a wake is pending, or the loop will look by itself
  bool written_ = false;                  // the eventfd is readable
  std::vector<EndedRequest> delivering_;  // loop thread
  std::unordered_map<uint64_t, Connection*> connections_;  // loop thread
  // Of the loop thread.
  std::vector<uint64_t> dirty_;                        // connections with output that is not looked after yet
  std::vector<uint64_t> to_look_;                      // what wake() returned
  std::vector<std::shared_ptr<ServedModel>> touched_;  // models with requests that wait to be pumped
  Connection* reading_ = nullptr;
  uint64_t last_connection_ = 0;
  int64_t last_read_ns_ = 0;
  uint64_t last_reader_ = 0;
  uint32_t reads_since_wake_ = 0;
  bool bursting_ = false;
  int64_t armed_ns_ = std::numeric_limits<int64_t>::max();  // when the timer fires

  std::mutex miss_mutex_;
  std::condition_variable miss_ready_;
  std::vector<MissTag> missed_;
  bool closed_ = false;

  std::atomic<bool> draining_{false};         // no partner: a late view of it only serves one call more
  std::atomic<uint64_t> next_id_;             // no partner: only distinctness matters
  std::atomic<uint64_t> unauthenticated_{0};  // no partner: a count
  // Of the loop thread.
  wire::PredictCall predict_call_;
  wire::VectorsCall vectors_call_;
  ServedModel::Scratch scratch_;
  Result result_;
};

}  // namespace penstock
