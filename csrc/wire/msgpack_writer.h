// Writing MessagePack in its smallest encodings to a buffer that grows up to a bound and is reused.
// A write that would pass the bound writes nothing and sets overflowed(); truncate() goes back to a mark.
// One thread at a time.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>

namespace penstock::wire {

class Writer {
 public:
  explicit Writer(size_t limit, size_t reserve = 0) : limit_(limit) {
    (void)ensure(std::min(reserve, limit));
  }

  const uint8_t* data() const { return buffer_.get(); }
  size_t size() const { return size_; }
  bool overflowed() const { return overflowed_; }
  void clear() { truncate(0); }
  // Drops everything after the first `size` bytes and forgets an overflow.
  void truncate(size_t size) {
    size_ = std::min(size, size_);
    overflowed_ = false;
  }

  void nil() { put(0xc0, 0, 0); }
  void boolean(bool value) { put(value ? 0xc3 : 0xc2, 0, 0); }
  void uint(uint64_t value) {
    if (value <= 0x7f) return put(static_cast<uint8_t>(value), 0, 0);
    const int power = width_power(value);
    put(static_cast<uint8_t>(0xcc + power), value, size_t{1} << power);
  }
  void integer(int64_t value) {
    if (value >= 0) return uint(static_cast<uint64_t>(value));
    if (value >= -32) return put(static_cast<uint8_t>(value), 0, 0);
    const int power = value >= INT8_MIN ? 0 : value >= INT16_MIN ? 1 : value >= INT32_MIN ? 2 : 3;
    put(static_cast<uint8_t>(0xd0 + power), static_cast<uint64_t>(value), size_t{1} << power);
  }
  void f32(float value) { put(0xca, std::bit_cast<uint32_t>(value), 4); }
  void f64(double value) { put(0xcb, std::bit_cast<uint64_t>(value), 8); }
  void str(std::string_view text) {
    if (text.size() < 32) {
      put(static_cast<uint8_t>(0xa0 | text.size()), 0, 0);
    } else {
      const int power = width_power(text.size());
      put(static_cast<uint8_t>(0xd9 + power), text.size(), size_t{1} << power);
    }
    raw(text.data(), text.size());
  }
  void bin_head(size_t size) {
    const int power = width_power(size);
    put(static_cast<uint8_t>(0xc4 + power), size, size_t{1} << power);
  }
  void bin(const void* data, size_t size) {
    bin_head(size);
    raw(data, size);
  }
  void ext(int8_t type, const void* data, size_t size) {
    if (size != 0 && size <= 16 && std::has_single_bit(size)) {
      put(static_cast<uint8_t>(0xd4 + std::countr_zero(size)), 0, 0);
    } else {
      const int power = width_power(size);
      put(static_cast<uint8_t>(0xc7 + power), size, size_t{1} << power);
    }
    raw(&type, 1);
    raw(data, size);
  }
  void array(uint32_t count) { container(count, 0x90, 0xdc); }
  void map(uint32_t pairs) { container(pairs, 0x80, 0xde); }

  // Appends bytes that are MessagePack already, or the payload of a head just written.
  void raw(const void* data, size_t size) {
    if (size == 0 || !ensure(size)) return;
    std::memcpy(buffer_.get() + size_, data, size);
    size_ += size;
  }

 private:
  static int width_power(uint64_t value) {
    return value <= UINT8_MAX ? 0 : value <= UINT16_MAX ? 1 : value <= UINT32_MAX ? 2 : 3;
  }
  void container(uint32_t count, uint8_t fix, uint8_t wide) {
    if (count < 16) return put(static_cast<uint8_t>(fix | count), 0, 0);
    if (count <= UINT16_MAX) return put(wide, count, 2);
    put(static_cast<uint8_t>(wide + 1), count, 4);
  }
  void put(uint8_t tag, uint64_t operand, size_t bytes) {
    if (!ensure(1 + bytes)) return;
    uint8_t* p = buffer_.get() + size_;
    *p++ = tag;
    for (size_t i = bytes; i-- > 0;) *p++ = static_cast<uint8_t>(operand >> (8 * i));
    size_ += 1 + bytes;
  }
  bool ensure(size_t more) {
    if (overflowed_ || more > limit_ - size_) {
      overflowed_ = true;
      return false;
    }
    if (more > capacity_ - size_) {
      const size_t capacity = std::min(limit_, std::max({size_ + more, 2 * capacity_, size_t{256}}));
      auto grown = std::make_unique_for_overwrite<uint8_t[]>(capacity);
      if (size_ != 0) std::memcpy(grown.get(), buffer_.get(), size_);
      buffer_ = std::move(grown);
      capacity_ = capacity;
    }
    return true;
  }

  size_t limit_;
  size_t size_ = 0;
  size_t capacity_ = 0;
  bool overflowed_ = false;
  std::unique_ptr<uint8_t[]> buffer_;
};

}  // namespace penstock::wire
