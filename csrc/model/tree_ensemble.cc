// Prediction: the leaves of a block of rows by the kernel that is the fastest for it, then one summation in
// tree order. All kernels find the same leaves.
#include "model/tree_ensemble.h"

#include <algorithm>
#include <cmath>

#include "base/cpu.h"
#include "model/tree_kernels.h"

namespace penstock {

namespace {

// Fewest rows for which the pieces are the fastest, where every tree has at most 32 leaves, and elsewhere:
// the same on every instruction set within one row (bench/README.md).
constexpr size_t kPiecesFromNarrow = 3, kPiecesFrom = 4;

struct Kernels {
  RankKernel rank;
  PieceKernel pieces;  // null where there are none
  CheckpointKernel checkpoints;
};

Kernels kernels_of(CpuLevel level) {
#if defined(__x86_64__)
  if (level == CpuLevel::kAvx512) return {rank_avx512, piece_leaves_avx512, checkpoint_leaves_avx512};
  if (level == CpuLevel::kAvx2) return {rank_avx2, piece_leaves_avx2, checkpoint_leaves_avx2};
#endif
#if defined(__SSE4_1__)
  return {rank_portable, piece_leaves_sse4, checkpoint_leaves_portable};
#else
  return {rank_portable, nullptr, checkpoint_leaves_portable};
#endif
}

// No branch on the values, for a compiler to turn into vectors.
bool any_nan(const float* row, size_t n) {
  int any = 0;
  for (size_t i = 0; i < n; ++i) any |= row[i] != row[i];
  return any != 0;
}

}  // namespace

TreeEnsemble::Scratch::Scratch(const TreeEnsemble& ensemble)
    : ranks_(ensemble.plan_.columns_max), leaves_(ensemble.n_trees()) {
  constexpr size_t kMaskBytes = kCheckpointTrees * sizeof(uint64_t);
  masks_.resize(kMaskBytes / sizeof(ByteLine));
}

bool TreeEnsemble::goes_left(const Split& s, float x) const {
  if (std::isnan(x)) return s.flags & kDefaultLeft;
  if (!(s.flags & kCategorical)) return x <= s.threshold;
  bool match = false;
  if (x > ((s.flags & kTruncateToZero) ? -1.0f : -0x1p-149f) && x < 2147483648.0f) {
    const uint32_t code = static_cast<uint32_t>(static_cast<int32_t>(x));
    match = code / 32 < s.cat_count && (cat_words_[s.cat_begin + code / 32] >> (code % 32) & 1);
  }
  return match == static_cast<bool>(s.flags & kMatchLeft);
}

uint32_t TreeEnsemble::walk(uint32_t tree, const float* row) const {
  const Split* splits = splits_.data() + split_begin_[tree];
  int32_t node = split_begin_[tree] == split_begin_[tree + 1] ? ~0 : 0;
  while (node >= 0) {
    const Split& s = splits[node];
    node = goes_left(s, row[s.feature]) ? s.left : s.right;
  }
  return static_cast<uint32_t>(~node);
}

// What the rank kernels leave out: twins, missing values that go right, categorical splits.
void TreeEnsemble::complete_ranks(const TreeRun& run, const float* rows, size_t n, size_t stride,
                                  int8_t* ranks) const {
  bool missing = false;
  for (size_t r = 0; r < n; ++r) missing = missing || any_nan(rows + r * stride, header_.n_features);
  for (const RankColumn& column : run.columns) {
    if (column.twin) std::copy_n(ranks - kLanes, kLanes, ranks);
    if (column.categorical) {
      const Split& split = splits_[column.split];
      for (size_t r = 0; r < n; ++r) {
        const bool right = !goes_left(split, rows[r * stride + column.feature]);
        ranks[r] = static_cast<int8_t>(kRankBias + right);
      }
    } else if (missing && column.nan_right) {
      for (size_t r = 0; r < n; ++r) {
        if (std::isnan(rows[r * stride + column.feature])) {
          ranks[r] = static_cast<int8_t>(int{kRankMax} + kRankBias);
        }
      }
    }
    ranks += kLanes;
  }
}

void TreeEnsemble::find_leaves(const TreeRun& run, const float* rows, size_t n, size_t stride, CpuLevel level,
                               Scratch& scratch) const {
  const Kernels kernels = kernels_of(level);
  auto* ranks = reinterpret_cast<int8_t*>(scratch.ranks_.data());
  uint8_t* leaves = scratch.leaves_.data()->bytes;
  kernels.rank(plan_, run, rows, n, stride, ranks);
  complete_ranks(run, rows, n, stride, ranks);
  if (kernels.pieces != nullptr && n >= (run.narrow ? kPiecesFromNarrow : kPiecesFrom)) {
    kernels.pieces(run, ranks, n, leaves);
  } else if (run.groups.empty()) {
    walk_leaves(run, ranks, n, leaves);
  } else {
    for (size_t r = 0; r < n; ++r) kernels.checkpoints(run, ranks, r, scratch.masks_.data(), leaves);
  }
}

// Adds the values of a run's trees to the sums of n <= kBlockRows rows.
void TreeEnsemble::add_run(const TreeRun& run, const float* rows, size_t n, size_t stride, double* sums,
                           Scratch& scratch) const {
  const size_t k_out = header_.n_outputs;
  const CpuLevel level = cpu_level();
  const uint32_t* value_begin = value_begin_.data() + run.first_tree;
  if (run.ranked) find_leaves(run, rows, n, stride, level, scratch);
  if (run.ranked && one_output_) {
#if defined(__x86_64__)
    if (level == CpuLevel::kAvx512 && run.narrow && n > 1) {
      add_leaves_avx512(run, scratch.leaves_.data()->bytes, n, sums);
      return;
    }
#endif
    add_leaves(leaf_values_.data(), value_begin, scratch.leaves_.data()->bytes, run.n_trees, n, sums);
    return;
  }
  for (uint32_t t = 0; t < run.n_trees; ++t) {
    const double* values = leaf_values_.data() + value_begin[t];
    const int32_t output = tree_output_[run.first_tree + t];
    const uint8_t* leaves = scratch.leaves_[t].bytes;
    for (size_t r = 0; r < n; ++r) {
      const size_t leaf = run.ranked ? leaves[r] : walk(run.first_tree + t, rows + r * stride);
      if (output >= 0) {
        sums[r * k_out + static_cast<size_t>(output)] += values[leaf];
      } else {
        for (size_t k = 0; k < k_out; ++k) sums[r * k_out + k] += values[leaf * k_out + k];
      }
    }
  }
}

void TreeEnsemble::predict_margin(const float* rows, size_t n, size_t stride, double* out,
                                  Scratch& scratch) const {
  const size_t k_out = header_.n_outputs;
  std::fill_n(out, n * k_out, 0.0);
  for (size_t start = 0; start < n; start += kBlockRows) {
    const size_t block = std::min(kBlockRows, n - start);
    double* sums = out + start * k_out;
    for (const TreeRun& run : plan_.runs) {
      add_run(run, rows + start * stride, block, stride, sums, scratch);
    }
    for (size_t r = 0; r < block; ++r) {
      for (size_t k = 0; k < k_out; ++k) sums[r * k_out + k] = sums[r * k_out + k] / divisor_[k] + base_[k];
    }
  }
}

void TreeEnsemble::transform(double* row) const {
  const size_t n = header_.n_outputs;
  switch (static_cast<Transform>(header_.transform)) {
    case Transform::kSigmoid:
      for (size_t k = 0; k < n; ++k) row[k] = 1.0 / (1.0 + std::exp(-header_.alpha * row[k]));
      break;
    case Transform::kSoftmax: {
      const double top = *std::max_element(row, row + n);
      double sum = 0.0;
      for (size_t k = 0; k < n; ++k) sum += row[k] = std::exp(row[k] - top);
      for (size_t k = 0; k < n; ++k) row[k] /= sum;
      break;
    }
    case Transform::kExp:
      for (size_t k = 0; k < n; ++k) row[k] = std::exp(row[k]);
      break;
    case Transform::kLog1pExp:
      for (size_t k = 0; k < n; ++k) row[k] = std::max(row[k], 0.0) + std::log1p(std::exp(-std::abs(row[k])));
      break;
    case Transform::kIdentity:
    case Transform::kCount:
      break;
  }
}

void TreeEnsemble::predict(const float* rows, size_t n, size_t stride, double* out, Scratch& scratch) const {
  predict_margin(rows, n, stride, out, scratch);
  for (size_t r = 0; r < n; ++r) transform(out + r * header_.n_outputs);
}

void TreeEnsemble::predict_leaf(const float* rows, size_t n, size_t stride, int32_t* out,
                                Scratch& scratch) const {
  for (size_t start = 0; start < n; start += kBlockRows) {
    const size_t block = std::min(kBlockRows, n - start);
    const float* of_block = rows + start * stride;
    for (const TreeRun& run : plan_.runs) {
      if (run.ranked) find_leaves(run, of_block, block, stride, cpu_level(), scratch);
      for (size_t r = 0; r < block; ++r) {
        int32_t* to = out + (start + r) * header_.n_trees + run.first_tree;
        for (uint32_t t = 0; t < run.n_trees; ++t) {
          to[t] = static_cast<int32_t>(run.ranked ? scratch.leaves_[t].bytes[r]
                                                  : walk(run.first_tree + t, of_block + r * stride));
        }
      }
    }
  }
}

}  // namespace penstock
