#include "batch/lane.h"

#include <algorithm>
#include <limits>

namespace penstock {

Lane::Lane(const LaneConfig& config) : config_(config), run_time_(config.initial_run_ns) {
  config_.policy.max_batch_rows = std::clamp<size_t>(config.policy.max_batch_rows, 1, kMaxBatchRows);
  slots_.resize(config.max_requests);
  free_.reserve(config.max_requests);
  for (uint32_t slot = config.max_requests; slot-- > 0;) free_.push_back(slot);
  // Every request may leave one short piece, and every row may be a piece of its own.
  const size_t most = size_t{config.max_queued_rows} + config.max_requests;
  work_.reserve(2 * most);
  pieces_.reserve(2 * most);
  batch_.reserve(kMaxBatchRows);
  ended_.reserve(config.max_requests);
  touched_.reserve(config.max_requests + kMaxBatchRows);
}

Lane::Submitted Lane::submit(uint64_t tag, uint32_t rows, int64_t deadline_ns, int64_t now_ns) {
  ++requests_.submitted;
  rows_.submitted += rows;
  const auto reject = [&](int64_t retry_after_ns) {
    ++requests_.ended[static_cast<size_t>(End::kRejected)];
    rows_.ended[static_cast<size_t>(End::kRejected)] += rows;
    return Submitted{kNoSlot, retry_after_ns};
  };
  const int64_t drain_ns =
      std::max<int64_t>(run_time_.predict(config_.policy.max_batch_rows), kMinRetryAfterNs);
  if (rows == 0 || rows > config_.max_rows_per_request) return reject(0);
  if (free_.empty() || uint64_t{queued_rows_} + rows > config_.max_queued_rows) return reject(drain_ns);
  // Later deadlines queue behind this request, so only the rows before it delay it.
  const auto position =
      std::upper_bound(work_.begin() + static_cast<ptrdiff_t>(head_), work_.end(), deadline_ns,
                       [](int64_t d, const QueuedWork& w) { return d < w.deadline_ns; });
  uint64_t ahead = queued_rows_;
  for (auto later = position; later != work_.end(); ++later) ahead -= later->rows;
  const int64_t busy_until = running_batches_ > 0 ? busy_until_ns_ : now_ns;
  const Admission admission = admit(ahead, rows, deadline_ns, now_ns, busy_until, run_time_, config_.policy);
  if (!admission.admitted) return reject(admission.retry_after_ns);

  const uint32_t slot = free_.back();
  free_.pop_back();
  slots_[slot] = Request{tag, deadline_ns, rows, 0, rows, 0, true, false};
  ++requests_.in_flight;
  rows_.in_flight += rows;
  auto at = position - work_.begin();
  for (uint32_t first = 0; first < rows;) {
    const uint32_t take =
        std::min<uint32_t>(rows - first, static_cast<uint32_t>(config_.policy.max_batch_rows));
    work_.insert(work_.begin() + at, QueuedWork{deadline_ns, take});
    pieces_.insert(pieces_.begin() + at, Piece{slot, first, take});
    ++at;
    first += take;
  }
  queued_rows_ += rows;
  return {slot, 0};
}

std::span<const Piece> Lane::next_batch(int64_t now_ns) {
  batch_.clear();
  for (;;) {
    const BatchDecision decision =
        form_batch(work_.data() + head_, work_.size() - head_, now_ns, run_time_, config_.policy);
    if (decision.expired > 0) {
      // Ending a request kills its other pieces too, so the queue must be looked at again.
      for (size_t i = 0; i < decision.expired; ++i) {
        const uint32_t slot = pieces_[head_ + i].slot;
        if (!slots_[slot].answered) end(slot, End::kExpired);
      }
      settle();
      continue;
    }
    for (size_t i = 0; i < decision.take; ++i) {
      const Piece& piece = pieces_[head_ + i];
      batch_.push_back(piece);
      ++slots_[piece.slot].pieces_out;
      slots_[piece.slot].rows_queued -= piece.rows;
    }
    head_ += decision.take;
    queued_rows_ -= static_cast<uint32_t>(decision.rows);
    if (decision.take > 0) {
      ++running_batches_;
      busy_until_ns_ = now_ns + run_time_.predict(decision.rows);
    }
    compact();
    return batch_;
  }
}

void Lane::finish(std::span<const Piece> pieces, int64_t started_ns, int64_t now_ns, bool ok) {
  if (pieces.empty()) return;
  size_t rows = 0;
  for (const Piece& piece : pieces) {
    rows += piece.rows;
    Request& request = slots_[piece.slot];
    --request.pieces_out;
    request.rows_done += piece.rows;
    touched_.push_back(piece.slot);
    if (request.answered) continue;
    if (!ok) {
      end(piece.slot, End::kFailed);
    } else if (request.rows_done == request.rows) {
      end(piece.slot, now_ns < request.deadline_ns ? End::kOk : End::kExpired);
    }
  }
  --running_batches_;
  if (ok) run_time_.record(rows, now_ns - started_ns);
  settle();
}

void Lane::expire(int64_t now_ns) {
  for (uint32_t slot = 0; slot < slots_.size(); ++slot) {
    const Request& request = slots_[slot];
    if (request.used && !request.answered && request.deadline_ns <= now_ns) end(slot, End::kExpired);
  }
  settle();
}

int64_t Lane::next_deadline() const {
  int64_t next = std::numeric_limits<int64_t>::max();
  for (const Request& request : slots_) {
    if (request.used && !request.answered) next = std::min(next, request.deadline_ns);
  }
  return next;
}

bool Lane::end_if_unanswered(const Named& named) {
  if (named.slot >= slots_.size()) return false;
  const Request& request = slots_[named.slot];
  if (!request.used || request.answered || request.tag != named.tag) return false;
  end(named.slot, End::kCancelled);
  return true;
}

bool Lane::cancel(uint32_t slot, uint64_t tag) {
  const bool found = end_if_unanswered({slot, tag});
  settle();
  return found;
}

void Lane::cancel_all(std::span<const Named> requests) {
  for (const Named& named : requests) (void)end_if_unanswered(named);
  settle();
}

void Lane::end(uint32_t slot, End how) {
  Request& request = slots_[slot];
  request.answered = true;
  --requests_.in_flight;
  rows_.in_flight -= request.rows;
  ++requests_.ended[static_cast<size_t>(how)];
  rows_.ended[static_cast<size_t>(how)] += request.rows;
  ended_.push_back({slot, request.tag, how});
  queued_rows_ -= request.rows_queued;
  if (request.rows_queued > 0) dead_pieces_ = true;
  request.rows_queued = 0;
  touched_.push_back(slot);
}

// Takes dead pieces out of the queue, in one pass however many requests ended, then frees their slots.
void Lane::settle() {
  if (dead_pieces_) {
    size_t kept = head_;
    for (size_t i = head_; i < pieces_.size(); ++i) {
      if (slots_[pieces_[i].slot].answered) continue;
      pieces_[kept] = pieces_[i];
      work_[kept] = work_[i];
      ++kept;
    }
    pieces_.resize(kept);
    work_.resize(kept);
    dead_pieces_ = false;
  }
  for (const uint32_t slot : touched_) {
    Request& request = slots_[slot];
    if (!request.used || !request.answered || request.pieces_out > 0) continue;
    request.used = false;
    free_.push_back(slot);
  }
  touched_.clear();
}

void Lane::compact() {
  if (head_ < 1024 && head_ < pieces_.size()) return;
  pieces_.erase(pieces_.begin(), pieces_.begin() + static_cast<ptrdiff_t>(head_));
  work_.erase(work_.begin(), work_.begin() + static_cast<ptrdiff_t>(head_));
  head_ = 0;
}

}  // namespace penstock
