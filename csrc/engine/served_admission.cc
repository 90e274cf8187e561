// The way into a ServedModel: options, rows and ids of a call, its request and its place in the lane.
#include <algorithm>
#include <cstring>

#include "engine/served_model.h"

namespace penstock {
namespace {

constexpr int64_t kEndOfTimeUs = 253'402'300'800'000'000;  // the year 10000

Status exhausted(std::string text) {
  return {Code::kResourceExhausted, std::move(text)};
}

int64_t to_ms_up(int64_t ns) {
  return (ns + 999'999) / 1'000'000;
}

}  // namespace

Status ServedModel::check_options(const wire::Options& options, uint32_t rows, int64_t received_ns,
                                  int64_t wall_us, Admission* admission) const {
  if (rows == 0) return Status::invalid("the request has 0 rows; expected at least 1");
  if (rows > config_.lane.max_rows_per_request) {
    return Status::invalid("the request has " + std::to_string(rows) + " rows; expected at most " +
                           std::to_string(config_.lane.max_rows_per_request));
  }
  if (options.has_now && !config_.allow_replay) {
    return {Code::kFailedPrecondition, "options.now is given, but serving.allow_replay is false"};
  }
  if (options.has_now && (options.now_us < 0 || options.now_us >= kEndOfTimeUs)) {
    return Status::invalid("options.now is " + std::to_string(options.now_us) +
                           "; expected microseconds of the years 1970 to 9999");
  }
  int64_t limit_ns = config_.max_latency_ns;
  if (options.deadline_us > 0 && options.deadline_us < limit_ns / 1000) limit_ns = options.deadline_us * 1000;
  admission->rows = rows;
  admission->received_ns = received_ns;
  admission->deadline_ns = received_ns + limit_ns;
  admission->now_us = options.has_now ? options.now_us : wall_us;
  admission->with_timings = options.timings;
  admission->low = options.low_priority;
  admission->trace = options.trace;
  return {};
}

void ServedModel::read_request_ids(const wire::Options& options, uint32_t rows, uint64_t first_id,
                                   Scratch& scratch) {
  scratch.request_ids.resize(std::max<size_t>(scratch.request_ids.size(), rows));
  wire::Cursor list = options.request_id_list;
  for (uint32_t r = 0; r < rows; ++r) {
    uint64_t id = first_id + r;
    if (options.request_ids == wire::RequestIds::kOne) id = options.request_id;
    if (options.request_ids == wire::RequestIds::kList) (void)list.read_uint(&id);
    scratch.request_ids[r] = id;
  }
}

void ServedModel::count_refused(Code code, uint32_t rows, bool low, int64_t received_ns) {
  meter_.ended(code, rows);
  meter_.refused(mono_ns() - received_ns);
  ++request_counts_[low].submitted;
  ++request_counts_[low].rejected;
  row_counts_[low].submitted += rows;
  row_counts_[low].rejected += rows;
}

Status ServedModel::refuse(Status status, uint32_t rows, bool low, int64_t received_ns) {
  const std::lock_guard lock(mutex_);
  count_refused(status.code, rows, low, received_ns);
  return status;
}

Status ServedModel::unavailable(int64_t now_ns, int64_t* retry_after_ms) const {
  *retry_after_ms = to_ms_up(breaker_.retry_after_ns(now_ns));
  return {Code::kUnavailable, "model '" + config_.name + "' fails or hangs: its circuit breaker is open"};
}

Status ServedModel::refusal(const Lane::Submitted& submitted, int64_t* retry_after_ms) const {
  *retry_after_ms = to_ms_up(submitted.retry_after_ns);
  return exhausted("the queue of model '" + config_.name + "' is " +
                   (submitted.refusal == Refusal::kTime ? "too long for the request's deadline"
                                                        : "full for its class or connection"));
}

Status ServedModel::too_many() const {
  return exhausted("too many requests are unanswered; at most " + std::to_string(requests_.size()) +
                   ", shared by all connections");
}

// While requests are refused, this one is looked at before anything is done for it. As of its arrival, so
// that no clock is read: what is admitted here is looked at once more.
Status ServedModel::refuse_early(const Admission& admission, int64_t* retry_after_ms) {
  const std::lock_guard lock(mutex_);
  Status status;
  if (!breaker_.closed()) {
    status = unavailable(admission.received_ns, retry_after_ms);
  } else if (const uint32_t peer = peers_.find(admission.target.connection); peer == kNone) {
    return {};
  } else if (!within_share(peers_[peer].held, 1, free_requests_.size(), requests_.size())) {
    status = too_many();
  } else {
    const Lane::Submitted checked =
        lane_.check({admission.rows, admission.deadline_ns, peer, admission.low}, admission.received_ns);
    if (checked.slot != Lane::kNoSlot) return {};
    learn_from_refusal(admission.rows);
    status = refusal(checked, retry_after_ms);
  }
  count_refused(status.code, admission.rows, admission.low, admission.received_ns);
  look(admission.received_ns);
  return status;
}

Status ServedModel::predict(const wire::PredictCall& call, std::string_view params, const Target& target,
                            int64_t received_ns, int64_t wall_us, uint64_t first_id, Scratch& scratch,
                            int64_t* retry_after_ms, uint64_t* tag) {
  Admission admission{.target = target};
  Status status = check_options(call.options, call.rows, received_ns, wall_us, &admission);
  if (status.is_ok() && plan_ == nullptr) {
    status = {Code::kFailedPrecondition,
              "model '" + config_.name + "' has no feature service; expected a call of predict_vectors"};
  }
  if (!status.is_ok()) return refuse(std::move(status), call.rows, call.options.low_priority, received_ns);
  const bool use_cache = !call.options.no_cache;
  scratch.edge.used = false;
  if (use_cache && edge_in_use() && edge_answers(admission, call, first_id, scratch, &status, tag))
    return status;
  scratch.gathered.with_sources = scratch.edge.used;
  if (received_ns < look_until_ns_.load(std::memory_order_relaxed)) {
    if (status = refuse_early(admission, retry_after_ms); !status.is_ok()) return status;
  }
  admission.decoded_ns = mono_ns();
  status = plan_->gather(call, admission.now_us, received_ns, use_cache, nullptr, scratch.plan,
                         &scratch.gathered, &scratch.misses);
  if (!status.is_ok()) return refuse(std::move(status), call.rows, admission.low, received_ns);
  if (!scratch.misses.empty())
    return park(admission, params, use_cache, scratch.misses, retry_after_ms, tag, first_id);
  if (samples_.chooses(call)) {
    samples_.add(params, admission.now_us, wall_us, call.rows, scratch.gathered.rows.data(), n_features_);
  }
  read_request_ids(call.options, call.rows, first_id, scratch);
  return admit(admission, scratch.gathered.rows.data(), scratch.gathered.status.data(),
               scratch.gathered.event_time.data(), scratch, retry_after_ms, tag);
}

Status ServedModel::predict_vectors(const wire::VectorsCall& call, const Target& target, int64_t received_ns,
                                    int64_t wall_us, uint64_t first_id, Scratch& scratch,
                                    int64_t* retry_after_ms, uint64_t* tag) {
  Admission admission{.target = target, .as_bin = true};
  Status status = check_options(call.options, call.rows, received_ns, wall_us, &admission);
  if (status.is_ok() && call.bytes != call.rows * n_features_ * sizeof(float)) {
    status =
        Status::invalid("data is of " + std::to_string(call.bytes) + " bytes; expected " +
                        std::to_string(call.rows) + " rows of " + std::to_string(n_features_) + " float32");
  }
  if (!status.is_ok()) return refuse(std::move(status), call.rows, call.options.low_priority, received_ns);
  scratch.edge.used = false;
  if (!call.options.no_cache && edge_in_use() &&
      edge_answers(admission, call, first_id, scratch, &status, tag)) {
    return status;
  }
  if (received_ns < look_until_ns_.load(std::memory_order_relaxed)) {
    if (status = refuse_early(admission, retry_after_ms); !status.is_ok()) return status;
  }
  GatheredRows& gathered = scratch.gathered;
  const size_t n = call.rows;
  fit_gathered(gathered, n);
  gathered.with_sources = false;
  std::memcpy(gathered.rows.data(), call.data, call.bytes);
  std::fill_n(gathered.status.begin(), n, uint8_t{0});
  std::fill_n(gathered.event_time.begin(), n * n_views_, std::numeric_limits<int64_t>::min());
  read_request_ids(call.options, call.rows, first_id, scratch);
  return admit(admission, gathered.rows.data(), gathered.status.data(), gathered.event_time.data(), scratch,
               retry_after_ms, tag);
}

void ServedModel::fit_gathered(GatheredRows& gathered, size_t rows) const {
  if (gathered.rows.size() < rows * n_features_) gathered.rows.resize(rows * n_features_);
  if (gathered.status.size() < rows) gathered.status.resize(rows);
  if (gathered.event_time.size() < rows * n_views_) gathered.event_time.resize(rows * n_views_);
}

Status ServedModel::new_request(const Admission& admission, uint32_t* index, int64_t* retry_after_ms,
                                bool needs_run) {
  meter_.saw(admission.received_ns);
  if (stopping_ || (needs_run && !breaker_.closed())) {
    count_refused(Code::kUnavailable, admission.rows, admission.low, admission.received_ns);
    if (stopping_) return {Code::kUnavailable, "model '" + config_.name + "' was unloaded"};
    look(admission.received_ns);
    return unavailable(admission.received_ns, retry_after_ms);
  }
  bool fresh;
  const uint32_t peer = peers_.acquire(admission.target.connection, &fresh);
  if (peer == kNone || !within_share(peers_[peer].held - 1, 1, free_requests_.size(), requests_.size())) {
    if (peer != kNone) peers_.release(peer);
    count_refused(Code::kResourceExhausted, admission.rows, admission.low, admission.received_ns);
    look(admission.received_ns);
    return too_many();
  }
  if (fresh) lane_.forget_flow(peer);
  ++request_counts_[admission.low].submitted;
  ++request_counts_[admission.low].in_flight;
  row_counts_[admission.low].submitted += admission.rows;
  row_counts_[admission.low].in_flight += admission.rows;
  *index = free_requests_.back();
  free_requests_.pop_back();
  Request& request = requests_[*index];
  ++request.generation;
  request.peer = peer;
  request.target = admission.target;
  request.rows = admission.rows;
  request.first_row = kNone;
  request.lane_slot = Lane::kNoSlot;
  request.received_ns = admission.received_ns;
  request.deadline_ns = admission.deadline_ns;
  request.formed_ns = request.run_ns = request.admitted_ns = request.finished_ns = 0;
  request.decoded_ns = admission.decoded_ns;
  request.trace = admission.trace;
  request.now_us = admission.now_us;
  request.as_bin = admission.as_bin;
  request.with_timings = admission.with_timings;
  request.low = admission.low;
  request.no_score = false;
  request.status = {};
  request.retry_after_ms = -1;
  return {};
}

Status ServedModel::admit(const Admission& admission, const float* rows, const uint8_t* row_status,
                          const int64_t* event_time, Scratch& scratch, int64_t* retry_after_ms,
                          uint64_t* tag) {
  const std::lock_guard lock(mutex_);
  uint32_t index = kNone;
  if (Status status = new_request(admission, &index, retry_after_ms); !status.is_ok()) return status;
  link(index);
  *tag = tag_of(index, requests_[index].generation);
  Status status = enter(index, rows, row_status, event_time, scratch, retry_after_ms);
  if (!status.is_ok()) {
    unlink(index);
    count_end(requests_[index], status.code);
    meter_.refused(mono_ns() - admission.received_ns);
    free_request(index);
  }
  return status;
}

// The rows of a request go to the lane, unless an equal request spares it the run.
Status ServedModel::enter(uint32_t index, const float* rows, const uint8_t* row_status,
                          const int64_t* event_time, Scratch& scratch, int64_t* retry_after_ms) {
  if (scratch.edge.used && edge_shares(index, rows, row_status, event_time, scratch)) return {};
  Status status = queue_rows(index, rows, row_status, event_time, scratch.request_ids.data(), retry_after_ms);
  if (status.is_ok() && scratch.edge.used) edge_queued(index, scratch);
  return status;
}

// What an idle lane refuses, it refuses for its predicted run time alone. Were the slow runs behind that
// prediction a passing trouble of the machine, no run would ever correct it: so each such refusal counts as
// a run of half the predicted time, and a lane that refuses all is tried again after a window of them. Never
// so short that the trial would run on the loop thread.
void ServedModel::learn_from_refusal(uint32_t rows) {
  if (lane_.queued_rows() > 0 || lane_.running_batches() > 0 || rows > config_.lane.max_queued_rows) return;
  const auto most = static_cast<uint32_t>(config_.lane.policy.max_batch_rows);
  for (const uint32_t n : {std::min(rows, most), rows > most ? rows % most : 0}) {
    const int64_t predicted = n == 0 ? 0 : lane_.run_time().predict(n);
    if (predicted > config_.inline_limit_ns)
      lane_.record_run(n, std::max(config_.inline_limit_ns + 1, predicted / 2));
  }
}

// Hands a request's rows to the lane. On a refusal the request holds no rows.
Status ServedModel::queue_rows(uint32_t index, const float* rows, const uint8_t* row_status,
                               const int64_t* event_time, const uint64_t* ids, int64_t* retry_after_ms) {
  Request& request = requests_[index];
  if (request.rows > free_rows_) {
    return exhausted("too many rows are unanswered; at most " + std::to_string(config_.max_resident_rows));
  }
  Status status = queue_placed(index, retry_after_ms);
  if (status.is_ok()) place_rows(index, rows, row_status, event_time, ids);
  return status;
}

// A place in the lane for a request whose rows are resident or will be before the lock is given up.
Status ServedModel::queue_placed(uint32_t index, int64_t* retry_after_ms) {
  Request& request = requests_[index];
  const int64_t now = mono_ns();
  request.admitted_ns = now;
  meter_.saw(now);
  if (now >= request.deadline_ns)
    return {Code::kDeadlineExceeded, "the deadline passed before the request could be queued"};
  if (!breaker_.closed()) return unavailable(now, retry_after_ms);  // it opened while the request was parked
  const Lane::Submitted submitted = lane_.submit(
      tag_of(index, request.generation), {request.rows, request.deadline_ns, request.peer, request.low}, now);
  if (submitted.slot == Lane::kNoSlot) {
    look(now);
    learn_from_refusal(request.rows);
    return refusal(submitted, retry_after_ms);
  }
  if (waits_apart(request.state)) parked_queue_.remove(requests_, index);
  request.lane_slot = submitted.slot;
  slot_tags_[submitted.slot] = tag_of(index, request.generation);
  request.state = State::kQueued;
  return {};
}

void ServedModel::place_rows(uint32_t index, const float* rows, const uint8_t* row_status,
                             const int64_t* event_time, const uint64_t* ids) {
  Request& request = requests_[index];
  request.first_row = free_row_;
  request.seek_index = 0;
  request.seek_row = free_row_;
  uint32_t last = kNone;
  for (uint32_t r = 0; r < request.rows; ++r) {
    const uint32_t at = free_row_;
    free_row_ = next_row_[at];
    std::copy_n(rows + r * n_features_, n_features_, &rows_[at * n_features_]);
    if (n_views_ != 0) std::copy_n(event_time + r * n_views_, n_views_, &event_time_[at * n_views_]);
    row_status_[at] = row_status[r];
    request_ids_[at] = ids[r];
    if (edge_ != nullptr) edge_->fills[at] = 0;
    last = at;
  }
  next_row_[last] = kNone;
  free_rows_ -= request.rows;
}

}  // namespace penstock
