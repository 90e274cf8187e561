#include "cache/feature_cache.h"

#include <algorithm>
#include <limits>
#include <string>
#include <thread>

#include "cache/feature_cache_layout.h"
#include "cache/slot_protocol.h"
#include "cache/wide_reads.h"

namespace penstock {
namespace {

constexpr int64_t kMostAheadUs = 60'000'000;  // a row is not loaded for a time further ahead
constexpr int kReadAttempts = 16;  // then kBusy: a get ends in bounded steps whatever a writer does

// Control word of a bucket: visited bits 0..14 | hand 15..18 | owner + 1 in 19..51, 0 when unlocked.
constexpr uint64_t kVisitedMask = (uint64_t{1} << FeatureCache::kWays) - 1;
constexpr int kHandShift = 15;
constexpr uint64_t kHandMask = uint64_t{15} << kHandShift;
constexpr int kOwnerShift = 19;
constexpr uint64_t kOwnerMask = ((uint64_t{1} << 33) - 1) << kOwnerShift;

constexpr uint64_t owner_field(uint32_t owner) {
  return (uint64_t{owner} + 1) << kOwnerShift;
}

constexpr uint64_t mix(uint64_t x) {
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93U;
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93U;
  return x ^ (x >> 32);
}

// To the second-level cache, which has more outstanding misses than the first (measured: 10 % a batch).
void prefetch(const void* at, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i, 0, 2);
}

int64_t expiry(int64_t mono_ns, int64_t ttl_ns) {
  int64_t at;
  if (ttl_ns <= 0 || __builtin_add_overflow(mono_ns, ttl_ns, &at)) return std::numeric_limits<int64_t>::max();
  return at;
}

}  // namespace

// Holds a bucket's lock for a scope. `abandon` leaves it locked.
struct FeatureCache::Lock {
  Lock(Bucket& bucket, uint32_t owner) : control(bucket.control) {
    uint64_t seen = sync::load(control, sync::kRelaxed);
    for (int spins = 0;; ++spins) {
      // Acquire: pairs with the release in the destructor of the previous holder.
      if ((seen & kOwnerMask) == 0 &&
          sync::compare_exchange(control, seen, seen | owner_field(owner), sync::kAcquire)) {
        break;
      }
      if ((seen & kOwnerMask) != 0) {
        if (spins < 64) {
          sync::pause();
        } else {
          std::this_thread::yield();
        }
        seen = sync::load(control, sync::kRelaxed);
      }
    }
    adopt(seen);
  }
  explicit Lock(Bucket& bucket) : control(bucket.control) { adopt(sync::load(control, sync::kRelaxed)); }
  ~Lock() {
    if (abandoned) return;
    uint64_t seen = sync::load(control, sync::kRelaxed);
    // A loop, since readers set visited bits meanwhile. Release: pairs with the acquire of the next holder.
    while (!sync::compare_exchange(
        control, seen, (seen & ~(kOwnerMask | kHandMask | unvisit)) | (uint64_t{hand} << kHandShift),
        sync::kRelease)) {
    }
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
  void adopt(uint64_t seen) {
    visited = seen & kVisitedMask;
    hand = static_cast<uint32_t>((seen & kHandMask) >> kHandShift);
  }

  sync::Word& control;
  uint64_t visited = 0;
  uint64_t unvisit = 0;
  uint32_t hand = 0;
  bool abandoned = false;
};

FeatureCache::Header& FeatureCache::header() const {
  return *reinterpret_cast<Header*>(base_);
}
FeatureCache::Bucket& FeatureCache::bucket(uint64_t index) const {
  return reinterpret_cast<Bucket*>(base_ + buckets_at_)[index];
}
FeatureCache::Side& FeatureCache::side(uint64_t index) const {
  return reinterpret_cast<Side*>(base_ + sides_at_)[index];
}
sync::Word* FeatureCache::slot_meta(uint64_t bucket, uint32_t way) const {
  return reinterpret_cast<sync::Word*>(base_ + slots_at_) + (bucket * kWays + way) * slot_stride_;
}
sync::Word* FeatureCache::slot_row(uint64_t bucket, uint32_t way) const {
  return slot_meta(bucket, way) + kMetaWords;
}

FeatureCache::Place FeatureCache::place(const Key128& key) const {
  const uint64_t hash = mix(key.lo ^ mix(key.hi + 0x9e3779b97f4a7c15U));
  const auto wide = static_cast<unsigned __int128>(hash) * n_buckets_;
  const uint64_t tag = hash & 0xffff;
  return {static_cast<uint64_t>(wide >> 64), tag == 0 ? 1 : tag};
}

uint32_t FeatureCache::candidates(const Place& place) const {
  uint32_t ways = 0;
  Bucket& b = bucket(place.bucket);
  const uint64_t tag = slot::make_word(place.tag, 0);
  for (uint32_t way = kWays; way-- > 0;) {
    // Relaxed: only a hint, checked again in read_one. A put that happened before this get is seen by
    // coherence. Equal tags leave only version bits in the exclusive or.
    const uint64_t apart = sync::load(b.slots[way], sync::kRelaxed) ^ tag;
    ways += ways + (apart <= slot::kVersionMask ? 1 : 0);
  }
  return ways;
}

// A row costs two misses that follow one another, the bucket and the slot, so keys go through three stages in
// groups: while one group's buckets are on their way, the slots of an earlier group are found and fetched,
// and the rows of a still earlier one are read. Within a stage the fetches stand together: each may wait for
// an address translation, and only what the processor sees close together waits at the same time.
struct FeatureCache::Reading {
  static constexpr size_t kGroup = 8;
  static constexpr size_t kSlotLag = 2 * kGroup;  // keys between the fetches of a bucket and of its slot
  static constexpr size_t kRowLag = 4 * kGroup;   // keys between the fetch of a bucket and the read
  static constexpr size_t kRing = 64;
  static_assert(kRing >= kRowLag + kGroup && kRing % kGroup == 0);

  Place places[kRing];
  const uint64_t* buckets[kRing];
  uint64_t tags[kRing];
  uint32_t ways[kRing];
};

size_t FeatureCache::get_many(const Key128* keys, size_t n, int64_t now_us, int64_t mono_ns, uint64_t* rows,
                              ReadStatus* status, RowMeta* meta, uint64_t* slot_versions) {
  using R = Reading;
  const WideReads* wide = wide_reads();
  Reading ring;
  uint64_t counts[4] = {};
  for (size_t step = 0; step < n + R::kRowLag; step += R::kGroup) {
    if (step < n) {
      const size_t first = step % R::kRing;
      const size_t size = std::min(R::kGroup, n - step);
      for (size_t i = 0; i < size; ++i) {
        const Place at = place(keys[step + i]);
        ring.places[first + i] = at;
        ring.tags[first + i] = at.tag;
        ring.buckets[first + i] = &bucket(at.bucket).control;
      }
      for (size_t i = first; i < first + size; ++i) prefetch(ring.buckets[i], sizeof(Bucket));
    }
    if (step >= R::kSlotLag && step - R::kSlotLag < n) {
      const size_t first = (step - R::kSlotLag) % R::kRing;
      const size_t size = std::min(R::kGroup, n - (step - R::kSlotLag));
      if (wide != nullptr) {
        wide->match_tags(ring.buckets + first, ring.tags + first, size, ring.ways + first);
      } else {
        for (size_t i = first; i < first + size; ++i) ring.ways[i] = candidates(ring.places[i]);
      }
      const size_t bytes = (kMetaWords + row_words_) * sizeof(uint64_t);
      for (size_t i = first; i < first + size; ++i) {
        for (uint32_t left = ring.ways[i]; left != 0; left &= left - 1) {
          prefetch(slot_meta(ring.places[i].bucket, static_cast<uint32_t>(__builtin_ctz(left))), bytes);
        }
      }
    }
    if (step >= R::kRowLag) {
      const size_t end = std::min(step - R::kRowLag + R::kGroup, n);
      for (size_t at = step - R::kRowLag; at < end; ++at) {
        const size_t i = at % R::kRing;
        uint64_t version = 0;
        status[at] = read_one(keys[at], ring.places[i], ring.ways[i], now_us, mono_ns, wide,
                              rows + at * row_words_, meta == nullptr ? nullptr : meta + at, &version, false);
        if (slot_versions != nullptr) slot_versions[at] = version;
        ++counts[static_cast<uint8_t>(status[at])];
      }
    }
  }
  sync::Word* counters[4] = {&header().hits, &header().misses, &header().expired, &header().busy};
  for (int i = 0; i < 4; ++i) {
    if (counts[i] != 0) sync::add(*counters[i], counts[i]);
  }
  return counts[0];
}

// A copy that turns out torn must not reach the caller's row.
bool FeatureCache::copy_confirmed(sync::Word* from, uint64_t* row, sync::Word& word, uint64_t seen) const {
  alignas(64) uint64_t copy[kMaxRowWords];
  slot::copy_out(from, copy, row_words_);
  if (!slot::read_confirm(word, seen)) return false;
  std::copy_n(copy, row_words_, row);
  return true;
}

ReadStatus FeatureCache::read_one(const Key128& key, const Place& place, uint32_t ways, int64_t now_us,
                                  int64_t mono_ns, const WideReads* wide, uint64_t* row, RowMeta* meta,
                                  uint64_t* version, bool peeking) {
  uint64_t head[kMetaWords];
  Bucket& b = bucket(place.bucket);
  const bool fits = wide != nullptr && row_words_ <= WideReads::kMaxWords;
  int attempts = kReadAttempts;
  for (; ways != 0; ways &= ways - 1) {
    const auto way = static_cast<uint32_t>(__builtin_ctz(ways));
    sync::Word& word = b.slots[way];
    for (;; sync::pause()) {
      const uint64_t seen = slot::read_begin(word);
      if (slot::tag_of(seen) != place.tag) break;
      if (!slot::is_being_written(seen)) {
        slot::copy_out(slot_meta(place.bucket, way), head, kMetaWords);
        const bool same = head[kKeyLo] == key.lo && head[kKeyHi] == key.hi;
        const bool valid = mono_ns < static_cast<int64_t>(head[kExpires]) &&
                           static_cast<int64_t>(head[kValidFrom]) <= now_us &&
                           now_us < static_cast<int64_t>(head[kValidUntil]);
        if (!same || !valid) {
          if (slot::read_confirm(word, seen)) {
            if (!same) break;
            return ReadStatus::kExpired;
          }
        } else if (fits ? wide->copy_confirmed(slot_row(place.bucket, way), row, row_words_, &word, seen)
                        : copy_confirmed(slot_row(place.bucket, way), row, word, seen)) {
          if (meta != nullptr) {
            *meta = {static_cast<int64_t>(head[kValidFrom]), static_cast<int64_t>(head[kValidUntil]),
                     static_cast<int64_t>(head[kEventTime]), static_cast<int64_t>(head[kKnownAt])};
          }
          *version = seen;
          if (peeking) return ReadStatus::kHit;
          if (refreshes_ != nullptr) offer_refresh(key, head, row, seen, now_us, mono_ns);
          // Relaxed, and only when clear: a hint for the lock's holder, which rereads the word to unlock.
          const uint64_t bit = uint64_t{1} << way;
          if ((sync::load(b.control, sync::kRelaxed) & bit) == 0) sync::set_bits(b.control, bit);
          return ReadStatus::kHit;
        }
      }
      if (--attempts == 0) return ReadStatus::kBusy;
    }
  }
  return ReadStatus::kMiss;
}

bool FeatureCache::peek(const Key128& key, int64_t now_us, int64_t mono_ns, uint64_t* row, RowMeta* meta) {
  const Place at = place(key);
  uint64_t version;
  return read_one(key, at, candidates(at), now_us, mono_ns, wide_reads(), row, meta, &version, true) ==
         ReadStatus::kHit;
}

// Unknown keys are left to expire: each is one load a negative TTL, however often it is asked for. A row that
// ends by request time is loaded for that time, when it will hold; a row whose memory TTL ends, for now.
void FeatureCache::offer_refresh(const Key128& key, const uint64_t* head, const uint64_t* row,
                                 uint64_t version, int64_t now_us, int64_t mono_ns) {
  if ((row[0] & 0xff) == kNotFound) return;
  const auto from = static_cast<int64_t>(head[kValidFrom]), until = static_cast<int64_t>(head[kValidUntil]);
  const double length = static_cast<double>(until) - static_cast<double>(from);
  const double left = static_cast<double>(until) - static_cast<double>(now_us);
  if (left < std::min(refresh_ahead_ * length, static_cast<double>(kMostAheadUs))) {
    refreshes_->offer(key, version, until, true);
  } else if (static_cast<int64_t>(head[kExpires]) - mono_ns < refresh_ahead_ns_) {
    refreshes_->offer(key, version, now_us, false);
  }
}

size_t FeatureCache::take_refreshes(size_t n, RefreshQueue::Item* out) {
  return refreshes_ == nullptr ? 0 : refreshes_->take(n, out);
}

// The functions below run under the bucket's lock; their relaxed accesses are ordered by it.

int FeatureCache::find_locked(const Key128& key, const Place& place) const {
  for (uint32_t left = candidates(place); left != 0; left &= left - 1) {
    const int way = __builtin_ctz(left);
    sync::Word* meta = slot_meta(place.bucket, static_cast<uint32_t>(way));
    if (sync::load(meta[kKeyLo], sync::kRelaxed) == key.lo &&
        sync::load(meta[kKeyHi], sync::kRelaxed) == key.hi) {
      return way;
    }
  }
  return -1;
}

bool FeatureCache::is_resident(const Key128& key) const {
  return find_locked(key, place(key)) >= 0;  // relaxed loads, as the answer is a hint
}

// No word recurs in a bucket, so an equal one is that put. Acquire: as in slot::read_begin, for the expiry.
bool FeatureCache::is_current(const Key128& key, uint64_t slot_version, int64_t mono_ns) const {
  const Place at = place(key);
  Bucket& b = bucket(at.bucket);
  for (uint32_t way = 0; way < kWays; ++way) {
    if (slot::read_begin(b.slots[way]) != slot_version) continue;
    if (ttl_ns_ <= 0) return true;
    const auto expires =
        static_cast<int64_t>(sync::load(slot_meta(at.bucket, way)[kExpires], sync::kRelaxed));
    return slot::read_confirm(b.slots[way], slot_version) && mono_ns < expires;
  }
  return false;
}

// An empty way, else one past its TTL, else CLOCK. The chosen way's row is gone after the caller's write.
uint32_t FeatureCache::choose_way(const Place& place, int64_t mono_ns, Lock& lock) {
  Bucket& b = bucket(place.bucket);
  uint32_t stale = kWays;
  for (uint32_t way = 0; way < kWays; ++way) {
    if (slot::tag_of(sync::load(b.slots[way], sync::kRelaxed)) == 0) return way;
    const auto expires =
        static_cast<int64_t>(sync::load(slot_meta(place.bucket, way)[kExpires], sync::kRelaxed));
    if (stale == kWays && expires <= mono_ns) stale = way;
  }
  if (stale != kWays) return stale;
  // Ends within one round: each step either returns or clears a bit.
  for (;;) {
    const uint32_t way = lock.hand;
    lock.hand = (lock.hand + 1) % kWays;
    const uint64_t bit = uint64_t{1} << way;
    if ((lock.visited & bit & ~lock.unvisit) == 0) {
      sync::add(header().evictions, 1);
      return way;
    }
    lock.unvisit |= bit;
  }
}

void FeatureCache::raise_floor(uint64_t index, uint64_t stamp) {
  sync::Word& floor = side(index).floor;
  if (sync::load(floor, sync::kRelaxed) < stamp) sync::store(floor, stamp, sync::kRelaxed);
}

uint64_t FeatureCache::next_version(uint64_t index) {
  sync::Word& sequence = side(index).sequence;
  const uint64_t next = sync::load(sequence, sync::kRelaxed) + 2;
  sync::store(sequence, next, sync::kRelaxed);
  return next;
}

int64_t FeatureCache::expires_at(const uint64_t* row, int64_t mono_ns) const {
  const bool negative = negative_ttl_ns_ > 0 && (row[0] & 0xff) == kNotFound;
  const bool shorter = negative && (ttl_ns_ == 0 || negative_ttl_ns_ < ttl_ns_);
  return expiry(mono_ns, shorter ? negative_ttl_ns_ : ttl_ns_);
}

// The stamp word of a half-written slot is the old one or the new one; either keeps an older value out.
void FeatureCache::empty_slot(uint64_t index, uint32_t way) {
  raise_floor(index, sync::load(slot_meta(index, way)[kStamp], sync::kRelaxed));
  slot::publish(bucket(index).slots[way], slot::make_word(0, next_version(index)));
}

FeatureCache::PutResult FeatureCache::put(const Key128& key, const uint64_t* row, const RowMeta& meta,
                                          uint64_t stamp, int64_t mono_ns, uint32_t owner) {
  return put_words(key, row, meta, stamp, mono_ns, owner, row_words_, true);
}

void FeatureCache::abandon_put_for_test(const Key128& key, const uint64_t* row, const RowMeta& meta,
                                        uint64_t stamp, int64_t mono_ns, uint32_t owner, uint32_t words) {
  (void)put_words(key, row, meta, stamp, mono_ns, owner, std::min(words, row_words_), false);
}

FeatureCache::PutResult FeatureCache::put_words(const Key128& key, const uint64_t* row, const RowMeta& meta,
                                                uint64_t stamp, int64_t mono_ns, uint32_t owner,
                                                uint32_t words, bool complete) {
  const Place at = place(key);
  Bucket& b = bucket(at.bucket);
  Lock lock(b, owner);
  lock.abandoned = !complete;
  const int found = find_locked(key, at);
  uint32_t way;
  if (found >= 0) {
    way = static_cast<uint32_t>(found);
    if (sync::load(slot_meta(at.bucket, way)[kStamp], sync::kRelaxed) > stamp) {
      sync::add(header().superseded, 1);
      return PutResult::kSuperseded;
    }
  } else {
    if (sync::load(side(at.bucket).floor, sync::kRelaxed) > stamp) {
      sync::add(header().superseded, 1);
      return PutResult::kSuperseded;
    }
    way = choose_way(at, mono_ns, lock);
    lock.unvisit |= uint64_t{1} << way;
    // Before the slot is touched: a writer that dies below must not lose the evicted stamp.
    if (slot::tag_of(sync::load(b.slots[way], sync::kRelaxed)) != 0) {
      raise_floor(at.bucket, sync::load(slot_meta(at.bucket, way)[kStamp], sync::kRelaxed));
    }
  }
  const uint64_t next = slot::make_word(at.tag, next_version(at.bucket));
  const uint64_t head[kMetaWords] = {key.lo,
                                     key.hi,
                                     static_cast<uint64_t>(meta.valid_from),
                                     static_cast<uint64_t>(meta.valid_until),
                                     static_cast<uint64_t>(meta.event_time),
                                     static_cast<uint64_t>(meta.known_at),
                                     static_cast<uint64_t>(expires_at(row, mono_ns)),
                                     stamp};
  slot::write_begin(b.slots[way]);
  slot::copy_in(slot_meta(at.bucket, way), head, kMetaWords);
  slot::copy_in(slot_row(at.bucket, way), row, words);
  if (complete) {
    slot::publish(b.slots[way], next);
    sync::add(header().puts, 1);
    if ((row[0] & 0xff) == kNotFound) sync::add(header().negative_puts, 1);
  }
  return found >= 0 ? PutResult::kReplaced : PutResult::kStored;
}

bool FeatureCache::discard(const Key128& key, uint64_t stamp, uint32_t owner) {
  const Place at = place(key);
  Lock lock(bucket(at.bucket), owner);
  const int found = find_locked(key, at);
  if (found >= 0) {
    const auto way = static_cast<uint32_t>(found);
    if (sync::load(slot_meta(at.bucket, way)[kStamp], sync::kRelaxed) > stamp) return false;
    empty_slot(at.bucket, way);
  }
  raise_floor(at.bucket, stamp);
  return found >= 0;
}

void FeatureCache::clear(uint32_t owner, uint64_t stamp) {
  for (uint64_t index = 0; index < n_buckets_; ++index) {
    Bucket& b = bucket(index);
    Lock lock(b, owner);
    for (uint32_t way = 0; way < kWays; ++way) {
      if (slot::tag_of(sync::load(b.slots[way], sync::kRelaxed)) != 0) empty_slot(index, way);
    }
    raise_floor(index, stamp);
  }
}

size_t FeatureCache::reclaim_owner(uint32_t dead, uint32_t survivor) {
  size_t taken = 0;
  for (uint64_t index = 0; index < n_buckets_; ++index) {
    Bucket& b = bucket(index);
    uint64_t seen = sync::load(b.control, sync::kRelaxed);
    bool ours = false;
    // Visited bits may change under the exchange; the owner field only by another survivor. Acquire: the dead
    // owner made no release, so its stores are ordered by the caller's knowledge of its end (see the header).
    while (!ours && (seen & kOwnerMask) == owner_field(dead)) {
      ours = sync::compare_exchange(b.control, seen, (seen & ~kOwnerMask) | owner_field(survivor),
                                    sync::kAcquire);
    }
    if (!ours) continue;
    Lock lock(b);
    for (uint32_t way = 0; way < kWays; ++way) {
      if (slot::is_being_written(sync::load(b.slots[way], sync::kRelaxed))) empty_slot(index, way);
    }
    sync::add(header().lock_takeovers, 1);
    ++taken;
  }
  return taken;
}

FeatureCacheStats FeatureCache::stats() const {
  Header& h = header();
  uint64_t size = 0;
  for (uint64_t index = 0; index < n_buckets_; ++index) {
    Bucket& b = bucket(index);
    for (sync::Word& word : b.slots) size += slot::tag_of(sync::load(word, sync::kRelaxed)) != 0 ? 1 : 0;
  }
  const auto read = [](sync::Word& counter) { return sync::load(counter, sync::kRelaxed); };
  return {read(h.hits),
          read(h.misses),
          read(h.expired),
          read(h.busy),
          read(h.puts),
          read(h.superseded),
          read(h.evictions),
          read(h.lock_takeovers),
          size,
          n_buckets_ * kWays,
          bytes_,
          read(h.negative_puts),
          refreshes_ == nullptr ? 0 : refreshes_->queued(),
          refreshes_ == nullptr ? 0 : refreshes_->dropped()};
}

}  // namespace penstock
