// How many edges of a column lie below a value: the inner loop of every drift count.
//
// The edges, in blocks of 32, follow the last edge of each block but the last (the pivots), all in lines of
// 16 filled up with +infinity. A vector path compares the value with all pivots, then with all edges of the
// one block that they name: five compares of 16 for 1279 edges, without a branch or a dependent load chain.
// The portable path is a binary search in step. Immutable once built; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace penstock {

struct alignas(64) EdgeLine {
  float edges[16];
};

struct EdgeIndex {
  static constexpr size_t kBlockLines = 2;
  static constexpr size_t kBlock = 16 * kBlockLines;

  const EdgeLine* pivots;
  size_t pivot_lines;
  const EdgeLine* blocks;
  const float* edges;  // strictly increasing, finite
  size_t n;

  // Appends the lines of n edges: pivots, then blocks. Returns the number of pivot lines.
  static size_t append(const float* edges, size_t n, std::vector<EdgeLine>* lines);
};

// below[i]: the number of edges < values[i]; for NaN any number up to n.
using EdgeSearch = void (*)(const EdgeIndex& index, const float* values, size_t count, uint32_t* below);

EdgeSearch edge_search();  // the best that cpu_level() allows

void edge_search_portable(const EdgeIndex& index, const float* values, size_t count, uint32_t* below);
void edge_search_avx2(const EdgeIndex& index, const float* values, size_t count, uint32_t* below);
void edge_search_avx512(const EdgeIndex& index, const float* values, size_t count, uint32_t* below);

}  // namespace penstock
