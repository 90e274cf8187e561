// What the kernels read instead of the splits. The ensemble is cut into runs of consecutive trees. A run of
// trees of at most 256 leaves compares ranks instead of floats: each of its columns is a feature (as it
// treats NaN) with the distinct thresholds that the run's splits compare it with, at most 255; a row's rank
// in a column is how many of them are less than its value, so `x > threshold[i]` is `rank > i`, in a byte. A
// categorical split has a column of its own, whose rank is 1 where the split sends the row right. The other
// trees are walked split by split. Const after load; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "model/tree_format.h"

namespace penstock {

inline constexpr size_t kLanes = 64;  // rows of a block: a column of ranks, or a tree's leaves, is 64 bytes
inline constexpr size_t kColumnsMax = 8191;      // of a run: TreePiece::column holds eight times the index
inline constexpr size_t kRankMax = 255;          // thresholds of a column
inline constexpr int kRankBias = -128;           // ranks are kept signed, as AVX2 compares them
inline constexpr size_t kPieceSplits = 4;        // a code of four bits looks up sixteen bytes
inline constexpr size_t kCheckpointStep = 8;     // splits from one checkpoint of the bit vectors to the next
inline constexpr size_t kCheckpointTrees = 256;  // trees of a checkpoint, at most
inline constexpr uint16_t kLeafNode = 0x100;     // child of a TreeNode: kLeafNode + leaf

struct alignas(64) FloatLine {
  float values[16];
};

struct alignas(64) ByteLine {
  uint8_t bytes[64];
};

struct RankColumn {
  uint32_t feature;
  uint32_t size;    // thresholds
  uint32_t search;  // in TreePlan::search: a line of the 16th, 32nd... threshold, then all; infinity pads
  uint32_t split;   // the splits_ index of a categorical column
  bool nan_right;   // a missing value has the rank kRankMax, else 0
  bool twin;        // the column before is the same but for missing values
  bool categorical;
};

// Up to four connected splits of a tree. Rows whose state equals `start`, the leftmost leaf below the piece,
// are at its root; `next` maps the code of its splits' outcomes (bit i: the row goes right at split i) to a
// leaf, or to the start of the piece below; the outcome of an absent split changes nothing. A tree's pieces
// lie parents first; each tree's state begins at leaf 0.
struct alignas(32) TreePiece {
  uint16_t column[kPieceSplits];   // eight times the column: ranks lie at 8 * this
  int8_t threshold[kPieceSplits];  // biased
  uint8_t start;
  uint8_t unused[3];
  uint8_t next[16];
};
static_assert(sizeof(TreePiece) == 32);

// A split for walks of one row: child[rank > threshold].
struct TreeNode {
  uint16_t column;  // as in TreePiece
  int8_t threshold;
  uint8_t unused;
  uint16_t child[2];
};
static_assert(sizeof(TreeNode) == 8);

// Bit vectors (QuickScorer, Lucchese et al. 2015) of a group of trees of at most 64 leaves, with checkpoints:
// each split that a row fails clears the leaves of its left subtree, and the lowest bit left is the row's
// leaf. The splits of a column lie by threshold, and after every kCheckpointStep of them the AND of all
// before it is kept for the whole group, so a row needs one vector a column and fewer than kCheckpointStep
// single splits.
struct CheckpointColumn {
  uint32_t column;
  uint32_t ends;     // in CheckpointGroup::ends, by rank: how many of the column's splits the rank fails
  uint32_t entries;  // first of the column's splits; they are padded to whole steps, and by one step
  uint32_t lines;    // first line of the column's checkpoints
};

struct CheckpointGroup {
  uint32_t first_tree, n_trees;
  uint32_t row_lines;  // of one checkpoint
  std::vector<CheckpointColumn> columns;
  std::vector<uint32_t> ends;
  std::vector<uint16_t> trees;   // of the splits, in the group
  std::vector<uint32_t> narrow;  // leaves that stay, by split: where the run is narrow
  std::vector<uint64_t> wide;    // where it is not
  std::vector<ByteLine> lines;
};

struct TreeRun {
  uint32_t first_tree, n_trees;
  bool ranked;  // else nothing below is filled
  bool narrow;  // every tree has at most 32 leaves
  std::vector<RankColumn> columns;
  std::vector<TreePiece> pieces;
  std::vector<uint32_t> piece_begin;    // [n_trees + 1]
  std::vector<CheckpointGroup> groups;  // none if a tree has more than 64 leaves
  std::vector<TreeNode> nodes;          // none if there are groups
  std::vector<uint32_t> node_begin;     // [n_trees + 1]
  // Narrow and one output: by tree, the low then the high halves of the leaf values, 32 of each.
  std::vector<ByteLine> halves;
};

struct TreePlan {
  std::vector<TreeRun> runs;
  std::vector<FloatLine> search;
  size_t columns_max = 0;  // of any run
};

struct TreeArrays {
  uint32_t n_trees;
  const Split* splits;
  const uint32_t* split_begin;
  const double* values;  // null if any tree adds to more than one output, or not all to the first
  const uint32_t* value_begin;
};

TreePlan plan_trees(const TreeArrays& trees);

}  // namespace penstock
