// Edge cache: predictions of the most common inputs, by a 128-bit keyed fingerprint of what they depend on.
// 15-way set-associative, seqlock slots, admission by frequency.
//
// A hit is exactly one row that some put stored for that key, whole, compared on all 128 bits, inside its TTL
// (put time <= mono_ns < put time + ttl), inside its validity (valid_from <= now_us < valid_until), and made
// from feature rows that their caches still hold: the same put of each, inside its own TTL. Misses may be
// spurious. A put into a full bucket replaces an expired entry, else the least frequent of a few, if the
// new key was seen more often than it; a put whose feature rows have changed meanwhile is dropped.
//
// Reads are lock-free and bounded; a write locks one bucket and gives up where another writer is at work.
// Memory is fixed by create; it is touched at once with `populate`, else page by page as entries arrive.
// Threads: every method from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/key.h"
#include "base/status.h"
#include "cache/feature_cache.h"
#include "cache/frequency_sketch.h"
#include "sync/sync.h"

namespace penstock {

enum class EdgeRead : uint8_t { kHit = 0, kMiss = 1, kExpired = 2, kStale = 3 };
enum class EdgePut : uint8_t { kStored = 0, kReplaced = 1, kRejected = 2, kStale = 3 };

struct EdgeCacheConfig {
  uint64_t capacity;  // entries; rounded up to whole buckets
  int64_t ttl_ns;     // <= 0: none
  uint32_t outputs = 1;
  uint32_t features = 0;
  std::vector<std::shared_ptr<FeatureCache>> views;  // whose rows the entries are made from
  bool populate = true;
  uint64_t hash_mask_for_test = ~uint64_t{0};  // 0: all keys in one bucket, with one tag
};

// One answered row, in the caller's memory. get() writes it, put() reads it.
struct EdgeRow {
  double* scores;          // [outputs]
  float* features;         // [features], bit for bit
  int64_t* event_time;     // [views]
  Key128* row_keys;        // [views]: keys of the feature rows
  uint64_t* row_versions;  // [views]: their slot versions; 0: depends on no row of that view
  int64_t valid_from = 0;  // request time, microseconds
  int64_t valid_until = 0;
  uint8_t status = 0;
};

struct EdgeCacheStats {
  uint64_t hits, misses, expired, stale, admitted, rejected, size, capacity, bytes;
};

class EdgeCache {
 public:
  static constexpr uint32_t kWays = 15;
  static constexpr size_t kMaxEntryWords = 4096;

  static Status create(const EdgeCacheConfig& config, std::unique_ptr<EdgeCache>* out);
  ~EdgeCache();
  EdgeCache(const EdgeCache&) = delete;
  EdgeCache& operator=(const EdgeCache&) = delete;

  // Notes that the key was asked for, and reads it. `row` is written in full by a hit alone.
  EdgeRead get(const Key128& key, int64_t now_us, int64_t mono_ns, EdgeRow* row);
  // The same without notice: neither frequency nor counters.
  EdgeRead peek(const Key128& key, int64_t now_us, int64_t mono_ns, EdgeRow* row);

  EdgePut put(const Key128& key, const EdgeRow& row, int64_t mono_ns);

  // Notes `times` requests of the key, as for one that was frequent elsewhere.
  void record(const Key128& key, uint32_t times);
  // Times that the key was seen lately, at most FrequencySketch::kMost.
  uint32_t frequency(const Key128& key) const;
  // Touches all memory, so that no later put pays for it. Safe beside readers and writers.
  void populate();

  EdgeCacheStats stats() const;  // walks the buckets
  uint64_t bytes() const { return bytes_; }

 private:
  struct Bucket;
  struct Place {
    uint64_t bucket;
    uint64_t tag;
  };
  struct Counters;

  EdgeCache(const EdgeCacheConfig& config, void* arena, size_t bytes, uint64_t n_buckets, uint64_t stride);
  Bucket& bucket(uint64_t index) const;
  sync::Word* slot(uint64_t bucket, uint32_t way) const;
  Counters& counters() const;
  Place place(const Key128& key) const;
  static uint64_t sketch_hash(const Key128& key);
  uint32_t candidates(const Place& place) const;
  bool rows_current(const Key128* keys, const uint64_t* versions, int64_t mono_ns) const;
  uint32_t choose_way(const Place& place, const Key128& key, int64_t mono_ns, uint64_t& control);

  std::vector<std::shared_ptr<FeatureCache>> views_;
  const int64_t ttl_ns_;
  const uint32_t outputs_, features_;
  const uint64_t hash_mask_;
  uint8_t* const base_;
  const size_t bytes_;
  const uint64_t n_buckets_;
  const uint64_t stride_;  // words of an entry: whole cache lines
  const size_t entry_words_;
  const uint64_t buckets_at_, slots_at_;
  mutable FrequencySketch sketch_;
};

}  // namespace penstock
