// A lane: the bounded queue of one served model version, as a deterministic state machine of (event, clock).
//
// Requests are split into pieces of at most max_batch_rows and queue by deadline. The lane holds no rows: a
// request is a slot number, and row r of slot s lives wherever the caller keeps it. Whoever drives a lane
// passes the monotonic time in, so a simulated clock can drive it through any schedule.
//
// Invariants:
//   - submitted == in_flight + ok + rejected + expired + cancelled + failed, in requests and in rows, after
//   every call;
//   - every submitted request is reported ended exactly once;
//   - no batch holds more than max_batch_rows rows;
//   - no request ends ok at or after its deadline;
//   - a slot is not reused while a batch that holds a piece of it runs (the model may still write there).
// All storage is allocated by the constructor. Not thread-safe: the owner locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "batch/policy.h"

namespace penstock {

enum class End : uint8_t { kOk = 0, kRejected = 1, kExpired = 2, kCancelled = 3, kFailed = 4 };
inline constexpr size_t kEnds = 5;

struct LaneConfig {
  PolicyConfig policy;
  uint32_t max_requests = 4096;      // in the lane at once, running ones included
  uint32_t max_queued_rows = 16384;  // waiting rows
  uint32_t max_rows_per_request = 4096;
  int64_t initial_run_ns = 0;  // predicted run time before the first run
};

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
  uint32_t slot;  // meaningless for a rejected request: it never had one
  uint64_t tag;   // the caller's own name of the request
  End end;
};

class Lane {
 public:
  static constexpr uint32_t kNoSlot = UINT32_MAX;

  explicit Lane(const LaneConfig& config);

  struct Submitted {
    uint32_t slot = kNoSlot;     // kNoSlot: rejected
    int64_t retry_after_ns = 0;  // when rejected
  };
  // Admits a request of `rows` (1..max_rows_per_request), or rejects it for want of room or of time.
  // A rejected request is counted and not reported in ended(): the result says it.
  Submitted submit(uint64_t tag, uint32_t rows, int64_t deadline_ns, int64_t now_ns);

  // Forms the next batch for an idle executor; empty when nothing can run. What can no longer make its
  // deadline is ended as expired. The batch must be given back with finish(). The span is valid until the
  // next call.
  std::span<const Piece> next_batch(int64_t now_ns);

  // The batch has run (or failed). `pieces` are those of next_batch. Learns the run time of a run that
  // succeeded.
  void finish(std::span<const Piece> pieces, int64_t started_ns, int64_t now_ns, bool ok);

  // Learns the time of a run made outside the queue, such as a warm-up.
  void record_run(size_t rows, int64_t elapsed_ns) { run_time_.record(rows, elapsed_ns); }

  // Ends every unanswered request whose deadline has come, running ones included: a hung model delays no
  // reply.
  void expire(int64_t now_ns);
  // Earliest deadline of an unanswered request, or INT64_MAX: when expire() is next due.
  int64_t next_deadline() const;

  // Ends the request if it is unanswered; false when the slot holds no such request.
  bool cancel(uint32_t slot, uint64_t tag);
  // The same for many, in one pass over the queue.
  struct Named {
    uint32_t slot;
    uint64_t tag;
  };
  void cancel_all(std::span<const Named> requests);

  // Requests ended since the last clear_ended(), in order. At most max_requests can be pending.
  std::span<const Ended> ended() const { return ended_; }
  void clear_ended() { ended_.clear(); }

  const LaneCounters& requests() const { return requests_; }
  const LaneCounters& rows() const { return rows_; }
  uint32_t queued_rows() const { return queued_rows_; }
  uint32_t running_batches() const { return running_batches_; }
  const RunTimeModel& run_time() const { return run_time_; }

 private:
  struct Request {
    uint64_t tag = 0;
    int64_t deadline_ns = 0;
    uint32_t rows = 0;
    uint32_t rows_done = 0;
    uint32_t rows_queued = 0;
    uint32_t pieces_out = 0;  // running pieces
    bool used = false;
    bool answered = false;
  };

  bool end_if_unanswered(const Named& named);
  void end(uint32_t slot, End how);
  void settle();
  void compact();

  LaneConfig config_;
  RunTimeModel run_time_;
  std::vector<Request> slots_;
  std::vector<uint32_t> free_;
  // The queue, sorted by deadline from head_ on; parallel arrays, so that the policy sees plain work.
  std::vector<QueuedWork> work_;
  std::vector<Piece> pieces_;
  size_t head_ = 0;
  std::vector<Piece> batch_;
  std::vector<Ended> ended_;
  LaneCounters requests_;
  LaneCounters rows_;
  uint32_t queued_rows_ = 0;
  uint32_t running_batches_ = 0;
  int64_t busy_until_ns_ = 0;
  bool dead_pieces_ = false;       // the queue holds pieces of answered requests; never between two calls
  std::vector<uint32_t> touched_;  // slots that this call may have freed
};

}  // namespace penstock
