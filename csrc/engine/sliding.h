// Sums over the last seconds: a ring of panes of one second each. Time is an argument and nothing reads a
// clock, so a simulated clock drives it through any schedule.
//
// Invariants: a slot goes only forward (a time older than what its slot holds counts in the newer pane), and
// a pane is emptied when its slot comes round. One thread at a time: the owner locks. Nothing allocates.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace penstock {

inline constexpr int64_t kSecondNs = 1'000'000'000;

// `Sums` is a value-initialised struct of counts.
template <class Sums>
class SecondPanes {
 public:
  static constexpr int64_t kPanes = 64;

  // The pane of a time, to be added to.
  Sums& at(int64_t now_ns) {
    const int64_t second = now_ns / kSecondNs;
    Pane& pane = panes_[static_cast<size_t>(second) % kPanes];
    if (pane.second < second) {
      pane.sums = Sums{};
      pane.second = second;
    }
    return pane.sums;
  }

  // The first nanosecond of the window of `seconds` panes that ends with the one of now_ns.
  static int64_t window_start(int64_t now_ns, int64_t seconds) {
    return (now_ns / kSecondNs - seconds + 1) * kSecondNs;
  }

  // Calls f(sums) for each pane of that window; seconds <= kPanes.
  template <class F>
  void each(int64_t now_ns, int64_t seconds, F&& f) const {
    const int64_t last = now_ns / kSecondNs;
    for (const Pane& pane : panes_) {
      if (pane.second > last - seconds && pane.second <= last) f(pane.sums);
    }
  }

 private:
  struct Pane {
    int64_t second = -1;
    Sums sums{};
  };
  std::array<Pane, kPanes> panes_;
};

// A small histogram of delays, 8 buckets an octave above 8 units of 1024 ns: a quantile is at most 1/8, or
// one unit, above the exact one. From 2^26 units (69 s) on, delays count in the last bucket.
struct DelayCounts {
  static constexpr size_t kSub = 8;
  static constexpr size_t kBuckets = 24 * kSub;
  std::array<uint32_t, kBuckets> counts{};

  void add(int64_t ns) {
    const uint64_t value = ns < 0 ? 0 : static_cast<uint64_t>(ns) >> 10;
    const size_t bucket = bucket_of(value);
    ++counts[bucket < kBuckets ? bucket : kBuckets - 1];
  }
  static size_t bucket_of(uint64_t value) {
    if (value < kSub) return value;
    const int octave = std::bit_width(value) - 1;  // at least 3
    return (static_cast<size_t>(octave) - 2) * kSub + ((value >> (octave - 3)) & (kSub - 1));
  }
  static int64_t upper_ns(size_t bucket) {
    if (bucket < kSub) return static_cast<int64_t>(bucket + 1) << 10;
    const size_t octave = bucket / kSub + 2;
    return static_cast<int64_t>((uint64_t{kSub} + bucket % kSub + 1) << (octave - 3)) << 10;
  }
};

}  // namespace penstock
