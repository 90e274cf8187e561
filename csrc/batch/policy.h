// The batching policy: pure functions of (queue state, clock), so that a simulated clock can test them.
//
// The policy is work-conserving: an idle lane starts at once with what is queued, so the latency limit is
// never a window that a request must wait. It decides:
//   - admit:  can a new request still be answered by its deadline, given what is served before it?
//   - form:   how many rows may a batch have that must meet a deadline? (rows_within; see Lane::next_batch)
//   - turn:   which of the two priority classes runs next?
//   - learn:  how long does a run of n rows take?
// Everything is fixed-size; nothing here allocates, locks or reads a clock. Callers hold the lane's lock.
//
// Priorities. A batch is of the high class while one waits, except that the low class has every low_every-th
// batch: after low_every - 1 high batches that were formed while a low request waited, the next one is low.
// Where the predicted run time does not grow (up to the end of the size bucket), low rows fill a high batch;
// they do not count as the low class's turn. What cannot make its deadline is run in neither class. Bounds,
// for k = low_every and batches of B = max_batch_rows rows that take at most T:
//   - A high request that is in the n-th high batch from its arrival on is delayed by the low class by at
//     most 1 + (n - 1) / (k - 1) batches (low_batches_before), the one that ran when it came included: so by
//     at most one batch while n < k. Proof: between two low batches lie k - 1 high ones.
//   - A low request that is in the n-th low batch from its arrival on waits for at most (k - 1) n high ones,
//     so its last batch starts within (1 + k n - 1) T (low_wait_bound), the batch that ran when it came
//     included. n is at most ceil((r + f) / B) + c: its r rows, the f low rows that the class serves before
//     it (FairQueue bounds them against every later arrival; what waits is at most the queue's limit), and c
//     batches that an earlier deadline cut short. Nobody waits beyond the deadline: then the answer is
//     DEADLINE_EXCEEDED.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace penstock {

// Largest batch that any lane may be configured for.
inline constexpr size_t kMaxBatchRows = 64;

// Run time per batch size, learned: for each size bucket (1, 2, 4, ..., 64) a high quantile over recent runs.
// The quantile is the fourth largest of a window of 32 (of fewer runs, the third or second), so that a run
// whose thread lost its core now and then does not poison it, while a real change shows after four. A bucket
// never run borrows from its neighbours: from a larger one as it is, from a smaller one scaled by rows (a run
// of n rows costs at most n runs of one row).
class RunTimeModel {
 public:
  static constexpr size_t kBuckets = 7;
  static constexpr size_t kWindow = 32;
  // The prediction is the rank(n)-th largest of n runs.
  static constexpr size_t rank(size_t n) { return n < 2 ? 1 : 2 + n / 16; }

  explicit RunTimeModel(int64_t initial_ns = 0) { predicted_.fill(initial_ns); }

  // Records that a run of `rows` (1..64) took `elapsed_ns`. Negative times count as 0.
  void record(size_t rows, int64_t elapsed_ns);

  // Predicted nanoseconds for a run of `rows` (1..64); the initial guess while nothing was recorded.
  int64_t predict(size_t rows) const { return predicted_[bucket_of(rows)]; }

  static size_t bucket_of(size_t rows) {
    const size_t bucket = static_cast<size_t>(std::bit_width(rows == 0 ? 0 : rows - 1));  // ceil(log2(rows))
    return bucket < kBuckets ? bucket : kBuckets - 1;
  }
  // The most rows that a run may have whose predicted time is that of a run of `rows`.
  static size_t bucket_end(size_t rows) { return size_t{1} << bucket_of(rows); }

 private:
  struct Window {
    std::array<int64_t, kWindow> runs{};
    uint32_t count = 0;  // runs ever recorded
    int64_t high = 0;    // the rank-th largest
  };
  void predict_all();

  std::array<Window, kBuckets> windows_{};
  std::array<int64_t, kBuckets> predicted_{};
};

struct PolicyConfig {
  size_t max_batch_rows = kMaxBatchRows;
  // Kept free between the predicted end of a run and the deadline, for encoding and writing the reply.
  int64_t guard_ns = 500'000;
  // The low class has at least every low_every-th batch while both wait; at least 2.
  uint32_t low_every = 8;
};

// Batches that n rows need.
constexpr uint64_t batches_of(uint64_t rows, uint64_t max_batch_rows) {
  return (rows + max_batch_rows - 1) / max_batch_rows;
}

// Predicted time of running `rows` in full batches and a rest, one after another.
int64_t run_ns(uint64_t rows, const RunTimeModel& model, const PolicyConfig& config);

// The most rows, up to `most`, that a run may have whose predicted time is less than `slack_ns`; 0: none.
size_t rows_within(int64_t slack_ns, size_t most, const RunTimeModel& model);

// Is it the low class's turn, after `high_batches` that were formed while it waited?
constexpr bool low_is_due(uint32_t high_batches, const PolicyConfig& config) {
  return high_batches + 1 >= config.low_every;
}

// At most how many low batches run before the n-th high batch, after `high_batches` as in low_is_due.
constexpr uint64_t low_batches_before(uint64_t n, uint32_t high_batches, const PolicyConfig& config) {
  return n == 0 ? 0 : (high_batches + n - 1) / (config.low_every - 1);
}

// At most how long after its arrival the n-th low batch starts, if none takes longer than longest_ns.
constexpr int64_t low_wait_bound(uint64_t n, int64_t longest_ns, const PolicyConfig& config) {
  return static_cast<int64_t>(1 + config.low_every * n - 1) * longest_ns;
}

// Does a batch that its head's deadline cuts to `cut` rows, where `full` could run, do nine tenths of the
// rows a second? On a saturated lane one that does less makes the next head late in its turn, and so on:
// there the head is better dropped, which is needed once and not for each batch. (Early drop: Nexus, SOSP
// 2019, 6.3.)
bool worth_serving(size_t cut, size_t full, const RunTimeModel& model);

// How long the thread that reads may run batches by itself, in one go: up to the limit. A batch that takes
// half of the limit at most costs less than handing it to the executor, with which the reading thread then
// contends for the lane and, where they are few, for a core: of such, it runs up to eight limits' worth.
class InlineBudget {
 public:
  explicit InlineBudget(int64_t limit_ns) : limit_ns_(limit_ns) {}

  // May a batch run that should take this long? After a no, nothing more runs in this go.
  bool take(int64_t predicted_ns) {
    used_ns_ += predicted_ns;
    return used_ns_ <= (is_cheap(predicted_ns) ? kTurn * limit_ns_ : limit_ns_);
  }
  bool is_cheap(int64_t predicted_ns) const { return predicted_ns <= limit_ns_ / 2; }

 private:
  static constexpr int64_t kTurn = 8;  // limits
  const int64_t limit_ns_;
  int64_t used_ns_ = 0;
};

// What a new request finds.
struct Ahead {
  uint64_t rows = 0;          // of its own class that are served before it
  uint64_t other_rows = 0;    // that wait in the other class
  uint32_t high_batches = 0;  // as in low_is_due
  bool low = false;           // the request's class
  int64_t busy_until_ns = 0;  // predicted end of the run in progress, or any past time when idle
};

struct Admission {
  bool admitted = true;
  int64_t retry_after_ns = 0;  // when refused: how long until the work now before it should be done
};

// The shortest retry hint: a shorter one would only bring the refusal back sooner.
inline constexpr int64_t kMinRetryAfterNs = 1'000'000;

// May a request of `rows` with `deadline_ns` still make it?
Admission admit(const Ahead& ahead, uint64_t rows, int64_t deadline_ns, int64_t now_ns,
                const RunTimeModel& model, const PolicyConfig& config);

// May a flow that holds `held` of a shared resource have `wanted` more, when `free` of `total` are free? A
// quarter is kept for flows that hold nothing: so each of total / 4 connections always has room for a
// request, however much the others send. Of the rest a flow may hold kShare times what it leaves free
// (dynamic thresholds: Choudhury and Hahne 1998): one alone uses most of it, N greedy ones settle at equal
// shares.
inline constexpr uint64_t kShare = 4;
constexpr bool within_share(uint64_t held, uint64_t wanted, uint64_t free, uint64_t total) {
  if (held == 0) return wanted <= free;
  const uint64_t kept = total / 4;
  return wanted + kept <= free && held + wanted <= kShare * (free - wanted - kept + 1);
}

}  // namespace penstock
