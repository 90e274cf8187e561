// How often keys were seen lately: a count-min sketch of 4-bit counters with a doorkeeper and aging (TinyLFU;
// Einziger, Friedman and Manes, 2017), laid out so that one key touches one cache line.
//
// A block serves about four entries of the cache: three rows of 32 counters and a 128-bit doorkeeper, which
// holds the keys seen once, so that keys which never return cost no counter. One block is aged (counters
// halved, doorkeeper emptied) every kAgeEvery records, in turn: each block once in twenty records an entry,
// without a pause for the whole table. Counts err upwards by collisions and downwards by lost updates.
// Any thread. Every word is accessed relaxed, by load and store: an update lost to a race only blurs a count.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sync/sync.h"

namespace penstock {

class FrequencySketch {
 public:
  static constexpr uint32_t kMost = 16;  // greatest estimate: 15 and the doorkeeper
  static constexpr uint64_t kEntriesPerBlock = 4;
  static constexpr uint64_t kAgeEvery = 20 * kEntriesPerBlock;

  struct alignas(64) Block {
    sync::Word counters[6];
    sync::Word seen[2];
  };

  static uint64_t blocks_for(uint64_t entries) {
    return std::max<uint64_t>(1, (entries + kEntriesPerBlock - 1) / kEntriesPerBlock);
  }
  // `blocks`: n zeroed blocks, n < 2^32, that outlive the sketch. `samples`: a zeroed word.
  FrequencySketch(Block* blocks, uint64_t n, sync::Word* samples)
      : blocks_(blocks), n_(n), samples_(samples) {}

  void record(uint64_t hash) {
    Block& block = block_of(hash);
    if (!admit_to_door(block, hash)) {
      uint32_t least = kCounterMost;
      for (int row = 0; row < kRows; ++row) least = std::min(least, counter(block, row, hash));
      for (int row = 0; row < kRows && least < kCounterMost; ++row) {
        if (counter(block, row, hash) != least) continue;  // only the least can be wrong by too little
        sync::Word& word = word_of(block, row, hash);
        sync::store(word, sync::load(word, sync::kRelaxed) + (uint64_t{1} << shift_of(row, hash)),
                    sync::kRelaxed);
      }
    }
    const uint64_t sample = sync::add(*samples_, 1) + 1;
    if (sample % kAgeEvery == 0) age(blocks_[sample / kAgeEvery % n_]);
  }

  uint32_t estimate(uint64_t hash) const {
    Block& block = block_of(hash);
    uint32_t least = kCounterMost;
    for (int row = 0; row < kRows; ++row) least = std::min(least, counter(block, row, hash));
    return least + (at_door(block, hash) ? 1 : 0);
  }

 private:
  static constexpr int kRows = 3;
  static constexpr uint32_t kCounterMost = 15;

  // The upper half of the hash names the block; 5 bits of the lower half a counter in each row, 14 the door.
  Block& block_of(uint64_t hash) const { return blocks_[(hash >> 32) * n_ >> 32]; }
  static uint32_t column(int row, uint64_t hash) { return static_cast<uint32_t>(hash >> (5 * row)) & 31; }
  static sync::Word& word_of(Block& block, int row, uint64_t hash) {
    return block.counters[2 * row + static_cast<int>(column(row, hash) >> 4)];
  }
  static uint32_t shift_of(int row, uint64_t hash) { return 4 * (column(row, hash) & 15); }
  static uint32_t counter(Block& block, int row, uint64_t hash) {
    const uint64_t word = sync::load(word_of(block, row, hash), sync::kRelaxed);
    return static_cast<uint32_t>(word >> shift_of(row, hash)) & kCounterMost;
  }
  static uint64_t door_bit(int which, uint64_t hash) {
    return uint64_t{1} << ((hash >> (15 + 6 * which)) & 63);
  }
  static bool at_door(Block& block, uint64_t hash) {
    return (sync::load(block.seen[0], sync::kRelaxed) & door_bit(0, hash)) != 0 &&
           (sync::load(block.seen[1], sync::kRelaxed) & door_bit(1, hash)) != 0;
  }
  // True if the key was not there.
  static bool admit_to_door(Block& block, uint64_t hash) {
    if (at_door(block, hash)) return false;
    for (int which = 0; which < 2; ++which) {
      const uint64_t seen = sync::load(block.seen[which], sync::kRelaxed);
      sync::store(block.seen[which], seen | door_bit(which, hash), sync::kRelaxed);
    }
    return true;
  }
  static void age(Block& block) {
    for (sync::Word& word : block.counters) {
      sync::store(word, sync::load(word, sync::kRelaxed) >> 1 & 0x7777777777777777U, sync::kRelaxed);
    }
    for (sync::Word& word : block.seen) sync::store(word, 0, sync::kRelaxed);
  }

  Block* blocks_;
  uint64_t n_;
  sync::Word* samples_;
};

}  // namespace penstock
