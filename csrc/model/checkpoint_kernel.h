// The checkpoint kernel, included by each instruction set's source: the same text, built for wider registers.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "model/tree_kernels.h"

namespace penstock {
namespace {  // each including source keeps its own code

// kBytes: of a register; kRegisters: of them, that stay loaded while the columns go by.
template <size_t kBytes, size_t kRegisters>
class CheckpointRow {
 public:
  static void leaves(const TreeRun& run, const int8_t* ranks, size_t row, void* masks, uint8_t* leaves) {
    for (const CheckpointGroup& group : run.groups) {
      uint8_t* to = leaves + group.first_tree * kLanes + row;
      if (run.narrow) {
        find(group, group.narrow.data(), ranks + row, static_cast<uint32_t*>(masks), to);
      } else {
        find(group, group.wide.data(), ranks + row, static_cast<uint64_t*>(masks), to);
      }
    }
  }

 private:
  typedef uint64_t Vector __attribute__((vector_size(kBytes), may_alias));
  static constexpr size_t kChunk = kBytes * kRegisters;
  static_assert(kChunk % sizeof(ByteLine) == 0 && sizeof(ByteLine) % kBytes == 0);
  static constexpr size_t kTogether = 32;  // columns

  template <class Mask>
  static void find(const CheckpointGroup& group, const Mask* keeps, const int8_t* ranks, Mask* masks,
                   uint8_t* leaves) {
    const size_t bytes = group.row_lines * sizeof(ByteLine);
    auto* mask_bytes = reinterpret_cast<uint8_t*>(masks);
    if (group.columns.empty()) std::fill_n(mask_bytes, bytes, uint8_t{0xff});
    for (size_t start = 0; start < group.columns.size(); start += kTogether) {
      const CheckpointColumn* columns = group.columns.data() + start;
      const size_t n = std::min(kTogether, group.columns.size() - start);
      const uint8_t* lines[kTogether];
      uint32_t ends[kTogether];
      for (size_t c = 0; c < n; ++c) {
        const int rank = ranks[8 * columns[c].column] - kRankBias;
        ends[c] = group.ends[columns[c].ends + static_cast<size_t>(rank)];
        lines[c] = group.lines[columns[c].lines + ends[c] / kCheckpointStep * group.row_lines].bytes;
      }
      const bool first = start == 0;
      size_t at = 0;
      for (; at + kChunk <= bytes; at += kChunk) meet<kRegisters>(lines, n, at, first, mask_bytes + at);
      for (; at < bytes; at += sizeof(ByteLine)) {
        meet<sizeof(ByteLine) / kBytes>(lines, n, at, first, mask_bytes + at);
      }
      // The splits past the checkpoint: always a whole step, so that no branch depends on the row.
      for (size_t c = 0; c < n; ++c) {
        const size_t failed = ends[c] % kCheckpointStep;
        const size_t begin = columns[c].entries + ends[c] - failed;
        for (size_t i = 0; i < kCheckpointStep; ++i) {
          masks[group.trees[begin + i]] &= keeps[begin + i] | (Mask{0} - static_cast<Mask>(i >= failed));
        }
      }
    }
    for (size_t t = 0; t < group.n_trees; ++t) {
      leaves[t * kLanes] = static_cast<uint8_t>(std::countr_zero(masks[t]));
    }
  }

  // to: the AND of kCount registers of n checkpoints, and of what it held, unless this is the first.
  template <size_t kCount>
  static void meet(const uint8_t* const* lines, size_t n, size_t at, bool first, uint8_t* to) {
    Vector kept[kCount];
    for (size_t i = 0; i < kCount; ++i) kept[i] = first ? ~Vector{} : load(to + i * kBytes);
    for (size_t c = 0; c < n; ++c) {
      for (size_t i = 0; i < kCount; ++i) kept[i] &= load(lines[c] + at + i * kBytes);
    }
    for (size_t i = 0; i < kCount; ++i) *reinterpret_cast<Vector*>(to + i * kBytes) = kept[i];
  }

  static Vector load(const uint8_t* at) { return *reinterpret_cast<const Vector*>(at); }
};

}  // namespace
}  // namespace penstock
