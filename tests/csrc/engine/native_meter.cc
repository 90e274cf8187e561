// The meter of a served model under a simulated clock, against a plain list of everything that happened.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "engine/serving_meter.h"

using namespace penstock;

namespace {

constexpr int64_t kMs = 1'000'000;

struct Event {
  int64_t at;
  Code code;
  uint32_t rows;
  int64_t queue_ns;  // of one answered OK
};
struct Run {
  int64_t started, finished;
};

bool due(Code code) {
  return code == Code::kOk || code == Code::kDeadlineExceeded || code == Code::kResourceExhausted ||
         code == Code::kUnavailable || code == Code::kInternal;
}

struct Oracle {
  int64_t start;
  std::vector<Event> events;
  std::vector<Run> runs;

  void check(const MeterReading& reading, int64_t now, int64_t running_since) const {
    uint64_t met = 0, all = 0;
    for (const Event& e : events) {
      met += e.code == Code::kOk;
      all += due(e.code);
    }
    CHECK(reading.met == met && reading.due == all);
    for (const auto& [window, width] : {std::pair{reading.short_window, MeterReading::kShort},
                                        std::pair{reading.long_window, MeterReading::kLong}}) {
      const int64_t from = (now / kSecondNs - width + 1) * kSecondNs;
      met = all = 0;
      uint64_t rows = 0;
      for (const Event& e : events) {
        if (e.at < from || e.at > now) continue;
        met += e.code == Code::kOk;
        rows += e.code == Code::kOk ? e.rows : 0;
        all += due(e.code);
      }
      CHECK(window.met == met && window.due == all && window.met_rows == rows);
      CHECK(std::abs(window.seconds - static_cast<double>(now - std::max(start, from)) / 1e9) < 1e-9);
    }
    const int64_t from = std::max(start, (now / kSecondNs - MeterReading::kShort + 1) * kSecondNs);
    int64_t busy = 0;
    for (const Run& run : runs) busy += std::max<int64_t>(0, run.finished - std::max(run.started, from));
    if (running_since >= 0) busy += now - std::max(running_since, from);
    const double ratio = now > from ? static_cast<double>(busy) / static_cast<double>(now - from) : 0;
    CHECK(std::abs(reading.busy_ratio - std::min(1.0, ratio)) < 1e-9);
    std::vector<int64_t> delays;
    for (const Event& e : events) {
      if (e.code == Code::kOk && e.at >= (now / kSecondNs - MeterReading::kShort + 1) * kSecondNs)
        delays.push_back(e.queue_ns);
    }
    if (delays.empty()) {
      CHECK(reading.queue_delay_p95_ns == 0);
      return;
    }
    std::sort(delays.begin(), delays.end());
    const size_t rank = (19 * delays.size() + 19) / 20;
    const int64_t exact = delays[rank - 1];
    CHECK(reading.queue_delay_p95_ns >= exact);
    CHECK(reading.queue_delay_p95_ns <= exact + exact / 8 + 1024);
  }
};

void simulate(uint64_t seed) {
  std::mt19937_64 rng(seed);
  const auto below = [&](uint64_t n) { return static_cast<int64_t>(rng() % n); };
  int64_t now = 5 * kSecondNs + below(kSecondNs);
  const auto meter = std::make_unique<ServingMeter>(now);
  Oracle oracle{now, {}, {}};
  for (int step = 0; step < 3000; ++step) {
    switch (below(40)) {
      case 0:
        now += below(3 * kSecondNs);  // a lull
        break;
      case 1:
        now += below(20) == 0 ? 100 * kSecondNs : kMs;  // longer than the ring
        break;
      default:
        now += below(5 * kMs);
    }
    if (below(3) == 0) {
      const int64_t started = now;
      meter->run_began(started);
      now += below(30) == 0 ? below(12 * kSecondNs) : below(8 * kMs);
      oracle.check(meter->read(now), now, started);  // a run that is not over counts too
      meter->ran(started, now);
      oracle.runs.push_back({started, now});
    }
    meter->saw(now);
    meter->saw(now - below(kSecondNs));  // an older reading changes nothing
    const auto code = static_cast<Code>(below(11));
    const auto rows = static_cast<uint32_t>(1 + below(64));
    Event event{now, below(2) == 0 ? Code::kOk : code, rows,
                below(4) == 0 ? below(3 * kSecondNs) : below(kMs)};
    if (event.code == Code::kOk) {
      StageTimes times;
      times.queue_ns = event.queue_ns;
      meter->answered(times);
    }
    meter->ended(event.code, event.rows);
    oracle.events.push_back(event);
    if (step % 7 == 0) {
      const int64_t later = now + below(20 * kSecondNs) * (below(5) == 0 ? 1 : 0);
      oracle.check(meter->read(later), later, -1);
    }
  }
}

void histogram_edges() {
  std::mt19937_64 rng(3);
  LatencyHistogram histogram;
  std::vector<uint64_t> values;
  for (int i = 0; i < 20'000; ++i) {
    const uint64_t value = rng() >> (20 + rng() % 44);
    values.push_back(value);
    histogram.add(static_cast<int64_t>(value));
  }
  for (uint64_t edge = 1; edge < uint64_t{1} << 45; edge *= 3) {
    const auto at_most = [&](double limit) {
      return static_cast<uint64_t>(std::count_if(
          values.begin(), values.end(), [&](uint64_t v) { return static_cast<double>(v) <= limit; }));
    };
    const uint64_t got = histogram.count_at_most(edge);
    CHECK(got <= at_most(static_cast<double>(edge)));
    CHECK(got >= at_most(static_cast<double>(edge) * 15 / 16 - 1));
  }
  CHECK(histogram.count_at_most(UINT64_MAX) == histogram.count());
}

}  // namespace

int main() {
  for (uint64_t seed = 0; seed < 8; ++seed) simulate(seed);
  histogram_edges();
  return 0;
}
