#include <algorithm>
#include <mutex>

#include "features/event_table_parts.h"
#include "features/event_threads.h"

namespace penstock {

namespace {

constexpr size_t kSortedRows = 1u << 20;  // that are sorted at a time

// Sorts by number, stably.
template <class Order>
void sort_rows(std::vector<Order>* rows, std::vector<Order>* spare) {
  spare->resize(rows->size());
  uint32_t most = 0;
  for (const Order& row : *rows) {
    if (row.number != kNoKey) most = std::max(most, row.number);
  }
  constexpr int kBits = 11;
  constexpr uint32_t kDigit = (1u << kBits) - 1;
  for (int shift = 0; shift < 32 && (shift == 0 || (most >> shift) != 0); shift += kBits) {
    uint32_t places[kDigit + 2] = {};
    for (const Order& row : *rows) ++places[(row.number >> shift & kDigit) + 1];
    for (uint32_t digit = 1; digit <= kDigit; ++digit) places[digit] += places[digit - 1];
    for (const Order& row : *rows) (*spare)[places[row.number >> shift & kDigit]++] = row;
    std::swap(*rows, *spare);
  }
}

}  // namespace

bool EventTable::read_raw(uint32_t column, uint32_t row, Word* out) const {
  if (row < rows_.n) return raw_[column].read(row, out);
  const size_t at = row - rows_.n;
  const Chunk& chunk = *chunks_[at / kChunkRows];
  *out = chunk.values[column * kChunkRows + at % kChunkRows];
  return chunk.valid[column * kChunkRows + at % kChunkRows] != 0;
}

uint32_t EventTable::find(Key128 key) const {
  const uint32_t found = base_.keys().find(key);
  if (found != kNoKey || more_keys_.size() == 0) return found;
  const uint32_t more = more_keys_.find(key);
  return more == kNoKey ? kNoKey : base_.n_keys() + more;
}

void EventTable::locate(uint32_t key, Found* found) const {
  found->key = key;
  found->history = histories_[key].get();
  if (found->history != nullptr) {
    found->events = found->history->events();
    found->values = found->history->values();
    found->points = found->history->points();
    return;
  }
  found->events = base_.slice(key);
  if (!values_.empty()) {
    found->base_values.resize(values_.size());
    const size_t at = base_.start(key);
    for (size_t c = 0; c < values_.size(); ++c) {
      found->base_values[c] = {values_[c].data() + at,
                               value_valid_[c].empty() ? nullptr : value_valid_[c].data() + at};
    }
    found->values = found->base_values.data();
  }
  if (shape_.points) {
    found->points = {points_.data() + point_starts_[key], point_starts_[key + 1] - point_starts_[key]};
  }
}

const TileSet* EventTable::tiles(const Found& found, const Window& window) const {
  if (window.group < 0) return nullptr;
  const auto g = static_cast<size_t>(window.group);
  if (found.history != nullptr) return found.history->tiles().get(g, groups_[g], found.events, found.values);
  return base_tiles_->get(found.key * groups_.size() + g, groups_[g], found.events, found.values);
}

uint8_t EventTable::newest(const Found& found, size_t after, int64_t now, const int64_t* known_by, size_t* at,
                           Interval* interval, int64_t* meta) const {
  const EventSlice& e = found.events;
  if (e.n == 0) return kRowNotFound;
  EventCut cut{shape_.versioned ? EventCut::kLive : EventCut::kAll, kTimeMax};
  if (known_by != nullptr || spec_.as_known) {
    cut.mode = EventCut::kKnown;
    if (known_by != nullptr) cut.by = *known_by;
    if (spec_.as_known) cut.by = std::min(cut.by, now);
  }
  const bool known = cut.mode == EventCut::kKnown;
  size_t found_at = after, next = after;
  while (found_at > 0 && !e.counts(found_at - 1, cut)) --found_at;
  while (!known && next < e.n && !e.counts(next, cut)) ++next;
  const size_t last = known ? after : found_at;
  if (last > 0) interval->begins(e.time[last - 1]);
  if (next < e.n) interval->ends(e.time[next]);
  if (spec_.as_known) {
    const size_t p = upper_time(found.points.data, 0, found.points.n, now);
    if (p > 0) interval->begins(found.points.data[p - 1]);
    if (p < found.points.n) interval->ends(found.points.data[p]);
  }
  if (found_at == 0) {
    if (!known) return next < e.n ? kRowFuture : kRowNotFound;
    for (size_t i = 0; i < e.n; ++i) {
      const bool gone = e.superseded != nullptr && e.superseded[i] != kTimeMax && e.superseded[i] <= cut.by;
      if (!gone) return kRowFuture;
    }
    return kRowNotFound;
  }
  *at = found_at - 1;
  if (spec_.tick > 0 && !known) {
    // The windows narrow this to the ticks at which one of them changes.
    size_t first = 0;
    while (!e.counts(first, cut)) ++first;
    size_t used = upper_time(e.time, 0, e.n, time_floor(now, spec_.tick));
    while (used > first + 1 && !e.counts(used - 1, cut)) --used;
    used = std::max(used, first + 1) - 1;
    *interval = {e.time[first], kTimeMax};
    meta[2] = e.time[used];
    meta[3] = e.known[used];
    return kRowPresent;
  }
  meta[2] = e.time[*at];
  meta[3] = e.known[*at];
  if (spec_.ttl > 0) {
    const int64_t gone = time_add(time_add(meta[2], spec_.ttl), 1);
    if (now >= gone && gone < kTimeMax) {
      interval->begins(gone);
      return kRowExpired;
    }
    interval->ends(gone);
  }
  return kRowPresent;
}

void EventTable::aggregate_row(const Found& found, int64_t now, const int64_t* known_by, const RowsFound& out,
                               size_t row, Interval* interval, Scratch* scratch) const {
  const EventSlice& events = found.events;
  for (size_t w = 0; w < spec_.windows.size(); ++w) {
    const Window& window = spec_.windows[w];
    size_t low, high;
    window.bounds(events, found.points, now, &low, &high, interval);
    EventCut cut{shape_.versioned ? EventCut::kLive : EventCut::kAll, kTimeMax};
    if (known_by != nullptr || window.as_known) {
      cut.mode = EventCut::kKnown;
      if (known_by != nullptr) cut.by = *known_by;
      if (window.as_known) cut.by = std::min(cut.by, window.at(now));
    }
    const TileSet* stored = tiles(found, window);
    cut_segments(events, window.tile, low, high, stored, cut, &scratch->segments);
    for (const uint32_t a : by_window_[w]) {
      const Aggregate& aggregate = spec_.aggregates[a];
      const Fold& fold = folds_[a];
      const ValueSlice values = value_slice(found.values, aggregate.value);
      Word* value = &scratch->results[a];
      bool valid = true;
      if (fold.kind == FoldKind::kSet) {
        valid = read_set(found, a, cut, stored, scratch, value);
        scratch->results_valid[a] = valid ? 1 : 0;
        continue;
      }
      Word* total = &scratch->totals[kMaxFoldWords * first_of_[a]];
      if (first_of_[a] != a) {
        *value = fold_result(aggregate, total, &valid);
        scratch->results_valid[a] = valid ? 1 : 0;
        continue;
      }
      fold_identity(fold, total);
      for (const Segment& segment : scratch->segments) {
        if (segment.tile_from < segment.tile_to) {
          fold_partials(fold, stored->columns(fold), segment.tile_from, segment.tile_to, total);
          continue;
        }
        Word part[kMaxFoldWords];
        fold_identity(fold, part);
        fold_events(fold, events, values, segment.from, segment.to, cut, part);
        const Word* columns[kMaxFoldWords] = {&part[0], &part[1], &part[2]};
        fold_partials(fold, columns, 0, 1, total);
      }
      *value = fold_result(aggregate, total, &valid);
      scratch->results_valid[a] = valid ? 1 : 0;
    }
  }
  for (size_t f = 0; f < spec_.features.size(); ++f) {
    if (!spec_.features[f].aggregate) continue;
    out.values[f][row] = scratch->results[spec_.features[f].at];
    out.valid[f][row] = scratch->results_valid[spec_.features[f].at] != 0;
  }
}

bool EventTable::read_set(const Found& found, uint32_t a, const EventCut& cut, const TileSet* stored,
                          Scratch* scratch, Word* value) const {
  const Aggregate& aggregate = spec_.aggregates[a];
  const ValueDomain& domain = domains_[static_cast<size_t>(aggregate.value)];
  const ValueSlice values = value_slice(found.values, aggregate.value);
  const bool counting = aggregate.kind == AggregateKind::kDistinct;
  ValueCounter& counter = scratch->counter;
  counter.clear();
  bool hashed = false;
  if (counting) scratch->registers.assign(kRegisters, 0);
  for (const Segment& segment : scratch->segments) {
    size_t from = segment.from, to = segment.to;
    if (segment.tile_from < segment.tile_to) {
      const ValueTree& tree = stored->values(sets_[a]);
      // A node without a list has more values than the bound of an exact number, where that is low enough.
      const bool by_hash = counting && aggregate.param <= static_cast<int64_t>(ValueTree::kMostValues);
      if (by_hash || tree.listed()) {
        tree.read(stored->number(segment.tile_from), stored->number(segment.tile_to - 1) + 1, &counter,
                  by_hash ? scratch->registers.data() : nullptr, &hashed);
        continue;
      }
      from = stored->begin(segment.tile_from);
      to = segment.tile_to < stored->size() ? stored->begin(segment.tile_to) : found.events.n;
    }
    count_values(found.events, values, domain, from, to, cut, &counter);
  }
  value->i = 0;
  if (!counting) return counter.top(domain, aggregate.param, value);
  if (hashed) {
    counter.hash_into(domain, scratch->registers.data());
    value->i = hll_estimate(scratch->registers.data());
  } else {
    value->i = counter.distinct(domain, aggregate.param);
  }
  return true;
}

void EventTable::number_rows(const RowsAsked& asked, size_t from, size_t n, uint32_t* numbers) const {
  std::unique_lock turn(turn_);
  const std::shared_lock reading(lock_);
  turn.unlock();
  const auto key_of = [&](size_t r) {
    return Key128{asked.keys[2 * (from + r)], asked.keys[2 * (from + r) + 1]};
  };
  for (size_t r = 0; r < n; ++r) base_.keys().prefetch(key_of(r));
  for (size_t r = 0; r < n; ++r) {
    numbers[r] = asked.nulls != nullptr && asked.nulls[from + r] ? kNoKey : find(key_of(r));
  }
}

void EventTable::locate_block(const RowsAsked& asked, const RowsFound& out, const RowOrder* order, size_t n,
                              uint32_t* newest_rows, Scratch* scratch) const {
  std::unique_lock turn(turn_);
  const std::shared_lock reading(lock_);
  turn.unlock();
  // The first event after each row's time: all searches take their steps together, as each waits for memory.
  const int64_t* times[kBlockRows];
  size_t after[kBlockRows], left[kBlockRows], longest = 0;
  for (size_t r = 0; r < n; ++r) {
    after[r] = left[r] = 0;
    const uint32_t key = order[r].number;
    if (key == kNoKey) continue;
    const History* history = histories_[key].get();
    const EventSlice events = history != nullptr ? history->events() : base_.slice(key);
    times[r] = events.time;
    left[r] = events.n;
    longest = std::max(longest, events.n);
  }
  for (; longest > 0; longest /= 2) {
    for (size_t r = 0; r < n; ++r) {
      if (left[r] == 0) continue;
      const size_t half = left[r] / 2, middle = after[r] + half;
      const bool above = times[r][middle] <= asked.now[order[r].row];
      after[r] = above ? middle + 1 : after[r];
      left[r] = above ? left[r] - half - 1 : half;
    }
  }
  Found& found = scratch->found;
  for (size_t r = 0; r < n; ++r) {
    const size_t row = order[r].row;
    int64_t* meta = out.meta + 4 * row;
    meta[2] = meta[3] = kTimeMin;
    Interval interval;
    uint8_t status = kRowNotFound;
    newest_rows[r] = kNoKey;
    const int64_t* known_by = asked.known_by == nullptr ? nullptr : asked.known_by + row;
    if (order[r].number != kNoKey) {
      locate(order[r].number, &found);
      size_t at = 0;
      status = newest(found, after[r], asked.now[row], known_by, &at, &interval, meta);
      if (status == kRowPresent) {
        newest_rows[r] = found.events.row[at];
        if (!spec_.windows.empty()) {
          aggregate_row(found, asked.now[row], known_by, out, row, &interval, scratch);
        }
      }
    }
    if (status != kRowPresent) {
      for (size_t f = 0; f < spec_.features.size(); ++f) {
        if (!spec_.features[f].aggregate) continue;
        out.values[f][row].i = 0;
        out.valid[f][row] = false;
      }
    }
    out.status[row] = status;
    meta[0] = interval.since;
    meta[1] = interval.until;
  }
}

void EventTable::gather_block(const RowsFound& out, const RowOrder* order, size_t n, Scratch* scratch) const {
  // Rows of events never change, so this need not be one step with locate_block().
  std::unique_lock turn(turn_);
  const std::shared_lock reading(lock_);
  turn.unlock();
  uint64_t present = 0;
  for (size_t r = 0; r < n; ++r) present |= uint64_t{order[r].number != kNoKey} << r;
  evaluate(
      *spec_.plain, spec_.plain_inputs, n, [order](size_t r) { return order[r].number; },
      [&](uint32_t c, uint32_t row, Word* word) {
        if (row != kNoKey) return read_raw(c, row, word);
        word->i = 0;
        return false;
      },
      scratch);
  for (size_t f = 0; f < spec_.features.size(); ++f) {
    if (spec_.features[f].aggregate) continue;
    const Block& block = scratch->out[spec_.features[f].at];
    const uint64_t valid = block.valid & present;
    Word* values = out.values[f];
    bool* valids = out.valid[f];
    for (size_t r = 0; r < n; ++r) {
      const bool is_valid = (valid >> r & 1) != 0;
      values[order[r].row].i = is_valid ? block.i64[r] : 0;
      valids[order[r].row] = is_valid;
    }
  }
}

void EventTable::rows_at(const RowsAsked& asked, const RowsFound& found, unsigned threads) const {
  const unsigned parts = parts_of(asked.n, threads);
  in_parts(parts, [&](unsigned part) {
    Scratch scratch(spec_.plain.get());
    scratch.totals.resize(kMaxFoldWords * spec_.aggregates.size());
    scratch.results.resize(spec_.aggregates.size());
    scratch.results_valid.resize(spec_.aggregates.size());
    const size_t stop = asked.n * (part + 1) / parts;
    for (size_t from = asked.n * part / parts; from < stop; from += kSortedRows) {
      rows_range(asked, found, from, std::min(kSortedRows, stop - from), &scratch);
    }
  });
}

void EventTable::rows_range(const RowsAsked& asked, const RowsFound& found, size_t from, size_t n,
                            Scratch* scratch) const {
  std::vector<RowOrder>& order = scratch->order;
  order.resize(n);
  uint32_t numbers[kBlockRows];
  const auto blocks = [n](auto&& f) {
    for (size_t at = 0; at < n; at += kBlockRows) f(at, std::min(kBlockRows, n - at));
  };
  blocks([&](size_t at, size_t count) {
    number_rows(asked, from + at, count, numbers);
    for (size_t r = 0; r < count; ++r) order[at + r] = {from + at + r, numbers[r]};
  });
  // Many rows are read by key and then by event, so that neighbours in memory follow one another.
  const bool sorted = n > kBlockRows;
  if (sorted) sort_rows(&order, &scratch->spare);
  blocks([&](size_t at, size_t count) {
    locate_block(asked, found, order.data() + at, count, numbers, scratch);
    for (size_t r = 0; r < count; ++r) order[at + r].number = numbers[r];
  });
  if (spec_.plain == nullptr) return;
  if (sorted) sort_rows(&order, &scratch->spare);
  blocks([&](size_t at, size_t count) { gather_block(found, order.data() + at, count, scratch); });
}

}  // namespace penstock
