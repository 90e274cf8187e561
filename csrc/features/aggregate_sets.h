// Aggregates of the set of values of a window: the number of distinct values, and the values by frequency.
//
// Both depend on how often each value occurs and on nothing else, so no order of events and no split into
// partials changes them. Doubles are compared as one NaN and one zero, NaN above all numbers; texts by their
// bytes. A ValueCounter is scratch memory: one thread uses it at a time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "features/aggregate.h"

namespace penstock {

// How the words of a value column are compared and hashed.
struct ValueDomain {
  bool real = false;
  const std::vector<std::string>* texts = nullptr;     // by code; null unless the values are strings
  const std::vector<uint64_t>* text_hashes = nullptr;  // by code

  // The one form of equal values, as a word that sorts as an integer does (strings: by code).
  int64_t canonical(Word value) const;
  Word restore(int64_t canonical) const;
  bool less(int64_t a, int64_t b) const;
  uint64_t hash(int64_t canonical) const;
};

// SplitMix64's finalizer (Steele, Lea, Flood, 2014).
uint64_t mix64(uint64_t x);
// SipHash-2-4 of the bytes under a zero key, its low half.
uint64_t text_hash(const std::string& text);

// HyperLogLog (Flajolet et al., 2007) with 4096 registers on 64-bit hashes: the top 12 bits choose a
// register, which keeps the greatest count of leading zeros, plus one, of the other 52. The estimate is alpha
// m^2 / sum(2^-register), or m ln(m / empty) (linear counting) where that is at most 5/2 m and a register is
// empty; rounded to the nearest integer. It depends on the set of hashes alone.
constexpr uint32_t kRegisters = 4096;
void hll_add(uint8_t* registers, uint64_t hash);
int64_t hll_estimate(const uint8_t* registers);

// How often each value occurs.
struct ValueCount {
  int64_t value;  // canonical
  int64_t times;
};

// An open-addressing table of counts, emptied in one step.
class ValueCounter {
 public:
  void clear();
  void add(int64_t canonical, int64_t times = 1);
  size_t size() const { return used_.size(); }

  // The number of distinct values: exact up to `exact`, an estimate above.
  int64_t distinct(const ValueDomain& domain, int64_t exact) const;
  void hash_into(const ValueDomain& domain, uint8_t* registers) const;
  // The value of `rank` (from 1) by falling count, ties by rising value; false if there are fewer.
  bool top(const ValueDomain& domain, int64_t rank, Word* out);
  // Each value once, ascending.
  std::vector<ValueCount> counts() const;

 private:
  struct Slot {
    int64_t value;
    int64_t times;
    uint64_t round;  // the slot is empty unless this is round_
  };
  void grow();

  std::vector<Slot> slots_;
  std::vector<uint32_t> used_;
  std::vector<ValueCount> ranked_;
  uint64_t round_ = 1;
};

}  // namespace penstock
