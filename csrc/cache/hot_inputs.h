// The most frequent inputs themselves, so that they can be computed again: a bounded table of encoded
// requests with counts. A full bucket gives the place of its least counted input to a new one, which goes on
// from that count (Space-Saving; Metwally, Agrawal and El Abbadi, 2005); counts are halved now and then, so
// that old favourites leave. Any thread; one lock, and an offer gives up where another thread holds it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#include "base/key.h"

namespace penstock {

class HotInputs {
 public:
  static constexpr size_t kMaxBytes = 1024;  // a longer request is not kept
  static constexpr size_t kWays = 8;

  struct Input {
    Key128 key{};
    uint64_t count = 0;
    std::vector<uint8_t> bytes;
    bool vectors = false;  // of predict_vectors: one row of float32; else the params of a predict call
  };

  // `capacity` inputs, rounded up to whole buckets; 0: none.
  explicit HotInputs(size_t capacity) : inputs_((capacity + kWays - 1) / kWays * kWays) {
    for (Input& input : inputs_) input.bytes.reserve(kMaxBytes);
  }

  // Counts one request of `key`. `encode(bytes)` writes it into an empty vector of capacity kMaxBytes when it
  // is new here, and returns false if it does not fit.
  template <class Encode>
  void offer(const Key128& key, bool vectors, uint64_t times, Encode&& encode) {
    if (inputs_.empty()) return;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return;
    if (++offers_ % (16 * inputs_.size()) == 0) {
      for (Input& input : inputs_) input.count /= 2;
    }
    const size_t bucket = static_cast<size_t>(key.hi % (inputs_.size() / kWays)) * kWays;
    Input* least = &inputs_[bucket];
    for (size_t i = bucket; i < bucket + kWays; ++i) {
      Input& input = inputs_[i];
      if (input.key == key && !input.bytes.empty()) {
        input.count += times;
        return;
      }
      if (input.count < least->count || input.bytes.empty()) least = &input;
      if (input.bytes.empty()) break;
    }
    scratch_.clear();
    if (!encode(scratch_)) return;
    least->bytes.assign(scratch_.begin(), scratch_.end());
    least->key = key;
    least->count += times;
    least->vectors = vectors;
  }

  // The inputs held, most frequent first.
  std::vector<Input> top() const {
    std::vector<Input> held;
    {
      const std::lock_guard lock(mutex_);
      for (const Input& input : inputs_) {
        if (!input.bytes.empty()) held.push_back(input);
      }
    }
    std::stable_sort(held.begin(), held.end(),
                     [](const Input& a, const Input& b) { return a.count > b.count; });
    return held;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Input> inputs_;
  std::vector<uint8_t> scratch_ = [] {
    std::vector<uint8_t> bytes;
    bytes.reserve(kMaxBytes);
    return bytes;
  }();
  uint64_t offers_ = 0;
};

}  // namespace penstock
