// The events of a source grouped by entity key and put in event order: (event time, known-at, source row).
//
// Built once and then immutable: any thread may read. Keys get dense numbers, through a plain array where
// they are integers of a narrow range and a hash table otherwise; events are placed by a counting sort over
// those numbers, and only the keys whose events are out of order are sorted. Rows with a null key are left
// out. Event times and, where a source has them, known-at times are copied into index order; all else is
// reached through the row number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/key.h"
#include "base/status.h"
#include "features/aggregate.h"

namespace penstock {

constexpr uint32_t kNoKey = 0xFFFFFFFFu;

// Keys of n rows: words [n, 2] (lo, hi), or lo alone where all hi are zero.
struct KeyColumn {
  const uint64_t* words = nullptr;
  bool single = false;
  Key128 at(size_t i) const { return single ? Key128{words[i], 0} : Key128{words[2 * i], words[2 * i + 1]}; }
};

// Columns of a source as they came. Null pointers: no row has a null, or the source has no such column.
struct EventRows {
  size_t n = 0;
  KeyColumn keys;
  const bool* null_keys = nullptr;
  const int64_t* event_time = nullptr;
  const int64_t* known_at = nullptr;    // null: the event time
  const uint64_t* event_ids = nullptr;  // [n, 2]
  const bool* null_ids = nullptr;
  const bool* deleted = nullptr;
};

// A map from keys to the numbers 0, 1, 2, ... in the order in which they were added.
class KeyMap {
 public:
  uint32_t find(Key128 key) const;
  uint32_t add(Key128 key);  // its number, old or new
  uint32_t size() const { return static_cast<uint32_t>(keys_.size()); }
  Key128 key(uint32_t number) const { return keys_[number]; }
  const std::vector<Key128>& keys() const { return keys_; }
  void prefetch(Key128 key) const;
  // Number the keys of all rows; kNoKey for null ones.
  void add_all(const KeyColumn& keys, const bool* nulls, size_t n, uint32_t* numbers);

 private:
  bool add_range(const KeyColumn& keys, const bool* nulls, size_t n, uint32_t* numbers);
  void grow();

  std::vector<Key128> keys_;
  std::vector<uint32_t> slots_;   // open addressing; number + 1
  std::vector<uint32_t> direct_;  // number + 1 of key low_ + i; then slots_ is empty until a key lies outside
  uint64_t low_ = 0;
};

class EventIndex {
 public:
  // Refuses more than 2^32 - 2 rows. With `threads` above 1 the work is shared out.
  static Status build(const EventRows& rows, unsigned threads, EventIndex* out);

  uint32_t n_keys() const { return keys_.size(); }
  const KeyMap& keys() const { return keys_; }
  size_t n_events() const { return row_.size(); }
  size_t start(uint32_t key) const { return starts_[key]; }
  bool versioned() const { return !superseded_.empty(); }
  const std::vector<uint32_t>& rows() const { return row_; }
  EventSlice slice(uint32_t key) const;
  // Rows of the key that say its events are deleted.
  void deletions(uint32_t key, std::vector<uint32_t>* rows) const;

 private:
  struct Deletion {
    uint32_t key;
    uint32_t row;
  };
  void apply_versions(const EventRows& rows);

  KeyMap keys_;
  std::vector<uint32_t> starts_;
  std::vector<int64_t> time_, known_, superseded_;  // the last two are empty where they would say nothing
  std::vector<uint32_t> row_;
  std::vector<Deletion> deletions_;  // by key, row
};

// One version of an event, for link_versions().
struct EventVersion {
  Key128 id;
  int64_t time;
  int64_t known;
  uint32_t row;
  bool deleted;
  int64_t superseded = kTimeMax;  // out
  bool counts = true;             // out: for some cut, or for none
};
// Orders the versions by (id, known-at, row) and says until when each one counts.
void link_versions(std::vector<EventVersion>* versions);

}  // namespace penstock
