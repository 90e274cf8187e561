// A high dynamic range histogram of nanoseconds, exact to three significant digits: values below 2048 have a
// bucket each, above them each octave has 1024. Values beyond kMax (73 minutes) count as kMax; max() is
// exact. Nothing allocates after construction. One thread at a time.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace penstock::load {

class HdrHistogram {
 public:
  static constexpr int kOctaveBits = 10;
  static constexpr int kMaxBits = 42;
  static constexpr uint64_t kMax = (uint64_t{1} << kMaxBits) - 1;

  HdrHistogram() : counts_(kBuckets) {}

  void add(int64_t ns) {
    const uint64_t value = ns < 0 ? 0 : static_cast<uint64_t>(ns);
    ++counts_[bucket_of(value < kMax ? value : kMax)];
    ++count_;
    sum_ += static_cast<double>(value);
    if (value > max_) max_ = value;
    if (value < min_) min_ = value;
  }

  uint64_t count() const { return count_; }
  uint64_t max() const { return max_; }
  uint64_t min() const { return count_ == 0 ? 0 : min_; }
  double mean() const { return count_ == 0 ? 0 : sum_ / static_cast<double>(count_); }

  // The largest value of the bucket that holds the ceil(q * count)-th smallest value, at most max(); 0 if
  // empty.
  uint64_t quantile(double q) const {
    const double exact = q * static_cast<double>(count_);
    auto rank = static_cast<uint64_t>(exact);
    if (static_cast<double>(rank) < exact || rank == 0) ++rank;
    uint64_t seen = 0;
    for (size_t b = 0; b < kBuckets; ++b) {
      seen += counts_[b];
      if (seen >= rank && seen != 0) return upper(b) < max_ ? upper(b) : max_;
    }
    return max_;
  }

  // How many values lie in buckets that end at or below the bucket of `ns`.
  uint64_t count_up_to(uint64_t ns) const {
    uint64_t seen = 0;
    for (size_t b = 0, last = bucket_of(ns < kMax ? ns : kMax); b <= last; ++b) seen += counts_[b];
    return seen;
  }

 private:
  static constexpr uint64_t kHalf = uint64_t{1} << kOctaveBits;
  static constexpr size_t kBuckets = 2 * kHalf + (kMaxBits - kOctaveBits - 1) * kHalf;

  static size_t bucket_of(uint64_t value) {
    if (value < 2 * kHalf) return value;
    const int shift = std::bit_width(value) - 1 - kOctaveBits;  // at least 1
    return static_cast<size_t>(shift) * kHalf + (value >> shift);
  }
  static uint64_t upper(size_t bucket) {
    if (bucket < 2 * kHalf) return bucket;
    const uint64_t shift = bucket / kHalf - 1;
    return ((bucket - shift * kHalf + 1) << shift) - 1;
  }

  std::vector<uint64_t> counts_;
  uint64_t count_ = 0;
  double sum_ = 0;
  uint64_t max_ = 0;
  uint64_t min_ = UINT64_MAX;
};

}  // namespace penstock::load
