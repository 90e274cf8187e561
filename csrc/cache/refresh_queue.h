// Keys of rows that were read shortly before their end, for the loader to read again while they still serve.
//
// Bounded and made once: a key that finds the queue full or another thread inside is not taken (a later read
// of the row offers it again), and the version offered last in its place is remembered, so that one row is
// taken about once however often it is read. Of one process; any thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "base/key.h"

namespace penstock {

class RefreshQueue {
 public:
  struct Item {
    Key128 key;
    int64_t at_us;  // the request time to load it for
    bool hold;      // at_us is the end of the row that serves now: not to be stored before then
  };

  void offer(const Key128& key, uint64_t version, int64_t at_us, bool hold) {
    const uint64_t name = (key.lo ^ key.hi * 0x9e3779b97f4a7c15U ^ version * 0xd6e8feb86659fd93U) | 1;
    // Relaxed, no partner: a lost or repeated mark only costs one more load.
    std::atomic<uint64_t>& seen = seen_[name % kSeen];
    if (seen.load(std::memory_order_relaxed) == name) return;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || size_ == kCapacity) {
      dropped_.fetch_add(1, std::memory_order_relaxed);
      return;
    }
    seen.store(name, std::memory_order_relaxed);
    items_[(begin_ + size_++) % kCapacity] = {key, at_us, hold};
    ++queued_;
  }

  // Up to n items, oldest first.
  size_t take(size_t n, Item* out) {
    const std::lock_guard lock(mutex_);
    n = n < size_ ? n : size_;
    for (size_t i = 0; i < n; ++i) out[i] = items_[(begin_ + i) % kCapacity];
    begin_ = (begin_ + n) % kCapacity;
    size_ -= n;
    return n;
  }

  uint64_t queued() {
    const std::lock_guard lock(mutex_);
    return queued_;
  }
  uint64_t dropped() const { return dropped_.load(std::memory_order_relaxed); }

 private:
  static constexpr size_t kCapacity = 1024;
  static constexpr size_t kSeen = 4093;  // prime: no bits of the name are favoured

  std::mutex mutex_;
  size_t begin_ = 0;
  size_t size_ = 0;
  uint64_t queued_ = 0;
  std::atomic<uint64_t> dropped_{0};
  const std::unique_ptr<Item[]> items_ = std::make_unique<Item[]>(kCapacity);
  const std::unique_ptr<std::atomic<uint64_t>[]> seen_ = std::make_unique<std::atomic<uint64_t>[]>(kSeen);
};

}  // namespace penstock
