// Bit-vector traversal (QuickScorer; Lucchese et al. 2015, vectorised 2016) for numeric trees of at most 64
// leaves. Each split that a row fails clears the leaves of its left subtree; the lowest bit left is the row's
// leaf. Splits of a feature lie by ascending threshold, so a block stops at the first that none of its rows
// fails. The plan is const after load; any thread may run a kernel with its own masks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace penstock {

inline constexpr size_t kMaxLanes = 32;  // rows that a kernel takes at most

struct BitvectorEntry {
  float threshold;
  uint32_t tree;
  uint64_t keep;  // leaves that stay possible when the row goes right
};

struct BitvectorPlan {
  std::vector<BitvectorEntry> entries;
  // Entries of feature f that send NaN left: [begin[2f], begin[2f+1]); right: [begin[2f+1], begin[2f+2]).
  std::vector<uint32_t> begin;
  bool narrow = false;  // every tree has at most 32 leaves: 32-bit masks
  bool usable = false;
};

// lanes: 8, 16 or 32 rows. columns: [feature][lanes]; masks: room for n_trees * lanes words;
// leaves[tree * stride + lane] is written for every lane.
void bitvector_leaves_avx2(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees, size_t lanes,
                           const float* columns, uint64_t* masks, uint32_t* leaves, size_t stride);

}  // namespace penstock
