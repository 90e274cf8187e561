// SHA-256 (FIPS 180-4), portable: for the checksums of files, not for secrets. One thread an object.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace penstock {

class Sha256 {
 public:
  void update(const uint8_t* data, size_t size);
  // The digest in lower-case hex. Nothing may follow.
  std::string hex_digest();

 private:
  void compress(const uint8_t* block);

  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t block_[64];
  size_t held_ = 0;  // bytes of block_
  uint64_t total_ = 0;
};

}  // namespace penstock
