#include "features/event_tiles.h"

#include <algorithm>

#include "features/event_window.h"

namespace penstock {

namespace {

constexpr size_t kLeastEvents = 128;  // of a key, before tiles are stored
constexpr size_t kEventsPerTile = 4;

// Stands in a slot for tiles that are not worth it; never read.
alignas(TileSet) unsigned char not_worth_it[sizeof(TileSet)];
TileSet* none() {
  return reinterpret_cast<TileSet*>(not_worth_it);
}

EventCut uncut(const EventSlice& events) {
  return {events.superseded == nullptr ? EventCut::kAll : EventCut::kLive, kTimeMax};
}

// Position of the first event at or after time t, searched forward from `from`.
size_t reach(const EventSlice& events, size_t from, size_t stop, int64_t t) {
  size_t step = 1;
  while (from + step < stop && events.time[from + step] < t) {
    from += step;
    step *= 2;
  }
  return t == kTimeMin ? from : upper_time(events.time, from, std::min(stop, from + step), t - 1);
}

int64_t tile_start(int64_t number, int64_t tile) {
  int64_t out;
  if (__builtin_mul_overflow(number, tile, &out)) return number < 0 ? kTimeMin : kTimeMax;
  return out;
}
int64_t tile_end(int64_t number, int64_t tile) {
  return tile_start(number + 1, tile);
}
// Position of the first event at or after time t.
size_t lower(const EventSlice& events, size_t from, int64_t t) {
  return t == kTimeMin ? from : upper_time(events.time, from, events.n, t - 1);
}

}  // namespace

uint32_t TileGroup::add(Fold fold) {
  for (uint32_t i = 0; i < folds.size(); ++i) {
    if (folds[i].same_as(fold)) return i;
  }
  fold.offset = n_words;
  n_words += fold.words();
  folds.push_back(fold);
  return static_cast<uint32_t>(folds.size() - 1);
}

uint32_t TileGroup::add_set(int32_t value) {
  const auto found = std::find(sets.begin(), sets.end(), value);
  if (found != sets.end()) return static_cast<uint32_t>(found - sets.begin());
  sets.push_back(value);
  return static_cast<uint32_t>(sets.size() - 1);
}

void count_values(const EventSlice& events, const ValueSlice& values, const ValueDomain& domain, size_t from,
                  size_t to, const EventCut& cut, ValueCounter* counter) {
  for (size_t i = from; i < to; ++i) {
    if ((values.valid == nullptr || values.valid[i] != 0) && events.counts(i, cut)) {
      counter->add(domain.canonical(values.data[i]));
    }
  }
}

bool TileSet::useful(const TileGroup& group, const EventSlice& events) {
  if (events.n < kLeastEvents) return false;
  size_t tiles = 0;
  for (size_t at = 0; at < events.n && tiles * kEventsPerTile <= events.n; ++tiles) {
    at = reach(events, at, events.n, tile_end(floor_div(events.time[at], group.tile), group.tile));
  }
  return tiles * kEventsPerTile <= events.n;
}

TileSet::TileSet(const TileGroup& group, const EventSlice& events, const ValueSlice* values)
    : words_(group.n_words), heads_(group.n_words) {
  for (const int32_t value : group.sets) trees_.emplace_back(&(*group.domains)[static_cast<size_t>(value)]);
  for (size_t at = 0; at < events.n;) {
    number_.push_back(floor_div(events.time[at], group.tile));
    begin_.push_back(at);
    at = reach(events, at, events.n, tile_end(number_.back(), group.tile));
  }
  settled_.resize(size());
  for (std::vector<Word>& column : words_) column.resize(size());
  for (size_t i = 0; i < size(); ++i) {
    fold_tile(group, events, values, i, i + 1 < size() ? begin_[i + 1] : events.n);
  }
  for (ValueTree& tree : trees_) tree.settle();
  set_heads();
}

TileSet::TileSet(const TileSet& other)
    : number_(other.number_),
      begin_(other.begin_),
      settled_(other.settled_),
      words_(other.words_),
      heads_(other.heads_.size()),
      trees_(other.trees_) {
  set_heads();
}

void TileSet::set_heads() {
  for (size_t w = 0; w < words_.size(); ++w) heads_[w] = words_[w].data();
}

void TileSet::fold_tile(const TileGroup& group, const EventSlice& events, const ValueSlice* values, size_t i,
                        size_t to) {
  const size_t from = begin_[i];
  int64_t settled = kTimeMin;
  for (size_t e = from; e < to; ++e) {
    if (events.superseded != nullptr && events.superseded[e] != kTimeMax) {
      settled = std::max(settled, events.superseded[e]);
    } else {
      settled = std::max(settled, events.known[e] == kTimeMin ? kTimeMax : events.known[e]);
    }
  }
  settled_[i] = settled;
  for (const Fold& fold : group.folds) {
    Word partial[kMaxFoldWords];
    fold_identity(fold, partial);
    fold_events(fold, events, value_slice(values, fold.value), from, to, uncut(events), partial);
    for (uint32_t w = 0; w < fold.words(); ++w) words_[fold.offset + w][i] = partial[w];
  }
  count_tile(group, events, values, number_[i], from, to);
}

void TileSet::count_tile(const TileGroup& group, const EventSlice& events, const ValueSlice* values,
                         int64_t number, size_t from, size_t to) {
  ValueCounter counter;
  for (size_t s = 0; s < group.sets.size(); ++s) {
    const int32_t value = group.sets[s];
    counter.clear();
    count_values(events, value_slice(values, value), (*group.domains)[static_cast<size_t>(value)], from, to,
                 uncut(events), &counter);
    trees_[s].set(number, counter.counts());
  }
}

void TileSet::update(const TileGroup& group, const EventSlice& events, const ValueSlice* values, int64_t t) {
  const int64_t number = floor_div(t, group.tile);
  const auto i =
      static_cast<size_t>(std::lower_bound(number_.begin(), number_.end(), number) - number_.begin());
  const size_t from = lower(events, 0, tile_start(number, group.tile));
  const size_t to = reach(events, from, events.n, tile_end(number, group.tile));
  const bool had = i < size() && number_[i] == number;
  const auto at = static_cast<ptrdiff_t>(i);
  if (from == to) {
    if (had) {
      count_tile(group, events, values, number, from, to);
      number_.erase(number_.begin() + at);
      begin_.erase(begin_.begin() + at);
      settled_.erase(settled_.begin() + at);
      for (std::vector<Word>& column : words_) column.erase(column.begin() + at);
    }
  } else {
    if (!had) {
      number_.insert(number_.begin() + at, number);
      begin_.insert(begin_.begin() + at, from);
      settled_.insert(settled_.begin() + at, 0);
      for (std::vector<Word>& column : words_) column.insert(column.begin() + at, Word{});
    }
    begin_[i] = from;
    fold_tile(group, events, values, i, to);
  }
  for (size_t k = i; k < size(); ++k) {
    if (number_[k] > number) {
      begin_[k] = lower(events, k > 0 ? begin_[k - 1] : 0, tile_start(number_[k], group.tile));
    }
  }
  for (ValueTree& tree : trees_) tree.settle();
  set_heads();
}

size_t TileSet::find(size_t position) const {
  return static_cast<size_t>(std::upper_bound(begin_.begin(), begin_.end(), position) - begin_.begin()) - 1;
}

TileSlots::~TileSlots() {
  for (size_t i = 0; i < n_; ++i) delete held(i);
}

TileSet* TileSlots::held(size_t slot) const {
  TileSet* found = slots_[slot].load(std::memory_order_acquire);
  return found == none() ? nullptr : found;
}

void TileSlots::put(size_t slot, std::unique_ptr<TileSet> tiles) {
  TileSet* expected = nullptr;
  TileSet* given = tiles == nullptr ? none() : tiles.get();
  if (slots_[slot].compare_exchange_strong(expected, given, std::memory_order_acq_rel)) tiles.release();
}

void TileSlots::judge_again(size_t slot) {
  if (slots_[slot].load(std::memory_order_relaxed) == none()) {
    slots_[slot].store(nullptr, std::memory_order_relaxed);
  }
}

const TileSet* TileSlots::get(size_t slot, const TileGroup& group, const EventSlice& events,
                              const ValueSlice* values) {
  if (events.n < kLeastEvents) return nullptr;
  if (slots_[slot].load(std::memory_order_acquire) == nullptr) {
    put(slot, TileSet::useful(group, events) ? std::make_unique<TileSet>(group, events, values) : nullptr);
  }
  return held(slot);
}

void cut_segments(const EventSlice& events, int64_t tile, size_t low, size_t high, const TileSet* tiles,
                  const EventCut& cut, std::vector<Segment>* out) {
  out->clear();
  if (low >= high) return;
  if (tile == 0) {
    out->push_back({low, high, 0, 0});
    return;
  }
  if (tiles == nullptr) {
    for (size_t from = low; from < high;) {
      const size_t to = reach(events, from, high, tile_end(floor_div(events.time[from], tile), tile));
      out->push_back({from, to, 0, 0});
      from = to;
    }
    return;
  }
  size_t run = 0;  // whole tiles not yet written
  size_t i = tiles->find(low);
  const auto flush = [&] {
    if (run > 0) out->push_back({0, 0, i - run, i});
    run = 0;
  };
  for (size_t from = low; from < high; ++i) {
    const size_t end = i + 1 < tiles->size() ? tiles->begin(i + 1) : events.n;
    const size_t to = std::min(end, high);
    if (from == tiles->begin(i) && to == end &&
        (cut.mode != EventCut::kKnown || tiles->settled(i) <= cut.by)) {
      ++run;
    } else {
      flush();
      out->push_back({from, to, 0, 0});
    }
    from = to;
  }
  flush();
}

}  // namespace penstock
