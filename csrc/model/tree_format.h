// trees.bin, version 1, little-endian, no padding: TreeHeader, then float64 base[n_outputs],
// u32 split_begin[n_trees + 1], u32 leaf_begin[n_trees + 1], i32 tree_output[n_trees], Split[n_splits],
// float64 leaf_values[n_leaf_values], u32 cat_words[n_cat_words]. crc is zlib's crc32 of all after the
// header. engine/penstock/models/trees.py writes it.
#pragma once

#include <bit>
#include <cstdint>

namespace penstock {

static_assert(std::endian::native == std::endian::little, "trees.bin is read in place as little-endian");

inline constexpr char kTreeMagic[8] = {'P', 'S', 'T', 'K', 'T', 'R', 'E', 'E'};
inline constexpr uint32_t kTreeVersion = 1;

enum class Transform : uint32_t { kIdentity, kSigmoid, kSoftmax, kExp, kLog1pExp, kCount };

struct TreeHeader {
  char magic[8];
  uint32_t version, n_features, n_outputs, n_trees, n_splits, n_leaves, n_leaf_values, n_cat_words;
  uint32_t transform, average;
  double alpha;  // slope of the sigmoid
  uint32_t crc, reserved;
};
static_assert(sizeof(TreeHeader) == 64);

enum SplitFlags : uint32_t {
  kDefaultLeft = 1,    // a missing value goes left
  kCategorical = 2,    // else numeric: left if x <= threshold
  kMatchLeft = 4,      // a category in the set goes left, others right; else the other way round
  kTruncateToZero = 8  // values in (-1, 0) are category 0 (LightGBM); else in no set (XGBoost)
};

struct Split {
  uint32_t feature;
  int32_t left, right;  // >= 0: split of the same tree; < 0: ~leaf of the same tree
  float threshold;
  uint32_t flags, cat_begin, cat_count;  // bitset of categories: words [cat_begin, cat_begin + cat_count)
};
static_assert(sizeof(Split) == 28);

}  // namespace penstock
