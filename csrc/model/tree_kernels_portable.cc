// The kernels for any processor, and those of x86-64's common base (SSE4.1), which is what "portable" means
// there.
#if defined(__SSE4_1__)
#include <smmintrin.h>
#endif

#include <algorithm>
#include <bit>

#include "model/checkpoint_kernel.h"
#include "model/piece_kernel.h"
#include "model/tree_kernels.h"

namespace penstock {
namespace {

#if defined(__SSE4_1__)
// How many of 16 values are less than x; 0 for NaN.
uint32_t count_less(const FloatLine& line, float x) {
  const __m128 wide = _mm_set1_ps(x);
  const auto less = [&](size_t i) {
    return _mm_castps_si128(_mm_cmplt_ps(_mm_load_ps(line.values + i), wide));
  };
  const __m128i low = _mm_packs_epi32(less(0), less(4)), high = _mm_packs_epi32(less(8), less(12));
  const int bits = _mm_movemask_epi8(_mm_packs_epi16(low, high));
  return static_cast<uint32_t>(std::popcount(static_cast<uint32_t>(bits)));
}
#else
uint32_t count_less(const FloatLine& line, float x) {
  uint32_t count = 0;
  for (const float value : line.values) count += value < x;
  return count;
}
#endif

}  // namespace

void rank_portable(const TreePlan& plan, const TreeRun& run, const float* rows, size_t n, size_t stride,
                   int8_t* ranks) {
  for (const RankColumn& column : run.columns) {
    if (!column.categorical && !column.twin) {
      const FloatLine* lines = plan.search.data() + column.search;
      const float* x_at = rows + column.feature;
      for (size_t r = 0; r < n; ++r, x_at += stride) {
        const uint32_t line = count_less(*lines, *x_at);
        const uint32_t rank = 16 * line + count_less(lines[1 + line], *x_at);
        ranks[r] = static_cast<int8_t>(static_cast<int>(rank) + kRankBias);
      }
    }
    ranks += kLanes;
  }
}

void checkpoint_leaves_portable(const TreeRun& run, const int8_t* ranks, size_t row, void* masks,
                                uint8_t* leaves) {
  CheckpointRow<16, 8>::leaves(run, ranks, row, masks, leaves);
}

void walk_leaves(const TreeRun& run, const int8_t* ranks, size_t n, uint8_t* leaves) {
  constexpr size_t kWalks = 8, kSteps = 4;
  const size_t walks = run.n_trees * n;
  size_t tree = 0, row = 0;
  for (size_t done = 0; done < walks; done += kWalks) {
    const TreeNode* nodes[kWalks];
    const int8_t* of_row[kWalks];
    uint8_t* to[kWalks];
    uint32_t at[kWalks];
    for (size_t i = 0; i < kWalks; ++i) {
      nodes[i] = run.nodes.data() + run.node_begin[tree];
      of_row[i] = ranks + row;
      to[i] = leaves + tree * kLanes + row;
      at[i] = 0;
      // Past the end the last walk is repeated.
      if (done + i + 1 < walks && ++row == n) row = 0, ++tree;
    }
    uint32_t all;
    do {
      all = kLeafNode;
      for (size_t step = 0; step < kSteps; ++step) {
        for (size_t i = 0; i < kWalks; ++i) {
          // At a leaf the node read is another's, and the step is not taken.
          const TreeNode& node = nodes[i][at[i] % kLeafNode];
          const uint32_t next = node.child[of_row[i][8 * size_t{node.column}] > node.threshold];
          at[i] = at[i] >= kLeafNode ? at[i] : next;
        }
      }
      for (size_t i = 0; i < kWalks; ++i) all &= at[i];
    } while (all < kLeafNode);
    for (size_t i = 0; i < kWalks; ++i) *to[i] = static_cast<uint8_t>(at[i]);
  }
}

void add_leaves(const double* values, const uint32_t* value_begin, const uint8_t* leaves, size_t n_trees,
                size_t n, double* sums) {
  // Sums of eight rows at a time stay in registers, and hide each other's latency.
  constexpr size_t kTogether = 8;
  size_t r = 0;
  for (; r + kTogether <= n; r += kTogether) {
    double sum[kTogether];
    std::copy_n(sums + r, kTogether, sum);
    for (size_t t = 0; t < n_trees; ++t) {
      const double* of_tree = values + value_begin[t];
      const uint8_t* leaf = leaves + t * kLanes + r;
      for (size_t i = 0; i < kTogether; ++i) sum[i] += of_tree[leaf[i]];
    }
    std::copy_n(sum, kTogether, sums + r);
  }
  for (; r + 2 <= n; r += 2) {
    double first = sums[r], second = sums[r + 1];
    for (size_t t = 0; t < n_trees; ++t) {
      const double* of_tree = values + value_begin[t];
      first += of_tree[leaves[t * kLanes + r]];
      second += of_tree[leaves[t * kLanes + r + 1]];
    }
    sums[r] = first, sums[r + 1] = second;
  }
  if (r < n) {
    double sum = sums[r];
    for (size_t t = 0; t < n_trees; ++t) sum += values[value_begin[t] + leaves[t * kLanes + r]];
    sums[r] = sum;
  }
}

#if defined(__SSE4_1__)
namespace {

struct Sse4 {
  using Register = __m128i;
  struct Small {
    explicit Small(const TreePiece& piece)
        : bytes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(piece.threshold))) {}
    template <size_t kByte>
    Register spread() const {
      return _mm_shuffle_epi8(bytes, _mm_set1_epi8(kByte));
    }
    Register bytes;  // thresholds, then start
  };
  static Register zero() { return _mm_setzero_si128(); }
  static Register load(const int8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
  static void store(uint8_t* at, Register a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), a); }
  static Register table(const uint8_t* next) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(next));
  }
  static Register greater(Register a, Register b) { return _mm_cmpgt_epi8(a, b); }
  static Register equal(Register a, Register b) { return _mm_cmpeq_epi8(a, b); }
  static Register add(Register a, Register b) { return _mm_add_epi8(a, b); }
  static Register subtract(Register a, Register b) { return _mm_sub_epi8(a, b); }
  static Register look_up(Register table, Register code) { return _mm_shuffle_epi8(table, code); }
  static Register choose(Register a, Register b, Register second) { return _mm_blendv_epi8(a, b, second); }
};

}  // namespace

void piece_leaves_sse4(const TreeRun& run, const int8_t* ranks, size_t n, uint8_t* leaves) {
  if (n > 32) {
    piece_leaves<Sse4, 2>(run, ranks, leaves);
    piece_leaves<Sse4, 2>(run, ranks + 32, leaves + 32);
  } else if (n > 16) {
    piece_leaves<Sse4, 2>(run, ranks, leaves);
  } else {
    piece_leaves<Sse4, 1>(run, ranks, leaves);
  }
}
#endif

}  // namespace penstock
