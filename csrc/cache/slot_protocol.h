// The version-word protocol of one cache slot (a seqlock): lock-free readers, one writer at a time.
//
// A slot word is {tag 16 | version 48}. Tag 0: empty. An odd version: being written. The writer must hold the
// bucket's lock; each published word must be one that this slot never held before (versions only rise).
// A reader that confirms the word it began with has copied exactly what the publisher of that word wrote.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sync/sync.h"

namespace penstock::slot {

inline constexpr uint64_t kVersionMask = (uint64_t{1} << 48) - 1;

inline constexpr uint64_t make_word(uint64_t tag, uint64_t version) {
  return (tag << 48) | (version & kVersionMask);
}
inline constexpr uint64_t tag_of(uint64_t word) {
  return word >> 48;
}
inline constexpr bool is_being_written(uint64_t word) {
  return (word & 1) != 0;
}

// Acquire: pairs with the release store in publish, so the copied words are at least that old.
inline uint64_t read_begin(sync::Word& word) {
  return sync::load(word, sync::kAcquire);
}

// The fence pairs with the one in write_begin: had any copied word come from a later writer, that writer's
// odd version would be seen here.
inline bool read_confirm(sync::Word& word, uint64_t seen) {
  sync::fence(sync::kAcquire);
  return sync::load(word, sync::kRelaxed) == seen;
}

// Relaxed copies: ordered by read_begin and read_confirm against write_begin and publish.
inline void copy_out(sync::Word* source, uint64_t* out, size_t n) {
  for (size_t i = 0; i < n; ++i) out[i] = sync::load(source[i], sync::kRelaxed);
}
inline void copy_in(sync::Word* target, const uint64_t* values, size_t n) {
  for (size_t i = 0; i < n; ++i) sync::store(target[i], values[i], sync::kRelaxed);
}

// Makes the version odd and keeps the tag, so that a reader of the old key tries again. The fence pairs with
// the one in read_confirm.
inline void write_begin(sync::Word& word) {
  sync::store(word, sync::load(word, sync::kRelaxed) | 1, sync::kRelaxed);
  sync::fence(sync::kRelease);
}

// Release: pairs with the acquire load in read_begin.
inline void publish(sync::Word& word, uint64_t next) {
  sync::store(word, next, sync::kRelease);
}

}  // namespace penstock::slot
