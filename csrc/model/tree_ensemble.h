// A forest of decision trees in flat arrays, loaded from trees.bin (layout in tree_format.h).
// Invariants, all proved by load(): splits of a tree are in preorder, its leaves are numbered from left to
// right, every index is in range. Const after load: any thread may predict, with one Scratch per thread.
// A row's score is the float64 sum of its leaves in tree order, then averaging, base score and transform:
// it does not depend on the batch or on the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/cpu.h"
#include "base/status.h"
#include "model/bitvector.h"
#include "model/tree_format.h"

namespace penstock {

class TreeEnsemble {
 public:
  static constexpr size_t kBlockRows = 64;

  // Working memory of one thread; made for one ensemble.
  class Scratch {
   public:
    explicit Scratch(const TreeEnsemble& ensemble);

   private:
    friend class TreeEnsemble;
    std::vector<uint32_t> leaves_;  // [tree][kBlockRows]
    std::vector<float> columns_;    // [feature][lanes]
    std::vector<uint64_t> masks_;   // room for kMaxMaskBytes a tree from a boundary of 64 bytes

    uint64_t* aligned_masks();
  };

  static Status load(const uint8_t* data, size_t size, std::shared_ptr<const TreeEnsemble>* out);

  uint32_t n_features() const { return header_.n_features; }
  uint32_t n_outputs() const { return header_.n_outputs; }
  uint32_t n_trees() const { return header_.n_trees; }

  // rows: n rows of n_features floats, stride_floats apart; NaN is missing. out: n * n_outputs.
  void predict(const float* rows, size_t n, size_t stride_floats, double* out, Scratch& scratch) const;
  // As predict, before the transform; averaged where the forest averages.
  void predict_margin(const float* rows, size_t n, size_t stride_floats, double* out, Scratch& scratch) const;
  // out: n * n_trees, the leaf's number from left to right in its tree.
  void predict_leaf(const float* rows, size_t n, size_t stride_floats, int32_t* out, Scratch& scratch) const;

 private:
  Status check_tree(uint32_t tree) const;
  void build_bitvector();
  uint32_t walk(uint32_t tree, const float* row) const;
  size_t lanes_for(size_t left, CpuLevel level) const;
  void find_leaves(const float* rows, size_t n, size_t stride, CpuLevel level, Scratch& scratch) const;
  void transform(double* row) const;

  TreeHeader header_{};
  std::vector<double> base_;
  std::vector<uint32_t> split_begin_, leaf_begin_;  // [n_trees + 1]
  std::vector<int32_t> tree_output_;  // output of the tree, -1: a vector leaf of n_outputs values
  std::vector<Split> splits_;
  std::vector<double> leaf_values_;
  std::vector<uint32_t> value_begin_;  // [n_trees] first leaf value of the tree
  std::vector<uint32_t> cat_words_;
  std::vector<double> divisor_;  // [n_outputs]
  BitvectorPlan plan_;           // empty if a tree has a categorical split or more than 64 leaves
};

}  // namespace penstock
