// SipHash-2-4 with 128-bit output (Aumasson and Bernstein, 2012; the reference code's siphash with outlen
// 16), streaming, without allocation. One thread uses an object at a time.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace penstock {

static_assert(std::endian::native == std::endian::little, "SipHash words are read in place as little-endian");

class SipHash128 {
 public:
  explicit SipHash128(const uint8_t seed[16]) {
    std::memcpy(&k0_, seed, 8);
    std::memcpy(&k1_, seed + 8, 8);
    reset();
  }

  void reset() {
    v0_ = k0_ ^ 0x736f6d6570736575U;
    v1_ = k1_ ^ 0x646f72616e646f6dU ^ 0xee;
    v2_ = k0_ ^ 0x6c7967656e657261U;
    v3_ = k1_ ^ 0x7465646279746573U;
    tail_ = 0;
    length_ = 0;
  }

  void add(const void* data, size_t size) {
    const auto* at = static_cast<const uint8_t*>(data);
    const auto* end = at + size;
    for (; at != end && (length_ & 7) != 0; ++at) add_byte(*at);
    for (; end - at >= 8; at += 8, length_ += 8) {
      uint64_t word;
      std::memcpy(&word, at, 8);
      compress(word);
    }
    for (; at != end; ++at) add_byte(*at);
  }

  // Ends the message; reset() before the next one.
  void finish(uint64_t* lo, uint64_t* hi) {
    compress(tail_ | (length_ << 56));
    v2_ ^= 0xee;
    for (int i = 0; i < 4; ++i) round();
    *lo = v0_ ^ v1_ ^ v2_ ^ v3_;
    v1_ ^= 0xdd;
    for (int i = 0; i < 4; ++i) round();
    *hi = v0_ ^ v1_ ^ v2_ ^ v3_;
  }

 private:
  void add_byte(uint8_t byte) {
    tail_ |= uint64_t{byte} << (8 * (length_ & 7));
    if ((++length_ & 7) == 0) {
      compress(tail_);
      tail_ = 0;
    }
  }
  void compress(uint64_t word) {
    v3_ ^= word;
    round();
    round();
    v0_ ^= word;
  }
  void round() {
    v0_ += v1_, v1_ = std::rotl(v1_, 13), v1_ ^= v0_, v0_ = std::rotl(v0_, 32);
    v2_ += v3_, v3_ = std::rotl(v3_, 16), v3_ ^= v2_;
    v0_ += v3_, v3_ = std::rotl(v3_, 21), v3_ ^= v0_;
    v2_ += v1_, v1_ = std::rotl(v1_, 17), v1_ ^= v2_, v2_ = std::rotl(v2_, 32);
  }

  uint64_t k0_, k1_;
  uint64_t v0_, v1_, v2_, v3_;
  uint64_t tail_;    // the bytes since the last whole word
  uint64_t length_;  // bytes so far
};

}  // namespace penstock
