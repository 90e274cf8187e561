#include "base/key.h"

#include <cstring>

namespace penstock {

void key_to_bytes(const Key128& key, uint8_t out[16]) {
  const uint64_t hi = __builtin_bswap64(key.hi);
  const uint64_t lo = __builtin_bswap64(key.lo);
  std::memcpy(out, &hi, 8);
  std::memcpy(out + 8, &lo, 8);
}

Key128 key_from_bytes(const uint8_t bytes[16]) {
  uint64_t hi, lo;
  std::memcpy(&hi, bytes, 8);
  std::memcpy(&lo, bytes + 8, 8);
  return {__builtin_bswap64(lo), __builtin_bswap64(hi)};
}

void KeyHasher::reset() {
  hash_.reset();
  parts_ = 0;
  first_is_int_ = false;
}

void KeyHasher::add_int(int64_t value) {
  if (parts_++ == 0) {
    first_is_int_ = true;
    first_int_ = value;
  }
  uint8_t part[9] = {'i'};
  std::memcpy(part + 1, &value, 8);
  hash_.add(part, sizeof part);
}

void KeyHasher::add_tagged(char tag, std::string_view bytes) {
  ++parts_;
  uint8_t head[9] = {static_cast<uint8_t>(tag)};
  const uint64_t size = bytes.size();
  std::memcpy(head + 1, &size, 8);
  hash_.add(head, sizeof head);
  hash_.add(bytes.data(), bytes.size());
}

Key128 KeyHasher::finish() {
  if (parts_ == 1 && first_is_int_) return key_of_int(first_int_);
  Key128 key;
  hash_.finish(&key.lo, &key.hi);
  key.hi |= 1;
  return key;
}

}  // namespace penstock
