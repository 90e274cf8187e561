// The batching policy: a pure function of (queue state, clock), so that a simulated clock can test it.
//
// The policy is work-conserving: an idle lane starts at once with what is queued, so the latency limit is
// never a window that a request must wait. It decides three things:
//   - admit:  can a new request still be answered by its deadline, given the work before it?
//   - form:   which prefix of the queue (by deadline) runs next, on an idle executor?
//   - learn:  how long does a run of n rows take?
// Everything is fixed-size; nothing here allocates, locks or reads a clock. Callers hold the lane's lock.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace penstock {

// Largest batch that any lane may be configured for.
inline constexpr size_t kMaxBatchRows = 64;

// Run time per batch size, learned: for each size bucket (1, 2, 4, ..., 64) a high quantile over recent runs.
// The quantile is the second largest of a window, so that a lone outlier does not poison it, while a real
// change shows after two runs. A bucket never run borrows from its neighbours: from a larger one as it is,
// from a smaller one scaled by rows (a run of n rows costs at most n runs of one row).
class RunTimeModel {
 public:
  static constexpr size_t kBuckets = 7;
  static constexpr size_t kWindow = 32;

  explicit RunTimeModel(int64_t initial_ns = 0) : initial_ns_(initial_ns) {}

  // Records that a run of `rows` (1..64) took `elapsed_ns`. Negative times count as 0.
  void record(size_t rows, int64_t elapsed_ns);

  // Predicted nanoseconds for a run of `rows` (1..64); the initial guess while nothing was recorded.
  int64_t predict(size_t rows) const;

  static size_t bucket_of(size_t rows);

 private:
  struct Window {
    std::array<int64_t, kWindow> runs{};
    uint32_t count = 0;  // runs ever recorded
    int64_t high = 0;    // second largest of the window (the largest, while it holds one run)
  };
  std::array<Window, kBuckets> windows_{};
  int64_t initial_ns_;
};

struct PolicyConfig {
  size_t max_batch_rows = kMaxBatchRows;
  // Kept free between the predicted end of a run and the deadline, for encoding and writing the reply.
  int64_t guard_ns = 500'000;
};

// What the policy sees of one queued piece of work, in deadline order.
struct QueuedWork {
  int64_t deadline_ns;
  uint32_t rows;  // 1..max_batch_rows: larger requests are split before they queue
};

struct BatchDecision {
  size_t expired =
      0;  // this many from the head can no longer make it, even in the smallest run: answer them now
  size_t take = 0;  // then run this many pieces as one batch
  size_t rows = 0;  // rows of the batch, at most max_batch_rows
};

// Chooses the next batch of an idle executor at `now_ns`. `queue` is sorted by deadline, earliest first.
// Pieces at the head that cannot finish by their deadline even if run alone are dropped; of the rest, the
// largest prefix is taken whose predicted run still meets the earliest deadline in it.
BatchDecision form_batch(const QueuedWork* queue, size_t n, int64_t now_ns, const RunTimeModel& model,
                         const PolicyConfig& config);

struct Admission {
  bool admitted = true;
  int64_t retry_after_ns = 0;  // when refused: how long until the work now before it should be done
};

// The shortest retry hint: a shorter one would only bring the refusal back sooner.
inline constexpr int64_t kMinRetryAfterNs = 1'000'000;

// May a request of `rows` with `deadline_ns` still make it? `rows_ahead` are queued rows with an earlier or
// equal deadline, `busy_until_ns` is the predicted end of the run in progress (or any past time when idle).
Admission admit(uint64_t rows_ahead, uint64_t rows, int64_t deadline_ns, int64_t now_ns,
                int64_t busy_until_ns, const RunTimeModel& model, const PolicyConfig& config);

}  // namespace penstock
