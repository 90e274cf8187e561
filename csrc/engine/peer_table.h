// The peers that have requests at one model, found by connection id, each with the list of its unanswered
// requests: so that a cancel, a lost connection and a fair share cost no more than the peer's own requests.
//
// A record stays with its connection after its last request, until another needs it (the one idle longest
// goes first), so that a peer that comes back finds its turn in the lane where it was. All storage is
// allocated by the constructor. The owner locks.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace penstock {

struct PeerRecord {
  static constexpr uint32_t kNone = UINT32_MAX;
  uint64_t connection = 0;
  uint32_t held = 0;                       // requests that are not freed
  uint32_t newest = kNone;                 // the list of those that are unanswered; the owner's
  size_t parked_bytes = 0;                 // the owner's
  bool known = false;                      // it stands for a connection
  uint32_t chain = kNone;                  // the next of its hash bucket
  uint32_t before = kNone, after = kNone;  // among the idle ones
};

class PeerTable {
 public:
  static constexpr uint32_t kNone = PeerRecord::kNone;

  explicit PeerTable(size_t capacity)
      : records_(capacity), buckets_(std::bit_ceil(capacity), kNone), mask_(buckets_.size() - 1) {
    for (uint32_t i = 0; i < capacity; ++i) append_idle(i);
  }

  PeerRecord& operator[](uint32_t index) { return records_[index]; }
  size_t size() const { return records_.size(); }

  // The peer's record; kNone if it has none.
  uint32_t find(uint64_t connection) const {
    // Ids are given in sequence: their low bits spread them evenly.
    uint32_t i = buckets_[connection & mask_];
    while (i != kNone && records_[i].connection != connection) i = records_[i].chain;
    return i;
  }

  // The peer's record, with one request more; kNone when all records are held. `fresh`: it was another's.
  uint32_t acquire(uint64_t connection, bool* fresh) {
    uint32_t i = find(connection);
    *fresh = i == kNone;
    if (*fresh) {
      i = idle_first_;
      if (i == kNone) return kNone;
      PeerRecord& record = records_[i];
      if (record.known) unchain(i);
      record.connection = connection;
      record.known = true;
      record.chain = std::exchange(buckets_[connection & mask_], i);
    }
    if (records_[i].held++ == 0) remove_idle(i);
    return i;
  }

  void release(uint32_t index) {
    if (--records_[index].held == 0) append_idle(index);
  }

 private:
  void unchain(uint32_t index) {
    uint32_t* at = &buckets_[records_[index].connection & mask_];
    while (*at != index) at = &records_[*at].chain;
    *at = records_[index].chain;
  }
  void append_idle(uint32_t index) {
    records_[index].before = idle_last_;
    records_[index].after = kNone;
    (idle_last_ == kNone ? idle_first_ : records_[idle_last_].after) = index;
    idle_last_ = index;
  }
  void remove_idle(uint32_t index) {
    const PeerRecord& record = records_[index];
    (record.before == kNone ? idle_first_ : records_[record.before].after) = record.after;
    (record.after == kNone ? idle_last_ : records_[record.after].before) = record.before;
  }

  std::vector<PeerRecord> records_;
  std::vector<uint32_t> buckets_;
  const uint64_t mask_;
  uint32_t idle_first_ = kNone, idle_last_ = kNone;
};

}  // namespace penstock
