// Requests that asked to be traced, from their end until the monitor makes spans of them: a bounded queue.
// A record that finds it full is dropped and counted. One thread at a time: the model's lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/status.h"
#include "engine/serving_meter.h"
#include "wire/rpc.h"

namespace penstock {

struct TraceRecord {
  wire::TraceParent parent;
  int64_t received_ns = 0;  // monotonic
  StageTimes times;         // total alone where the answer is an error
  uint32_t rows = 0;
  Code code = Code::kOk;
};

class TraceQueue {
 public:
  // 0, as at first: nothing is kept.
  void set_capacity(size_t capacity) {
    capacity_ = capacity;
    records_.reserve(capacity);
  }
  bool enabled() const { return capacity_ > 0; }
  void push(const TraceRecord& record) {
    if (records_.size() >= capacity_) {
      ++dropped_;
    } else {
      records_.push_back(record);
    }
  }
  // Moves what waits to `out`, whose storage is used next.
  void take(std::vector<TraceRecord>& out) {
    out.clear();
    out.reserve(capacity_);
    std::swap(records_, out);
  }
  uint64_t dropped() const { return dropped_; }

 private:
  size_t capacity_ = 0;
  std::vector<TraceRecord> records_;
  uint64_t dropped_ = 0;
};

}  // namespace penstock
