// A sample of the feature vectors that were made for requests, with what was asked, so that they can be made
// again offline and compared: for chosen keys, the call's own bytes and its float32 rows.
//
// A key is chosen by a hash of its bytes in the call, so that a key is always or never looked at, whatever is
// asked of it. Records go to one buffer until take() swaps it for the other; one that does not fit is dropped
// and counted. Nothing is allocated after the constructor. Any thread.
//
// A record: int64 now_us, int64 made_us (wall clock), uint32 rows, uint32 bytes of params, the params, then
// rows * features float32. Little-endian, unaligned.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

#include "base/siphash.h"
#include "wire/rpc.h"

namespace penstock {

class VectorSamples {
 public:
  // share: of the keys, 0 to 1. 0: nothing is kept, and no memory is.
  VectorSamples(double share, size_t capacity_bytes)
      : threshold_(share >= 1 ? UINT64_MAX : static_cast<uint64_t>(share * 0x1p64)),
        capacity_(threshold_ == 0 ? 0 : capacity_bytes) {
    filling_.reserve(capacity_);
    taken_.reserve(capacity_);
  }

  // Whether the key of the call's first row is looked at.
  bool chooses(const wire::PredictCall& call) const {
    if (threshold_ == 0) return false;
    constexpr uint8_t kSeed[16] = {};  // equal in every process
    SipHash128 hash(kSeed);
    for (uint32_t c = 0; c < call.entities.size; ++c) {
      const wire::Column& column = call.entities.column[c];
      wire::Cursor after = column.cursor();
      if (!after.skip()) return false;
      hash.add(column.value, static_cast<size_t>(after.position() - column.value));
    }
    uint64_t lo, hi;
    hash.finish(&lo, &hi);
    return lo <= threshold_;
  }

  void add(std::string_view params, int64_t now_us, int64_t made_us, uint32_t rows, const float* values,
           size_t features) {
    const size_t floats = size_t{rows} * features * sizeof(float);
    const size_t size = kHead + params.size() + floats;
    const std::lock_guard lock(mutex_);
    if (size > capacity_ - filling_.size()) {
      ++dropped_;
      return;
    }
    const size_t at = filling_.size();
    filling_.resize(at + size);
    uint8_t* out = filling_.data() + at;
    const auto length = static_cast<uint32_t>(params.size());
    std::memcpy(out, &now_us, 8);
    std::memcpy(out + 8, &made_us, 8);
    std::memcpy(out + 16, &rows, 4);
    std::memcpy(out + 20, &length, 4);
    std::memcpy(out + kHead, params.data(), params.size());
    std::memcpy(out + kHead + params.size(), values, floats);
    ++added_;
  }

  // What was added since the last call; the storage is used again at the next. One thread at a time.
  const std::vector<uint8_t>& take() {
    const std::lock_guard lock(mutex_);
    taken_.clear();
    std::swap(filling_, taken_);
    return taken_;
  }

  struct Counts {
    uint64_t added = 0, dropped = 0;
  };
  Counts counts() {
    const std::lock_guard lock(mutex_);
    return {added_, dropped_};
  }

 private:
  static constexpr size_t kHead = 24;

  const uint64_t threshold_;
  const size_t capacity_;
  std::mutex mutex_;
  std::vector<uint8_t> filling_, taken_;
  uint64_t added_ = 0, dropped_ = 0;
};

}  // namespace penstock
