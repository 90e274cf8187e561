// A lane: the bounded queue of one served model version, as a deterministic state machine of (event, clock).
//
// Requests are of one of two priority classes (policy.h) and of a flow, the connection that they came by;
// each class is served fairly among flows and by deadline (fair_queue.h). The lane holds no rows: a request
// is a slot number, and row r of slot s lives wherever the caller keeps it. A batch is made of pieces, runs
// of rows of one request, in order; a request is cut wherever a batch is full. Whoever drives a lane passes
// the monotonic time in, so a simulated clock can drive it through any schedule.
//
// Invariants:
//   - submitted == in_flight + ok + rejected + expired + cancelled + failed, in requests and in rows, after
//   every call;
//   - every submitted request is reported ended exactly once;
//   - no batch holds more than max_batch_rows rows;
//   - no request ends ok at or after its deadline;
//   - a slot is not reused while a batch that holds a piece of it runs (the model may still write there);
//   - the waits of the low class and of a flow beside greedy flows keep the bounds of policy.h, fair_queue.h;
//   - each class has room of its own, which a flow holds no more of than its share (within_share).
// All storage is allocated by the constructor; every call is O(log n) amortised for each request it concerns.
// Not thread-safe: the owner locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "batch/fair_queue.h"
#include "batch/ordered_queue.h"
#include "batch/policy.h"

namespace penstock {

enum class End : uint8_t {
  kOk = 0,
  kRejected = 1,
  kExpired = 2,
  kCancelled = 3,
  kFailed = 4,
  kUnavailable = 5
};
inline constexpr size_t kEnds = 6;

struct LaneConfig {
  PolicyConfig policy;
  // Of the high class; the low one has half as much of its own (low_room).
  uint32_t max_requests = 4096;      // in the lane at once, running ones included
  uint32_t max_queued_rows = 16384;  // waiting rows
  uint32_t max_rows_per_request = 4096;
  uint32_t max_flows = 1;
  int64_t initial_run_ns = 0;       // predicted run time before the first run
  int64_t horizon_ns = 50'000'000;  // how far ahead deadlines mostly lie
};

constexpr uint32_t low_room(uint32_t high_room) {
  return high_room < 2 ? 1 : high_room / 2;
}

struct LaneCounters {
  uint64_t submitted = 0;
  uint64_t in_flight = 0;
  uint64_t ended[kEnds] = {};
};

struct Piece {
  uint32_t slot;
  uint32_t first_row;
  uint32_t rows;
};

struct Ended {
  uint32_t slot;
  uint64_t tag;  // the caller's own name of the request
  End end;
};

enum class Refusal : uint8_t {
  kNone = 0,
  kSize,  // no request may have so many rows
  kRoom,  // the lane is full, or the request's class or flow holds its share of it
  kTime,  // the work before it would make it late
};

class Lane {
 public:
  static constexpr uint32_t kNoSlot = UINT32_MAX;

  explicit Lane(const LaneConfig& config);

  struct Wanted {
    uint32_t rows;
    int64_t deadline_ns;
    uint32_t flow = 0;  // 0..max_flows-1
    bool low = false;
  };
  struct Submitted {
    uint32_t slot = kNoSlot;     // kNoSlot: rejected
    int64_t retry_after_ns = 0;  // when rejected
    Refusal refusal = Refusal::kNone;
  };
  // Would submit() admit it? Counts nothing.
  Submitted check(const Wanted& wanted, int64_t now_ns);
  // Admits a request of 1..max_rows_per_request rows, or rejects it for want of room or of time.
  // A rejected request is counted and not reported in ended(): the result says it.
  Submitted submit(uint64_t tag, const Wanted& wanted, int64_t now_ns);

  // Forms the next batch for an idle executor; empty when nothing can run. What can no longer make its
  // deadline is ended as expired. The batch must be given back with finish(). The span is valid until the
  // next call.
  std::span<const Piece> next_batch(int64_t now_ns);

  // The batch has run (or failed, or was not run). `pieces` are those of next_batch. Learns the run time of a
  // run that succeeded, if `learn`.
  void finish(std::span<const Piece> pieces, int64_t started_ns, int64_t now_ns, bool ok, bool learn = true);

  // Learns the time of a run made outside the queue, such as a warm-up.
  void record_run(size_t rows, int64_t elapsed_ns) { run_time_.record(rows, elapsed_ns); }

  // Ends every unanswered request whose deadline has come, running ones included: a hung model delays no
  // reply.
  void expire(int64_t now_ns);
  // Earliest deadline of an unanswered request, or INT64_MAX: when expire() is next due.
  int64_t next_deadline() const;

  // Ends the request if it is unanswered; false when the slot holds no such request.
  bool cancel(uint32_t slot, uint64_t tag);
  // Ends every unanswered request as kUnavailable.
  void end_all();
  // The flow, which has nothing in the lane, stands for another peer from now on.
  void forget_flow(uint32_t flow);

  // Requests ended since the last clear_ended(), in order. At most slots() can be pending.
  std::span<const Ended> ended() const { return ended_; }
  void clear_ended() { ended_.clear(); }

  uint32_t slots() const { return static_cast<uint32_t>(slots_.size()); }
  const LaneCounters& requests() const { return requests_; }
  const LaneCounters& rows() const { return rows_; }
  uint32_t queued_rows() const { return static_cast<uint32_t>(high_.rows() + low_.rows()); }
  const FairQueue& queue(bool low) const { return low ? low_ : high_; }
  // High batches formed since the last low one while a low request waited.
  uint32_t high_batches() const { return high_batches_; }
  uint32_t running_batches() const { return running_batches_; }
  const RunTimeModel& run_time() const { return run_time_; }

 private:
  static constexpr int64_t kLongAgo = INT64_MIN / 2;

  struct Request {
    uint64_t tag = 0;
    int64_t deadline_ns = 0;
    uint64_t sequence = 0;
    uint32_t rows = 0;
    uint32_t rows_taken = 0;
    uint32_t rows_done = 0;
    uint32_t pieces_out = 0;  // running pieces
    uint32_t flow = 0;
    bool low = false;
    bool used = false;
    bool answered = false;
    QueueLinks links;
  };
  struct Requests : std::vector<Request> {
    QueueLinks& links(uint32_t i) { return (*this)[i].links; }
    bool before(uint32_t a, uint32_t b) const {
      const Request& x = (*this)[a];
      const Request& y = (*this)[b];
      return x.deadline_ns != y.deadline_ns ? x.deadline_ns < y.deadline_ns : x.sequence < y.sequence;
    }
  };
  struct Held {
    uint32_t requests = 0;  // slots
    uint32_t rows = 0;      // waiting
  };
  // Of one class.
  struct Room {
    uint32_t max_requests;
    uint32_t max_rows;
    uint32_t requests = 0;    // held
    std::vector<Held> flows;  // what each holds
  };
  // A batch while it is filled.
  struct Filling {
    size_t rows = 0;
    size_t limit;
    int64_t earliest_ns;
  };

  Room& room_of(const Request& request) { return request.low ? low_room_ : high_room_; }
  FairQueue& queue_of(const Request& request) { return request.low ? low_ : high_; }
  size_t first_limit(const FairQueue& queue, uint32_t slot, int64_t now_ns) const;
  bool saturated(const FairQueue& queue, int64_t now_ns) const;
  void drop_hopeless(FairQueue& queue, int64_t now_ns);
  void fill(FairQueue& queue, int64_t now_ns, Filling* filling);
  void end(uint32_t slot, End how);
  void free_if_done(uint32_t slot);

  LaneConfig config_;
  RunTimeModel run_time_;
  Requests slots_;
  std::vector<uint32_t> free_;
  OrderedQueue by_deadline_;  // the unanswered ones
  FairQueue high_, low_;
  Room high_room_, low_room_;
  std::vector<Piece> batch_;
  std::vector<Ended> ended_;
  LaneCounters requests_;
  LaneCounters rows_;
  uint64_t sequence_ = 0;
  uint32_t high_batches_ = 0;
  uint32_t running_batches_ = 0;
  int64_t busy_until_ns_ = 0;
  // When a request was last refused for want of time although none in its class may wait longer; [low].
  int64_t overloaded_ns_[2] = {kLongAgo, kLongAgo};
};

}  // namespace penstock
