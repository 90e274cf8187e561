#include "batch/fair_queue.h"

#include <algorithm>
#include <bit>

namespace penstock {

FairQueue::FairQueue(uint32_t max_requests, uint32_t max_flows, size_t max_batch_rows, int64_t horizon_ns)
    : most_(std::max<size_t>(max_batch_rows, 1)),
      shift_(static_cast<uint32_t>(std::bit_width(std::max<size_t>(max_batch_rows, 1) - 1))),
      // Half the ring covers the horizon.
      bucket_shift_(static_cast<uint32_t>(
          std::bit_width(static_cast<uint64_t>(std::max<int64_t>(horizon_ns, 1)) / (kBuckets / 2)))),
      requests_(max_requests),
      flows_(max_flows) {}

// Puts the flow where its tag and its first request say, or nowhere when nothing of it waits.
void FairQueue::order(uint32_t index) {
  Flow& flow = flows_[index];
  const uint32_t head = flow.queue.top(requests_);
  const uint64_t round = flow.tag >> shift_;
  if (head == flow.head && round == flow.round) return;
  const bool waited = flow.head != kNone;
  const bool alone = waited && waiting_ == 1;  // its place does not change
  if (waited && (!alone || head == kNone)) {
    order_.remove(flows_, index);
    --waiting_;
  }
  flow.head = head;
  if (head == kNone) return;
  flow.round = round;
  flow.deadline_ns = requests_[head].deadline_ns;
  flow.sequence = requests_[head].sequence;
  if (alone) return;
  order_.push(flows_, index);
  ++waiting_;
}

void FairQueue::push(uint32_t slot, uint32_t flow_index, uint32_t rows, int64_t deadline_ns,
                     uint64_t sequence, int64_t now_ns) {
  const int64_t slice = deadline_ns >> bucket_shift_;
  const bool within = slice - (now_ns >> bucket_shift_) < kBuckets;
  if (within) last_bucket_ = std::max(last_bucket_, slice);
  const auto bucket = static_cast<uint8_t>(within ? slice & (kBuckets - 1) : kBuckets);
  Request& request = requests_[slot];
  request = {deadline_ns, sequence, rows, flow_index, bucket, {}};
  by_deadline_[bucket] += rows;
  latest_ = std::max(latest_, deadline_ns);
  Flow& flow = flows_[flow_index];
  if (flow.head == kNone) flow.tag = std::max(flow.tag, round_ << shift_);
  flow.queue.push(requests_, slot);
  flow.rows += rows;
  rows_ += rows;
  order(flow_index);
}

void FairQueue::take(uint32_t rows) {
  const uint32_t flow_index = order_.top(flows_);
  Flow& flow = flows_[flow_index];
  Request& request = requests_[flow.head];
  round_ = std::max(round_, flow.round);
  flow.tag += rows;
  flow.rows -= rows;
  rows_ -= rows;
  by_deadline_[request.bucket] -= rows;
  request.rows -= rows;
  if (request.rows == 0) flow.queue.remove(requests_, flow.head);
  order(flow_index);
}

void FairQueue::remove(uint32_t slot) {
  Request& request = requests_[slot];
  Flow& flow = flows_[request.flow];
  flow.rows -= request.rows;
  rows_ -= request.rows;
  by_deadline_[request.bucket] -= request.rows;
  request.rows = 0;
  flow.queue.remove(requests_, slot);
  order(request.flow);
}

uint64_t FairQueue::lead(uint32_t flow) const {
  const uint64_t begin = round_ << shift_;
  return std::max(flows_[flow].tag, begin) - begin;
}

uint64_t FairQueue::rows_ahead(uint32_t flow, uint32_t rows, int64_t deadline_ns, int64_t now_ns) const {
  const uint64_t own = flows_[flow].rows;
  // Rows of later time slices are due after the request.
  const int64_t first = (now_ns >> bucket_shift_);
  uint64_t due_before = rows_;
  for (int64_t slice = std::min(last_bucket_, first + kBuckets - 1); slice > deadline_ns >> bucket_shift_;
       --slice) {
    due_before -= by_deadline_[static_cast<size_t>(slice & (kBuckets - 1))];
  }
  const uint64_t own_before = std::min(own, due_before);
  const uint64_t others = waiting_ - (own > 0 ? 1 : 0);
  const uint64_t ahead = lead(flow);
  const uint64_t fair = own_before + others * overtaken(ahead, own_before + rows);
  // In the present round the deadline decides; in a later one, all that waits may come first.
  const bool this_round = (ahead + own_before + rows - 1) >> shift_ == 0;
  return std::min(this_round ? due_before : rows_, fair);
}

}  // namespace penstock
