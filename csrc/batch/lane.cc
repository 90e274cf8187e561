#include "batch/lane.h"

#include <algorithm>
#include <limits>

namespace penstock {
namespace {

LaneConfig checked(LaneConfig config) {
  config.policy.max_batch_rows = std::clamp<size_t>(config.policy.max_batch_rows, 1, kMaxBatchRows);
  config.policy.low_every = std::max(config.policy.low_every, 2U);
  config.max_flows = std::max(config.max_flows, 1U);
  return config;
}

}  // namespace

Lane::Lane(const LaneConfig& config)
    : config_(checked(config)),
      run_time_(config.initial_run_ns),
      high_(config_.max_requests + low_room(config_.max_requests), config_.max_flows,
            config_.policy.max_batch_rows, config_.horizon_ns),
      low_(config_.max_requests + low_room(config_.max_requests), config_.max_flows,
           config_.policy.max_batch_rows, config_.horizon_ns),
      high_room_{config_.max_requests, config_.max_queued_rows, 0, std::vector<Held>(config_.max_flows)},
      low_room_{low_room(config_.max_requests), low_room(config_.max_queued_rows), 0,
                std::vector<Held>(config_.max_flows)} {
  const uint32_t slots = high_room_.max_requests + low_room_.max_requests;
  slots_.resize(slots);
  free_.reserve(slots);
  for (uint32_t slot = slots; slot-- > 0;) free_.push_back(slot);
  batch_.reserve(kMaxBatchRows);
  ended_.reserve(slots);
}

Lane::Submitted Lane::check(const Wanted& wanted, int64_t now_ns) {
  const uint32_t rows = wanted.rows;
  if (rows == 0 || rows > config_.max_rows_per_request) return {kNoSlot, 0, Refusal::kSize};
  const Room& room = wanted.low ? low_room_ : high_room_;
  const Held& held = room.flows[wanted.flow];
  const FairQueue& queue = wanted.low ? low_ : high_;
  if (!within_share(held.requests, 1, room.max_requests - room.requests, room.max_requests) ||
      !within_share(held.rows, rows, room.max_rows - queue.rows(), room.max_rows)) {
    const int64_t drain_ns = run_time_.predict(config_.policy.max_batch_rows);
    return {kNoSlot, std::max<int64_t>(drain_ns, kMinRetryAfterNs), Refusal::kRoom};
  }
  const Ahead ahead{.rows = queue.rows_ahead(wanted.flow, rows, wanted.deadline_ns, now_ns),
                    .other_rows = (wanted.low ? high_ : low_).rows(),
                    .high_batches = high_batches_,
                    .low = wanted.low,
                    .busy_until_ns = running_batches_ > 0 ? busy_until_ns_ : now_ns};
  const Admission admission = admit(ahead, rows, wanted.deadline_ns, now_ns, run_time_, config_.policy);
  if (!admission.admitted) {
    if (wanted.deadline_ns >= queue.latest_deadline()) overloaded_ns_[wanted.low] = now_ns;
    return {kNoSlot, admission.retry_after_ns, Refusal::kTime};
  }
  return {free_.back(), 0, Refusal::kNone};
}

Lane::Submitted Lane::submit(uint64_t tag, const Wanted& wanted, int64_t now_ns) {
  ++requests_.submitted;
  rows_.submitted += wanted.rows;
  const Submitted result = check(wanted, now_ns);
  if (result.slot == kNoSlot) {
    ++requests_.ended[static_cast<size_t>(End::kRejected)];
    rows_.ended[static_cast<size_t>(End::kRejected)] += wanted.rows;
    return result;
  }
  free_.pop_back();
  Request& request = slots_[result.slot];
  request.tag = tag;
  request.deadline_ns = wanted.deadline_ns;
  request.sequence = ++sequence_;
  request.rows = wanted.rows;
  request.rows_taken = request.rows_done = request.pieces_out = 0;
  request.flow = wanted.flow;
  request.low = wanted.low;
  request.used = true;
  request.answered = false;
  by_deadline_.push(slots_, result.slot);
  Room& room = room_of(request);
  ++room.requests;
  ++room.flows[wanted.flow].requests;
  room.flows[wanted.flow].rows += wanted.rows;
  ++requests_.in_flight;
  rows_.in_flight += wanted.rows;
  queue_of(request).push(result.slot, wanted.flow, wanted.rows, wanted.deadline_ns, request.sequence, now_ns);
  return result;
}

// The most rows of a batch that begins with this request. It always goes if alone it makes its deadline; what
// joins it must not make it late.
size_t Lane::first_limit(const FairQueue& queue, uint32_t slot, int64_t now_ns) const {
  const size_t most = config_.policy.max_batch_rows;
  const int64_t slack_ns = queue.deadline_of(slot) - now_ns - config_.policy.guard_ns;
  return std::max(rows_within(slack_ns, most, run_time_), std::min<size_t>(queue.rows_of(slot), most));
}

// Does each loss of speed cost some request its deadline? Yes while requests are refused for want of time,
// and when what waits could not be done in time.
bool Lane::saturated(const FairQueue& queue, int64_t now_ns) const {
  const int64_t since_ns = now_ns - overloaded_ns_[&queue == &low_];
  if (since_ns <= 2 * run_time_.predict(config_.policy.max_batch_rows)) return true;
  const int64_t all_done_ns = now_ns + run_ns(queue.rows(), run_time_, config_.policy);
  return all_done_ns + config_.policy.guard_ns >= queue.latest_deadline();
}

// Ends what is first in the queue and cannot be in time even if it runs alone from now on; on a saturated
// lane also what would make a poor batch.
void Lane::drop_hopeless(FairQueue& queue, int64_t now_ns) {
  const size_t most = config_.policy.max_batch_rows;
  for (uint32_t slot = queue.top(); slot != FairQueue::kNone; slot = queue.top()) {
    const uint32_t rows = queue.rows_of(slot);
    const int64_t full_ns = now_ns + run_time_.predict(most) + config_.policy.guard_ns;
    if (rows <= most && full_ns < queue.deadline_of(slot)) return;  // it bears a full batch
    if (now_ns + run_ns(rows, run_time_, config_.policy) < queue.deadline_of(slot)) {
      const size_t cut = first_limit(queue, slot, now_ns);
      if (worth_serving(cut, std::min<uint64_t>(queue.rows(), most), run_time_)) return;
      if (!saturated(queue, now_ns)) return;
    }
    end(slot, End::kExpired);
  }
}

void Lane::fill(FairQueue& queue, int64_t now_ns, Filling* filling) {
  for (uint32_t slot = queue.top(); slot != FairQueue::kNone && filling->rows < filling->limit;
       slot = queue.top()) {
    const int64_t deadline_ns = queue.deadline_of(slot);
    if (deadline_ns < filling->earliest_ns) {
      size_t limit;
      if (filling->rows == 0) {
        limit = first_limit(queue, slot, now_ns);
      } else {
        limit = rows_within(deadline_ns - now_ns - config_.policy.guard_ns, filling->limit, run_time_);
        if (limit <= filling->rows) return;
      }
      filling->limit = std::min(filling->limit, limit);
      filling->earliest_ns = deadline_ns;
    }
    const auto take =
        static_cast<uint32_t>(std::min<size_t>(queue.rows_of(slot), filling->limit - filling->rows));
    Request& request = slots_[slot];
    if (!batch_.empty() && batch_.back().slot == slot) {
      batch_.back().rows += take;  // its flow's turn came again
    } else {
      batch_.push_back({slot, request.rows_taken, take});
      ++request.pieces_out;
    }
    request.rows_taken += take;
    room_of(request).flows[request.flow].rows -= take;
    filling->rows += take;
    queue.take(take);
  }
}

std::span<const Piece> Lane::next_batch(int64_t now_ns) {
  batch_.clear();
  drop_hopeless(high_, now_ns);
  drop_hopeless(low_, now_ns);
  if (low_.empty()) high_batches_ = 0;
  if (high_.empty() && low_.empty()) return batch_;
  Filling filling{.limit = config_.policy.max_batch_rows, .earliest_ns = std::numeric_limits<int64_t>::max()};
  if (high_.empty() || (!low_.empty() && low_is_due(high_batches_, config_.policy))) {
    fill(low_, now_ns, &filling);
    high_batches_ = 0;
  } else {
    fill(high_, now_ns, &filling);
    filling.limit = std::min(filling.limit, RunTimeModel::bucket_end(filling.rows));
    if (!low_.empty()) fill(low_, now_ns, &filling);
    high_batches_ = low_.empty() ? 0 : high_batches_ + 1;
  }
  ++running_batches_;
  busy_until_ns_ = now_ns + run_time_.predict(filling.rows);
  return batch_;
}

void Lane::finish(std::span<const Piece> pieces, int64_t started_ns, int64_t now_ns, bool ok, bool learn) {
  if (pieces.empty()) return;
  size_t rows = 0;
  for (const Piece& piece : pieces) {
    rows += piece.rows;
    Request& request = slots_[piece.slot];
    --request.pieces_out;
    request.rows_done += piece.rows;
    if (request.answered) {
      free_if_done(piece.slot);
    } else if (!ok) {
      end(piece.slot, End::kFailed);
    } else if (request.rows_done == request.rows) {
      end(piece.slot, now_ns < request.deadline_ns ? End::kOk : End::kExpired);
    }
  }
  --running_batches_;
  if (ok && learn) run_time_.record(rows, now_ns - started_ns);
}

void Lane::expire(int64_t now_ns) {
  while (next_deadline() <= now_ns) end(by_deadline_.top(slots_), End::kExpired);
}

int64_t Lane::next_deadline() const {
  const uint32_t first = by_deadline_.top(slots_);
  return first == OrderedQueue::kNone ? std::numeric_limits<int64_t>::max() : slots_[first].deadline_ns;
}

bool Lane::cancel(uint32_t slot, uint64_t tag) {
  if (slot >= slots_.size()) return false;
  const Request& request = slots_[slot];
  if (!request.used || request.answered || request.tag != tag) return false;
  end(slot, End::kCancelled);
  return true;
}

void Lane::end_all() {
  while (!by_deadline_.empty()) end(by_deadline_.top(slots_), End::kUnavailable);
}

void Lane::forget_flow(uint32_t flow) {
  high_.forget(flow);
  low_.forget(flow);
}

void Lane::end(uint32_t slot, End how) {
  Request& request = slots_[slot];
  request.answered = true;
  by_deadline_.remove(slots_, slot);
  --requests_.in_flight;
  rows_.in_flight -= request.rows;
  ++requests_.ended[static_cast<size_t>(how)];
  rows_.ended[static_cast<size_t>(how)] += request.rows;
  ended_.push_back({slot, request.tag, how});
  if (request.rows_taken < request.rows) {
    queue_of(request).remove(slot);
    room_of(request).flows[request.flow].rows -= request.rows - request.rows_taken;
    request.rows_taken = request.rows;
  }
  free_if_done(slot);
}

// Of an answered request.
void Lane::free_if_done(uint32_t slot) {
  Request& request = slots_[slot];
  if (request.pieces_out > 0) return;
  request.used = false;
  Room& room = room_of(request);
  --room.requests;
  --room.flows[request.flow].requests;
  free_.push_back(slot);
}

}  // namespace penstock
