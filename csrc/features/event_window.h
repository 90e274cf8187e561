// Where a window lies at a request time, and when events enter and leave it. Times are int64 microseconds;
// sums saturate. Pure functions; any thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "features/aggregate.h"

namespace penstock {

// a + b for b >= 0, kTimeMax at most.
inline int64_t time_add(int64_t a, int64_t b) {
  return a > kTimeMax - b ? kTimeMax : a + b;
}
// a - b for b >= 0, kTimeMin at least.
inline int64_t time_sub(int64_t a, int64_t b) {
  return a < kTimeMin + b ? kTimeMin : a - b;
}
inline int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}
// The last multiple of `every` at or before t; t itself where `every` is 0.
inline int64_t time_floor(int64_t t, int64_t every) {
  if (every == 0) return t;
  return t < kTimeMin + every ? kTimeMin : floor_div(t, every) * every;
}
// The first time whose floor is t or later.
inline int64_t time_ceil(int64_t t, int64_t every) {
  return every == 0 ? t : time_floor(time_add(t, every - 1), every);
}
// Position of the first time above t in [first, stop) of ascending times.
inline size_t upper_time(const int64_t* times, size_t first, size_t stop, int64_t t) {
  while (first < stop) {
    const size_t middle = (first + stop) >> 1;
    if (times[middle] <= t) {
      first = middle + 1;
    } else {
      stop = middle;
    }
  }
  return first;
}

// The request times around one of them between which nothing changes: [since, until).
struct Interval {
  int64_t since = kTimeMin;
  int64_t until = kTimeMax;
  void begins(int64_t t) { since = std::max(since, t); }
  void ends(int64_t t) { until = std::min(until, t); }
};

// Sorted times at which what is known of a key's events changes.
struct KnownPoints {
  const int64_t* data = nullptr;
  size_t n = 0;
};

// An event of time e is in the window at T from T = e + enters until before T = e + leaves; T is the request
// time, floored to `every`, less `lag`.
struct Window {
  int64_t enters = 0;  // 0, or 1 where the window is open above
  int64_t leaves = 0;  // its length, plus 1 where it is closed below
  int64_t every = 0;
  int64_t lag = 0;
  int64_t tile = 0;       // width of the segments at multiples of which it is cut, 0 for one segment
  bool as_known = false;  // only events known by T count
  int32_t group = -1;     // of the tiles that serve it

  int64_t at(int64_t now) const { return time_sub(time_floor(now, every), lag); }
  // The request time from which T is t or later.
  int64_t reaches(int64_t t) const { return time_ceil(time_add(t, lag), every); }

  // Events [low, high) of n in the window, and the interval narrowed to the times at which they are those.
  void bounds(const EventSlice& events, const KnownPoints& points, int64_t now, size_t* low, size_t* high,
              Interval* interval) const {
    const int64_t t = at(now);
    const size_t b = upper_time(events.time, 0, events.n, time_sub(t, enters));
    const size_t a = upper_time(events.time, 0, b, time_sub(t, leaves));
    *low = a;
    *high = b;
    const auto entry = [&](size_t i) { return reaches(time_add(events.time[i], enters)); };
    const auto exit = [&](size_t i) { return reaches(time_add(events.time[i], leaves)); };
    if (b > 0) interval->begins(entry(b - 1));
    if (b < events.n) interval->ends(entry(b));
    if (a > 0) interval->begins(exit(a - 1));
    if (a < b) interval->ends(exit(a));
    if (!as_known) return;
    const size_t p = upper_time(points.data, 0, points.n, t);
    if (p > 0) interval->begins(reaches(points.data[p - 1]));
    if (p < points.n) interval->ends(reaches(points.data[p]));
  }
};

}  // namespace penstock
