// The way to a model that runs in a child process: one block of shared memory, and one socket as doorbell.
//
// The block holds the rows and the scores of one run; the doorbell says how many rows, the reply that the
// scores are there. The block outlives the children (a new one maps the same), each child has a socket of its
// own, and a child is attached only once the one before it is reaped: nothing of an old child is ever taken
// for a new one's.
//
// Invariants: run() returns within run_timeout, and at once when the child dies (its socket ends, or its
// pidfd says so) or the channel is closed. A child that died, hung or broke the protocol is detached by run()
// and the alarm rings; whoever watches the alarm kills, reaps and restarts it. run() allocates only when it
// fails. Threads: any. One run at a time; attach() and detach() wait for a run in progress, close() does not.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "engine/foreign_model.h"
#include "engine/score_rule.h"

namespace penstock {

class ChildChannel {
 public:
  static constexpr size_t kMaxRows = 64;
  static constexpr size_t kTextBytes = 1024;  // of an error's text

  // Packets on the socket (SOCK_SEQPACKET), native byte order.
  struct Call {
    uint32_t sequence;
    uint32_t rows;
  };
  struct Reply {
    uint32_t sequence;
    uint32_t failed;      // 0: the scores are there; else the text is
    uint32_t text_bytes;  // at most kTextBytes
  };
  // Where things lie in the block: rows float32 [64, F], scores float64 [64, width], then the text.
  static size_t scores_offset(size_t n_features) {
    return (kMaxRows * n_features * sizeof(float) + 63) & ~size_t{63};
  }
  static size_t text_offset(size_t n_features, size_t width) {
    return scores_offset(n_features) + kMaxRows * width * sizeof(double);
  }
  static size_t block_bytes(size_t n_features, size_t width) {
    return text_offset(n_features, width) + kTextBytes;
  }

  static Status create(size_t n_features, const ScoreRule& rule, int64_t run_timeout_ns,
                       std::shared_ptr<ChildChannel>* out);
  ~ChildChannel();
  ChildChannel(const ChildChannel&) = delete;
  ChildChannel& operator=(const ChildChannel&) = delete;

  size_t n_features() const { return n_features_; }
  const ScoreRule& rule() const { return rule_; }
  int memory_fd() const { return memory_fd_; }
  // Readable after a run lost the child. read_alarm() makes it unreadable again.
  int alarm_fd() const { return alarm_fd_; }
  void read_alarm();

  // A child is ready; another would be `restart_ns` after its end. Takes both descriptors over; pidfd may be
  // -1.
  void attach(int socket, int pidfd, int64_t restart_ns);
  // The child is gone, or shall go. Runs are UNAVAILABLE, for `reason`, until the next attach().
  void detach(std::string reason);
  std::string reason();  // why the last child was detached
  // What to tell callers meanwhile: another child should be ready after this.
  void expect_after(int64_t delay_ns);
  // Ends a run in progress; every later one is UNAVAILABLE.
  void close();

  Status run(const float* rows, size_t n, double* scores);
  int64_t retry_after_ms() const;

 private:
  ChildChannel(size_t n_features, const ScoreRule& rule, int64_t run_timeout_ns)
      : n_features_(n_features), rule_(rule), run_timeout_ns_(run_timeout_ns) {}
  Status lost(std::string reason);
  void drop_child();

  const size_t n_features_;
  const ScoreRule rule_;
  const int64_t run_timeout_ns_;
  int memory_fd_ = -1;
  int alarm_fd_ = -1;
  int close_fd_ = -1;  // readable for ever once closed
  uint8_t* block_ = nullptr;

  std::mutex mutex_;  // held while a run waits
  int socket_ = -1;
  int pidfd_ = -1;
  int64_t restart_ns_ = 0;
  uint32_t sequence_ = 0;
  std::string reason_ = "its process has not started yet";
  std::atomic<bool> closed_{false};      // set by close(), read by run(); close_fd_ wakes what waits
  std::atomic<int64_t> ready_at_ns_{0};  // a hint: set by expect_after(), read by retry_after_ms()
};

// A channel as what a lane runs.
class ChildModel final : public ForeignModel<ChildChannel> {
 public:
  using ForeignModel::ForeignModel;
  void interrupt() override { backend_->close(); }
  int64_t retry_after_ms() const override { return backend_->retry_after_ms(); }
};

}  // namespace penstock
