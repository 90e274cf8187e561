#include "batch/policy.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace penstock {

size_t RunTimeModel::bucket_of(size_t rows) {
  const size_t bucket = std::bit_width(std::max<size_t>(rows, 1) - 1);  // ceil(log2(rows))
  return std::min(bucket, kBuckets - 1);
}

void RunTimeModel::record(size_t rows, int64_t elapsed_ns) {
  Window& window = windows_[bucket_of(rows)];
  window.runs[window.count % kWindow] = std::max<int64_t>(elapsed_ns, 0);
  ++window.count;
  const size_t held = std::min<size_t>(window.count, kWindow);
  int64_t first = 0;
  int64_t second = 0;
  for (size_t i = 0; i < held; ++i) {
    const int64_t run = window.runs[i];
    if (run > first) {
      second = first;
      first = run;
    } else if (run > second) {
      second = run;
    }
  }
  window.high = held == 1 ? first : second;
}

int64_t RunTimeModel::predict(size_t rows) const {
  const size_t bucket = bucket_of(rows);
  if (windows_[bucket].count > 0) return windows_[bucket].high;
  for (size_t larger = bucket + 1; larger < kBuckets; ++larger) {
    if (windows_[larger].count > 0) return windows_[larger].high;
  }
  for (size_t smaller = bucket; smaller-- > 0;) {
    if (windows_[smaller].count > 0) {
      const int64_t high = windows_[smaller].high;
      const int64_t factor = int64_t{1} << (bucket - smaller);
      return high > std::numeric_limits<int64_t>::max() / factor ? high : high * factor;
    }
  }
  return initial_ns_;
}

BatchDecision form_batch(const QueuedWork* queue, size_t n, int64_t now_ns, const RunTimeModel& model,
                         const PolicyConfig& config) {
  BatchDecision decision;
  // A guard larger than the time left would refuse work that could be answered: it holds back rows, not
  // requests.
  while (decision.expired < n) {
    const QueuedWork& head = queue[decision.expired];
    if (now_ns + model.predict(head.rows) < head.deadline_ns) break;
    ++decision.expired;
  }
  if (decision.expired == n) return decision;
  const int64_t earliest = queue[decision.expired].deadline_ns;
  size_t rows = 0;
  for (size_t i = decision.expired; i < n; ++i) {
    const size_t grown = rows + queue[i].rows;
    if (grown > config.max_batch_rows) break;
    // The head always goes: alone it makes its deadline. What joins it must not make it late.
    if (i > decision.expired && now_ns + model.predict(grown) + config.guard_ns >= earliest) break;
    rows = grown;
    ++decision.take;
  }
  decision.rows = rows;
  return decision;
}

Admission admit(uint64_t rows_ahead, uint64_t rows, int64_t deadline_ns, int64_t now_ns,
                int64_t busy_until_ns, const RunTimeModel& model, const PolicyConfig& config) {
  const auto run_ns = [&](uint64_t n) {
    const size_t rest = static_cast<size_t>(n % config.max_batch_rows);
    return static_cast<int64_t>(n / config.max_batch_rows) * model.predict(config.max_batch_rows) +
           (rest == 0 ? 0 : model.predict(rest));
  };
  const int64_t start_ns = std::max(now_ns, busy_until_ns);
  const int64_t end_ns = start_ns + run_ns(rows_ahead + rows);
  if (end_ns + config.guard_ns < deadline_ns) return {};
  // Alone on an idle lane the guard is waived, as in form_batch: better tried than refused.
  if (rows_ahead == 0 && start_ns == now_ns && end_ns < deadline_ns) return {};
  return {false, std::max<int64_t>(start_ns - now_ns + run_ns(rows_ahead), kMinRetryAfterNs)};
}

}  // namespace penstock
