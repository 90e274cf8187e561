// Prediction: leaves of a block of rows by one of two traversals, then one summation in tree order.
#include "model/tree_ensemble.h"

#include <algorithm>
#include <cmath>

#include "base/cpu.h"

namespace penstock {

namespace {

constexpr size_t kAlign = 64;

}  // namespace

TreeEnsemble::Scratch::Scratch(const TreeEnsemble& ensemble)
    : leaves_(ensemble.n_trees() * kBlockRows), columns_(ensemble.n_features() * kMaxLanes) {
  if (ensemble.plan_.usable) masks_.resize((ensemble.n_trees() * kMaxMaskBytes + kAlign) / sizeof(uint64_t));
}

uint64_t* TreeEnsemble::Scratch::aligned_masks() {
  const auto at = reinterpret_cast<uintptr_t>(masks_.data());
  return reinterpret_cast<uint64_t*>((at + kAlign - 1) / kAlign * kAlign);
}

uint32_t TreeEnsemble::walk(uint32_t tree, const float* row) const {
  const Split* splits = splits_.data() + split_begin_[tree];
  int32_t node = split_begin_[tree] == split_begin_[tree + 1] ? ~0 : 0;
  while (node >= 0) {
    const Split& s = splits[node];
    const float x = row[s.feature];
    bool left;
    if (std::isnan(x)) {
      left = s.flags & kDefaultLeft;
    } else if (s.flags & kCategorical) {
      bool match = false;
      if (x > ((s.flags & kTruncateToZero) ? -1.0f : -0x1p-149f) && x < 2147483648.0f) {
        const uint32_t code = static_cast<uint32_t>(static_cast<int32_t>(x));
        match = code / 32 < s.cat_count && (cat_words_[s.cat_begin + code / 32] >> (code % 32) & 1);
      }
      left = match == static_cast<bool>(s.flags & kMatchLeft);
    } else {
      left = x <= s.threshold;
    }
    node = left ? s.left : s.right;
  }
  return static_cast<uint32_t>(~node);
}

// Rows that a vector kernel takes at once: the fewest that hold `left`. 1: the row-by-row kernel, which is
// the faster for one row alone.
size_t TreeEnsemble::lanes_for(size_t left, CpuLevel level) const {
  if (level == CpuLevel::kPortable || left == 1) return 1;
  if (level == CpuLevel::kAvx512) return left > 32 && plan_.narrow ? 64 : left > 16 ? 32 : 16;
  return left > 16 ? 32 : left > 8 ? 16 : 8;
}

void TreeEnsemble::find_leaves(const float* rows, size_t n, size_t stride, CpuLevel level,
                               Scratch& scratch) const {
  if (!plan_.usable) {
    for (uint32_t t = 0; t < header_.n_trees; ++t) {
      for (size_t r = 0; r < n; ++r) scratch.leaves_[t * kBlockRows + r] = walk(t, rows + r * stride);
    }
    return;
  }
  uint64_t* masks = scratch.aligned_masks();
  size_t lanes;
  for (size_t done = 0; done < n; done += lanes) {
    lanes = lanes_for(n - done, level);
    uint32_t* leaves = scratch.leaves_.data() + done;
    if (lanes == 1) {
      bitvector_leaves_row(plan_, header_.n_features, header_.n_trees, rows + done * stride, masks, leaves,
                           kBlockRows);
      continue;
    }
#if defined(__x86_64__)
    // Lanes past the last row repeat it; their leaves are never used.
    for (size_t lane = 0; lane < lanes; ++lane) {
      const float* row = rows + std::min(done + lane, n - 1) * stride;
      for (size_t f = 0; f < header_.n_features; ++f) scratch.columns_[f * lanes + lane] = row[f];
    }
    const auto kernel = level == CpuLevel::kAvx512 ? bitvector_leaves_avx512 : bitvector_leaves_avx2;
    kernel(plan_, header_.n_features, header_.n_trees, lanes, scratch.columns_.data(), masks, leaves,
           kBlockRows);
#endif
  }
}

void TreeEnsemble::predict_margin(const float* rows, size_t n, size_t stride, double* out,
                                  Scratch& scratch) const {
  const size_t k_out = header_.n_outputs;
  for (size_t start = 0; start < n; start += kBlockRows) {
    const size_t block = std::min(kBlockRows, n - start);
    const CpuLevel level = cpu_level();
    find_leaves(rows + start * stride, block, stride, level, scratch);
    double* sums = out + start * k_out;
    std::fill_n(sums, block * k_out, 0.0);
    uint32_t first_tree = 0;
#if defined(__x86_64__)
    if (level == CpuLevel::kAvx512 && k_out == 1 && block >= 4) {
      sum_leaves_avx512(leaf_values_.data(), value_begin_.data(), scratch.leaves_.data(), header_.n_trees,
                        block, kBlockRows, sums);
      first_tree = header_.n_trees;
    }
#endif
    for (uint32_t t = first_tree; t < header_.n_trees; ++t) {
      const double* values = leaf_values_.data() + value_begin_[t];
      const uint32_t* leaves = scratch.leaves_.data() + t * kBlockRows;
      if (tree_output_[t] >= 0) {
        double* column = sums + tree_output_[t];
        for (size_t r = 0; r < block; ++r) column[r * k_out] += values[leaves[r]];
      } else {
        for (size_t r = 0; r < block; ++r) {
          for (size_t k = 0; k < k_out; ++k) sums[r * k_out + k] += values[leaves[r] * k_out + k];
        }
      }
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
    find_leaves(rows + start * stride, block, stride, cpu_level(), scratch);
    for (size_t r = 0; r < block; ++r) {
      for (size_t t = 0; t < header_.n_trees; ++t) {
        out[(start + r) * header_.n_trees + t] = static_cast<int32_t>(scratch.leaves_[t * kBlockRows + r]);
      }
    }
  }
}

}  // namespace penstock
