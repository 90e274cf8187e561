// Prediction: leaves of a block of rows by one of two traversals, then one summation in tree order.
#include "model/tree_ensemble.h"

#include <algorithm>
#include <cmath>

#include "base/cpu.h"

namespace penstock {

TreeEnsemble::Scratch::Scratch(const TreeEnsemble& ensemble)
    : leaves_(ensemble.n_trees() * kBlockRows),
      columns_(ensemble.n_features() * kMaxLanes),
      masks_(ensemble.plan_.usable ? ensemble.n_trees() * kMaxLanes : 0) {}

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

void TreeEnsemble::find_leaves(const float* rows, size_t n, size_t stride, Scratch& scratch) const {
#if defined(__x86_64__)
  if (plan_.usable && cpu_level() >= CpuLevel::kAvx2) {
    size_t lanes;
    for (size_t done = 0; done < n; done += lanes) {
      const size_t left = n - done;
      lanes = left > 16 ? 32 : left > 8 ? 16 : 8;
      // Lanes past the last row repeat it; their leaves are never read.
      for (size_t lane = 0; lane < lanes; ++lane) {
        const float* row = rows + std::min(done + lane, n - 1) * stride;
        for (size_t f = 0; f < header_.n_features; ++f) scratch.columns_[f * lanes + lane] = row[f];
      }
      bitvector_leaves_avx2(plan_, header_.n_features, header_.n_trees, lanes, scratch.columns_.data(),
                            scratch.masks_.data(), scratch.leaves_.data() + done, kBlockRows);
    }
    return;
  }
#endif
  for (uint32_t t = 0; t < header_.n_trees; ++t) {
    for (size_t r = 0; r < n; ++r) scratch.leaves_[t * kBlockRows + r] = walk(t, rows + r * stride);
  }
}

void TreeEnsemble::predict_margin(const float* rows, size_t n, size_t stride, double* out,
                                  Scratch& scratch) const {
  const size_t k_out = header_.n_outputs;
  for (size_t start = 0; start < n; start += kBlockRows) {
    const size_t block = std::min(kBlockRows, n - start);
    find_leaves(rows + start * stride, block, stride, scratch);
    double* sums = out + start * k_out;
    std::fill_n(sums, block * k_out, 0.0);
    for (uint32_t t = 0; t < header_.n_trees; ++t) {
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
    find_leaves(rows + start * stride, block, stride, scratch);
    for (size_t r = 0; r < block; ++r) {
      for (size_t t = 0; t < header_.n_trees; ++t) {
        out[(start + r) * header_.n_trees + t] = static_cast<int32_t>(scratch.leaves_[t * kBlockRows + r]);
      }
    }
  }
}

}  // namespace penstock
