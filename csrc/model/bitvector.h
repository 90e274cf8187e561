// Bit-vector traversal (QuickScorer; Lucchese et al. 2015, vectorised 2016) for numeric trees of at most 64
// leaves. Each split that a row fails clears the leaves of its left subtree; the lowest bit left is the row's
// leaf. Splits of a feature lie by ascending threshold, so a block stops at the first that none of its rows
// fails. The plan is const after load; any thread may run a kernel with its own masks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace penstock {

inline constexpr size_t kMaxLanes = 64;       // rows that a kernel takes at most
inline constexpr size_t kMaxMaskBytes = 256;  // of one tree: 64 lanes of 32 bits, or 32 lanes of 64

struct BitvectorEntry {
  float threshold;
  uint32_t tree;
  uint64_t keep;  // leaves that stay possible when the row goes right
};

template <class Mask>
struct BitvectorKeep {
  uint32_t tree;
  Mask keep;
};

struct BitvectorPlan {
  std::vector<BitvectorEntry> entries;
  // The entries again, apart, for one row: it needs the thresholds only to find where it stops failing.
  std::vector<float> thresholds;
  std::vector<BitvectorKeep<uint32_t>> narrow_keeps;  // the one that `narrow` says is filled
  std::vector<BitvectorKeep<uint64_t>> wide_keeps;
  // Entries of feature f that send NaN left: [begin[2f], begin[2f+1]); right: [begin[2f+1], begin[2f+2]).
  std::vector<uint32_t> begin;
  bool narrow = false;  // every tree has at most 32 leaves: 32-bit masks
  bool usable = false;
};

// columns: [feature][lanes]; masks: kMaxMaskBytes a tree, aligned to 64 bytes; leaves[tree * stride + lane]
// is written for every lane. Lanes: 8, 16 or 32.
void bitvector_leaves_avx2(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees, size_t lanes,
                           const float* columns, uint64_t* masks, uint32_t* leaves, size_t stride);

// Lanes: 16, 32, or 64 if the plan is narrow.
void bitvector_leaves_avx512(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees, size_t lanes,
                             const float* columns, uint64_t* masks, uint32_t* leaves, size_t stride);

// One row; leaves[tree * stride] is written.
void bitvector_leaves_row(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees, const float* row,
                          uint64_t* masks, uint32_t* leaves, size_t stride);

// sums[r], for r < n: the sum over trees, in their order, of values[value_begin[t] + leaves[t * stride + r]].
// Up to 7 leaves past a tree's n-th are read, and must be leaves of that tree.
void sum_leaves_avx512(const double* values, const uint32_t* value_begin, const uint32_t* leaves,
                       uint32_t n_trees, size_t n, size_t stride, double* sums);

}  // namespace penstock
