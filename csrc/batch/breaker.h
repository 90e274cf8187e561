// The circuit breaker of a lane: decides from what the runs do whether requests are taken at all. A pure
// state machine; time is an argument. The owner locks.
//
//   closed     requests are taken. A run that does not return for longer than its limit, or `failures` failed
//              runs in a row, open it.
//   open       requests are refused, as UNAVAILABLE with a hint. The probe is due as soon as the run that
//              hung has returned, after failures `probe_ns` after the last one.
//   half-open  the owner runs the probe, a batch of zeros that nobody waits for. It is judged like any run:
//   if
//              it succeeds in time the breaker closes, else it opens and the next probe is due probe_ns
//              later.
//
// The limit of a run is the larger of timeout_ns and kPredictedTimes times its predicted time. A run that
// hung cannot be killed: the breaker stays open until it returns, so a model never has two runs at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace penstock {

struct BreakerConfig {
  int64_t timeout_ns = 100'000'000;  // a run may take this long before it counts as hung
  int64_t probe_ns = 1'000'000'000;  // between a failure and the probe after it
  uint32_t failures = 5;             // failed runs in a row that open it
};

class Breaker {
 public:
  enum class State : uint8_t { kClosed = 0, kOpen = 1, kHalfOpen = 2 };
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  static constexpr int64_t kPredictedTimes = 8;

  explicit Breaker(const BreakerConfig& config) : config_(config) {}

  State state() const { return state_; }
  bool closed() const { return state_ == State::kClosed; }
  bool running() const { return running_; }
  bool hung() const { return hung_; }  // a run that hangs has not returned yet
  uint64_t opens() const { return opens_; }
  uint64_t probes() const { return probes_; }

  // A run begins (one at a time).
  void started(int64_t now_ns, int64_t predicted_ns) {
    const int64_t limit_ns =
        std::max(config_.timeout_ns,
                 predicted_ns > kNever / kPredictedTimes ? kNever / 2 : kPredictedTimes * predicted_ns);
    hung_at_ns_ = limit_ns > kNever - now_ns ? kNever : now_ns + limit_ns;
    running_ = true;
  }

  // When check() is next due; kNever when no run can be found to hang.
  int64_t due_ns() const { return running_ ? hung_at_ns_ : kNever; }

  // Opens the breaker if the run in progress hangs. True when it was opened just now, from closed: what waits
  // must be told.
  bool check(int64_t now_ns) {
    if (!running_ || now_ns < hung_at_ns_) return false;
    hung_at_ns_ = kNever;
    hung_ = true;
    return open(kNever);
  }

  struct Outcome {
    bool hung;    // the run outlasted its limit, whether or not check() saw it
    bool opened;  // as check()
  };
  // The run has ended.
  Outcome finished(int64_t now_ns, bool ok) {
    bool opened = check(now_ns);
    running_ = false;
    const bool hung = hung_;
    if (hung) {
      // A probe that hung tells that it is too early; a run that hung is over, and the model free to be
      // tried.
      probe_at_ns_ = state_ == State::kOpen && probing_ ? now_ns + config_.probe_ns : now_ns;
    } else if (!ok) {
      ++failed_;
      if (probing_ || failed_ >= config_.failures) opened = open(now_ns + config_.probe_ns) || opened;
    } else {
      failed_ = 0;
      if (probing_) state_ = State::kClosed;
    }
    hung_ = probing_ = false;
    return {hung, opened};
  }

  // When the owner may probe; kNever while the breaker is not open or the run that hung has not returned.
  int64_t probe_at_ns() const { return state_ == State::kOpen && !running_ ? probe_at_ns_ : kNever; }

  // The owner's next run, which started() tells of, is the probe.
  void probe() {
    state_ = State::kHalfOpen;
    probing_ = true;
    ++probes_;
  }

  // A hint to those who are refused.
  int64_t retry_after_ns(int64_t now_ns) const {
    const int64_t at_ns = probe_at_ns();
    return at_ns == kNever ? config_.probe_ns : std::max<int64_t>(at_ns - now_ns, 1'000'000);
  }

 private:
  bool open(int64_t probe_at_ns) {
    const bool was_closed = state_ == State::kClosed;
    state_ = State::kOpen;
    probe_at_ns_ = probe_at_ns;
    if (was_closed) ++opens_;
    failed_ = 0;
    return was_closed;
  }

  BreakerConfig config_;
  State state_ = State::kClosed;
  bool running_ = false;
  bool hung_ = false;     // the run in progress was found to hang
  bool probing_ = false;  // the run in progress, or to come, is the probe
  int64_t hung_at_ns_ = kNever;
  int64_t probe_at_ns_ = kNever;
  uint32_t failed_ = 0;  // in a row
  uint64_t opens_ = 0, probes_ = 0;
};

}  // namespace penstock
