// The layout of a feature cache's arena: header | buckets | sides | slots, each slot its metadata and its
// row.
//
// Included by the cache's own sources only. Whatever changes here changes kLayoutVersion: processes of two
// versions must not share an arena.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cache/feature_cache.h"

namespace penstock {

inline constexpr uint64_t kArenaMagic = 0x3143'4b43'4f54'5350U;
inline constexpr uint64_t kLayoutVersion = 3;

constexpr uint64_t align_up(uint64_t value, uint64_t to) {
  return (value + to - 1) / to * to;
}

// Words of a slot's metadata: one cache line, followed by the row's.
enum MetaWord : size_t {
  kKeyLo,
  kKeyHi,
  kValidFrom,
  kValidUntil,
  kEventTime,
  kKnownAt,
  kExpires,
  kStamp,
  kMetaWords
};

struct FeatureCache::Header {
  // Written once by create, the magic last.
  sync::Word magic;
  uint64_t layout_version, n_buckets, row_words, slot_stride;
  int64_t ttl_ns, negative_ttl_ns;
  uint64_t bytes, identity;
  // Counters: relaxed adds, read by stats; they publish nothing.
  alignas(64) sync::Word hits;
  sync::Word misses, expired, busy;
  alignas(64) sync::Word puts;
  sync::Word superseded, evictions, lock_takeovers, negative_puts;
};

struct alignas(128) FeatureCache::Bucket {
  sync::Word control;
  sync::Word slots[kWays];
};

// What only writers need; under the bucket's lock.
struct FeatureCache::Side {
  sync::Word floor;     // greatest stamp ever evicted or discarded
  sync::Word sequence;  // last version given to a slot of this bucket: no word recurs in a bucket
};

struct FeatureCache::Geometry {
  uint64_t n_buckets, slot_stride, buckets_at, sides_at, slots_at, bytes;

  Geometry() = default;
  Geometry(uint64_t buckets, uint64_t stride)
      : n_buckets(buckets),
        slot_stride(stride),
        buckets_at(align_up(sizeof(Header), 128)),
        sides_at(buckets_at + buckets * sizeof(Bucket)),
        slots_at(sides_at + align_up(buckets * sizeof(Side), 64)),
        bytes(slots_at + buckets * kWays * stride * sizeof(uint64_t)) {}
};

}  // namespace penstock
