#include "features/event_index.h"

#include <algorithm>
#include <bit>
#include <string>
#include <system_error>
#include <thread>

namespace penstock {

namespace {

constexpr size_t kAhead = 16;  // rows whose slot is fetched early

uint64_t hash_of(Key128 key) {
  uint64_t x = (key.lo ^ (key.hi * 0x9E3779B97F4A7C15u)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 29)) * 0x94D049BB133111EBu;
  return x ^ (x >> 32);
}

// Runs f(0) .. f(parts - 1), each on a thread where one can be had.
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

// Sorts the events of one key at a time; scratch memory of one thread.
class EventSorter {
 public:
  // Puts [first, stop) of the columns into the order (time, known, position); `known` may be null.
  void sort(int64_t* time, int64_t* known, uint32_t* row, size_t n) {
    int64_t low = time[0], high = time[0];
    for (size_t i = 1; i < n; ++i) {
      low = std::min(low, time[i]);
      high = std::max(high, time[i]);
    }
    const uint64_t span = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
    const int index_bits = std::bit_width(n - 1);
    words_.resize(2 * n);
    uint64_t* words = words_.data();
    if (std::bit_width(span) + index_bits > 64) {
      order_by_compare(time, n, words);
    } else {
      // Time above, position below: one word, and no two are equal.
      for (size_t i = 0; i < n; ++i) {
        words[i] = (static_cast<uint64_t>(time[i]) - static_cast<uint64_t>(low)) << index_bits | i;
      }
      words = n <= kInsertion ? insertion(words, n) : radix(words, n, index_bits, std::bit_width(span));
      const uint64_t mask = (uint64_t{1} << index_bits) - 1;
      for (size_t i = 0; i < n; ++i) words[i] &= mask;
    }
    if (known != nullptr) order_ties(time, known, words, n);
    permute(words, time, n);
    if (known != nullptr) permute(words, known, n);
    permute(words, row, n);
  }

 private:
  static constexpr size_t kInsertion = 40;

  static uint64_t* insertion(uint64_t* words, size_t n) {
    for (size_t i = 1; i < n; ++i) {
      const uint64_t word = words[i];
      size_t at = i;
      for (; at > 0 && words[at - 1] > word; --at) words[at] = words[at - 1];
      words[at] = word;
    }
    return words;
  }
  // By the bits above `shift`, eight at a time, stably; returns where the result is.
  uint64_t* radix(uint64_t* words, size_t n, int shift, int bits) {
    uint64_t* from = words;
    uint64_t* to = words + n;
    for (const int end = shift + bits; shift < end; shift += 8) {
      uint32_t places[257] = {};
      for (size_t i = 0; i < n; ++i) ++places[(from[i] >> shift & 255) + 1];
      for (size_t digit = 1; digit < 257; ++digit) places[digit] += places[digit - 1];
      for (size_t i = 0; i < n; ++i) to[places[from[i] >> shift & 255]++] = from[i];
      std::swap(from, to);
    }
    return from;
  }
  static void order_by_compare(const int64_t* time, size_t n, uint64_t* words) {
    for (size_t i = 0; i < n; ++i) words[i] = i;
    std::stable_sort(words, words + n, [time](uint64_t a, uint64_t b) { return time[a] < time[b]; });
  }
  static void order_ties(const int64_t* time, const int64_t* known, uint64_t* words, size_t n) {
    for (size_t first = 0; first < n;) {
      size_t stop = first + 1;
      while (stop < n && time[words[stop]] == time[words[first]]) ++stop;
      if (stop - first > 1) {
        std::stable_sort(words + first, words + stop,
                         [known](uint64_t a, uint64_t b) { return known[a] < known[b]; });
      }
      first = stop;
    }
  }
  template <class T>
  void permute(const uint64_t* order, T* values, size_t n) {
    copy_.resize(n);
    for (size_t i = 0; i < n; ++i) copy_[i] = static_cast<int64_t>(values[order[i]]);
    for (size_t i = 0; i < n; ++i) values[i] = static_cast<T>(copy_[i]);
  }

  std::vector<uint64_t> words_;
  std::vector<int64_t> copy_;
};

bool id_less(Key128 a, Key128 b) {
  return a.hi != b.hi ? a.hi < b.hi : a.lo < b.lo;
}

}  // namespace

void KeyMap::prefetch(Key128 key) const {
  if (!slots_.empty()) __builtin_prefetch(&slots_[hash_of(key) & (slots_.size() - 1)]);
}

uint32_t KeyMap::find(Key128 key) const {
  if (!direct_.empty() && key.hi == 0 && key.lo - low_ < direct_.size()) return direct_[key.lo - low_] - 1;
  if (slots_.empty()) return kNoKey;
  const size_t mask = slots_.size() - 1;
  for (size_t at = hash_of(key) & mask; slots_[at] != 0; at = (at + 1) & mask) {
    if (keys_[slots_[at] - 1] == key) return slots_[at] - 1;
  }
  return kNoKey;
}

uint32_t KeyMap::add(Key128 key) {
  if (!direct_.empty() && key.hi == 0 && key.lo - low_ < direct_.size()) {
    uint32_t& at = direct_[key.lo - low_];
    if (at == 0) {
      keys_.push_back(key);
      at = size();
    }
    return at - 1;
  }
  if (slots_.size() < 2 * (keys_.size() + 1)) grow();
  const size_t mask = slots_.size() - 1;
  size_t at = hash_of(key) & mask;
  for (; slots_[at] != 0; at = (at + 1) & mask) {
    if (keys_[slots_[at] - 1] == key) return slots_[at] - 1;
  }
  keys_.push_back(key);
  slots_[at] = size();
  return size() - 1;
}

void KeyMap::grow() {
  std::vector<uint32_t> slots(std::max<size_t>(16, 2 * slots_.size()));
  while (slots.size() < 2 * (keys_.size() + 1)) slots.resize(2 * slots.size());
  const size_t mask = slots.size() - 1;
  for (uint32_t number = 0; number < size(); ++number) {
    const Key128 key = keys_[number];
    if (!direct_.empty() && key.hi == 0 && key.lo - low_ < direct_.size()) continue;
    size_t at = hash_of(key) & mask;
    while (slots[at] != 0) at = (at + 1) & mask;
    slots[at] = number + 1;
  }
  slots_ = std::move(slots);
}

bool KeyMap::add_range(const KeyColumn& keys, const bool* nulls, size_t n, uint32_t* numbers) {
  uint64_t low = ~uint64_t{0}, high = 0, hashed = 0;
  for (size_t i = 0; i < n; ++i) {
    if (nulls != nullptr && nulls[i]) continue;
    const Key128 key = keys.at(i);
    low = std::min(low, key.lo);
    high = std::max(high, key.lo);
    hashed |= key.hi;
  }
  if (hashed != 0 || low > high || high - low >= 4 * n + 1024) return false;
  low_ = low;
  direct_.assign(high - low + 1, 0);
  for (size_t i = 0; i < n; ++i) {
    if (nulls == nullptr || !nulls[i]) direct_[keys.at(i).lo - low] = 1;
  }
  for (size_t d = 0; d < direct_.size(); ++d) {
    if (direct_[d] == 0) continue;
    keys_.push_back({low + d, 0});
    direct_[d] = size();
  }
  for (size_t i = 0; i < n; ++i) {
    numbers[i] = nulls != nullptr && nulls[i] ? kNoKey : direct_[keys.at(i).lo - low] - 1;
  }
  return true;
}

void KeyMap::add_all(const KeyColumn& keys, const bool* nulls, size_t n, uint32_t* numbers) {
  if (keys_.empty() && n > 0 && add_range(keys, nulls, n, numbers)) return;
  for (size_t i = 0; i < n; ++i) {
    if (i + kAhead < n) prefetch(keys.at(i + kAhead));
    numbers[i] = nulls != nullptr && nulls[i] ? kNoKey : add(keys.at(i));
  }
}

EventSlice EventIndex::slice(uint32_t key) const {
  EventSlice out;
  const size_t at = starts_[key];
  out.n = starts_[key + 1] - at;
  out.time = time_.data() + at;
  out.known = (known_.empty() ? time_ : known_).data() + at;
  out.superseded = superseded_.empty() ? nullptr : superseded_.data() + at;
  out.row = row_.data() + at;
  return out;
}

void EventIndex::deletions(uint32_t key, std::vector<uint32_t>* rows) const {
  auto at = std::lower_bound(deletions_.begin(), deletions_.end(), key,
                             [](const Deletion& d, uint32_t k) { return d.key < k; });
  for (; at != deletions_.end() && at->key == key; ++at) rows->push_back(at->row);
}

Status EventIndex::build(const EventRows& rows, unsigned threads, EventIndex* out) {
  if (rows.n >= kNoKey) {
    return Status::invalid("a source has " + std::to_string(rows.n) + " rows; expected fewer than 2^32 - 1");
  }
  EventIndex& index = *out;
  std::vector<uint32_t> numbers(rows.n);
  index.keys_.add_all(rows.keys, rows.null_keys, rows.n, numbers.data());
  const uint32_t n_keys = index.n_keys();
  const unsigned parts = rows.n < 65536 ? 1 : std::max(1u, threads);
  const auto range = [&](unsigned part, size_t n) {
    return std::pair<size_t, size_t>{n * part / parts, n * (part + 1) / parts};
  };
  // Counts of each part, which become the places of its first events: so the order of rows is kept.
  std::vector<std::vector<uint32_t>> places(parts);
  in_parts(parts, [&](unsigned part) {
    places[part].assign(n_keys, 0);
    const auto [from, to] = range(part, rows.n);
    for (size_t i = from; i < to; ++i) {
      if (numbers[i] != kNoKey) ++places[part][numbers[i]];
    }
  });
  index.starts_.resize(n_keys + 1);
  uint32_t total = 0;
  for (uint32_t key = 0; key < n_keys; ++key) {
    index.starts_[key] = total;
    for (unsigned part = 0; part < parts; ++part) {
      const uint32_t count = places[part][key];
      places[part][key] = total;
      total += count;
    }
  }
  index.starts_[n_keys] = total;
  index.time_.resize(total);
  index.row_.resize(total);
  const bool known = rows.known_at != nullptr;
  if (known) index.known_.resize(total);
  in_parts(parts, [&](unsigned part) {
    const auto [from, to] = range(part, rows.n);
    uint32_t* place = places[part].data();
    for (size_t i = from; i < to; ++i) {
      if (numbers[i] == kNoKey) continue;
      const uint32_t at = place[numbers[i]]++;
      index.time_[at] = rows.event_time[i];
      index.row_[at] = static_cast<uint32_t>(i);
      if (known) index.known_[at] = rows.known_at[i];
    }
  });
  in_parts(parts, [&](unsigned part) {
    const auto [from, to] = range(part, n_keys);
    EventSorter sorter;
    for (size_t key = from; key < to; ++key) {
      const uint32_t first = index.starts_[key], stop = index.starts_[key + 1];
      bool ordered = true;
      for (uint32_t i = first + 1; i < stop && ordered; ++i) {
        ordered = index.time_[i - 1] < index.time_[i] || (index.time_[i - 1] == index.time_[i] &&
                                                          (!known || index.known_[i - 1] <= index.known_[i]));
      }
      if (ordered) continue;
      sorter.sort(&index.time_[first], known ? &index.known_[first] : nullptr, &index.row_[first],
                  stop - first);
    }
  });
  if (rows.event_ids != nullptr || rows.deleted != nullptr) index.apply_versions(rows);
  return Status::ok();
}

void EventIndex::apply_versions(const EventRows& rows) {
  superseded_.assign(row_.size(), kTimeMax);
  std::vector<uint8_t> keep(row_.size(), 1);
  std::vector<EventVersion> versions;
  std::vector<std::pair<uint32_t, uint32_t>> where;  // row, position
  for (uint32_t key = 0; key < n_keys(); ++key) {
    versions.clear();
    where.clear();
    for (uint32_t at = starts_[key]; at < starts_[key + 1]; ++at) {
      const uint32_t row = row_[at];
      const bool deleted = rows.deleted != nullptr && rows.deleted[row];
      if (deleted) {
        deletions_.push_back({key, row});
        keep[at] = 0;
      }
      if (rows.event_ids == nullptr || (rows.null_ids != nullptr && rows.null_ids[row])) continue;
      const int64_t known = (known_.empty() ? time_ : known_)[at];
      versions.push_back(
          {{rows.event_ids[2 * row], rows.event_ids[2 * row + 1]}, time_[at], known, row, deleted});
      where.emplace_back(row, at);
    }
    if (versions.empty()) continue;
    link_versions(&versions);
    std::sort(where.begin(), where.end());
    for (const EventVersion& version : versions) {
      const auto at =
          std::lower_bound(where.begin(), where.end(), std::pair<uint32_t, uint32_t>{version.row, 0});
      superseded_[at->second] = version.superseded;
      if (!version.counts) keep[at->second] = 0;
    }
  }
  std::sort(deletions_.begin(), deletions_.end(), [](const Deletion& a, const Deletion& b) {
    return a.key != b.key ? a.key < b.key : a.row < b.row;
  });
  uint32_t kept = 0;
  for (uint32_t key = 0; key < n_keys(); ++key) {
    const uint32_t first = starts_[key], stop = starts_[key + 1];
    starts_[key] = kept;
    for (uint32_t at = first; at < stop; ++at) {
      if (keep[at] == 0) continue;
      time_[kept] = time_[at];
      if (!known_.empty()) known_[kept] = known_[at];
      superseded_[kept] = superseded_[at];
      row_[kept++] = row_[at];
    }
  }
  starts_[n_keys()] = kept;
  time_.resize(kept);
  row_.resize(kept);
  superseded_.resize(kept);
  if (!known_.empty()) known_.resize(kept);
}

void link_versions(std::vector<EventVersion>* versions) {
  std::sort(versions->begin(), versions->end(), [](const EventVersion& a, const EventVersion& b) {
    if (a.id != b.id) return id_less(a.id, b.id);
    return a.known != b.known ? a.known < b.known : a.row < b.row;
  });
  for (size_t i = 0; i < versions->size(); ++i) {
    EventVersion& version = (*versions)[i];
    const bool last = i + 1 == versions->size() || (*versions)[i + 1].id != version.id;
    version.superseded = last ? kTimeMax : (*versions)[i + 1].known;
    // A version that was known for no time counts never, nor does an old one that was known at no time.
    version.counts =
        !version.deleted && (last || (version.known != kTimeMin && version.superseded > version.known));
  }
}

}  // namespace penstock
