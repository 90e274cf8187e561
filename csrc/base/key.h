// 128-bit entity keys. A lone int64 is kept exactly (hi = 0); anything else is a keyed SipHash-2-4-128 of its
// canonical bytes with the lowest bit of hi set, so that a hashed key never equals an exact one. With 127
// hash bits, n keys collide with probability below n^2 / 2^128. Canonical bytes, per part in join-key order:
// 'i' + int64 LE | 's' + u64 LE length + UTF-8 | 'b' + length + bytes. Keys are values. One thread uses a
// KeyHasher at a time; nothing here allocates.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/siphash.h"

namespace penstock {

struct Key128 {
  uint64_t lo;
  uint64_t hi;
  friend bool operator==(const Key128&, const Key128&) = default;
};

inline Key128 key_of_int(int64_t value) {
  return {static_cast<uint64_t>(value), 0};
}

// hi then lo, both big-endian: the form in which keys are stored and sorted on disk.
void key_to_bytes(const Key128& key, uint8_t out[16]);
Key128 key_from_bytes(const uint8_t bytes[16]);

class KeyHasher {
 public:
  explicit KeyHasher(const uint8_t seed[16]) : hash_(seed) {}

  void reset();
  void add_int(int64_t value);
  void add_str(std::string_view text) { add_tagged('s', text); }
  void add_bytes(std::string_view bytes) { add_tagged('b', bytes); }
  // The key of the parts added since the last reset; the exact key if that was one int. reset() before reuse.
  Key128 finish();

 private:
  void add_tagged(char tag, std::string_view bytes);

  SipHash128 hash_;
  int64_t first_int_ = 0;
  uint32_t parts_ = 0;
  bool first_is_int_ = false;
};

}  // namespace penstock
