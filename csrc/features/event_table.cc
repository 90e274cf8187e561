#include "features/event_table.h"

#include <algorithm>

#include "features/event_table_parts.h"
#include "features/event_threads.h"

namespace penstock {

namespace {

constexpr size_t kKeysPerLock = 1024;  // so that an append never waits long

void write_block(const Block& block, size_t n, Word* values, bool* valid) {
  for (size_t r = 0; r < n; ++r) {
    values[r].i = block.i64[r];
    valid[r] = (block.valid >> r & 1) != 0;
  }
}

}  // namespace

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
    uint32_t first = 0;
    while (first < a && (own.aggregates[first].window != aggregate.window ||
                         !table->folds_[first].same_as(fold) || fold.kind == FoldKind::kSet)) {
      ++first;
    }
    table->first_of_.push_back(first);
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
  Found found;
  uint32_t key = 0;
  for (bool more = true; more;) {
    std::unique_lock turn(turn_);
    const std::shared_lock reading(lock_);
    turn.unlock();
    const auto stop = static_cast<uint32_t>(std::min(histories_.size(), size_t{key} + kKeysPerLock));
    for (; key < stop; ++key) {
      locate(key, &found);
      if (!may_differ(found, start, end)) continue;
      keys->push_back(key < base_.n_keys() ? base_.keys().key(key) : more_keys_.key(key - base_.n_keys()));
    }
    more = key < histories_.size();
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
  const EventCut cut{shape_.versioned ? EventCut::kLive : EventCut::kAll, kTimeMax};
  Found found;
  for (size_t from = 0; from < n; from += kKeysPerLock) {
    std::unique_lock turn(turn_);
    const std::shared_lock reading(lock_);
    turn.unlock();
    for (size_t i = from; i < std::min(n, from + kKeysPerLock); ++i) {
      times[i] = kTimeMin;
      const uint32_t key = find({keys[2 * i], keys[2 * i + 1]});
      if (key == kNoKey) continue;
      locate(key, &found);
      size_t at = upper_time(found.events.time, 0, found.events.n, now);
      while (at > 0 && !found.events.counts(at - 1, cut)) --at;
      if (at > 0) times[i] = found.events.time[at - 1];
    }
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
