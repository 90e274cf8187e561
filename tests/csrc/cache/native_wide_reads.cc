// Each vector path of the cache's reads against the word-by-word meaning: every tag position, every row
// length, and a row whose slot word moved on.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/cpu.h"
#include "cache/wide_reads.h"
#include "check.h"

namespace {

using penstock::CpuLevel;
using penstock::WideReads;

constexpr uint64_t kVersions = (uint64_t{1} << 48) - 1;

uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

void check_tags(const WideReads& wide, uint64_t& random) {
  constexpr size_t kBuckets = 7;
  alignas(128) uint64_t words[kBuckets][16];
  const uint64_t* buckets[kBuckets];
  uint64_t tags[kBuckets];
  uint32_t expected[kBuckets], ways[kBuckets];
  for (int round = 0; round < 2000; ++round) {
    for (size_t i = 0; i < kBuckets; ++i) {
      buckets[i] = words[i];
      tags[i] = round % 2 == 0 ? 1 + next_random(random) % 3 : 0xfffe + next_random(random) % 2;
      words[i][0] = tags[i] << 48;  // the control word is not a slot, whatever it holds
      expected[i] = 0;
      for (uint32_t way = 0; way < 15; ++way) {
        const uint64_t tag = next_random(random) % 2 == 0 ? tags[i] : next_random(random) & 0xffff;
        words[i][way + 1] = tag << 48 | (next_random(random) & kVersions);
        expected[i] |= uint32_t{tag == tags[i]} << way;
      }
    }
    wide.match_tags(buckets, tags, kBuckets, ways);
    CHECK(std::equal(ways, ways + kBuckets, expected));
  }
}

void check_copies(const WideReads& wide, uint64_t& random) {
  constexpr size_t kGuard = 8;
  alignas(64) uint64_t row[WideReads::kMaxWords];
  for (size_t n = 1; n <= WideReads::kMaxWords; ++n) {
    for (uint64_t& word : row) word = next_random(random);
    for (size_t offset = 0; offset < kGuard; ++offset) {  // the caller's row may lie anywhere
      std::vector<uint64_t> out(WideReads::kMaxWords + 2 * kGuard, 7);
      std::vector<uint64_t> expected = out;
      uint64_t slot_word = 42;
      CHECK(!wide.copy_confirmed(row, out.data() + offset, n, &slot_word, 40));
      CHECK(out == expected);
      std::copy_n(row, n, expected.begin() + static_cast<std::ptrdiff_t>(offset));
      CHECK(wide.copy_confirmed(row, out.data() + offset, n, &slot_word, 42));
      CHECK(out == expected);
    }
  }
}

}  // namespace

int main() {
  uint64_t random = 88172645463325252U;
  for (const CpuLevel level : {CpuLevel::kAvx512, CpuLevel::kAvx2, CpuLevel::kPortable}) {
    if (penstock::force_cpu_level(level) != level) continue;
    const WideReads* wide = penstock::wide_reads();
    if (wide == nullptr) continue;
    check_tags(*wide, random);
    check_copies(*wide, random);
  }
  return 0;
}
