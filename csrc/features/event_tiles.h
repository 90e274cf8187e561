// Stored partials of the segments of one key's events, so that a long window is a few folds and many
// combines.
//
// Windows are cut at multiples of the tile width. A tile holds, for each fold of its group, the partial of
// all its events that count without a cut; it is used for a window that holds the whole tile, and under a cut
// only where that admits the same events. So tiles change no bit. Built and changed by one thread while no
// other reads; reads are const.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "features/aggregate.h"
#include "features/event_value_tree.h"

namespace penstock {

// The folds of all windows that share a tile width.
struct TileGroup {
  int64_t tile = 0;
  std::vector<Fold> folds;
  std::vector<int32_t> sets;  // value columns whose values are counted
  uint32_t n_words = 0;
  const std::vector<ValueDomain>* domains = nullptr;  // of the value columns; need not move

  // The position of the fold in `folds`, which gets it where it is new.
  uint32_t add(Fold fold);
  // The position of the value column in `sets`, which gets it where it is new.
  uint32_t add_set(int32_t value);
};

// A run of events [from, to): one segment, or the whole tiles [tile_from, tile_to).
struct Segment {
  size_t from, to;
  size_t tile_from, tile_to;
};

class TileSet {
 public:
  // Whether tiles are worth their memory: enough events, several of them a tile.
  static bool useful(const TileGroup& group, const EventSlice& events);
  TileSet(const TileGroup& group, const EventSlice& events, const ValueSlice* values);
  TileSet(const TileSet& other);

  // Recomputes the tile of time t, whose events have changed; positions behind it have moved.
  void update(const TileGroup& group, const EventSlice& events, const ValueSlice* values, int64_t t);

  size_t size() const { return number_.size(); }
  size_t begin(size_t i) const { return begin_[i]; }
  size_t find(size_t position) const;  // the tile that holds the event
  int64_t settled(size_t i) const { return settled_[i]; }
  int64_t number(size_t i) const { return number_[i]; }
  const ValueTree& values(uint32_t set) const { return trees_[set]; }
  const Word* const* columns(const Fold& fold) const { return heads_.data() + fold.offset; }

 private:
  void fold_tile(const TileGroup& group, const EventSlice& events, const ValueSlice* values, size_t i,
                 size_t to);
  void count_tile(const TileGroup& group, const EventSlice& events, const ValueSlice* values, int64_t number,
                  size_t from, size_t to);
  void set_heads();

  std::vector<int64_t> number_;   // time / tile, ascending
  std::vector<size_t> begin_;     // position of the first event
  std::vector<int64_t> settled_;  // cuts from here on admit the events that count without one
  std::vector<std::vector<Word>> words_;
  std::vector<const Word*> heads_;
  std::vector<ValueTree> trees_;  // by set
};

// The tile sets of one key or of several, built when they are first read. Readers may share it; put() of two
// of them keeps one. All else is for one thread while no other reads.
class TileSlots {
 public:
  explicit TileSlots(size_t n = 0) : n_(n), slots_(n == 0 ? nullptr : new std::atomic<TileSet*>[n]()) {}
  ~TileSlots();
  TileSlots(const TileSlots&) = delete;
  TileSlots& operator=(const TileSlots&) = delete;

  // The tiles of a slot, built from the events if need be; null where they are not worth it.
  const TileSet* get(size_t slot, const TileGroup& group, const EventSlice& events, const ValueSlice* values);
  // What a slot holds now; null if nothing.
  TileSet* held(size_t slot) const;
  void put(size_t slot, std::unique_ptr<TileSet> tiles);
  // Forget that a slot's tiles were not worth it.
  void judge_again(size_t slot);

 private:
  size_t n_;
  std::unique_ptr<std::atomic<TileSet*>[]> slots_;  // released by put(), acquired by get() and held()
};

// Adds the values of the events [from, to) that count.
void count_values(const EventSlice& events, const ValueSlice& values, const ValueDomain& domain, size_t from,
                  size_t to, const EventCut& cut, ValueCounter* counter);

// Cuts [low, high) into segments, left to right; `tiles` may be null.
void cut_segments(const EventSlice& events, int64_t tile, size_t low, size_t high, const TileSet* tiles,
                  const EventCut& cut, std::vector<Segment>* out);

inline ValueSlice value_slice(const ValueSlice* values, int32_t column) {
  return column < 0 ? ValueSlice{nullptr, nullptr} : values[column];
}

}  // namespace penstock
