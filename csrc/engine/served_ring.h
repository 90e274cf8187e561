// The rows that were answered OK, for drift, labels, freshness and the log: a bounded ring, drained in order
// by the monitor.
//
// Drift counts every row, without exception: rows are counted in place, in order, by whoever drains, by the
// threads that push once much waits (help), and at the latest by the push that would overwrite a row not yet
// counted. What is drained may be lost: a row that needs room in a full ring takes the place of the oldest,
// which is counted as dropped.
//
// Invariants: begin_ <= counted_ <= end_ <= begin_ + capacity (absolute positions; a row lives at position
// modulo capacity); a row is read for counting only between counted_ and end_, where nobody writes.
// Threads: any. Lock order: mutex() before counting_, never the other way round.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "drift/drift_panes.h"
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
      : capacity_(std::max<size_t>(1, capacity)),
        features_(features),
        outputs_(outputs),
        views_(views),
        request_ids_(capacity_),
        now_us_(capacity_),
        status_(capacity_),
        scores_(capacity_ * outputs),
        rows_(capacity_ * features),
        event_time_(capacity_ * views) {}

  size_t features() const { return features_; }
  size_t outputs() const { return outputs_; }
  size_t views() const { return views_; }

  // Every row pushed from now on is counted there. Before the first push.
  void count_drift(std::shared_ptr<DriftPanes> drift) { drift_ = std::move(drift); }
  // Adds every row that the ring takes to `word` too, which outlives this process where it lies in a file:
  // what a killed process had not drained is known by it. Before the first push.
  void count_in(sync::Word* word) { taken_ = word; }

  // One row; event_time may be null when there are no views.
  void push(uint64_t request_id, int64_t now_us, uint8_t status, const double* scores, const float* row,
            const int64_t* event_time) {
    const uint64_t end = end_.load(std::memory_order_relaxed);
    if (end - begin_ == capacity_) {
      if (drift_ != nullptr && begin_ == counted_.load(std::memory_order_acquire)) {
        const std::lock_guard counting(counting_);
        if (begin_ == counted_.load(std::memory_order_relaxed)) count_some();
      }
      ++begin_;
      ++dropped_;
    }
    if (taken_ != nullptr) sync::add(*taken_, 1);  // relaxed: read once this process has ended
    const size_t at = end % capacity_;
    request_ids_[at] = request_id;
    now_us_[at] = now_us;
    status_[at] = status;
    std::copy_n(scores, outputs_, &scores_[at * outputs_]);
    std::copy_n(row, features_, &rows_[at * features_]);
    if (views_ != 0) std::copy_n(event_time, views_, &event_time_[at * views_]);
    end_.store(end + 1, std::memory_order_release);
  }
  std::mutex& mutex() { return mutex_; }  // held around push() by the caller, once a request

  // After `rows` pushes, with no lock held: counts about twice as many when a quarter of the ring waits to be
  // counted, so that a monitor that falls behind holds up nobody for long.
  void help(size_t rows) {
    if (drift_ == nullptr) return;
    for (size_t done = 0; done < 2 * rows && 4 * uncounted() > capacity_; done += kTurn) {
      const std::unique_lock counting(counting_, std::try_to_lock);
      if (!counting.owns_lock()) return;  // somebody counts already
      count_some();
    }
  }

  // Counts every row pushed before the call.
  void count_all() {
    if (drift_ == nullptr) return;
    const uint64_t end = end_.load(std::memory_order_acquire);
    while (counted_.load(std::memory_order_acquire) < end) {
      const std::lock_guard counting(counting_);
      count_some();
    }
  }

  size_t size() {
    const std::lock_guard lock(mutex_);
    return end_.load(std::memory_order_relaxed) - begin_;
  }
  uint64_t dropped() {
    const std::lock_guard lock(mutex_);
    return dropped_;
  }

  // Counts what waits, then moves up to n rows out, oldest first; returns how many. One thread at a time. In
  // short turns, because the replies of the model wait while the lock is held.
  size_t drain(size_t n, const Out& out) {
    count_all();
    size_t done = 0;
    while (done < n) {
      bool empty = false;
      const size_t moved = drain_some(done, std::min(n, done + kTurn), out, &empty);
      done += moved;
      if (empty) break;
      if (moved == 0) count_all();  // rows came meanwhile, in place of those counted before
    }
    return done;
  }

 private:
  static constexpr size_t kTurn = 256;

  size_t uncounted() const {
    return end_.load(std::memory_order_relaxed) - counted_.load(std::memory_order_relaxed);
  }

  // Counts up to kTurn rows. counting_ is held.
  void count_some() {
    const uint64_t from = counted_.load(std::memory_order_relaxed);
    const uint64_t end = end_.load(std::memory_order_acquire);
    const size_t at = from % capacity_;
    const size_t n = std::min({static_cast<size_t>(end - from), kTurn, capacity_ - at});
    if (n == 0) return;
    drift_->add(&now_us_[at], &rows_[at * features_], features_, &scores_[at * outputs_], outputs_, n);
    counted_.store(from + n, std::memory_order_release);
  }

  // Moves counted rows to places from..to of `out`. empty: nothing is left, counted or not; seen under the
  // same lock, for whoever counts does not hold it.
  size_t drain_some(size_t from, size_t to, const Out& out, bool* empty) {
    const std::lock_guard lock(mutex_);
    const uint64_t ready =
        drift_ == nullptr ? end_.load(std::memory_order_relaxed) : counted_.load(std::memory_order_acquire);
    const size_t n = std::min<uint64_t>(to - from, ready - begin_);
    for (size_t i = from; i < from + n;) {  // in one or two pieces: the ring may wrap
      const size_t at = begin_ % capacity_;
      const size_t k = std::min(from + n - i, capacity_ - at);
      std::copy_n(&request_ids_[at], k, out.request_ids + i);
      std::copy_n(&now_us_[at], k, out.now_us + i);
      std::copy_n(&status_[at], k, out.status + i);
      std::copy_n(scores_.data() + at * outputs_, k * outputs_, out.scores + i * outputs_);
      std::copy_n(rows_.data() + at * features_, k * features_, out.rows + i * features_);
      if (views_ != 0) std::copy_n(&event_time_[at * views_], k * views_, out.event_time + i * views_);
      begin_ += k;
      i += k;
    }
    *empty = begin_ == end_.load(std::memory_order_relaxed);
    return n;
  }

  std::mutex mutex_;
  std::mutex counting_;  // one thread counts
  const size_t capacity_, features_, outputs_, views_;
  std::shared_ptr<DriftPanes> drift_;
  uint64_t begin_ = 0;
  uint64_t dropped_ = 0;
  sync::Word* taken_ = nullptr;
  // push() releases what it wrote; count_some() and count_all() acquire it.
  std::atomic<uint64_t> end_{0};
  // count_some() releases that it has read; push() acquires it before it overwrites, and drain_some().
  std::atomic<uint64_t> counted_{0};
  std::vector<uint64_t> request_ids_;
  std::vector<int64_t> now_us_;
  std::vector<uint8_t> status_;
  std::vector<double> scores_;
  std::vector<float> rows_;
  std::vector<int64_t> event_time_;
};

}  // namespace penstock
