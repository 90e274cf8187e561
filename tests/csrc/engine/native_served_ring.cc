// The ring of served rows under contention: several threads push, one drains now and then, others look.
// Every row pushed is counted for drift exactly once, whatever the ring drops; what is drained comes in the
// order of the pushes, and drained + dropped + held is what was pushed.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "engine/served_ring.h"

using namespace penstock;

namespace {

constexpr int64_t kPaneUs = 1000;

std::shared_ptr<DriftPanes> make_panes(size_t features) {
  std::shared_ptr<const HistogramSpec> inputs, score;
  CHECK(HistogramSpec::create(std::vector<HistogramColumn>(features, {{0.5f, 1.5f, 2.5f}}), &inputs).is_ok());
  CHECK(HistogramSpec::create({{{0.5f}}}, &score).is_ok());
  std::shared_ptr<DriftPanes> panes;
  CHECK(DriftPanes::create(inputs, score, kPaneUs, 4 * kPaneUs, &panes).is_ok());
  return panes;
}

void contend(size_t capacity, bool drain) {
  constexpr size_t kFeatures = 3, kThreads = 3, kRequests = 2000, kRows = 16;
  ServedRing ring(capacity, kFeatures, 2, 1);
  const auto panes = make_panes(kFeatures);
  ring.count_drift(panes);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&ring, t] {
      for (size_t r = 0; r < kRequests; ++r) {
        {
          const std::lock_guard lock(ring.mutex());
          for (size_t i = 0; i < kRows; ++i) {
            const float row[kFeatures] = {static_cast<float>(i % 4), 1, static_cast<float>(t)};
            const double scores[2] = {static_cast<double>(i % 2), 7};
            const int64_t event_time = static_cast<int64_t>(r);
            ring.push(t << 32 | (r * kRows + i), static_cast<int64_t>(i % 2) * kPaneUs, 0, scores, row,
                      &event_time);
          }
        }
        ring.help(kRows);
      }
    });
  }
  uint64_t drained = 0;
  uint64_t next[kThreads] = {};
  uint64_t ids[100];
  int64_t now[100], event_time[100];
  uint8_t status[100];
  double scores[200];
  float rows[100 * kFeatures];
  const auto take = [&] {
    const size_t want = std::min<size_t>(100, ring.size());
    const size_t n = ring.drain(want, {ids, now, status, scores, rows, event_time});
    CHECK(n == want);
    for (size_t i = 0; i < n; ++i) {
      const uint64_t t = ids[i] >> 32;
      const auto at = static_cast<uint32_t>(ids[i]);
      CHECK(at >= next[t]);  // in order; what lies between was dropped
      next[t] = at + 1;
      CHECK(rows[i * kFeatures + 2] == static_cast<float>(t) && scores[2 * i + 1] == 7);
      CHECK(event_time[i] == at / kRows);
    }
    drained += n;
    return n;
  };
  std::vector<uint64_t> inputs(panes->inputs().n_slots()), score(panes->score().n_slots());
  if (drain) {
    for (int i = 0; i < 300; ++i) {
      (void)take();
      (void)panes->window(std::nullopt, 4, inputs.data(), score.data());
    }
  }
  for (auto& thread : threads) thread.join();
  if (drain) {
    while (take() > 0) {
    }
  }
  ring.count_all();
  constexpr uint64_t kAll = kThreads * kRequests * kRows;
  CHECK(drained + ring.dropped() + ring.size() == kAll);
  std::fill(inputs.begin(), inputs.end(), 0);
  std::fill(score.begin(), score.end(), 0);
  const DriftPanes::Window window = panes->window(std::nullopt, 4, inputs.data(), score.data());
  CHECK(window.n == kAll && window.rows == kAll && window.late == 0 && window.expired == 0);
  for (size_t bin = 0; bin < 4; ++bin) {
    CHECK(inputs[bin] == kAll / 4);  // the first column
    CHECK(inputs[panes->inputs().offset(1) + bin] == (bin == 1 ? kAll : 0));
  }
  CHECK(score[0] == kAll / 2 && score[1] == kAll / 2);
}

}  // namespace

int main() {
  for (const size_t capacity : {1, 7, 64, 300, 4096}) {
    contend(capacity, true);
    contend(capacity, false);
  }
  std::puts("served ring: ok");
  return 0;
}
