// What one served model says of its time: latencies by stage, objectives met, busy and queue-delay ratios.
//
// The stages of a request answered OK add up to its total: receive (read callback to decoded; for bare
// vectors to admitted), gather (to admitted, the loader's reads included), queue (waiting for a run, its
// batch's copies included), run (its batches in the model), encode (answer known to its reply being encoded).
//
// An objective is met by a request that was answered OK, which never happens after its deadline. It is missed
// by one that was due and was not: late, refused for want of room or time, or failed. Requests that were
// wrong in themselves or cancelled were not due.
//
// Times come with the calls: the readings that the request path takes anyway. saw() tells the latest one,
// under which ends are counted. One thread at a time: the model's lock. Nothing allocates.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/status.h"
#include "engine/latency.h"
#include "engine/sliding.h"

namespace penstock {

struct StageTimes {
  int64_t receive_ns = 0, gather_ns = 0, queue_ns = 0, run_ns = 0, encode_ns = 0, total_ns = 0;
};

struct StageHistograms {
  LatencyHistogram receive, gather, queue, run, encode, total;  // total: of every request that was queued
  LatencyHistogram refuse;  // read callback to refusal, of those refused on arrival
};

struct MeterWindow {
  double seconds = 0;  // that it covers: less than its width soon after the start
  uint64_t met = 0, due = 0, met_rows = 0;
};

struct MeterReading {
  static constexpr int64_t kShort = 10, kLong = 60;  // widths, seconds
  uint64_t met = 0, due = 0;                         // since the start
  MeterWindow short_window, long_window;
  double busy_ratio = 0;           // of the short window: time in the model / time
  int64_t queue_delay_p95_ns = 0;  // of the short window
};

class ServingMeter {
 public:
  explicit ServingMeter(int64_t start_ns) : start_ns_(start_ns), now_ns_(start_ns) {}

  void saw(int64_t now_ns) { now_ns_ = std::max(now_ns_, now_ns); }

  // Every request, once, at its end.
  void ended(Code code, uint32_t rows) {
    const bool ok = code == Code::kOk;
    if (!ok && !was_due(code)) return;
    Sums& sums = panes_.at(now_ns_);
    ++due_;
    ++sums.due;
    if (!ok) return;
    ++met_;
    ++sums.met;
    sums.met_rows += rows;
  }

  // One answered OK.
  void answered(const StageTimes& times) {
    stages_.receive.add(times.receive_ns);
    if (times.gather_ns > 0) stages_.gather.add(times.gather_ns);
    stages_.queue.add(times.queue_ns);
    stages_.run.add(times.run_ns);
    stages_.encode.add(times.encode_ns);
    panes_.at(now_ns_).queue_delay.add(times.queue_ns);
  }
  void refused(int64_t elapsed_ns) { stages_.refuse.add(elapsed_ns); }
  void took(int64_t total_ns) { stages_.total.add(total_ns); }

  // One run at a time.
  void run_began(int64_t now_ns) { running_since_ns_ = now_ns; }
  void ran(int64_t started_ns, int64_t finished_ns) {
    running_since_ns_ = kIdle;
    saw(finished_ns);
    // A run that took longer than the ring reaches fills it once.
    started_ns = std::max(started_ns, finished_ns - (SecondPanes<Sums>::kPanes - 1) * kSecondNs);
    while (started_ns < finished_ns) {
      const int64_t until = std::min(finished_ns, (started_ns / kSecondNs + 1) * kSecondNs);
      panes_.at(started_ns).busy_ns += until - started_ns;
      started_ns = until;
    }
  }

  const StageHistograms& stages() const { return stages_; }

  MeterReading read(int64_t now_ns) const {
    MeterReading reading;
    reading.met = met_;
    reading.due = due_;
    reading.short_window = window(now_ns, MeterReading::kShort);
    reading.long_window = window(now_ns, MeterReading::kLong);
    int64_t busy_ns = 0;
    DelayCounts delays;
    uint64_t delayed = 0;
    panes_.each(now_ns, MeterReading::kShort, [&](const Sums& sums) {
      busy_ns += sums.busy_ns;
      for (size_t b = 0; b < DelayCounts::kBuckets; ++b) {
        delays.counts[b] += sums.queue_delay.counts[b];
        delayed += sums.queue_delay.counts[b];
      }
    });
    const int64_t from = first(now_ns, MeterReading::kShort);
    if (running_since_ns_ != kIdle)
      busy_ns += std::max<int64_t>(0, now_ns - std::max(running_since_ns_, from));
    if (now_ns > from) {
      reading.busy_ratio = std::min(1.0, static_cast<double>(busy_ns) / static_cast<double>(now_ns - from));
    }
    uint64_t seen = 0;
    for (size_t b = 0; b < DelayCounts::kBuckets && delayed > 0; ++b) {
      seen += delays.counts[b];
      if (20 * seen < 19 * delayed) continue;
      reading.queue_delay_p95_ns = DelayCounts::upper_ns(b);
      break;
    }
    return reading;
  }

 private:
  static constexpr int64_t kIdle = INT64_MIN;
  struct Sums {
    uint64_t met = 0, due = 0, met_rows = 0;
    int64_t busy_ns = 0;
    DelayCounts queue_delay;
  };

  static bool was_due(Code code) {
    return code == Code::kDeadlineExceeded || code == Code::kResourceExhausted ||
           code == Code::kUnavailable || code == Code::kInternal;
  }
  int64_t first(int64_t now_ns, int64_t seconds) const {
    return std::max(start_ns_, SecondPanes<Sums>::window_start(now_ns, seconds));
  }
  MeterWindow window(int64_t now_ns, int64_t seconds) const {
    MeterWindow window;
    window.seconds = static_cast<double>(now_ns - first(now_ns, seconds)) / 1e9;
    panes_.each(now_ns, seconds, [&](const Sums& sums) {
      window.met += sums.met;
      window.due += sums.due;
      window.met_rows += sums.met_rows;
    });
    return window;
  }

  const int64_t start_ns_;
  int64_t now_ns_;
  int64_t running_since_ns_ = kIdle;
  uint64_t met_ = 0, due_ = 0;
  StageHistograms stages_;
  SecondPanes<Sums> panes_;
};

}  // namespace penstock
