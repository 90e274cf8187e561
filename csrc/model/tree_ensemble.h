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
#include "model/tree_format.h"
#include "model/tree_plan.h"

namespace penstock {

class TreeEnsemble {
 public:
  static constexpr size_t kBlockRows = kLanes;

  // Working memory of one thread; made for one ensemble.
  class Scratch {
   public:
    explicit Scratch(const TreeEnsemble& ensemble);

   private:
    friend class TreeEnsemble;
    std::vector<ByteLine> ranks_;   // [column][kLanes], of the run at hand
    std::vector<ByteLine> leaves_;  // [tree][kLanes], of the run at hand
    std::vector<ByteLine> masks_;   // bit vectors of one row
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
  void build_plan();
  bool goes_left(const Split& split, float x) const;
  uint32_t walk(uint32_t tree, const float* row) const;
  void complete_ranks(const TreeRun& run, const float* rows, size_t n, size_t stride, int8_t* ranks) const;
  void find_leaves(const TreeRun& run, const float* rows, size_t n, size_t stride, CpuLevel level,
                   Scratch& scratch) const;
  void add_run(const TreeRun& run, const float* rows, size_t n, size_t stride, double* sums,
               Scratch& scratch) const;
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
  bool one_output_ = false;      // every tree adds to the only output
  TreePlan plan_;
};

}  // namespace penstock
