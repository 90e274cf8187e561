// A fixed generator for the native test programs, so that a failure repeats.
#pragma once

#include <cstdint>

inline uint64_t random_below(uint64_t n) {
  static uint64_t state = 0x9e3779b97f4a7c15u;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state % n;
}
