// A lane on a simulated clock: random schedules of arrivals, runs (some slow, some hung), cancels and timers.
// Every schedule must hold: in time or told so (at most 2 ms late), at most max_batch_rows, one end per
// request, conservation after every event. The count of schedules may be given as the first argument.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#include "batch/lane.h"
#include "check.h"

namespace {

using penstock::End;
using penstock::Lane;
using penstock::LaneConfig;
using penstock::LaneCounters;
using penstock::Piece;

constexpr int64_t kUs = 1'000;
constexpr int64_t kMs = 1'000'000;
constexpr int64_t kTimerLateness = 2 * kMs;  // promise 1: the most a refusal may be late

uint64_t sum_ended(const LaneCounters& c) {
  uint64_t sum = 0;
  for (const uint64_t n : c.ended) sum += n;
  return sum;
}

struct Open {
  int64_t deadline_ns;
  uint32_t rows;
  uint32_t slot;
};

struct Run {
  std::vector<Piece> pieces;
  int64_t started_ns;
  int64_t ends_ns;
  bool ok;
};

class Simulation {
 public:
  Simulation(uint64_t seed, bool small)
      : rng_(seed),
        config_(make_config(small)),
        lane_(config_),
        executors_(1 + rng_() % 2),
        per_row_ns_(static_cast<int64_t>(1 + rng_() % 200) * kUs) {}

  void run(int steps) {
    for (int step = 0; step < steps; ++step) {
      step_once();
      check_books();
    }
    // Nothing more arrives: timers and run ends alone must bring every request to its end.
    while (!open_.empty() || !running_.empty()) {
      const bool advanced = advance_to_next_event(INT64_MAX);
      CHECK(advanced);
      check_books();
    }
    CHECK(lane_.requests().in_flight == 0 && lane_.rows().in_flight == 0 && lane_.queued_rows() == 0);
    // Every slot came back: the lane is as roomy as at first.
    for (uint32_t i = 0; i < config_.max_requests; ++i) {
      const Lane::Submitted s = lane_.submit(next_tag_ + i, 1, now_ + 3600'000 * kMs, now_);
      CHECK(s.slot != Lane::kNoSlot || i >= config_.max_queued_rows);
    }
  }

  uint64_t ok() const { return lane_.requests().ended[static_cast<size_t>(End::kOk)]; }
  uint64_t refused() const { return lane_.requests().ended[static_cast<size_t>(End::kRejected)]; }
  uint64_t expired() const { return lane_.requests().ended[static_cast<size_t>(End::kExpired)]; }

 private:
  LaneConfig make_config(bool small) {
    LaneConfig config;
    config.policy.max_batch_rows = 1 + rng_() % penstock::kMaxBatchRows;
    config.policy.guard_ns = static_cast<int64_t>(rng_() % 500) * kUs;
    config.max_requests = small ? 1 + rng_() % 8 : 64;
    config.max_queued_rows = small ? 1 + rng_() % 64 : 512;
    config.max_rows_per_request = 200;
    config.initial_run_ns = static_cast<int64_t>(rng_() % 3) * kMs;
    return config;
  }

  void step_once() {
    switch (rng_() % 8) {
      case 0:
      case 1:
      case 2:
      case 3:
        arrive();
        break;
      case 4:
        if (!open_.empty()) cancel();
        break;
      default:
        advance_to_next_event(now_ + static_cast<int64_t>(rng_() % 20) * kMs);
    }
    start_runs();
  }

  void arrive() {
    const uint32_t rows = rng_() % 4 ? 1 + rng_() % 4 : 1 + rng_() % 200;
    const int64_t deadline = now_ + (rng_() % 10 ? 50 * kMs : static_cast<int64_t>(rng_() % 50) * kMs);
    const uint64_t tag = next_tag_++;
    const Lane::Submitted result = lane_.submit(tag, rows, deadline, now_);
    if (result.slot == Lane::kNoSlot) return;
    CHECK(result.slot < config_.max_requests);
    for (const auto& [other, open] : open_) CHECK(open.slot != result.slot);
    for (const Run& r : running_) {
      for (const Piece& piece : r.pieces)
        CHECK(piece.slot != result.slot);  // the model may still write there
    }
    open_[tag] = {deadline, rows, result.slot};
  }

  void cancel() {
    auto victim = open_.begin();
    std::advance(victim, static_cast<long>(rng_() % open_.size()));
    CHECK(!lane_.cancel(victim->second.slot, victim->first + 1'000'000));  // another's tag cancels nothing
    CHECK(lane_.cancel(victim->second.slot, victim->first));
    drain(End::kCancelled);
  }

  void start_runs() {
    while (running_.size() < executors_) {
      const auto pieces = lane_.next_batch(now_);
      uint32_t rows = 0;
      std::vector<Piece> batch(pieces.begin(), pieces.end());
      drain(End::kExpired);
      if (batch.empty()) return;
      for (const Piece& piece : batch) {
        rows += piece.rows;
        const bool known = std::any_of(open_.begin(), open_.end(),
                                       [&](const auto& entry) { return entry.second.slot == piece.slot; });
        CHECK(known);  // no run is spent on a request that was answered
      }
      CHECK(rows >= 1 && rows <= config_.policy.max_batch_rows);  // promise 2
      int64_t takes = per_row_ns_ * rows / 4 + per_row_ns_;
      if (rng_() % 20 == 0) takes *= 20;           // an outlier
      if (rng_() % 200 == 0) takes = 5'000 * kMs;  // a hang
      running_.push_back({std::move(batch), now_, now_ + takes, rng_() % 50 != 0});
    }
  }

  // Moves the clock to the next run end or timer, at most to `until`; false when nothing is to come.
  bool advance_to_next_event(int64_t until) {
    int64_t next = until;
    const int64_t deadline = lane_.next_deadline();
    // The timer of the loop thread: due at the deadline, late by less than promise 1 allows.
    const int64_t timer =
        deadline == INT64_MAX ? INT64_MAX : deadline + static_cast<int64_t>(rng_() % 1500) * kUs;
    next = std::min(next, timer);
    size_t which = running_.size();
    for (size_t i = 0; i < running_.size(); ++i) {
      if (running_[i].ends_ns <= next) {
        next = running_[i].ends_ns;
        which = i;
      }
    }
    if (next == INT64_MAX) return false;
    now_ = std::max(now_, next);
    if (which < running_.size()) {
      Run done = std::move(running_[which]);
      running_.erase(running_.begin() + static_cast<long>(which));
      lane_.finish(done.pieces, done.started_ns, now_, done.ok);
      for (const auto& ended : lane_.ended()) {
        CHECK(ended.end ==
              (done.ok ? (now_ < open_.at(ended.tag).deadline_ns ? End::kOk : End::kExpired) : End::kFailed));
      }
      drain_any();
    }
    if (now_ >= lane_.next_deadline()) {
      lane_.expire(now_);
      drain(End::kExpired);
      CHECK(lane_.next_deadline() > now_);
    }
    start_runs();
    return true;
  }

  void drain(End expected) {
    for (const auto& ended : lane_.ended()) CHECK(ended.end == expected);
    drain_any();
  }

  void drain_any() {
    for (const auto& ended : lane_.ended()) {
      const auto entry = open_.find(ended.tag);
      CHECK(entry != open_.end());  // reported once, and only if it was admitted
      if (ended.end == End::kOk) CHECK(now_ < entry->second.deadline_ns);
      CHECK(now_ <= entry->second.deadline_ns + kTimerLateness);
      open_.erase(entry);
    }
    lane_.clear_ended();
  }

  void check_books() {
    for (const LaneCounters* c : {&lane_.requests(), &lane_.rows()}) {
      CHECK(c->submitted == c->in_flight + sum_ended(*c));
    }
    CHECK(lane_.requests().in_flight == open_.size());
    CHECK(lane_.queued_rows() <= config_.max_queued_rows);
    CHECK(lane_.running_batches() == running_.size());
  }

  std::mt19937_64 rng_;
  LaneConfig config_;
  Lane lane_;
  size_t executors_;
  int64_t per_row_ns_;
  int64_t now_ = 1'000 * kMs;
  uint64_t next_tag_ = 1;
  std::map<uint64_t, Open> open_;
  std::vector<Run> running_;
};

}  // namespace

int main(int argc, char** argv) {
  const int schedules = argc > 1 ? std::atoi(argv[1]) : 100'000;
  uint64_t ok = 0;
  uint64_t refused = 0;
  uint64_t expired = 0;
  for (int i = 0; i < schedules; ++i) {
    Simulation simulation(static_cast<uint64_t>(i), i % 2 == 0);
    simulation.run(20);
    ok += simulation.ok();
    refused += simulation.refused();
    expired += simulation.expired();
  }
  // The schedules must reach all three outcomes, or they prove nothing.
  CHECK(ok > 0 && refused > 0 && expired > 0);
  std::printf("%d schedules: %llu ok, %llu refused, %llu expired\n", schedules,
              static_cast<unsigned long long>(ok), static_cast<unsigned long long>(refused),
              static_cast<unsigned long long>(expired));
  return 0;
}
