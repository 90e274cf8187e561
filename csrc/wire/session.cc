#include "wire/session.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <utility>

namespace penstock::wire {
namespace {

constexpr uint32_t kFirstInFlight = 31;  // a table of 64 slots

}  // namespace

InFlight::InFlight(uint32_t limit)
    : limit_(std::min(limit, uint32_t{1} << 24)),
      mask_(std::bit_ceil(2 * std::min(limit_, kFirstInFlight) + 2) - 1),
      msgids_(mask_ + 1),
      used_(mask_ + 1) {}

uint32_t InFlight::find(uint32_t msgid) const {
  uint32_t slot = home(msgid);
  while (used_[slot] && msgids_[slot] != msgid) slot = (slot + 1) & mask_;
  return slot;
}

void InFlight::grow() {
  const std::vector<uint32_t> msgids = std::exchange(msgids_, std::vector<uint32_t>(2 * (mask_ + 1)));
  const std::vector<uint8_t> used = std::exchange(used_, std::vector<uint8_t>(2 * (mask_ + 1)));
  mask_ = 2 * mask_ + 1;
  for (size_t i = 0; i < used.size(); ++i) {
    if (!used[i]) continue;
    const uint32_t slot = find(msgids[i]);
    msgids_[slot] = msgids[i];
    used_[slot] = 1;
  }
}

void InFlight::insert(uint32_t msgid) {
  if (2 * size_ + 2 > mask_) grow();
  const uint32_t slot = find(msgid);
  msgids_[slot] = msgid;
  used_[slot] = 1;
  ++size_;
}

bool InFlight::erase(uint32_t msgid) {
  uint32_t hole = find(msgid);
  if (!used_[hole]) return false;
  // Close the hole: a later entry of the run moves back when its home does not lie after the hole.
  for (uint32_t slot = (hole + 1) & mask_; used_[slot]; slot = (slot + 1) & mask_) {
    if (((slot - home(msgids_[slot])) & mask_) >= ((slot - hole) & mask_)) {
      msgids_[hole] = msgids_[slot];
      hole = slot;
    }
  }
  used_[hole] = 0;
  --size_;
  return true;
}

Session::Session(const SessionLimits& limits)
    : limits_(limits),
      scanner_(limits.scan),
      in_flight_(limits.max_in_flight),
      front_(std::make_unique<Writer>(limits.max_output_bytes)),
      back_(std::make_unique<Writer>(limits.max_output_bytes)) {}

std::span<uint8_t> Session::get_buffer(size_t hint) {
  if (closed_) return {};
  if (begin_ > 0) {
    std::memmove(input_.get(), input_.get() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  // An unfinished message is within the limit, so a chunk beyond the limit always leaves room to read. The
  // buffer grows by the bytes that have come, never by the bytes that are announced.
  const size_t most = limits_.scan.max_message_bytes + kChunk;
  const size_t wanted = end_ + std::clamp(hint, size_t{1}, kChunk);
  if (wanted > capacity_ && capacity_ < most) {
    const size_t capacity = std::min(most, std::max({wanted, 2 * capacity_, kChunk}));
    auto grown = std::make_unique_for_overwrite<uint8_t[]>(capacity);
    if (end_ != 0) std::memcpy(grown.get(), input_.get(), end_);
    input_ = std::move(grown);
    capacity_ = capacity;
  }
  return {input_.get() + end_, capacity_ - end_};
}

void Session::advance(size_t n) {
  end_ += std::min(n, capacity_ - end_);
}

bool Session::next_message(Message* message) {
  if (closed_) return false;
  const uint8_t* data = input_.get() + begin_;
  const ScanResult result = scanner_.scan(data, end_ - begin_);
  if (result == ScanResult::kNeedMore) return false;
  *message = Message{};
  if (result != ScanResult::kComplete) {
    fail_framing(result, message);
    return true;
  }
  const size_t size = scanner_.message_bytes();
  scanner_.reset();
  begin_ += size;
  classify(Cursor(data, data + size), message);
  return true;
}

void Session::classify(Cursor bytes, Message* message) {
  Envelope envelope;
  message->status = decode_envelope(bytes, &envelope);
  message->has_msgid = envelope.has_msgid;
  message->msgid = envelope.msgid;
  message->method = envelope.method;
  message->params = envelope.params;
  if (envelope.kind == EnvelopeKind::kRequest) {
    message->kind = MessageKind::kBad;
    if (message->status.is_ok()) admit(envelope, message);
    return;
  }
  message->has_msgid = false;
  if (envelope.kind == EnvelopeKind::kNotification && message->status.is_ok() &&
      envelope.method == "cancel") {
    Cursor params = envelope.params;
    uint32_t count;
    uint64_t msgid;
    if (params.read_array(&count) && count == 1 && params.read_uint(&msgid) && msgid <= UINT32_MAX &&
        in_flight_.contains(static_cast<uint32_t>(msgid))) {
      message->kind = MessageKind::kCancel;
      message->has_msgid = true;
      message->msgid = static_cast<uint32_t>(msgid);
      return;
    }
  }
  message->kind = MessageKind::kNotification;
  ++dropped_;
}

void Session::admit(const Envelope& envelope, Message* message) {
  if (in_flight_.contains(envelope.msgid)) {
    message->status = Status::invalid("msgid is " + std::to_string(envelope.msgid) +
                                      ", which is in flight; expected one that is not");
    return;
  }
  if (in_flight_.full()) {
    message->status = {Code::kResourceExhausted, "the connection has " + std::to_string(in_flight_.size()) +
                                                     " requests in flight, its limit"};
    return;
  }
  in_flight_.insert(envelope.msgid);
  message->kind = envelope.method == "predict"           ? MessageKind::kPredict
                  : envelope.method == "predict_vectors" ? MessageKind::kPredictVectors
                                                         : MessageKind::kOther;
}

void Session::fail_framing(ScanResult result, Message* message) {
  message->kind = MessageKind::kFramingError;
  if (result == ScanResult::kTooLarge) {
    message->status = Status::invalid("message is above the limit of " +
                                      std::to_string(limits_.scan.max_message_bytes) + " bytes");
  } else if (result == ScanResult::kTooDeep) {
    message->status = Status::invalid("message is nested above the limit of " +
                                      std::to_string(limits_.scan.max_depth) + " levels");
  } else {
    message->status = Status::invalid("message has the reserved byte 0xc1; expected MessagePack");
  }
  closed_ = true;
  // A full output buffer leaves no room for it; the connection is closed all the same.
  (void)encode_error(*front_, std::nullopt, message->status, false);
}

const Writer* Session::take_output() {
  if (sending_ || front_->size() == 0) return nullptr;
  std::swap(front_, back_);
  sending_ = true;
  return back_.get();
}

void Session::output_sent() {
  if (!sending_) return;
  back_->clear();
  sending_ = false;
}

}  // namespace penstock::wire
