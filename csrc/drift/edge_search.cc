#include "drift/edge_search.h"

#include <algorithm>
#include <limits>

#include "base/cpu.h"

namespace penstock {
namespace {

constexpr size_t kTogether = 8;

}  // namespace

size_t EdgeIndex::append(const float* edges, size_t n, std::vector<EdgeLine>* lines) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const auto add = [&](size_t count, auto&& edge) {
    for (size_t i = 0; i < count; i += 16) {
      EdgeLine line;
      for (size_t k = 0; k < 16; ++k) line.edges[k] = i + k < count ? edge(i + k) : kInf;
      lines->push_back(line);
    }
  };
  const size_t n_pivots = n / kBlock;  // the last block is never full
  add(n_pivots, [&](size_t i) { return edges[(i + 1) * kBlock - 1]; });
  add((n_pivots + 1) * kBlock, [&](size_t i) { return i < n ? edges[i] : kInf; });
  return (n_pivots + 15) / 16;
}

// Binary searches in step, so that their loads overlap, with masks in place of branches that no predictor
// would learn.
void edge_search_portable(const EdgeIndex& index, const float* values, size_t count, uint32_t* below) {
  std::fill_n(below, count, 0u);
  if (index.n == 0) return;
  for (size_t i = 0; i < count; i += kTogether) {
    const size_t have = std::min(kTogether, count - i);
    float value[kTogether];
    uint32_t at[kTogether] = {};
    for (size_t k = 0; k < kTogether; ++k) value[k] = values[i + std::min(k, have - 1)];
    size_t n = index.n;
    while (n > 1) {
      const auto half = static_cast<uint32_t>(n / 2);
      for (size_t k = 0; k < kTogether; ++k) {
        at[k] += half & -static_cast<uint32_t>(index.edges[at[k] + half - 1] < value[k]);
      }
      n -= half;
    }
    for (size_t k = 0; k < have; ++k) below[i + k] = at[k] + (index.edges[at[k]] < value[k] ? 1u : 0u);
  }
}

EdgeSearch edge_search() {
#if defined(__x86_64__)
  switch (cpu_level()) {
    case CpuLevel::kAvx512:
      return edge_search_avx512;
    case CpuLevel::kAvx2:
      return edge_search_avx2;
    case CpuLevel::kPortable:
      break;
  }
#endif
  return edge_search_portable;
}

}  // namespace penstock
