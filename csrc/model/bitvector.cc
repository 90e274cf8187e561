// One row at a time, on any processor: the cheapest way to a batch of one, since nothing is done for lanes
// that hold no row.
#include "model/bitvector.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace penstock {
namespace {

// How many of n ascending values are less than x, without a branch on x: a search that branches guesses wrong
// at every other step.
size_t count_less(const float* values, size_t n, float x) {
  const float* base = values;
  while (n > 1) {
    const size_t half = n / 2;
    base += half & (size_t{0} - static_cast<size_t>(base[half - 1] < x));
    n -= half;
  }
  return static_cast<size_t>(base - values) + (n == 1 && *base < x ? 1 : 0);
}

template <class Mask>
void run(const BitvectorPlan& plan, const std::vector<BitvectorKeep<Mask>>& keeps, uint32_t n_features,
         uint32_t n_trees, const float* row, Mask* masks, uint32_t* leaves, size_t stride) {
  std::fill_n(masks, n_trees, ~Mask{0});
  // The searches of some features first: they overlap, and the loops below then know early where they end.
  constexpr size_t kTogether = 32;
  const float* thresholds = plan.thresholds.data();
  for (size_t start = 0; start < n_features; start += kTogether) {
    const uint32_t* begin = plan.begin.data() + 2 * start;
    const size_t groups = 2 * std::min(kTogether, n_features - start);
    uint32_t ends[2 * kTogether];
    for (size_t g = 0; g < groups; ++g) {
      const float x = row[start + g / 2];
      // The row fails the splits whose threshold is less than x; a missing value all of the odd groups'.
      const size_t size = begin[g + 1] - begin[g];
      const size_t failed = std::isnan(x) ? g % 2 * size : count_less(thresholds + begin[g], size, x);
      ends[g] = begin[g] + static_cast<uint32_t>(failed);
    }
    for (size_t g = 0; g < groups; ++g) {
      const BitvectorKeep<Mask>* stop = keeps.data() + ends[g];
      for (const BitvectorKeep<Mask>* at = keeps.data() + begin[g]; at != stop; ++at) {
        masks[at->tree] &= at->keep;
      }
    }
  }
  for (size_t t = 0; t < n_trees; ++t) {
    leaves[t * stride] = static_cast<uint32_t>(std::countr_zero(masks[t]));
  }
}

}  // namespace

void bitvector_leaves_row(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees, const float* row,
                          uint64_t* masks, uint32_t* leaves, size_t stride) {
  if (plan.narrow) {
    run(plan, plan.narrow_keeps, n_features, n_trees, row, reinterpret_cast<uint32_t*>(masks), leaves,
        stride);
  } else {
    run(plan, plan.wide_keeps, n_features, n_trees, row, masks, leaves, stride);
  }
}

}  // namespace penstock
