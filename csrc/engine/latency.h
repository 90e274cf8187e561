// A histogram of nanoseconds with 16 buckets an octave: a quantile is at most 1/16 above the exact one.
// One writer at a time; a reader copies under the owner's lock. Nothing allocates.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace penstock {

class LatencyHistogram {
 public:
  void add(int64_t ns) {
    const uint64_t value = ns < 0 ? 0 : static_cast<uint64_t>(ns);
    ++counts_[bucket_of(value)];
    ++count_;
    sum_ += value;
    if (value > max_) max_ = value;
  }

  uint64_t count() const { return count_; }
  uint64_t sum() const { return sum_; }
  uint64_t max() const { return max_; }

  // How many values are at most `edge`; one up to 1/16 below it may count as above.
  uint64_t count_at_most(uint64_t edge) const {
    uint64_t seen = 0;
    for (size_t b = 0; b < kBuckets && upper(b) <= edge; ++b) seen += counts_[b];
    return seen;
  }

  // The upper edge of the bucket that holds the ceil(q * count)-th smallest value, at most max(); 0 if empty.
  uint64_t quantile(double q) const {
    if (count_ == 0) return 0;
    const double exact = q * static_cast<double>(count_);
    auto rank = static_cast<uint64_t>(exact);
    if (static_cast<double>(rank) < exact || rank == 0) ++rank;
    uint64_t seen = 0;
    for (size_t b = 0; b < kBuckets; ++b) {
      seen += counts_[b];
      if (seen >= rank) return upper(b) < max_ ? upper(b) : max_;
    }
    return max_;
  }

 private:
  static constexpr size_t kSub = 16;
  static constexpr size_t kBuckets = 61 * kSub;

  static size_t bucket_of(uint64_t value) {
    if (value < kSub) return value;
    const int octave = std::bit_width(value) - 1;  // at least 4
    return (static_cast<size_t>(octave) - 3) * kSub + ((value >> (octave - 4)) & (kSub - 1));
  }
  static uint64_t upper(size_t bucket) {
    if (bucket < kSub) return bucket;
    const size_t octave = bucket / kSub + 3;
    return ((uint64_t{kSub} + bucket % kSub + 1) << (octave - 4)) - 1;
  }

  std::array<uint64_t, kBuckets> counts_{};
  uint64_t count_ = 0;
  uint64_t sum_ = 0;
  uint64_t max_ = 0;
};

}  // namespace penstock
