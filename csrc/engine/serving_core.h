// The live models by name, the connections, and the ways between them: replies of ended requests to their
// connections, misses of parked requests to the loader.
//
// Threads: connections, received(), wake() and expire() belong to the loop thread. call_local(), publishing,
// stats and the loader's calls may come from any thread. Ended requests of connections are queued and one
// eventfd write wakes the loop, unless a wake is pending already or the loop is in received() and will look
// itself. Lock order: models_mutex_, a model's lock, then ended_mutex_ or miss_mutex_.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/miss_batch.h"
#include "engine/served_model.h"
#include "wire/session.h"

namespace penstock {

class ServingCore;

// One peer's session. Loop thread only.
class Connection {
 public:
  Connection(ServingCore* core, uint64_t id, const wire::SessionLimits& limits)
      : core_(core), id_(id), max_output_bytes_(limits.max_output_bytes), session_(limits) {}
  ~Connection() { drop(); }

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
  // Answer a request that received() returned; false if it is not in flight or the output is full. A result
  // that does not fit is answered RESOURCE_EXHAUSTED.
  bool reply(uint32_t msgid, std::string_view result);
  bool reply_error(uint32_t msgid, const Status& status, bool retryable, int64_t retry_after_ms);
  // The peer is gone. Its requests are cancelled and nothing is sent.
  void drop();
  bool dropped() const { return core_ == nullptr; }
  // Flush, then hang up: the framing is broken, or a request could not even be refused for want of room.
  bool closed() const { return session_.closed() || overflowed_; }

 private:
  friend class ServingCore;
  void refuse(uint32_t msgid, const Status& status, int64_t retry_after_ms);
  bool encode_error(std::optional<uint32_t> msgid, const Status& status, bool retryable,
                    int64_t retry_after_ms);

  ServingCore* core_;
  const uint64_t id_;
  const size_t max_output_bytes_;
  wire::Session session_;
  bool overflowed_ = false;
};

class ServingCore : public ModelEvents {
 public:
  static constexpr uint32_t kMaxWorkers = 64;

  // worker: index of this process among those that serve together, below kMaxWorkers; their request ids are
  // apart. cache_owner: its number as a writer of the feature caches.
  explicit ServingCore(uint32_t worker = 0, uint32_t cache_owner = 0);
  ~ServingCore() override;
  ServingCore(const ServingCore&) = delete;
  ServingCore& operator=(const ServingCore&) = delete;

  // The model answers to its name from now on. The version before it is returned, still running, or null.
  std::shared_ptr<ServedModel> publish(std::shared_ptr<ServedModel> model);
  std::shared_ptr<ServedModel> retire(const std::string& name);
  std::shared_ptr<ServedModel> find(std::string_view name);
  std::vector<std::shared_ptr<ServedModel>> models();
  // The live ones and those replaced that somebody holds or that have unanswered requests.
  std::vector<std::shared_ptr<ServedModel>> all_models();
  Status unknown_model(std::string_view name);

  std::unique_ptr<Connection> connect(const wire::SessionLimits& limits);
  int event_fd() const { return event_fd_; }
  // Writes the replies of ended requests into their connections; the ids of connections with new output.
  std::vector<uint64_t> wake();
  // Answers what is due, then as wake().
  std::vector<uint64_t> expire();
  int64_t next_deadline();
  // New predict calls are UNAVAILABLE from now on.
  void drain() { draining_.store(true, std::memory_order_relaxed); }

  // A call on the caller's thread. Until wait_local() has returned the waiter must stay where it is.
  struct LocalCall {
    std::shared_ptr<ServedModel> model;
    Waiter waiter;
    uint64_t tag = 0;
    int64_t retry_after_ms = -1;
  };
  Status begin_local(bool vectors, std::string_view params, ServedModel::Scratch& scratch, LocalCall* call);

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
  void begin_read();
  void end_read();
  void deliver_ended();
  void signal();
  std::vector<uint64_t> take_dirty();

  std::mutex models_mutex_;
  std::unordered_map<std::string, std::shared_ptr<ServedModel>, Hash, std::equal_to<>> models_;
  std::vector<std::shared_ptr<ServedModel>> replaced_;  // each until nobody else has it and all is answered

  const uint32_t cache_owner_;
  int event_fd_;
  std::mutex ended_mutex_;
  std::vector<EndedRequest> ended_;
  bool signalled_ = false;                // a wake is pending, or the loop will look by itself
  std::vector<EndedRequest> delivering_;  // loop thread
  std::unordered_map<uint64_t, Connection*> connections_;  // loop thread
  std::vector<uint64_t> dirty_;                            // loop thread
  Connection* reading_ = nullptr;                          // loop thread
  uint64_t last_connection_ = 0;

  std::mutex miss_mutex_;
  std::condition_variable miss_ready_;
  std::vector<MissTag> missed_;
  bool closed_ = false;

  std::atomic<bool> draining_{false};  // no partner: a late view of it only serves one call more
  std::atomic<uint64_t> next_id_;      // no partner: only distinctness matters
  // Of the loop thread.
  wire::PredictCall predict_call_;
  wire::VectorsCall vectors_call_;
  ServedModel::Scratch scratch_;
  Result result_;
};

}  // namespace penstock
