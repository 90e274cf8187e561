// The rows that were answered OK, for drift, labels, freshness and the log: a bounded ring, drained in order
// by the monitor. A row that finds the ring full is dropped and counted. Any thread; one lock.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "sync/sync.h"

namespace penstock {

class ServedRing {
 public:
  // Where drain() puts n rows: each array is n times its row's width.
  struct Out {
    uint64_t* request_ids;
    int64_t* now_us;
    uint8_t* status;
    double* scores;
    float* rows;
    int64_t* event_time;
  };

  ServedRing(size_t capacity, size_t features, size_t outputs, size_t views)
      : capacity_(capacity),
        features_(features),
        outputs_(outputs),
        views_(views),
        request_ids_(capacity),
        now_us_(capacity),
        status_(capacity),
        scores_(capacity * outputs),
        rows_(capacity * features),
        event_time_(capacity * views) {}

  size_t features() const { return features_; }
  size_t outputs() const { return outputs_; }
  size_t views() const { return views_; }

  // Adds every row that the ring takes to `word` too, which outlives this process where it lies in a file:
  // what a killed process had not drained is known by it. Before the first push.
  void count_in(sync::Word* word) { taken_ = word; }

  // One row; event_time may be null when there are no views.
  void push(uint64_t request_id, int64_t now_us, uint8_t status, const double* scores, const float* row,
            const int64_t* event_time) {
    if (size_ == capacity_) {
      ++dropped_;
      return;
    }
    if (taken_ != nullptr) sync::add(*taken_, 1);  // relaxed: read once this process has ended
    const size_t at = (begin_ + size_++) % capacity_;
    request_ids_[at] = request_id;
    now_us_[at] = now_us;
    status_[at] = status;
    std::copy_n(scores, outputs_, &scores_[at * outputs_]);
    std::copy_n(row, features_, &rows_[at * features_]);
    if (views_ != 0) std::copy_n(event_time, views_, &event_time_[at * views_]);
  }
  std::mutex& mutex() { return mutex_; }  // held around push() by the caller, once a request

  size_t size() {
    const std::lock_guard lock(mutex_);
    return size_;
  }
  uint64_t dropped() {
    const std::lock_guard lock(mutex_);
    return dropped_;
  }

  // Moves up to n rows out, oldest first; returns how many. One thread at a time. In short turns, because the
  // replies of the model wait while the lock is held.
  size_t drain(size_t n, const Out& out) {
    size_t done = 0;
    while (done < n) {
      const size_t moved = drain_some(done, std::min(n, done + kTurn), out);
      if (moved == 0) break;
      done += moved;
    }
    return done;
  }

 private:
  static constexpr size_t kTurn = 128;

  // Moves rows to places from..to of `out`.
  size_t drain_some(size_t from, size_t to, const Out& out) {
    const std::lock_guard lock(mutex_);
    const size_t n = std::min(to - from, size_);
    for (size_t i = from; i < from + n; ++i) {
      const size_t at = (begin_ + i - from) % capacity_;
      out.request_ids[i] = request_ids_[at];
      out.now_us[i] = now_us_[at];
      out.status[i] = status_[at];
      std::copy_n(&scores_[at * outputs_], outputs_, out.scores + i * outputs_);
      std::copy_n(&rows_[at * features_], features_, out.rows + i * features_);
      if (views_ != 0) std::copy_n(&event_time_[at * views_], views_, out.event_time + i * views_);
    }
    begin_ = capacity_ == 0 ? 0 : (begin_ + n) % capacity_;
    size_ -= n;
    return n;
  }

  std::mutex mutex_;
  size_t capacity_, features_, outputs_, views_;
  size_t begin_ = 0;
  size_t size_ = 0;
  uint64_t dropped_ = 0;
  sync::Word* taken_ = nullptr;
  std::vector<uint64_t> request_ids_;
  std::vector<int64_t> now_us_;
  std::vector<uint8_t> status_;
  std::vector<double> scores_;
  std::vector<float> rows_;
  std::vector<int64_t> event_time_;
};

}  // namespace penstock
