// The events of one key that has been appended to: sorted vectors of its own, with the versions of its
// events.
//
// The first append to a key copies what the index holds of it. One thread changes a history while no other
// reads it; reads are const.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/key.h"
#include "features/aggregate.h"
#include "features/event_index.h"
#include "features/event_tiles.h"
#include "features/event_window.h"

namespace penstock {

// What a view keeps of each event, beside the event itself.
struct HistoryShape {
  size_t n_values = 0;     // value columns
  bool versioned = false;  // events have ids, or may be deleted
  bool points = false;     // the times at which events become known are kept, sorted
  const std::vector<TileGroup>* groups = nullptr;
};

struct NewEvent {
  uint32_t row;
  int64_t time;
  int64_t known;
  bool has_id = false;
  Key128 id{0, 0};
  bool deleted = false;
};

class History {
 public:
  explicit History(const HistoryShape& shape);

  // Before the first add(): the events that the index holds, and their versions.
  void copy(const EventSlice& events, const ValueSlice* values, const KnownPoints& points);
  void copy_version(const EventVersion& version) { versions_[version.id].push_back(version); }

  // value(column, &word): whether the event's value is not null.
  template <class F>
  void add(const NewEvent& event, F&& value) {
    for (size_t c = 0; c < shape_.n_values; ++c) fresh_valid_[c] = value(c, &fresh_[c]) ? 1 : 0;
    insert(event);
  }
  // After the last add(): brings the tiles up to date.
  void settle();

  EventSlice events() const;
  const ValueSlice* values() const { return slices_.data(); }
  KnownPoints points() const { return {points_.data(), points_.size()}; }
  TileSlots& tiles() const { return tiles_; }  // by group

 private:
  struct IdHash {
    size_t operator()(const Key128& id) const {
      return static_cast<size_t>(id.lo ^ (id.hi * 0x9E3779B97F4A7C15u));
    }
  };
  void insert(const NewEvent& event);
  void place(const NewEvent& event, int64_t superseded);
  size_t find(int64_t time, uint32_t row) const;
  void set_slices();

  HistoryShape shape_;
  std::vector<int64_t> time_, known_, superseded_;
  std::vector<uint32_t> row_;
  std::vector<std::vector<Word>> values_;
  std::vector<std::vector<uint8_t>> valid_;
  std::vector<ValueSlice> slices_;
  std::vector<int64_t> points_;
  std::unordered_map<Key128, std::vector<EventVersion>, IdHash> versions_;
  std::vector<int64_t> touched_;  // times of the events that have changed since settle()
  std::vector<Word> fresh_;
  std::vector<uint8_t> fresh_valid_;
  mutable TileSlots tiles_;  // filled by readers
  size_t judged_ = 0;        // events when it was last asked whether tiles are worth it
};

}  // namespace penstock
