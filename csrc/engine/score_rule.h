// From what a foreign model returned to the scores that are served: one column or all, checked.
//
// A value that is not finite, or no probability where one was promised, becomes NaN, and its request fails. A
// probability that is off by the rounding of float32 is put into [0, 1].
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>

namespace penstock {

struct ScoreRule {
  static constexpr double kSlack = 1e-5;

  size_t width = 1;  // columns that the model returns
  int column = -1;   // the one that is served; -1: all
  bool probability = false;

  size_t n_outputs() const { return column < 0 ? width : 1; }

  // raw [n, width] -> scores [n, n_outputs].
  template <class T>
  void apply(const T* raw, size_t n, double* scores) const {
    const size_t first = column < 0 ? 0 : static_cast<size_t>(column);
    const size_t k = n_outputs();
    for (size_t i = 0; i < n; ++i) {
      for (size_t j = 0; j < k; ++j) scores[i * k + j] = checked(raw[i * width + first + j]);
    }
  }

 private:
  double checked(double value) const {
    constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
    if (!std::isfinite(value)) return kNone;
    if (!probability) return value;
    if (value < -kSlack || value > 1 + kSlack) return kNone;
    return value < 0 ? 0.0 : value > 1 ? 1.0 : value;
  }
};

}  // namespace penstock
