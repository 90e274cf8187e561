// Feature cache: a fixed-capacity, 15-way set-associative table of 128-bit keys and typed rows.
//
// Reads are lock-free and bounded; a write locks one bucket. A hit is exactly one row some put stored for
// that key, whole, inside its memory TTL (put time <= mono_ns < put time + ttl) and its validity (valid_from
// <= now_us < valid_until). Misses may be spurious (eviction, contention). Capacity and memory are fixed by
// create; nothing is allocated afterwards. A key lives in one bucket, in at most one way, and never moves.
//
// A bucket's lock names its owner. A writer that died holding locks leaves at most one half-written slot a
// bucket: readers of it get kBusy and writers of that bucket wait until a survivor calls reclaim_owner.
// Owner numbers are the caller's: pack a worker index with a generation that rises at each restart, so that a
// dead owner's number is never used again.
//
// The arena holds offsets only and begins with a header (magic, layout version, geometry, identity), so that
// it may be mapped anywhere: by several processes too, where it is a file (open_shared). A process that is
// killed at any instruction leaves no torn row, and after reclaim_owner no lock and no slot lost.
//
// A row whose word 0 has kNotFound in its low byte (features/row.h) says that its key is unknown; it has a
// memory TTL of its own. A row read in the last part of its life is offered for a reload (take_refreshes).
// Threads: every method from any thread, except where said.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/key.h"
#include "base/status.h"
#include "cache/refresh_queue.h"
#include "sync/sync.h"

namespace penstock {

struct WideReads;

enum class ReadStatus : uint8_t { kHit = 0, kMiss = 1, kExpired = 2, kBusy = 3 };

struct RowMeta {
  int64_t valid_from, valid_until, event_time, known_at;
};

struct FeatureCacheConfig {
  uint64_t
      capacity;  // rows; rounded up to whole buckets. 1.5 to 2 times the expected keys keeps conflicts rare.
  uint32_t row_words;           // 1 .. kMaxRowWords
  int64_t ttl_ns;               // <= 0: none
  int64_t negative_ttl_ns = 0;  // of rows of unknown keys, where shorter than ttl_ns; <= 0: as ttl_ns
  double refresh_ahead = 0;     // 0 .. 0.5: the last part of a row's life in which a read asks for a reload
  uint64_t identity = 0;        // of the key hash and the rows' layout: an arena of another one is foreign
};

struct FeatureCacheStats {
  uint64_t hits, misses, expired, busy, puts, superseded, evictions, lock_takeovers, size, capacity, bytes;
  uint64_t negative_puts, refreshes_queued, refreshes_dropped;  // the last two: of this process
};

class FeatureCache {
 public:
  static constexpr uint32_t kWays = 15;
  static constexpr uint32_t kMaxRowWords = 2048;
  static constexpr uint8_t kNotFound = 2;
  enum class PutResult : uint8_t { kStored = 0, kReplaced = 1, kSuperseded = 2 };

  static Status create(const FeatureCacheConfig& config, std::unique_ptr<FeatureCache>* out);
  // In the empty file (or memfd) `fd`, which the caller may close afterwards and hand to other processes.
  static Status create_in(int fd, const FeatureCacheConfig& config, std::unique_ptr<FeatureCache>* out);
  // The cache that `fd` holds. Refuses what is no arena, has another layout, or, where `expected` is given,
  // another geometry, TTL or identity; its refresh_ahead is this process's own.
  static Status attach(int fd, const FeatureCacheConfig* expected, std::unique_ptr<FeatureCache>* out);
  // The cache in the file at `path`, which the first process to ask makes.
  static Status open_shared(const std::string& path, const FeatureCacheConfig& config,
                            std::unique_ptr<FeatureCache>* out);
  ~FeatureCache();
  FeatureCache(const FeatureCache&) = delete;
  FeatureCache& operator=(const FeatureCache&) = delete;

  // rows: n * row_words words. Only the rows (and meta) of hits are written. meta and slot_versions may be
  // null. A slot version names one put of that key for the life of the cache; 0 for a non-hit. Returns the
  // hits.
  size_t get_many(const Key128* keys, size_t n, int64_t now_us, int64_t mono_ns, uint64_t* rows,
                  ReadStatus* status, RowMeta* meta, uint64_t* slot_versions);

  // A hit of one key, counted nowhere and no sign of use.
  bool peek(const Key128& key, int64_t now_us, int64_t mono_ns, uint64_t* row, RowMeta* meta);

  // Refused (kSuperseded) if the resident row has a greater stamp, or if the key is absent and its bucket
  // ever evicted or discarded a greater one: a slow loader can never put back an older value.
  PutResult put(const Key128& key, const uint64_t* row, const RowMeta& meta, uint64_t stamp, int64_t mono_ns,
                uint32_t owner);

  // Whether a row of the key is resident, valid or not. A hint: it may be gone by the time of the answer.
  bool is_resident(const Key128& key) const;

  // Whether the key's row is still that of the put which `slot_version` names, inside its memory TTL.
  bool is_current(const Key128& key, uint64_t slot_version, int64_t mono_ns) const;

  // Removes the key unless its row has a greater stamp; from then on puts with a lesser stamp are refused.
  bool discard(const Key128& key, uint64_t stamp, uint32_t owner);
  // Empties every bucket; from then on puts with a stamp below `stamp` are refused, wherever they come from.
  void clear(uint32_t owner = 0, uint64_t stamp = 0);

  // Takes over every bucket lock held by `dead`, empties what it left half-written and unlocks. Returns the
  // number of locks. The caller knows that `dead` ended, by a way that orders its last stores before this
  // call (a join, a wait for the process).
  size_t reclaim_owner(uint32_t dead, uint32_t survivor);

  // Up to n rows that were read shortly before their end, to be loaded again and put.
  size_t take_refreshes(size_t n, RefreshQueue::Item* out);

  FeatureCacheStats stats() const;  // exact when no writer runs; walks the buckets
  uint32_t row_words() const { return row_words_; }

  // For tests of takeover: a put that stops after `words` words of the row, lock held, as a dying writer
  // would.
  void abandon_put_for_test(const Key128& key, const uint64_t* row, const RowMeta& meta, uint64_t stamp,
                            int64_t mono_ns, uint32_t owner, uint32_t words);

 private:
  struct Header;
  struct Bucket;
  struct Side;
  struct SlotMeta;
  struct Place {
    uint64_t bucket;
    uint64_t tag;
  };
  struct Lock;
  struct Reading;

  struct Geometry;

  FeatureCache(void* arena, size_t bytes, double refresh_ahead);
  static Status geometry_of(const FeatureCacheConfig& config, Geometry* out);
  static void write_header(void* arena, const FeatureCacheConfig& config, const Geometry& geometry);
  Header& header() const;
  Bucket& bucket(uint64_t index) const;
  Side& side(uint64_t index) const;
  sync::Word* slot_meta(uint64_t bucket, uint32_t way) const;
  sync::Word* slot_row(uint64_t bucket, uint32_t way) const;
  Place place(const Key128& key) const;
  uint32_t candidates(const Place& place) const;
  ReadStatus read_one(const Key128& key, const Place& place, uint32_t ways, int64_t now_us, int64_t mono_ns,
                      const WideReads* wide, uint64_t* row, RowMeta* meta, uint64_t* version, bool peeking);
  bool copy_confirmed(sync::Word* from, uint64_t* row, sync::Word& word, uint64_t seen) const;
  int find_locked(const Key128& key, const Place& place) const;
  uint32_t choose_way(const Place& place, int64_t mono_ns, Lock& lock);
  void raise_floor(uint64_t bucket, uint64_t stamp);
  void empty_slot(uint64_t bucket, uint32_t way);
  uint64_t next_version(uint64_t bucket);
  int64_t expires_at(const uint64_t* row, int64_t mono_ns) const;
  void offer_refresh(const Key128& key, const uint64_t* head, const uint64_t* row, uint64_t version,
                     int64_t now_us, int64_t mono_ns);
  PutResult put_words(const Key128& key, const uint64_t* row, const RowMeta& meta, uint64_t stamp,
                      int64_t mono_ns, uint32_t owner, uint32_t words, bool complete);

  // Copies of the header's geometry, constant after create.
  uint8_t* base_;
  size_t bytes_;
  uint64_t n_buckets_;
  uint32_t row_words_;
  uint64_t slot_stride_;  // words of a slot's metadata and row: whole cache lines
  int64_t ttl_ns_, negative_ttl_ns_;
  uint64_t buckets_at_, sides_at_, slots_at_;
  // Of this process.
  const double refresh_ahead_;
  int64_t refresh_ahead_ns_;                 // of the memory TTL
  std::unique_ptr<RefreshQueue> refreshes_;  // null: nothing is refreshed ahead
};

}  // namespace penstock
