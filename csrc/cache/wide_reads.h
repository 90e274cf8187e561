// Reads of a bucket's slot words and of a slot's row with vector loads: what the portable path in
// feature_cache.cc does word by word. x86-64 only, chosen at run time.
//
// To the compiler these are plain loads of memory that a writer may be storing to, so the portable path's
// argument (every access atomic) is replaced by this one. match_tags gives only hints, which the reader
// confirms through slot::read_begin. copy_confirmed keeps the whole row in registers and accepts it only if
// the slot word, loaded after the row, is still the one that read_begin saw; x86 keeps the order of loads and
// a compiler barrier stands between them, which is what the acquire fence of slot::read_confirm compiles to.
// Vector loads may tear, within a word too: the writer made the version odd before its first store, so a row
// that mixes two writes is refused just as a torn copy of whole words is. ThreadSanitizer builds take the
// portable path, since it sees no atomics here. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace penstock {

struct WideReads {
  // buckets[i]: 16 words aligned to 128 bytes, the last 15 of them slot words. Bit w of ways[i] is set if the
  // upper 16 bits of slot word w are tags[i].
  void (*match_tags)(const uint64_t* const* buckets, const uint64_t* tags, size_t n, uint32_t* ways);
  // Copies n words, 1 <= n <= kMaxWords, from `row` (aligned to 64 bytes, readable to the end of its last
  // line) to `out` if *slot_word is `seen` after they were read; else leaves `out` as it was.
  bool (*copy_confirmed)(const uint64_t* row, uint64_t* out, size_t n, const uint64_t* slot_word,
                         uint64_t seen);
  static constexpr size_t kMaxWords = 32;
};

// Null where the portable path holds. Follows cpu_level.
const WideReads* wide_reads();

extern const WideReads kWideReadsAvx2;
extern const WideReads kWideReadsAvx512;

}  // namespace penstock
