// A lane on a simulated clock: random schedules of arrivals of both priorities over several connections, runs
// (some slow, some hung, some failed), cancels, timers and, on some lanes, a circuit breaker. Every schedule
// must hold: in time or told so (at most 2 ms late), at most max_batch_rows, one end per request,
// conservation after every event, and for every request the bounds of policy.h on what the other class costs
// it and of fair_queue.h on what the other connections do. The count of schedules may be given as the first
// argument.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#include "batch/breaker.h"
#include "batch/lane.h"
#include "check.h"

namespace {

using penstock::Breaker;
using penstock::End;
using penstock::FairQueue;
using penstock::Lane;
using penstock::LaneConfig;
using penstock::LaneCounters;
using penstock::Piece;

constexpr int64_t kUs = 1'000;
constexpr int64_t kMs = 1'000'000;
constexpr int64_t kTimerLateness = 2 * kMs;  // promise 1: the most a refusal may be late
constexpr uint32_t kFlows = 5;

uint64_t sum_ended(const LaneCounters& c) {
  uint64_t sum = 0;
  for (const uint64_t n : c.ended) sum += n;
  return sum;
}

struct Open {
  int64_t deadline_ns;
  uint32_t rows;
  uint32_t slot;
  uint32_t flow;
  bool low;
  int64_t arrived_ns;
  uint32_t rows_taken = 0;
  // Since it arrived, until its last row was taken.
  uint32_t high_batches_before;  // the lane's count when it came
  uint64_t lead;                 // of its flow when it came
  uint64_t high = 0, low_turns = 0, cut = 0;
  uint64_t other_low_rows = 0;   // served in low turns to others
  uint64_t served[kFlows] = {};  // rows of its class, by flow
  int64_t longest_ns = 0;

  bool waits() const { return rows_taken < rows; }
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
        breaker_({static_cast<int64_t>(60 + rng_() % 100) * kMs, static_cast<int64_t>(1 + rng_() % 50) * kMs,
                  static_cast<uint32_t>(1 + rng_() % 3)}),
        with_breaker_(executors_ == 1 && rng_() % 2 == 0),
        per_row_ns_(static_cast<int64_t>(1 + rng_() % 200) * kUs) {}

  void run(int steps) {
    for (int step = 0; step < steps; ++step) {
      step_once();
      check_books();
    }
    // Nothing more arrives: timers and run ends alone must bring every request to its end.
    while (!open_.empty() || !running_.empty() || !breaker_.closed()) {
      const bool advanced = advance_to_next_event(INT64_MAX);
      CHECK(advanced);
      check_books();
    }
    CHECK(lane_.requests().in_flight == 0 && lane_.rows().in_flight == 0 && lane_.queued_rows() == 0);
    // Every slot came back: the lane is as roomy as at first.
    for (uint32_t i = 0; i < config_.max_requests; ++i) {
      const Lane::Submitted s = lane_.submit(next_tag_ + i, {1, now_ + 3600'000 * kMs, kFlows + i}, now_);
      CHECK(s.slot != Lane::kNoSlot || i >= config_.max_queued_rows);
    }
  }

  uint64_t ok() const { return lane_.requests().ended[static_cast<size_t>(End::kOk)]; }
  uint64_t refused() const { return lane_.requests().ended[static_cast<size_t>(End::kRejected)]; }
  uint64_t expired() const { return lane_.requests().ended[static_cast<size_t>(End::kExpired)]; }
  uint64_t opens() const { return breaker_.opens(); }
  uint64_t low_turns() const { return low_turns_; }
  uint64_t riders() const { return riders_; }

 private:
  LaneConfig make_config(bool small) {
    LaneConfig config;
    config.policy.max_batch_rows = 1 + rng_() % penstock::kMaxBatchRows;
    config.policy.guard_ns = static_cast<int64_t>(rng_() % 500) * kUs;
    config.policy.low_every = 2 + rng_() % 8;
    config.max_requests = small ? 1 + rng_() % 8 : 64;
    config.max_queued_rows = small ? 1 + rng_() % 64 : 512;
    config.max_rows_per_request = 200;
    config.max_flows = kFlows + config.max_requests;
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
    const uint32_t flow = rng_() % 2 ? 0 : rng_() % kFlows;  // one of them is greedy
    const bool low = rng_() % 3 == 0;
    if (!breaker_.closed()) return;
    if (lane_.queue(false).rows_of_flow(flow) + lane_.queue(true).rows_of_flow(flow) == 0 &&
        rng_() % 8 == 0) {
      lane_.forget_flow(flow);  // another connection now
      for (auto& [other, open] : open_) open.served[flow] = 0;
    }
    const uint64_t lead = lane_.queue(low).lead(flow);
    CHECK(lead < lane_.queue(low).quantum() + config_.policy.max_batch_rows);
    const Lane::Submitted checked = lane_.check({rows, deadline, flow, low}, now_);
    const Lane::Submitted result = lane_.submit(tag, {rows, deadline, flow, low}, now_);
    CHECK(checked.slot == result.slot && checked.refusal == result.refusal);
    if (result.slot == Lane::kNoSlot) return;
    CHECK(result.slot < lane_.slots());
    for (const auto& [other, open] : open_) CHECK(open.slot != result.slot);
    for (const Run& r : running_) {
      for (const Piece& piece : r.pieces)
        CHECK(piece.slot != result.slot);  // the model may still write there
    }
    Open open{.deadline_ns = deadline,
              .rows = rows,
              .slot = result.slot,
              .flow = flow,
              .low = low,
              .arrived_ns = now_,
              .high_batches_before = lane_.high_batches(),
              .lead = lead};
    for (const Run& run : running_) open.longest_ns = std::max(open.longest_ns, run.ends_ns - now_);
    open_[tag] = open;
  }

  void cancel() {
    auto victim = open_.begin();
    std::advance(victim, static_cast<long>(rng_() % open_.size()));
    CHECK(!lane_.cancel(victim->second.slot, victim->first + 1'000'000));  // another's tag cancels nothing
    CHECK(lane_.cancel(victim->second.slot, victim->first));
    drain(End::kCancelled);
  }

  Open& open_of(uint32_t slot) {
    const auto at = std::find_if(open_.begin(), open_.end(),
                                 [&](const auto& entry) { return entry.second.slot == slot; });
    CHECK(at != open_.end());  // no run is spent on a request that was answered
    return at->second;
  }

  // The bounds, for every request that waited when the batch was formed.
  void account(const std::vector<Piece>& batch, uint32_t rows) {
    const bool low_turn = open_of(batch[0].slot).low;
    const penstock::PolicyConfig& policy = config_.policy;
    const uint64_t most = policy.max_batch_rows;
    uint64_t low_rows = 0;
    std::vector<Open*> waiting;
    for (auto& [tag, open] : open_) {
      if (open.waits()) waiting.push_back(&open);
    }
    for (const Piece& piece : batch) {
      Open& served = open_of(piece.slot);
      CHECK(piece.first_row == served.rows_taken);  // rows go in order, each once
      CHECK(!low_turn || served.low);
      CHECK(served.deadline_ns > now_);
      if (served.low) low_rows += piece.rows;
      if (served.low && !low_turn) riders_ += piece.rows;
      for (Open* open : waiting) {
        if (open->low != served.low || !open->waits()) continue;
        open->served[served.flow] += piece.rows;
        const uint64_t own = open->served[open->flow] + (open == &served ? 0 : 1);
        for (uint32_t flow = 0; flow < kFlows; ++flow) {
          if (flow == open->flow) continue;
          CHECK(open->served[flow] <= lane_.queue(open->low).overtaken(open->lead, own));
        }
      }
      served.rows_taken += piece.rows;
      CHECK(served.rows_taken <= served.rows);
    }
    if (low_turn) ++low_turns_;
    const bool cut = low_turn && rows < most && !lane_.queue(true).empty();
    for (Open* open : waiting) {
      ++(low_turn ? open->low_turns : open->high);
      if (cut) ++open->cut;
      if (open->low) {
        if (low_turn) open->other_low_rows += low_rows;
        // Between two turns of the low class at most low_every - 1 batches of the high one.
        CHECK(open->high <= (policy.low_every - 1) * (open->low_turns + 1));
        CHECK(open->low_turns <= (open->other_low_rows + open->rows + most - 1) / most + open->cut);
        if (!open->waits() && executors_ == 1) {
          const uint64_t n = open->low_turns + (low_turn ? 0 : 1);
          CHECK(now_ - open->arrived_ns <= penstock::low_wait_bound(n, open->longest_ns, policy));
        }
      } else if (low_turn) {
        CHECK(open->low_turns <=
              penstock::low_batches_before(open->high + 1, open->high_batches_before, policy));
      }
    }
  }

  void start_runs() {
    if (now_ >= breaker_.probe_at_ns()) {
      breaker_.probe();
      begin({});
    }
    while (running_.size() < executors_ && breaker_.closed()) {
      const auto pieces = lane_.next_batch(now_);
      uint32_t rows = 0;
      std::vector<Piece> batch(pieces.begin(), pieces.end());
      drain(End::kExpired);
      if (batch.empty()) return;
      for (const Piece& piece : batch) rows += piece.rows;
      CHECK(rows >= 1 && rows <= config_.policy.max_batch_rows);  // promise 2
      account(batch, rows);
      begin(std::move(batch));
    }
  }

  // An empty batch is the breaker's probe.
  void begin(std::vector<Piece> batch) {
    int64_t rows = 0;
    for (const Piece& piece : batch) rows += piece.rows;
    int64_t takes = per_row_ns_ * rows / 4 + per_row_ns_;
    if (rng_() % 20 == 0) takes *= 20;           // an outlier
    if (rng_() % 200 == 0) takes = 5'000 * kMs;  // a hang
    for (auto& [tag, open] : open_) open.longest_ns = std::max(open.longest_ns, takes);
    if (with_breaker_) breaker_.started(now_, lane_.run_time().predict(std::max<size_t>(rows, 1)));
    running_.push_back({std::move(batch), now_, now_ + takes, rng_() % 50 != 0});
  }

  void trip() {
    CHECK(!breaker_.closed());
    lane_.end_all();
    drain(End::kUnavailable);
    CHECK(open_.empty());
  }

  // Moves the clock to the next run end or timer, at most to `until`; false when nothing is to come.
  bool advance_to_next_event(int64_t until) {
    int64_t next = until;
    const int64_t deadline = lane_.next_deadline();
    // The timer of the loop thread: due at the deadline, late by less than promise 1 allows.
    const int64_t timer =
        deadline == INT64_MAX ? INT64_MAX : deadline + static_cast<int64_t>(rng_() % 1500) * kUs;
    next = std::min({next, timer, breaker_.due_ns(), breaker_.probe_at_ns()});
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
      const bool opened = with_breaker_ && breaker_.finished(now_, done.ok).opened;
      CHECK(!done.pieces.empty() || with_breaker_);
      lane_.finish(done.pieces, done.started_ns, now_, done.ok);
      for (const auto& ended : lane_.ended()) {
        CHECK(ended.end ==
              (done.ok ? (now_ < open_.at(ended.tag).deadline_ns ? End::kOk : End::kExpired) : End::kFailed));
      }
      drain_any();
      if (opened) trip();
    }
    if (with_breaker_ && breaker_.check(now_)) trip();
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
    CHECK(lane_.queue(false).rows() <= config_.max_queued_rows);
    CHECK(lane_.queue(true).rows() <= penstock::low_room(config_.max_queued_rows));
    const auto batches = std::count_if(running_.begin(), running_.end(),
                                       [](const Run& run) { return !run.pieces.empty(); });  // no probe
    CHECK(lane_.running_batches() == static_cast<uint32_t>(batches));
    CHECK(breaker_.closed() || open_.empty());
    uint64_t held[2] = {};
    for (const auto& [tag, open] : open_) ++held[open.low];
    CHECK(held[0] <= config_.max_requests && held[1] <= penstock::low_room(config_.max_requests));
  }

  std::mt19937_64 rng_;
  LaneConfig config_;
  Lane lane_;
  size_t executors_;
  Breaker breaker_;
  bool with_breaker_;
  int64_t per_row_ns_;
  uint64_t low_turns_ = 0, riders_ = 0;
  int64_t now_ = 1'000 * kMs;
  uint64_t next_tag_ = 1;
  std::map<uint64_t, Open> open_;
  std::vector<Run> running_;
};

// One run at a time of exactly `run_ns(rows)`; greedy flows keep as much in flight as is admitted.
class Steady {
 public:
  Steady(size_t most, int64_t fixed_ns, int64_t row_ns, uint32_t low_every = 8)
      : config_{.policy = {.max_batch_rows = most, .guard_ns = 0, .low_every = low_every},
                .max_requests = 4096,
                .max_queued_rows = 16384,
                .max_flows = 64},
        lane_(config_),
        fixed_ns_(fixed_ns),
        row_ns_(row_ns) {
    for (size_t rows = 1; rows <= most; rows *= 2) lane_.record_run(rows, run_ns(rows));
    lane_.record_run(most, run_ns(most));
  }

  int64_t run_ns(size_t rows) const { return fixed_ns_ + static_cast<int64_t>(rows) * row_ns_; }
  Lane& lane() { return lane_; }
  int64_t now() const { return now_; }
  uint64_t ok() const { return lane_.rows().ended[static_cast<size_t>(End::kOk)]; }

  bool submit(uint64_t tag, uint32_t flow, bool low, int64_t limit_ns = 50 * kMs) {
    return lane_.submit(tag, {1, now_ + limit_ns, flow, low}, now_).slot != Lane::kNoSlot;
  }
  // Runs one batch; `tags` that were in it are given to `on_ended`.
  template <typename OnEnded>
  bool run_one(OnEnded&& on_ended, int64_t more_ns = 0) {
    const auto pieces = lane_.next_batch(now_);
    const std::vector<Piece> batch(pieces.begin(), pieces.end());
    for (const auto& ended : lane_.ended()) on_ended(ended.tag, ended.end);
    lane_.clear_ended();
    if (batch.empty()) return false;
    size_t rows = 0;
    for (const Piece& piece : batch) rows += piece.rows;
    const int64_t started = now_;
    now_ += run_ns(rows) + more_ns;
    lane_.expire(now_);
    lane_.finish(batch, started, now_, true);
    for (const auto& ended : lane_.ended()) on_ended(ended.tag, ended.end);
    lane_.clear_ended();
    return true;
  }
  void pass(int64_t ns) { now_ += ns; }

 private:
  LaneConfig config_;
  Lane lane_;
  int64_t fixed_ns_, row_ns_;
  int64_t now_ = kMs;
};

// One request in flight beside greedy connections: never refused, never late, its wait within the bound.
void one_beside_the_greedy() {
  for (const uint32_t greedy : {1U, 3U, 8U}) {
    for (const size_t most : {size_t{1}, size_t{16}, size_t{64}}) {
      // The bound must lie within the limit, or nothing could be promised.
      const int64_t row_ns = 20 * kMs / static_cast<int64_t>((3 * greedy + 2) * most);
      Steady steady(most, 0, row_ns);
      const uint64_t bound_rows =
          most + greedy * steady.lane().queue(false).overtaken(2 * most - 1, 1) + most;
      uint64_t tag = 1'000'000;
      uint64_t served = 0;
      bool in_flight = false;
      int64_t sent_ns = 0;
      for (int turn = 0; turn < 2000; ++turn) {
        for (uint32_t flow = 1; flow <= greedy; ++flow) {
          while (steady.submit(++tag, flow, false)) {
          }
        }
        if (!in_flight) {
          CHECK(steady.submit(1, 0, false));
          in_flight = true;
          sent_ns = steady.now();
        }
        CHECK(steady.run_one([&](uint64_t ended, End end) {
          if (ended != 1) return;
          CHECK(end == End::kOk);
          CHECK(steady.now() - sent_ns <= static_cast<int64_t>(bound_rows + most) * row_ns);
          in_flight = false;
          ++served;
        }));
      }
      CHECK(served >= 2000 / (3 * greedy + 4));
    }
  }
}

// High requests at a rate that the lane bears are none of them refused for thousands of low ones; the low
// ones get what is left, and where the high ones leave nothing, their share.
void high_is_not_refused_for_low() {
  for (const bool saturate : {false, true}) {
    Steady steady(64, 100 * kUs, 10 * kUs, 8);
    uint64_t low_ok = 0;
    uint64_t high_ok = 0;
    uint64_t tag = 0;
    for (int turn = 0; turn < 4000; ++turn) {
      while (steady.submit(tag << 1 | 1, 1 + tag % 4, true)) ++tag;
      ++tag;
      if (saturate) {
        while (steady.submit(tag << 1, 8 + tag % 8, false)) ++tag;
      } else if (turn % 2 == 0) {
        CHECK(steady.submit(tag << 1, 0, false));
      }
      ++tag;
      CHECK(steady.run_one([&](uint64_t ended, End end) {
        if (end == End::kOk) ++((ended & 1) != 0 ? low_ok : high_ok);
        CHECK(saturate || (ended & 1) != 0 || end == End::kOk);
      }));
    }
    CHECK(high_ok > 1000);
    CHECK(!saturate || low_ok * 9 >= high_ok);
    CHECK(saturate || low_ok > 50'000);
  }
}

// Five times the load that the lane bears, with a pause of the machine in between: what is answered in time
// stays near the lane's capacity, although the pause leaves a queue whose head is nearly late.
void overload_keeps_goodput() {
  for (const int64_t fixed : {int64_t{0}, 2 * kMs, 5 * kMs}) {
    Steady steady(64, fixed, 50 * kUs);
    const double capacity = 64.0 / static_cast<double>(steady.run_ns(64));  // rows a ns
    const auto gap_ns = static_cast<int64_t>(1 / (5 * capacity));
    int64_t arrived = steady.now();
    uint64_t tag = 0;
    int64_t measured_from = 0;
    uint64_t ok_before = 0;
    for (int turn = 0; turn < 3000; ++turn) {
      for (; arrived <= steady.now(); arrived += gap_ns)
        (void)steady.submit(++tag, static_cast<uint32_t>(arrived / gap_ns % 32), false, 50 * kMs);
      if (!steady.run_one([](uint64_t, End) {}, turn == 500 ? 45 * kMs : 0)) steady.pass(gap_ns);
      if (turn == 600) {
        measured_from = steady.now();
        ok_before = steady.ok();
      }
    }
    const double rate =
        static_cast<double>(steady.ok() - ok_before) / static_cast<double>(steady.now() - measured_from);
    std::printf("overload, fixed cost %lld us: %.2f of capacity in time\n",
                static_cast<long long>(fixed / kUs), rate / capacity);
    CHECK(rate >= 0.9 * capacity);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = argc > 1 ? std::atoi(argv[1]) : 20'000;
  uint64_t ok = 0;
  uint64_t refused = 0;
  uint64_t expired = 0;
  uint64_t opens = 0;
  uint64_t low_turns = 0;
  uint64_t riders = 0;
  one_beside_the_greedy();
  high_is_not_refused_for_low();
  overload_keeps_goodput();
  for (int i = 0; i < schedules; ++i) {
    Simulation simulation(static_cast<uint64_t>(i), i % 2 == 0);
    simulation.run(i % 8 == 0 ? 100 : 20);
    ok += simulation.ok();
    refused += simulation.refused();
    expired += simulation.expired();
    opens += simulation.opens();
    low_turns += simulation.low_turns();
    riders += simulation.riders();
  }
  // The schedules must reach all of these, or they prove nothing.
  CHECK(ok > 0 && refused > 0 && expired > 0 && opens > 0 && low_turns > 0 && riders > 0);
  std::printf("%d schedules: %llu ok, %llu refused, %llu expired\n", schedules,
              static_cast<unsigned long long>(ok), static_cast<unsigned long long>(refused),
              static_cast<unsigned long long>(expired));
  return 0;
}
