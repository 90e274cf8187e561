// Histogram counts per column: the one data structure that feeds every drift statistic.
//
// A numeric column has strictly increasing finite float32 edges e[0..m) and m + 1 fine bins (e[k-1], e[k]],
// ends open; a categorical column has n codes, one bin each. A column's slots lie together, in this order:
//   fine bins..., missing, unseen, neg_inf, pos_inf
// NaN counts as missing and nothing else. An infinity counts in its end bin and also in its own slot.
// A categorical value that is no code 0..n-1 (infinities too) counts as unseen and nothing else.
//
// Invariants: counts are integers, so any split of the rows, in any order, gives the same counts, and merge
// is exact. They equal penstock_kernels' reference, Numba and Triton counts, slot for slot. Threads:
// HistogramSpec is immutable and shared freely. A HistogramCounts has one writer at a time; any other access
// during a write needs the caller's lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "drift/edge_search.h"

namespace penstock {

struct HistogramColumn {
  std::vector<float> edges;  // Numeric: strictly increasing, finite; may be empty (one bin).
  uint32_t n_codes = 0;      // Categorical when > 0; edges must then be empty.
};

class HistogramSpec {
 public:
  static constexpr size_t kExtraSlots = 4;
  static constexpr uint32_t kMaxCodes = 1u << 24;  // Every code is exact as a float32.

  static Status create(const std::vector<HistogramColumn>& columns,
                       std::shared_ptr<const HistogramSpec>* out);

  size_t n_columns() const { return columns_.size(); }
  size_t n_slots() const { return n_slots_; }
  size_t offset(size_t column) const { return columns_[column].offset; }
  size_t n_bins(size_t column) const { return columns_[column].n_bins; }
  bool is_categorical(size_t column) const { return columns_[column].categorical; }
  const float* edges(size_t column) const { return edges_.data() + columns_[column].edges_offset; }
  EdgeIndex edge_index(size_t column) const {
    const Column& c = columns_[column];
    const EdgeLine* const lines = lines_.data() + c.lines_offset;
    return {lines, c.pivot_lines, lines + c.pivot_lines, edges(column), c.n_bins - 1};
  }
  bool same_as(const HistogramSpec& other) const;

 private:
  struct Column {
    size_t offset, n_bins, edges_offset, lines_offset, pivot_lines;
    bool categorical;
    bool operator==(const Column&) const = default;
  };
  std::vector<Column> columns_;
  std::vector<float> edges_;
  std::vector<EdgeLine> lines_;  // of the numeric columns, for edge_search()
  size_t n_slots_ = 0;
};

// Adds n rows of spec.n_columns() floats, row i at rows + i * stride, to spec.n_slots() counts of uint16_t,
// uint32_t or uint64_t. A row adds at most 1 to a slot; the caller sees to it that none overflows. Allocates
// nothing.
template <class Count>
void count_rows(const HistogramSpec& spec, const float* rows, size_t n, size_t stride, Count* counts);

class HistogramCounts {
 public:
  explicit HistogramCounts(std::shared_ptr<const HistogramSpec> spec);

  const HistogramSpec& spec() const { return *spec_; }
  const std::vector<uint64_t>& counts() const { return counts_; }

  // Adds n rows of n_columns() floats, row i at rows + i * stride. Allocates nothing.
  void count(const float* rows, size_t n, size_t stride);
  // Adds the other's counts; refused, unchanged, unless the specs are equal. Adding itself doubles.
  Status merge(const HistogramCounts& other);
  void clear();
  // Copies spec().n_slots() counts to out.
  void snapshot(uint64_t* out) const;

 private:
  std::shared_ptr<const HistogramSpec> spec_;
  std::vector<uint64_t> counts_;
};

}  // namespace penstock
