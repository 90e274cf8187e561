#include "drift/histogram.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

namespace penstock {
namespace {

constexpr size_t kTogether = 64;  // values of one column searched at once

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
    spec->columns_.push_back({spec->n_slots_, n_bins, spec->edges_.size(), 0, 0, column.n_codes > 0});
    spec->edges_.insert(spec->edges_.end(), column.edges.begin(), column.edges.end());
    spec->columns_.back().lines_offset = spec->lines_.size();
    if (column.n_codes == 0) {
      spec->columns_.back().pivot_lines =
          EdgeIndex::append(column.edges.data(), column.edges.size(), &spec->lines_);
    }
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
  const EdgeSearch search = edge_search();
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
    const EdgeIndex index = spec.edge_index(j);
    size_t missing = 0, neg_inf = 0, pos_inf = 0;
    float values[kTogether];
    uint32_t below[kTogether];
    for (size_t i = 0; i < n; i += kTogether) {
      const size_t have = std::min(kTogether, n - i);
      for (size_t k = 0; k < have; ++k) values[k] = value[(i + k) * stride];
      search(index, values, have, below);
      for (size_t k = 0; k < have; ++k) {
        const float v = values[k];
        missing += v != v;
        neg_inf += v == -kInf;
        pos_inf += v == kInf;
        bins[below[k]] = static_cast<Count>(bins[below[k]] + (v == v));
      }
    }
    extra[0] = static_cast<Count>(extra[0] + missing);
    extra[2] = static_cast<Count>(extra[2] + neg_inf);
    extra[3] = static_cast<Count>(extra[3] + pos_inf);
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
