#include "features/event_history.h"

#include <algorithm>

namespace penstock {

History::History(const HistoryShape& shape)
    : shape_(shape),
      values_(shape.n_values),
      valid_(shape.n_values),
      slices_(shape.n_values),
      fresh_(shape.n_values),
      fresh_valid_(shape.n_values),
      tiles_(shape.groups->size()) {}

void History::copy(const EventSlice& events, const ValueSlice* values, const KnownPoints& points) {
  time_.assign(events.time, events.time + events.n);
  known_.assign(events.known, events.known + events.n);
  row_.assign(events.row, events.row + events.n);
  if (shape_.versioned) {
    if (events.superseded != nullptr) {
      superseded_.assign(events.superseded, events.superseded + events.n);
    } else {
      superseded_.assign(events.n, kTimeMax);
    }
  }
  for (size_t c = 0; c < shape_.n_values; ++c) {
    values_[c].assign(values[c].data, values[c].data + events.n);
    if (values[c].valid != nullptr) {
      valid_[c].assign(values[c].valid, values[c].valid + events.n);
    } else {
      valid_[c].assign(events.n, 1);
    }
  }
  points_.assign(points.data, points.data + points.n);
  set_slices();
}

void History::set_slices() {
  for (size_t c = 0; c < shape_.n_values; ++c) slices_[c] = {values_[c].data(), valid_[c].data()};
}

EventSlice History::events() const {
  EventSlice out;
  out.n = time_.size();
  out.time = time_.data();
  out.known = known_.data();
  out.superseded = shape_.versioned ? superseded_.data() : nullptr;
  out.row = row_.data();
  return out;
}

size_t History::find(int64_t time, uint32_t row) const {
  auto at = static_cast<size_t>(std::lower_bound(time_.begin(), time_.end(), time) - time_.begin());
  while (at < time_.size() && time_[at] == time && row_[at] != row) ++at;
  return at < time_.size() && time_[at] == time ? at : time_.size();
}

void History::place(const NewEvent& event, int64_t superseded) {
  // Behind all events of the same or an earlier time that were known no later: the new row is the last to
  // come.
  size_t at = upper_time(time_.data(), 0, time_.size(), event.time);
  while (at > 0 && time_[at - 1] == event.time && known_[at - 1] > event.known) --at;
  const auto offset = static_cast<ptrdiff_t>(at);
  time_.insert(time_.begin() + offset, event.time);
  known_.insert(known_.begin() + offset, event.known);
  if (shape_.versioned) superseded_.insert(superseded_.begin() + offset, superseded);
  row_.insert(row_.begin() + offset, event.row);
  for (size_t c = 0; c < shape_.n_values; ++c) {
    values_[c].insert(values_[c].begin() + offset, fresh_[c]);
    valid_[c].insert(valid_[c].begin() + offset, fresh_valid_[c]);
  }
  touched_.push_back(event.time);
}

void History::insert(const NewEvent& event) {
  if (shape_.points && event.known != kTimeMin) {
    points_.insert(std::upper_bound(points_.begin(), points_.end(), event.known), event.known);
  }
  if (!event.has_id) {
    if (!event.deleted) place(event, kTimeMax);
    return;
  }
  std::vector<EventVersion>& versions = versions_[event.id];
  const std::vector<EventVersion> before = versions;
  versions.push_back({event.id, event.time, event.known, event.row, event.deleted});
  link_versions(&versions);
  for (const EventVersion& version : versions) {
    if (version.row == event.row) {
      if (version.counts) place(event, version.superseded);
      continue;
    }
    const auto old = std::find_if(before.begin(), before.end(),
                                  [&](const EventVersion& v) { return v.row == version.row; });
    if (!old->counts || (version.counts && version.superseded == old->superseded)) continue;
    const size_t at = find(version.time, version.row);
    if (at == time_.size()) continue;
    if (version.counts) {
      superseded_[at] = version.superseded;
    } else {
      const auto offset = static_cast<ptrdiff_t>(at);
      time_.erase(time_.begin() + offset);
      known_.erase(known_.begin() + offset);
      superseded_.erase(superseded_.begin() + offset);
      row_.erase(row_.begin() + offset);
      for (size_t c = 0; c < shape_.n_values; ++c) {
        values_[c].erase(values_[c].begin() + offset);
        valid_[c].erase(valid_[c].begin() + offset);
      }
    }
    touched_.push_back(version.time);
  }
  // Of a version that never counts again only the newest is needed, to order what comes.
  std::vector<EventVersion> kept;
  for (size_t i = 0; i < versions.size(); ++i) {
    const EventVersion& version = versions[i];
    const bool ends_one = version.deleted && version.superseded != version.known;
    if (version.counts || ends_one || i + 1 == versions.size()) kept.push_back(version);
  }
  versions = std::move(kept);
}

void History::settle() {
  set_slices();
  if (touched_.empty()) return;
  std::sort(touched_.begin(), touched_.end());
  const EventSlice slice = events();
  const bool judge = slice.n >= 2 * judged_;
  if (judge) judged_ = slice.n;
  for (size_t g = 0; g < shape_.groups->size(); ++g) {
    if (judge) tiles_.judge_again(g);
    TileSet* tiles = tiles_.held(g);
    if (tiles == nullptr) continue;
    const TileGroup& group = (*shape_.groups)[g];
    for (size_t i = 0; i < touched_.size(); ++i) {
      const bool same = i > 0 && floor_div(touched_[i], group.tile) == floor_div(touched_[i - 1], group.tile);
      if (!same) tiles->update(group, slice, slices_.data(), touched_[i]);
    }
  }
  touched_.clear();
}

}  // namespace penstock
