#include "features/event_table.h"

#include <algorithm>
#include <system_error>
#include <thread>

namespace penstock {

namespace {

constexpr size_t kRowsPerThread = 4096;
constexpr size_t kSortedRows = 1u << 20;  // that are sorted at a time

template <class F>
void in_parts(unsigned parts, F&& f) {
  std::vector<std::thread> threads;
  unsigned own = 1;
  try {
    for (; own < parts; ++own) threads.emplace_back(f, own);
  } catch (const std::system_error&) {
  }
  f(0u);
  for (; own < parts; ++own) f(own);
  for (std::thread& thread : threads) thread.join();
}

unsigned parts_of(size_t rows, unsigned threads) {
  return static_cast<unsigned>(std::clamp<size_t>(rows / kRowsPerThread, 1, std::max(1u, threads)));
}

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

void write_block(const Block& block, size_t n, Word* values, bool* valid) {
  for (size_t r = 0; r < n; ++r) {
    values[r].i = block.i64[r];
    valid[r] = (block.valid >> r & 1) != 0;
  }
}

}  // namespace

bool RawColumn::read(size_t row, Word* out) const {
  if (valid != nullptr && !valid[row]) {
    out->i = 0;
    return false;
  }
  if (narrow) {
    out->f = static_cast<const float*>(values)[row];
  } else {
    *out = static_cast<const Word*>(values)[row];
  }
  return true;
}

struct EventTable::Found {
  EventSlice events;
  const ValueSlice* values = nullptr;
  KnownPoints points;
  const History* history = nullptr;
  uint32_t key = kNoKey;
  std::vector<ValueSlice> base_values;
};

struct EventTable::Scratch {
  Found found;
  FeatureProgram::Scratch program;
  std::vector<Block> in, out;
  std::vector<Segment> segments;
  std::vector<RowOrder> order, spare;
  std::vector<uint8_t> registers;
  ValueCounter counter;
  std::vector<Word> results;  // of the aggregates
  std::vector<uint8_t> results_valid;

  explicit Scratch(const FeatureProgram* used) {
    if (used == nullptr) return;
    program = used->make_scratch();
    in.resize(used->inputs().size());
    out.resize(used->outputs().size());
  }
};

Status EventTable::check(const ViewSpec& spec, size_t n_raw) const {
  const auto fits = [n_raw](const std::shared_ptr<const FeatureProgram>& program,
                            const std::vector<uint32_t>& inputs) {
    return inputs.size() == (program == nullptr ? 0 : program->inputs().size()) &&
           std::all_of(inputs.begin(), inputs.end(), [n_raw](uint32_t i) { return i < n_raw; });
  };
  const size_t n_values = spec.values == nullptr ? 0 : spec.values->outputs().size();
  const size_t n_plain = spec.plain == nullptr ? 0 : spec.plain->outputs().size();
  bool good = fits(spec.plain, spec.plain_inputs) && fits(spec.values, spec.value_inputs) &&
              spec.value_texts.size() == n_values && spec.ttl >= 0 && spec.tick >= 0;
  for (const Window& w : spec.windows) {
    good = good && w.leaves > w.enters && w.enters >= 0 && w.every >= 0 && w.lag >= 0 && w.tile >= 0;
  }
  for (const Aggregate& a : spec.aggregates) {
    good = good && a.window < spec.windows.size() && a.value < static_cast<int32_t>(n_values) &&
           (a.value >= 0 || a.kind == AggregateKind::kCount) && a.param >= 0;
  }
  for (const StoredFeature& f : spec.features) {
    good = good && f.at < (f.aggregate ? spec.aggregates.size() : n_plain);
  }
  return good ? Status::ok() : Status::invalid("the parts of the view's specification do not fit together");
}

Status EventTable::create(ViewSpec spec, const EventRows& rows, std::vector<RawColumn> raw,
                          std::vector<std::vector<std::string>> texts, unsigned threads,
                          std::unique_ptr<EventTable>* out) {
  std::unique_ptr<EventTable> table(new EventTable());
  Status status = table->check(spec, raw.size());
  if (!status.is_ok()) return status;
  table->spec_ = std::move(spec);
  ViewSpec& own = table->spec_;
  const size_t n_values = own.values == nullptr ? 0 : own.values->outputs().size();
  if (texts.size() != n_values) return Status::invalid("texts do not fit the value columns");
  table->raw_ = std::move(raw);
  table->rows_ = rows;
  table->by_window_.resize(own.windows.size());
  bool as_known = own.as_known;
  for (size_t a = 0; a < own.aggregates.size(); ++a) {
    Aggregate& aggregate = own.aggregates[a];
    Window& window = own.windows[aggregate.window];
    aggregate.real =
        aggregate.value >= 0 && is_float(own.values->outputs()[static_cast<size_t>(aggregate.value)].dtype);
    as_known = as_known || window.as_known;
    table->by_window_[aggregate.window].push_back(static_cast<uint32_t>(a));
    Fold fold = fold_of(aggregate);
    uint32_t set = 0;
    if (window.tile > 0 && own.store_tiles) {
      if (window.group < 0) {
        size_t g = 0;
        while (g < table->groups_.size() && table->groups_[g].tile != window.tile) ++g;
        if (g == table->groups_.size()) table->groups_.push_back({window.tile, {}, {}, 0, &table->domains_});
        window.group = static_cast<int32_t>(g);
      }
      TileGroup& group = table->groups_[static_cast<size_t>(window.group)];
      if (fold.kind == FoldKind::kSet) {
        set = group.add_set(aggregate.value);
      } else {
        fold = group.folds[group.add(fold)];
      }
    }
    table->folds_.push_back(fold);
    table->sets_.push_back(set);
  }
  status = EventIndex::build(rows, threads, &table->base_);
  if (!status.is_ok()) return status;
  table->shape_ = {n_values, rows.event_ids != nullptr || rows.deleted != nullptr, as_known, &table->groups_};
  table->texts_ = std::move(texts);
  table->text_hashes_.resize(n_values);
  for (size_t c = 0; c < n_values; ++c) {
    for (const std::string& text : table->texts_[c]) table->text_hashes_[c].push_back(text_hash(text));
    const bool has_texts = own.value_texts[c];
    table->domains_.push_back({is_float(own.values->outputs()[c].dtype),
                               has_texts ? &table->texts_[c] : nullptr,
                               has_texts ? &table->text_hashes_[c] : nullptr});
  }
  if (n_values > 0) table->fold_values(threads);
  if (as_known) table->collect_points();
  table->histories_.resize(table->base_.n_keys());
  if (!table->groups_.empty()) {
    table->base_tiles_ = std::make_unique<TileSlots>(table->base_.n_keys() * table->groups_.size());
  }
  *out = std::move(table);
  return Status::ok();
}

// Runs a program over n <= 64 rows: read(column, row(i), word) gives its inputs, scratch->out gets its
// outputs.
template <class Rows, class Read>
void EventTable::evaluate(const FeatureProgram& program, const std::vector<uint32_t>& inputs, size_t n,
                          const Rows& row, const Read& read, Scratch* scratch) {
  for (size_t c = 0; c < inputs.size(); ++c) {
    Block& block = scratch->in[c];
    block.valid = 0;
    for (size_t r = 0; r < n; ++r) {
      Word word;
      block.valid |= uint64_t{read(inputs[c], row(r), &word)} << r;
      block.i64[r] = word.i;
    }
  }
  program.run(scratch->in.data(), n, scratch->out.data(), scratch->program);
}

void EventTable::fold_values(unsigned threads) {
  const size_t n = base_.n_events(), n_values = spec_.values->outputs().size();
  values_.resize(n_values);
  value_valid_.resize(n_values);
  for (size_t c = 0; c < n_values; ++c) {
    values_[c].resize(n);
    value_valid_[c].resize(n);
  }
  const unsigned parts = parts_of(n, threads);
  std::vector<std::vector<uint8_t>> whole(parts, std::vector<uint8_t>(n_values, 1));
  in_parts(parts, [&](unsigned part) {
    Scratch scratch(spec_.values.get());
    const size_t blocks = (n + kBlockRows - 1) / kBlockRows;
    const size_t to = std::min(n, blocks * (part + 1) / parts * kBlockRows);
    for (size_t from = blocks * part / parts * kBlockRows; from < to; from += kBlockRows) {
      const size_t count = std::min(kBlockRows, to - from);
      const uint32_t* rows = base_.rows().data() + from;
      evaluate(
          *spec_.values, spec_.value_inputs, count, [&](size_t r) { return rows[r]; },
          [&](uint32_t c, uint32_t row, Word* out) { return raw_[c].read(row, out); }, &scratch);
      for (size_t c = 0; c < n_values; ++c) {
        write_block(scratch.out[c], count, values_[c].data() + from,
                    reinterpret_cast<bool*>(value_valid_[c].data()) + from);
        const uint64_t all = count == kBlockRows ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
        if (scratch.out[c].valid != all) whole[part][c] = 0;
      }
    }
  });
  for (size_t c = 0; c < n_values; ++c) {
    const bool none_null = std::all_of(whole.begin(), whole.end(), [c](const auto& w) { return w[c] != 0; });
    if (none_null) value_valid_[c] = {};
  }
}

void EventTable::collect_points() {
  std::vector<uint32_t> deletions;
  for (uint32_t key = 0; key < base_.n_keys(); ++key) {
    point_starts_.push_back(points_.size());
    const EventSlice events = base_.slice(key);
    const size_t first = points_.size();
    for (size_t i = 0; i < events.n; ++i) {
      if (events.known[i] != kTimeMin) points_.push_back(events.known[i]);
    }
    deletions.clear();
    base_.deletions(key, &deletions);
    for (const uint32_t row : deletions) {
      const int64_t known = (rows_.known_at != nullptr ? rows_.known_at : rows_.event_time)[row];
      if (known != kTimeMin) points_.push_back(known);
    }
    std::sort(points_.begin() + static_cast<ptrdiff_t>(first), points_.end());
  }
  point_starts_.push_back(points_.size());
}

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
      Word total[kMaxFoldWords];
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

std::unique_ptr<History> EventTable::open_history(uint32_t key) const {
  auto history = std::make_unique<History>(shape_);
  Found found;
  locate(key, &found);
  history->copy(found.events, found.values, found.points);
  if (rows_.event_ids != nullptr) {
    std::vector<uint32_t> rows(found.events.row, found.events.row + found.events.n);
    base_.deletions(key, &rows);
    for (const uint32_t row : rows) {
      if (rows_.null_ids != nullptr && rows_.null_ids[row]) continue;
      EventVersion version;
      version.id = {rows_.event_ids[2 * row], rows_.event_ids[2 * row + 1]};
      version.time = rows_.event_time[row];
      version.known = (rows_.known_at != nullptr ? rows_.known_at : rows_.event_time)[row];
      version.row = row;
      version.deleted = rows_.deleted != nullptr && rows_.deleted[row];
      history->copy_version(version);
    }
  }
  for (size_t g = 0; g < groups_.size(); ++g) {
    const TileSet* held = base_tiles_->held(key * groups_.size() + g);
    if (held != nullptr) history->tiles().put(g, std::make_unique<TileSet>(*held));
  }
  return history;
}

Status EventTable::append(const EventRows& rows, const std::vector<RawColumn>& raw,
                          const std::vector<std::vector<std::string>>& texts, std::vector<Key128>* keys) {
  const std::lock_guard appending(appending_);
  if (raw.size() != raw_.size() || texts.size() != texts_.size()) {
    return Status::invalid("the columns of the appended rows are not those of the table");
  }
  const size_t first = rows_.n + n_appended_;
  if (first + rows.n >= kNoKey) {
    return Status::invalid("a view has " + std::to_string(first + rows.n) +
                           " events; expected fewer than 2^32 - 1");
  }
  const bool has_ids = rows.event_ids != nullptr || rows.deleted != nullptr;
  if (has_ids && !shape_.versioned) {
    return Status::invalid("appended rows have event ids or deletions; the table's source has none");
  }
  // All that reads only what this thread may change comes before the lock.
  const size_t n_values = values_.size();
  std::vector<std::vector<Word>> values(n_values, std::vector<Word>(rows.n));
  std::vector<std::vector<uint8_t>> valid(n_values, std::vector<uint8_t>(rows.n));
  if (n_values > 0) {
    Scratch scratch(spec_.values.get());
    for (size_t from = 0; from < rows.n; from += kBlockRows) {
      const size_t count = std::min(kBlockRows, rows.n - from);
      evaluate(
          *spec_.values, spec_.value_inputs, count, [&](size_t r) { return static_cast<uint32_t>(from + r); },
          [&](uint32_t c, uint32_t row, Word* out) { return raw[c].read(row, out); }, &scratch);
      for (size_t c = 0; c < n_values; ++c) {
        write_block(scratch.out[c], count, values[c].data() + from,
                    reinterpret_cast<bool*>(valid[c].data()) + from);
      }
    }
  }
  std::vector<std::vector<uint64_t>> hashes(texts.size());
  for (size_t c = 0; c < texts.size(); ++c) {
    for (const std::string& text : texts[c]) hashes[c].push_back(text_hash(text));
  }
  KeyMap distinct;
  std::vector<uint32_t> numbers(rows.n);
  for (size_t i = 0; i < rows.n; ++i) {
    numbers[i] = rows.null_keys != nullptr && rows.null_keys[i] ? kNoKey : distinct.add(rows.keys.at(i));
  }
  std::vector<std::unique_ptr<History>> opened(distinct.size());
  for (uint32_t k = 0; k < distinct.size(); ++k) {
    const uint32_t key = find(distinct.key(k));
    if (key == kNoKey) {
      opened[k] = std::make_unique<History>(shape_);
    } else if (histories_[key] == nullptr) {
      opened[k] = open_history(key);
    }
  }
  keys->assign(distinct.keys().begin(), distinct.keys().end());

  const std::lock_guard turn(turn_);
  const std::lock_guard writing(lock_);
  for (size_t c = 0; c < texts.size(); ++c) {
    texts_[c].insert(texts_[c].end(), texts[c].begin(), texts[c].end());
    text_hashes_[c].insert(text_hashes_[c].end(), hashes[c].begin(), hashes[c].end());
  }
  for (size_t i = 0; i < rows.n; ++i) {
    const size_t at = n_appended_ + i;
    if (at / kChunkRows == chunks_.size()) {
      auto chunk = std::make_unique<Chunk>();
      chunk->values.resize(raw_.size() * kChunkRows);
      chunk->valid.resize(raw_.size() * kChunkRows);
      chunks_.push_back(std::move(chunk));
    }
    Chunk& chunk = *chunks_[at / kChunkRows];
    for (size_t c = 0; c < raw_.size(); ++c) {
      const size_t cell = c * kChunkRows + at % kChunkRows;
      chunk.valid[cell] = raw[c].read(i, &chunk.values[cell]) ? 1 : 0;
    }
  }
  n_appended_ += rows.n;
  std::vector<History*> histories(distinct.size());
  for (uint32_t k = 0; k < distinct.size(); ++k) {
    uint32_t key = find(distinct.key(k));
    if (key == kNoKey) {
      key = base_.n_keys() + more_keys_.add(distinct.key(k));
      histories_.emplace_back();
    }
    if (opened[k] != nullptr) histories_[key] = std::move(opened[k]);
    histories[k] = histories_[key].get();
  }
  for (size_t i = 0; i < rows.n; ++i) {
    if (numbers[i] == kNoKey) continue;
    NewEvent event{static_cast<uint32_t>(first + i), rows.event_time[i],
                   (rows.known_at != nullptr ? rows.known_at : rows.event_time)[i]};
    event.deleted = rows.deleted != nullptr && rows.deleted[i];
    if (rows.event_ids != nullptr && (rows.null_ids == nullptr || !rows.null_ids[i])) {
      event.has_id = true;
      event.id = {rows.event_ids[2 * i], rows.event_ids[2 * i + 1]};
    }
    histories[numbers[i]]->add(event, [&](size_t c, Word* out) {
      *out = values[c][i];
      return valid[c][i] != 0;
    });
  }
  for (History* history : histories) history->settle();
  return Status::ok();
}

bool EventTable::erase(Key128 key) {
  const std::lock_guard appending(appending_);
  auto empty = std::make_unique<History>(shape_);
  empty->settle();
  const std::lock_guard turn(turn_);
  const std::lock_guard writing(lock_);
  const uint32_t found = find(key);
  if (found == kNoKey) return false;
  std::swap(histories_[found], empty);
  return true;
}

bool EventTable::may_differ(const Found& found, int64_t start, int64_t end) const {
  const EventSlice& e = found.events;
  // Whether an event's time is in (after - shift, until - shift].
  const auto any = [](const int64_t* times, size_t n, int64_t after, int64_t until, int64_t shift) {
    const size_t from = upper_time(times, 0, n, time_sub(after, shift));
    return from < n && times[from] <= time_sub(until, shift);
  };
  if (any(e.time, e.n, start, end, 0)) return true;
  if (spec_.as_known && any(found.points.data, found.points.n, start, end, 0)) return true;
  for (const Window& window : spec_.windows) {
    const int64_t since = window.at(start), until = window.at(end);
    if (any(e.time, e.n, since, until, window.enters) || any(e.time, e.n, since, until, window.leaves))
      return true;
    if (window.as_known && any(found.points.data, found.points.n, since, until, 0)) return true;
  }
  if (spec_.ttl == 0) return false;
  const int64_t shift = time_add(spec_.ttl, 1);
  const size_t stop = upper_time(e.time, 0, e.n, time_sub(end, shift));
  for (size_t i = upper_time(e.time, 0, stop, time_sub(start, shift)); i < stop; ++i) {
    // Of plain events only one without a younger one by then expires.
    const bool plain = e.superseded == nullptr && !spec_.as_known;
    if (!plain || i + 1 == e.n || e.time[i + 1] - e.time[i] > spec_.ttl) return true;
  }
  return false;
}

void EventTable::changed_keys(int64_t start, int64_t end, std::vector<Key128>* keys) const {
  std::unique_lock turn(turn_);
  const std::shared_lock reading(lock_);
  turn.unlock();
  Found found;
  for (uint32_t key = 0; key < histories_.size(); ++key) {
    locate(key, &found);
    if (!may_differ(found, start, end)) continue;
    keys->push_back(key < base_.n_keys() ? base_.keys().key(key) : more_keys_.key(key - base_.n_keys()));
  }
}

void EventTable::keys(std::vector<Key128>* keys) const {
  std::unique_lock turn(turn_);
  const std::shared_lock reading(lock_);
  turn.unlock();
  *keys = base_.keys().keys();
  keys->insert(keys->end(), more_keys_.keys().begin(), more_keys_.keys().end());
}

size_t EventTable::n_keys() const {
  std::unique_lock turn(turn_);
  const std::shared_lock reading(lock_);
  turn.unlock();
  return histories_.size();
}

void EventTable::source_rows(std::vector<int64_t>* rows) const {
  std::unique_lock turn(turn_);
  const std::shared_lock reading(lock_);
  turn.unlock();
  for (uint32_t key = 0; key < base_.n_keys(); ++key) {
    const EventSlice events = base_.slice(key);
    if (events.n > 0 && (histories_[key] == nullptr || histories_[key]->events().n > 0)) {
      rows->push_back(events.row[0]);
    }
  }
}

void EventTable::newest_events(const uint64_t* keys, size_t n, int64_t now, int64_t* times) const {
  std::unique_lock turn(turn_);
  const std::shared_lock reading(lock_);
  turn.unlock();
  const EventCut cut{shape_.versioned ? EventCut::kLive : EventCut::kAll, kTimeMax};
  Found found;
  for (size_t i = 0; i < n; ++i) {
    times[i] = kTimeMin;
    const uint32_t key = find({keys[2 * i], keys[2 * i + 1]});
    if (key == kNoKey) continue;
    locate(key, &found);
    size_t at = upper_time(found.events.time, 0, found.events.n, now);
    while (at > 0 && !found.events.counts(at - 1, cut)) --at;
    if (at > 0) times[i] = found.events.time[at - 1];
  }
}

size_t EventTable::n_events() const {
  std::unique_lock turn(turn_);
  const std::shared_lock reading(lock_);
  turn.unlock();
  size_t n = base_.n_events();
  for (uint32_t key = 0; key < histories_.size(); ++key) {
    if (histories_[key] == nullptr) continue;
    n += histories_[key]->events().n;
    if (key < base_.n_keys()) n -= base_.slice(key).n;
  }
  return n;
}

}  // namespace penstock
