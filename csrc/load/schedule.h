// When the requests of an open loop fall due. One thread; allocates nothing.
#pragma once

#include <cmath>
#include <cstdint>

namespace penstock::load {

// When requests fall due, as offsets from the first.
class Schedule {
 public:
  Schedule(double rate, bool poisson, uint64_t seed)
      : period_ns_(1e9 / rate), poisson_(poisson), state_(seed) {}

  int64_t offset_ns() const { return static_cast<int64_t>(offset_ns_); }
  void advance() {
    ++n_;
    if (poisson_) {
      offset_ns_ -= std::log(1 - uniform()) * period_ns_;
    } else {
      offset_ns_ = static_cast<double>(n_) * period_ns_;
    }
  }

 private:
  double uniform() {  // splitmix64; [0, 1)
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ z >> 31) >> 11) * 0x1p-53;
  }

  const double period_ns_;
  const bool poisson_;
  uint64_t state_;
  uint64_t n_ = 0;
  double offset_ns_ = 0;
};

}  // namespace penstock::load
