// The waiting requests of one priority class, in the order in which they are served: fair among flows (a flow
// is a connection), by deadline where fairness does not decide.
//
// Time is counted in rounds, of `quantum` rows for each flow (start-time fair queueing, Goyal, Vin and Cheng
// 1996, with its tags cut to rounds). A flow's tag rises by the rows it is served. A flow that starts to wait
// gets at least the tag at which the present round begins, so idling saves nothing up. Next is the flow of
// the earliest round; in a round, the one whose first request has the earliest deadline; in a flow, that
// request. While no flow has more than `quantum` rows waiting this is earliest deadline first over all.
//
// Guarantee. Take a request at whose arrival its flow's tag is s rows after the beginning of the present
// round (0 <= s < quantum + max_batch_rows), and let a be its rows and those of its own flow that are served
// before it. Until its last row is taken, each other flow is served at most
//     ((s + a - 1) / quantum + 1) * quantum + max_batch_rows - 1        (overtaken())
// rows, however many it has waiting and whatever their deadlines. Proof: while the request waits, its flow is
// never of a later round than r, the round of tag s + a - 1, so no flow of a round after r is chosen; a flow
// is chosen with tags from the present round's beginning to the end of r, and the last time it may go over
// that end by what one batch takes, less one. So one request in flight beside flooders is delayed by less
// than three quanta of each, whatever they send.
//
// Deterministic; all storage is allocated by the constructor; O(log n) amortised. The owner locks.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "batch/ordered_queue.h"
#include "batch/policy.h"

namespace penstock {

class FairQueue {
 public:
  static constexpr uint32_t kNone = OrderedQueue::kNone;

  // Requests are slots 0..max_requests-1, flows 0..max_flows-1. `horizon_ns`: how far ahead deadlines mostly
  // lie, for rows_ahead(). The quantum is max_batch_rows, rounded up to a power of two.
  FairQueue(uint32_t max_requests, uint32_t max_flows, size_t max_batch_rows, int64_t horizon_ns);

  bool empty() const { return rows_ == 0; }
  uint64_t rows() const { return rows_; }
  uint64_t rows_of_flow(uint32_t flow) const { return flows_[flow].rows; }
  uint32_t waiting_flows() const { return waiting_; }
  uint32_t quantum() const { return uint32_t{1} << shift_; }
  // No waiting request has a later deadline.
  int64_t latest_deadline() const { return latest_; }

  void push(uint32_t slot, uint32_t flow, uint32_t rows, int64_t deadline_ns, uint64_t sequence,
            int64_t now_ns);
  // The request to serve next; kNone when empty.
  uint32_t top() const {
    const uint32_t flow = order_.top(flows_);
    return flow == kNone ? kNone : flows_[flow].head;
  }
  // The top request is served `rows` of its rows.
  void take(uint32_t rows);
  void remove(uint32_t slot);

  uint32_t rows_of(uint32_t slot) const { return requests_[slot].rows; }
  int64_t deadline_of(uint32_t slot) const { return requests_[slot].deadline_ns; }

  // At most how many of the rows that wait now are served before a request that `flow` would add.
  uint64_t rows_ahead(uint32_t flow, uint32_t rows, int64_t deadline_ns, int64_t now_ns) const;
  // How far the tag of `flow` lies after the beginning of the present round: s of the guarantee.
  uint64_t lead(uint32_t flow) const;
  // At most how many rows another flow is served before the last of `own` rows of a flow with this lead.
  uint64_t overtaken(uint64_t lead, uint64_t own) const {
    return ((((lead + own - 1) >> shift_) + 1) << shift_) + most_ - 1;
  }

  // The flow, which has nothing waiting, stands for somebody else from now on.
  void forget(uint32_t flow) { flows_[flow].tag = 0; }

 private:
  static constexpr int64_t kBuckets = 64;

  struct Request {
    int64_t deadline_ns = 0;
    uint64_t sequence = 0;  // of arrival, where deadlines are equal
    uint32_t rows = 0;
    uint32_t flow = 0;
    uint8_t bucket = 0;
    QueueLinks links;
  };
  struct Requests : std::vector<Request> {
    using vector::vector;
    QueueLinks& links(uint32_t i) { return (*this)[i].links; }
    bool before(uint32_t a, uint32_t b) const {
      const Request& x = (*this)[a];
      const Request& y = (*this)[b];
      return x.deadline_ns != y.deadline_ns ? x.deadline_ns < y.deadline_ns : x.sequence < y.sequence;
    }
  };
  struct Flow {
    uint64_t tag = 0;  // rows
    uint64_t rows = 0;
    OrderedQueue queue;
    // What the flow is ordered by: its round and its first request.
    uint64_t round = 0;
    int64_t deadline_ns = 0;
    uint64_t sequence = 0;
    uint32_t head = OrderedQueue::kNone;  // kNone: nothing waits
    QueueLinks links;
  };
  struct Flows : std::vector<Flow> {
    using vector::vector;
    QueueLinks& links(uint32_t i) { return (*this)[i].links; }
    bool before(uint32_t a, uint32_t b) const {
      const Flow& x = (*this)[a];
      const Flow& y = (*this)[b];
      if (x.round != y.round) return x.round < y.round;
      return x.deadline_ns != y.deadline_ns ? x.deadline_ns < y.deadline_ns : x.sequence < y.sequence;
    }
  };

  void order(uint32_t flow);

  const uint64_t most_;          // rows that one batch takes
  const uint32_t shift_;         // of the quantum
  const uint32_t bucket_shift_;  // of nanoseconds
  Requests requests_;
  Flows flows_;
  OrderedQueue order_;  // the flows that wait
  uint64_t round_ = 0;  // the latest that was served
  uint64_t rows_ = 0;
  uint32_t waiting_ = 0;
  int64_t latest_ = 0;
  // Waiting rows by deadline, in a ring of time slices, so that admission need not walk the queue. A deadline
  // beyond the ring goes to the last place, which always counts as due before.
  std::array<uint64_t, kBuckets + 1> by_deadline_{};
  int64_t last_bucket_ = 0;  // the latest slice in use
};

}  // namespace penstock
