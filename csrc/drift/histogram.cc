#include "drift/histogram.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

namespace penstock {
namespace {

constexpr size_t kTogether = 8;

// Number of edges below each of kTogether values: binary searches in step, so that their loads overlap, with
// masks in place of branches that no predictor would learn. For NaN: any number up to n.
void edges_below(const float* edges, size_t n, const float* values, uint32_t* below) {
  std::fill_n(below, kTogether, 0u);
  if (n == 0) return;
  while (n > 1) {
    const auto half = static_cast<uint32_t>(n / 2);
    for (size_t k = 0; k < kTogether; ++k) {
      below[k] += half & -static_cast<uint32_t>(edges[below[k] + half - 1] < values[k]);
    }
    n -= half;
  }
  for (size_t k = 0; k < kTogether; ++k) below[k] += edges[below[k]] < values[k] ? 1u : 0u;
}

}  // namespace

Status HistogramSpec::create(const std::vector<HistogramColumn>& columns,
                             std::shared_ptr<const HistogramSpec>* out) {
  auto spec = std::make_shared<HistogramSpec>();
  for (size_t j = 0; j < columns.size(); ++j) {
    const HistogramColumn& column = columns[j];
    const std::string name = "columns[" + std::to_string(j) + "]";
    if (column.n_codes > 0 && !column.edges.empty()) {
      return Status::invalid(name + " has both edges and codes; expected one of them");
    }
    if (column.n_codes > kMaxCodes) {
      return Status::invalid(name + " has " + std::to_string(column.n_codes) + " codes; expected at most " +
                             std::to_string(kMaxCodes));
    }
    for (size_t k = 0; k < column.edges.size(); ++k) {
      const float edge = column.edges[k];
      if (!std::isfinite(edge) || (k > 0 && !(column.edges[k - 1] < edge))) {
        return Status::invalid(name + ".edges[" + std::to_string(k) + "] is " + std::to_string(edge) +
                               "; expected finite, strictly increasing edges");
      }
    }
    const size_t n_bins = column.n_codes > 0 ? column.n_codes : column.edges.size() + 1;
    spec->columns_.push_back({spec->n_slots_, n_bins, spec->edges_.size(), column.n_codes > 0});
    spec->edges_.insert(spec->edges_.end(), column.edges.begin(), column.edges.end());
    spec->n_slots_ += n_bins + kExtraSlots;
  }
  *out = std::move(spec);
  return Status::ok();
}

bool HistogramSpec::same_as(const HistogramSpec& other) const {
  return columns_ == other.columns_ && edges_ == other.edges_;
}

HistogramCounts::HistogramCounts(std::shared_ptr<const HistogramSpec> spec)
    : spec_(std::move(spec)), counts_(spec_->n_slots(), 0) {}

template <class Count>
void count_rows(const HistogramSpec& spec, const float* rows, size_t n, size_t stride, Count* counts) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  // Column by column: one column's edges and slots stay in the first-level cache for the whole batch.
  for (size_t j = 0; j < spec.n_columns(); ++j) {
    Count* const bins = counts + spec.offset(j);
    const size_t n_bins = spec.n_bins(j);
    Count* const extra = bins + n_bins;
    const float* value = rows + j;
    if (spec.is_categorical(j)) {
      for (size_t i = 0; i < n; ++i) {
        const float v = value[i * stride];
        if (v != v) {
          ++extra[0];
        } else if (v >= 0.0f && v < static_cast<float>(n_bins) && v == std::floor(v)) {
          ++bins[static_cast<size_t>(v)];
        } else {
          ++extra[1];
        }
      }
      continue;
    }
    const float* const edges = spec.edges(j);
    float values[kTogether];
    uint32_t below[kTogether];
    for (size_t i = 0; i < n; i += kTogether) {
      const size_t have = std::min(kTogether, n - i);
      for (size_t k = 0; k < kTogether; ++k) values[k] = value[(i + std::min(k, have - 1)) * stride];
      edges_below(edges, n_bins - 1, values, below);
      for (size_t k = 0; k < have; ++k) {
        const float v = values[k];
        const bool missing = v != v;
        bins[below[k]] += missing ? 0 : 1;
        extra[0] += missing;
        extra[2] += v == -kInf;
        extra[3] += v == kInf;
      }
    }
  }
}

template void count_rows(const HistogramSpec&, const float*, size_t, size_t, uint16_t*);
template void count_rows(const HistogramSpec&, const float*, size_t, size_t, uint32_t*);
template void count_rows(const HistogramSpec&, const float*, size_t, size_t, uint64_t*);

void HistogramCounts::count(const float* rows, size_t n, size_t stride) {
  count_rows(*spec_, rows, n, stride, counts_.data());
}

Status HistogramCounts::merge(const HistogramCounts& other) {
  if (!spec_->same_as(*other.spec_)) {
    return Status::invalid("other has another spec; expected the same columns and edges");
  }
  for (size_t i = 0; i < counts_.size(); ++i) counts_[i] += other.counts_[i];
  return Status::ok();
}

void HistogramCounts::clear() {
  std::fill(counts_.begin(), counts_.end(), 0);
}

void HistogramCounts::snapshot(uint64_t* out) const {
  std::copy(counts_.begin(), counts_.end(), out);
}

}  // namespace penstock
