#include "cache/edge_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "cache/slot_protocol.h"

namespace penstock {
namespace {

constexpr int kReadAttempts = 16;   // then a miss: a get ends in bounded steps whatever a writer does
constexpr uint32_t kVictims = 4;    // entries of a full bucket that a new one is compared with
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older C libraries do not name
constexpr uint32_t kNoWay = UINT32_MAX;

// Control word of a bucket: locked 0 | hand 1..4 | sequence in 16..62. Changed only by the lock's holder.
constexpr uint64_t kLocked = 1;
constexpr int kHandShift = 1;
constexpr uint64_t kHandMask = uint64_t{15} << kHandShift;
constexpr int kSequenceShift = 16;

// Words of an entry. Then: scores, (key lo, key hi, slot version, event time) of each view, features two a
// word.
enum EntryWord : size_t { kKeyLo, kKeyHi, kExpires, kValidFrom, kValidUntil, kRowStatus, kHeadWords };
constexpr size_t kViewWords = 4;

constexpr uint64_t mix(uint64_t x) {
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93U;
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93U;
  return x ^ (x >> 32);
}

constexpr uint64_t align_up(uint64_t value, uint64_t to) {
  return (value + to - 1) / to * to;
}

constexpr size_t words_of(size_t outputs, size_t views, size_t features) {
  return kHeadWords + outputs + kViewWords * views + (features + 1) / 2;
}

int64_t expiry(int64_t mono_ns, int64_t ttl_ns) {
  int64_t at;
  if (ttl_ns <= 0 || __builtin_add_overflow(mono_ns, ttl_ns, &at)) return std::numeric_limits<int64_t>::max();
  return at;
}

}  // namespace

struct alignas(128) EdgeCache::Bucket {
  sync::Word control;
  sync::Word slots[kWays];
};

// Relaxed adds, read by stats; they publish nothing.
struct alignas(64) EdgeCache::Counters {
  sync::Word reads[4];  // by EdgeRead
  sync::Word admitted, rejected;
  sync::Word samples;  // of the sketch
};

Status EdgeCache::create(const EdgeCacheConfig& config, std::unique_ptr<EdgeCache>* out) {
  constexpr uint64_t kMaxCapacity = uint64_t{1} << 32;
  if (config.capacity == 0 || config.capacity > kMaxCapacity) {
    return Status::invalid("capacity is " + std::to_string(config.capacity) +
                           "; expected 1 to 2**32 predictions");
  }
  const size_t words = words_of(config.outputs, config.views.size(), config.features);
  if (words > kMaxEntryWords) {
    return Status::invalid("a prediction of " + std::to_string(config.features) + " features and " +
                           std::to_string(config.outputs) + " outputs takes " + std::to_string(words) +
                           " words; expected at most " + std::to_string(kMaxEntryWords));
  }
  const uint64_t n_buckets = (config.capacity + kWays - 1) / kWays;
  const uint64_t stride = align_up(words, 8);
  const uint64_t n_blocks = FrequencySketch::blocks_for(n_buckets * kWays);
  const uint64_t bytes = align_up(sizeof(Counters), 128) + n_buckets * sizeof(Bucket) +
                         n_blocks * sizeof(FrequencySketch::Block) +
                         n_buckets * kWays * stride * sizeof(uint64_t);
  void* arena =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena == MAP_FAILED) {
    return {Code::kResourceExhausted, "cannot map " + std::to_string(bytes) +
                                          " bytes for an edge cache of capacity " +
                                          std::to_string(config.capacity)};
  }
  out->reset(new EdgeCache(config, arena, bytes, n_buckets, stride));
  if (config.populate) (*out)->populate();
  return {};
}

EdgeCache::EdgeCache(const EdgeCacheConfig& config, void* arena, size_t bytes, uint64_t n_buckets,
                     uint64_t stride)
    : views_(config.views),
      ttl_ns_(config.ttl_ns),
      outputs_(config.outputs),
      features_(config.features),
      hash_mask_(config.hash_mask_for_test),
      base_(static_cast<uint8_t*>(arena)),
      bytes_(bytes),
      n_buckets_(n_buckets),
      stride_(stride),
      entry_words_(words_of(config.outputs, config.views.size(), config.features)),
      buckets_at_(align_up(sizeof(Counters), 128)),
      slots_at_(buckets_at_ + n_buckets * sizeof(Bucket) +
                FrequencySketch::blocks_for(n_buckets * kWays) * sizeof(FrequencySketch::Block)),
      sketch_(reinterpret_cast<FrequencySketch::Block*>(base_ + buckets_at_ + n_buckets * sizeof(Bucket)),
              FrequencySketch::blocks_for(n_buckets * kWays), &counters().samples) {}

EdgeCache::~EdgeCache() {
  munmap(base_, bytes_);
}

// Where the kernel does not know the advice, the pages come with the first entries.
void EdgeCache::populate() {
  (void)madvise(base_, bytes_, MADV_HUGEPAGE);
  (void)madvise(base_, bytes_, kPopulateWrite);
}

EdgeCache::Bucket& EdgeCache::bucket(uint64_t index) const {
  return reinterpret_cast<Bucket*>(base_ + buckets_at_)[index];
}
sync::Word* EdgeCache::slot(uint64_t bucket, uint32_t way) const {
  return reinterpret_cast<sync::Word*>(base_ + slots_at_) + (bucket * kWays + way) * stride_;
}
EdgeCache::Counters& EdgeCache::counters() const {
  return *reinterpret_cast<Counters*>(base_);
}

// The keys are fingerprints, so their halves are independent; mixed all the same, for keys that are not.
EdgeCache::Place EdgeCache::place(const Key128& key) const {
  const uint64_t hash = mix(key.hi ^ mix(key.lo)) & hash_mask_;
  const auto wide = static_cast<unsigned __int128>(hash) * n_buckets_;
  const uint64_t tag = hash & 0xffff;
  return {static_cast<uint64_t>(wide >> 64), tag == 0 ? 1 : tag};
}
uint64_t EdgeCache::sketch_hash(const Key128& key) {
  return mix(key.lo ^ mix(key.hi + 0x9e3779b97f4a7c15U));
}

uint32_t EdgeCache::candidates(const Place& place) const {
  uint32_t ways = 0;
  Bucket& b = bucket(place.bucket);
  for (uint32_t way = kWays; way-- > 0;) {
    // Relaxed: a hint, checked again by the reader through the slot's protocol, or under the lock.
    const uint64_t word = sync::load(b.slots[way], sync::kRelaxed);
    ways += ways + (slot::tag_of(word) == place.tag ? 1 : 0);
  }
  return ways;
}

bool EdgeCache::rows_current(const Key128* keys, const uint64_t* versions, int64_t mono_ns) const {
  for (size_t v = 0; v < views_.size(); ++v) {
    if (versions[v] != 0 && !views_[v]->is_current(keys[v], versions[v], mono_ns)) return false;
  }
  return true;
}

EdgeRead EdgeCache::get(const Key128& key, int64_t now_us, int64_t mono_ns, EdgeRow* row) {
  sketch_.record(sketch_hash(key));
  const EdgeRead read = peek(key, now_us, mono_ns, row);
  sync::add(counters().reads[static_cast<size_t>(read)], 1);
  return read;
}

EdgeRead EdgeCache::peek(const Key128& key, int64_t now_us, int64_t mono_ns, EdgeRow* row) {
  const Place at = place(key);
  Bucket& b = bucket(at.bucket);
  uint64_t copy[kMaxEntryWords];  // a copy that turns out torn must not reach the caller
  int attempts = kReadAttempts;
  for (uint32_t ways = candidates(at); ways != 0; ways &= ways - 1) {
    const auto way = static_cast<uint32_t>(__builtin_ctz(ways));
    sync::Word& word = b.slots[way];
    for (;; sync::pause()) {
      const uint64_t seen = slot::read_begin(word);
      if (slot::tag_of(seen) != at.tag) break;
      if (!slot::is_being_written(seen)) {
        sync::Word* entry = slot(at.bucket, way);
        slot::copy_out(entry, copy, 2);
        const bool same = copy[kKeyLo] == key.lo && copy[kKeyHi] == key.hi;
        if (same) slot::copy_out(entry + 2, copy + 2, entry_words_ - 2);
        if (slot::read_confirm(word, seen)) {
          if (!same) break;
          if (mono_ns >= static_cast<int64_t>(copy[kExpires]) ||
              now_us < static_cast<int64_t>(copy[kValidFrom]) ||
              now_us >= static_cast<int64_t>(copy[kValidUntil])) {
            return EdgeRead::kExpired;
          }
          const uint64_t* view = copy + kHeadWords + outputs_;
          for (size_t v = 0; v < views_.size(); ++v, view += kViewWords) {
            const Key128 row_key{view[0], view[1]};
            if (view[2] != 0 && !views_[v]->is_current(row_key, view[2], mono_ns)) return EdgeRead::kStale;
            row->row_keys[v] = row_key;
            row->row_versions[v] = view[2];
            row->event_time[v] = static_cast<int64_t>(view[3]);
          }
          std::memcpy(row->scores, copy + kHeadWords, outputs_ * sizeof(double));
          std::memcpy(row->features, view, features_ * sizeof(float));
          row->valid_from = static_cast<int64_t>(copy[kValidFrom]);
          row->valid_until = static_cast<int64_t>(copy[kValidUntil]);
          row->status = static_cast<uint8_t>(copy[kRowStatus]);
          return EdgeRead::kHit;
        }
      }
      if (--attempts == 0) return EdgeRead::kMiss;
    }
  }
  return EdgeRead::kMiss;
}

// Under the bucket's lock. An empty way, else an expired one, else the least frequent of kVictims in turn,
// if the key is more frequent; else kNoWay.
uint32_t EdgeCache::choose_way(const Place& place, const Key128& key, int64_t mono_ns, uint64_t& control) {
  Bucket& b = bucket(place.bucket);
  for (uint32_t way = 0; way < kWays; ++way) {
    if (slot::tag_of(sync::load(b.slots[way], sync::kRelaxed)) == 0) return way;
  }
  auto hand = static_cast<uint32_t>((control & kHandMask) >> kHandShift);
  uint32_t least = sketch_.estimate(sketch_hash(key));
  uint32_t chosen = kNoWay;
  for (uint32_t i = 0; i < kVictims; ++i, hand = hand + 1 == kWays ? 0 : hand + 1) {
    sync::Word* entry = slot(place.bucket, hand);
    if (static_cast<int64_t>(sync::load(entry[kExpires], sync::kRelaxed)) <= mono_ns) {
      chosen = hand;
      break;
    }
    const Key128 other{sync::load(entry[kKeyLo], sync::kRelaxed), sync::load(entry[kKeyHi], sync::kRelaxed)};
    const uint32_t seen = sketch_.estimate(sketch_hash(other));
    if (seen >= least) continue;
    least = seen;
    chosen = hand;
  }
  control = (control & ~kHandMask) | uint64_t{hand} << kHandShift;
  return chosen;
}

EdgePut EdgeCache::put(const Key128& key, const EdgeRow& row, int64_t mono_ns) {
  if (!rows_current(row.row_keys, row.row_versions, mono_ns)) return EdgePut::kStale;
  const Place at = place(key);
  Bucket& b = bucket(at.bucket);
  uint64_t control = sync::load(b.control, sync::kRelaxed);
  // Acquire: pairs with the release store that unlocks. One try: what is not cached now may be later.
  if ((control & kLocked) != 0 ||
      !sync::compare_exchange(b.control, control, control | kLocked, sync::kAcquire)) {
    sync::add(counters().rejected, 1);
    return EdgePut::kRejected;
  }
  uint32_t way = kNoWay;
  for (uint32_t ways = candidates(at); ways != 0 && way == kNoWay; ways &= ways - 1) {
    const auto each = static_cast<uint32_t>(__builtin_ctz(ways));
    sync::Word* entry = slot(at.bucket, each);
    if (sync::load(entry[kKeyLo], sync::kRelaxed) == key.lo &&
        sync::load(entry[kKeyHi], sync::kRelaxed) == key.hi) {
      way = each;
    }
  }
  const bool replaces = way != kNoWay;
  if (!replaces) way = choose_way(at, key, mono_ns, control);
  EdgePut result = EdgePut::kRejected;
  if (way != kNoWay) {
    uint64_t entry[kMaxEntryWords];
    entry[kKeyLo] = key.lo;
    entry[kKeyHi] = key.hi;
    entry[kExpires] = static_cast<uint64_t>(expiry(mono_ns, ttl_ns_));
    entry[kValidFrom] = static_cast<uint64_t>(row.valid_from);
    entry[kValidUntil] = static_cast<uint64_t>(row.valid_until);
    entry[kRowStatus] = row.status;
    std::memcpy(entry + kHeadWords, row.scores, outputs_ * sizeof(double));
    uint64_t* view = entry + kHeadWords + outputs_;
    for (size_t v = 0; v < views_.size(); ++v, view += kViewWords) {
      view[0] = row.row_keys[v].lo;
      view[1] = row.row_keys[v].hi;
      view[2] = row.row_versions[v];
      view[3] = static_cast<uint64_t>(row.event_time[v]);
    }
    if (features_ % 2 != 0) entry[entry_words_ - 1] = 0;  // half of it is no feature
    std::memcpy(view, row.features, features_ * sizeof(float));
    control += uint64_t{1} << kSequenceShift;
    const uint64_t version = 2 * (control >> kSequenceShift);  // never held before by a slot of this bucket
    slot::write_begin(b.slots[way]);
    slot::copy_in(slot(at.bucket, way), entry, entry_words_);
    slot::publish(b.slots[way], slot::make_word(at.tag, version));
    result = replaces ? EdgePut::kReplaced : EdgePut::kStored;
  }
  sync::add(result == EdgePut::kRejected ? counters().rejected : counters().admitted, 1);
  sync::store(b.control, control & ~kLocked, sync::kRelease);
  return result;
}

void EdgeCache::record(const Key128& key, uint32_t times) {
  for (uint32_t i = 0; i < times; ++i) sketch_.record(sketch_hash(key));
}

uint32_t EdgeCache::frequency(const Key128& key) const {
  return sketch_.estimate(sketch_hash(key));
}

EdgeCacheStats EdgeCache::stats() const {
  uint64_t size = 0;
  for (uint64_t index = 0; index < n_buckets_; ++index) {
    for (sync::Word& word : bucket(index).slots)
      size += slot::tag_of(sync::load(word, sync::kRelaxed)) != 0 ? 1 : 0;
  }
  Counters& c = counters();
  const auto read = [](sync::Word& counter) { return sync::load(counter, sync::kRelaxed); };
  return {read(c.reads[0]),
          read(c.reads[1]),
          read(c.reads[2]),
          read(c.reads[3]),
          read(c.admitted),
          read(c.rejected),
          size,
          n_buckets_ * kWays,
          bytes_};
}

}  // namespace penstock
