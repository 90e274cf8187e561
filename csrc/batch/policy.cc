#include "batch/policy.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

namespace penstock {

void RunTimeModel::record(size_t rows, int64_t elapsed_ns) {
  Window& window = windows_[bucket_of(rows)];
  const int64_t run = std::max<int64_t>(elapsed_ns, 0);
  const int64_t before = window.high;
  const int64_t gone = std::exchange(window.runs[window.count % kWindow], run);
  ++window.count;
  if (window.count > kWindow && gone < before && run < before) return;  // the largest are the same
  const size_t n = std::min<size_t>(window.count, kWindow);
  std::array<int64_t, kWindow> sorted = window.runs;
  const auto wanted = sorted.begin() + static_cast<std::ptrdiff_t>(rank(n)) - 1;
  std::nth_element(sorted.begin(), wanted, sorted.begin() + static_cast<std::ptrdiff_t>(n), std::greater<>());
  window.high = *wanted;
  if (window.high != before || window.count == 1) predict_all();
}

void RunTimeModel::predict_all() {
  for (size_t bucket = 0; bucket < kBuckets; ++bucket) {
    size_t from = bucket;
    while (from < kBuckets && windows_[from].count == 0) ++from;
    if (from < kBuckets) {
      predicted_[bucket] = windows_[from].high;
      continue;
    }
    from = bucket;
    while (from > 0 && windows_[from].count == 0) --from;
    const int64_t high = windows_[from].high;
    const int64_t factor = int64_t{1} << (bucket - from);
    predicted_[bucket] = high > std::numeric_limits<int64_t>::max() / factor ? high : high * factor;
  }
}

int64_t run_ns(uint64_t rows, const RunTimeModel& model, const PolicyConfig& config) {
  const uint64_t full = rows / config.max_batch_rows;
  const auto rest = static_cast<size_t>(rows % config.max_batch_rows);
  return (full == 0 ? 0 : static_cast<int64_t>(full) * model.predict(config.max_batch_rows)) +
         (rest == 0 ? 0 : model.predict(rest));
}

size_t rows_within(int64_t slack_ns, size_t most, const RunTimeModel& model) {
  if (model.predict(most) < slack_ns) return most;
  for (size_t bucket = RunTimeModel::bucket_of(most); bucket-- > 0;) {
    if (model.predict(size_t{1} << bucket) < slack_ns) return size_t{1} << bucket;
  }
  return 0;
}

bool worth_serving(size_t cut, size_t full, const RunTimeModel& model) {
  const auto rate = [&](size_t rows) {
    return static_cast<double>(rows) / static_cast<double>(std::max<int64_t>(model.predict(rows), 1));
  };
  return cut >= full || 10 * rate(cut) >= 9 * rate(full);
}

Admission admit(const Ahead& ahead, uint64_t rows, int64_t deadline_ns, int64_t now_ns,
                const RunTimeModel& model, const PolicyConfig& config) {
  const uint64_t most = config.max_batch_rows;
  const int64_t start_ns = std::max(now_ns, ahead.busy_until_ns);
  int64_t others_ns = 0;
  if (ahead.other_rows > 0) {
    const uint64_t n = batches_of(ahead.rows + rows, most);
    const uint64_t turns =
        ahead.low ? (config.low_every - 1) * n : low_batches_before(n, ahead.high_batches, config);
    others_ns = run_ns(std::min(ahead.other_rows, turns * most), model, config);
  }
  const int64_t end_ns = start_ns + others_ns + run_ns(ahead.rows + rows, model, config);
  if (end_ns + config.guard_ns < deadline_ns) return {};
  // Alone on an idle lane the guard is waived, as it is when the batch is formed: better tried than refused.
  if (ahead.rows == 0 && others_ns == 0 && start_ns == now_ns && end_ns < deadline_ns) return {};
  const int64_t before_ns = start_ns - now_ns + others_ns + run_ns(ahead.rows, model, config);
  return {false, std::max<int64_t>(before_ns, kMinRetryAfterNs)};
}

}  // namespace penstock
