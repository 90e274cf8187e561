// Shadow requests of a ServedModel: the rows of a request that another version answered, scored by this one
// unseen. They count in this model's counters and go through its served ring, marked kShadowRow.
#include <algorithm>

#include "engine/served_model.h"

namespace penstock {

void ServedModel::copy_features(const Request& request, Result* out) const {
  out->now_us = request.now_us;
  out->features.resize(request.rows * n_features_);
  out->event_time.resize(request.rows * n_views_);
  uint32_t row = request.first_row;
  for (uint32_t r = 0; r < request.rows; ++r, row = next_row_[row]) {
    std::copy_n(&rows_[row * n_features_], n_features_, &out->features[r * n_features_]);
    if (n_views_ != 0) std::copy_n(&event_time_[row * n_views_], n_views_, &out->event_time[r * n_views_]);
  }
}

// served_.mutex() is held.
void ServedModel::serve_row(const Request& request, uint32_t row, uint8_t flags) {
  served_.push(request_ids_[row], request.now_us, row_status_[row] | flags, &scores_[row * n_outputs_],
               &rows_[row * n_features_], n_views_ == 0 ? nullptr : &event_time_[row * n_views_]);
}

void ServedModel::shadow(const Result& answered) {
  const std::lock_guard lock(mutex_);
  const int64_t now = mono_ns();
  expire_locked(now);  // where no loop thread does it
  Admission admission;
  admission.target.shadow = true;
  admission.rows = answered.rows;
  admission.received_ns = now;
  admission.deadline_ns = now + config_.max_latency_ns;
  admission.now_us = answered.now_us;
  admission.low = true;
  if (answered.rows > config_.lane.max_rows_per_request) {
    count_refused(Code::kInvalidArgument, answered.rows, true, now);
    return;
  }
  uint32_t index = kNone;
  int64_t retry_after_ms = -1;
  if (!new_request(admission, &index, &retry_after_ms).is_ok()) return;
  link(index);
  const Status status = queue_rows(index, answered.features.data(), answered.row_status.data(),
                                   answered.event_time.data(), answered.request_ids.data(), &retry_after_ms);
  if (!status.is_ok()) {
    unlink(index);
    count_end(requests_[index], status.code);
    free_request(index);
    return;
  }
  if (lane_.running_batches() == 0) work_.notify_one();
}

// In place of take(): the request is counted, its rows are served and freed.
void ServedModel::end_shadow(uint32_t index) {
  Request& request = requests_[index];
  const int64_t now = mono_ns();
  if (request.status.is_ok() && now >= request.deadline_ns) request.status = {Code::kDeadlineExceeded, ""};
  meter_.saw(now);
  const StageTimes times = times_of(request, now);
  if (request.status.is_ok()) {
    const std::lock_guard served(served_.mutex());
    uint32_t row = request.first_row;
    for (uint32_t r = 0; r < request.rows; ++r, row = next_row_[row]) serve_row(request, row, kShadowRow);
    meter_.answered(times);
  }
  meter_.took(times.total_ns);
  count_end(request, request.status.code);
  free_request(index);
}

}  // namespace penstock
