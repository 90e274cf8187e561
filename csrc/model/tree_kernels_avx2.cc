// The AVX2 kernels. See tree_kernels.h; built for x86-64-v3 alone.
#include <immintrin.h>

#include "model/checkpoint_kernel.h"
#include "model/piece_kernel.h"

namespace penstock {
namespace {

struct Avx2 {
  using Register = __m256i;
  struct Small {
    explicit Small(const TreePiece& piece) : at(piece.threshold) {}
    template <size_t kByte>
    Register spread() const {
      return _mm256_set1_epi8(at[kByte]);
    }
    const int8_t* at;  // thresholds, then start
  };
  static Register zero() { return _mm256_setzero_si256(); }
  static Register load(const int8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
  static void store(uint8_t* at, Register a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), a); }
  static Register table(const uint8_t* next) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(next)));
  }
  static Register greater(Register a, Register b) { return _mm256_cmpgt_epi8(a, b); }
  static Register equal(Register a, Register b) { return _mm256_cmpeq_epi8(a, b); }
  static Register add(Register a, Register b) { return _mm256_add_epi8(a, b); }
  static Register subtract(Register a, Register b) { return _mm256_sub_epi8(a, b); }
  static Register look_up(Register table, Register code) { return _mm256_shuffle_epi8(table, code); }
  static Register choose(Register a, Register b, Register second) { return _mm256_blendv_epi8(a, b, second); }
};

struct Avx2Half {
  using Register = __m128i;
  struct Small {
    explicit Small(const TreePiece& piece) : at(piece.threshold) {}
    template <size_t kByte>
    Register spread() const {
      return _mm_set1_epi8(at[kByte]);
    }
    const int8_t* at;
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

// How many of 16 values are less than x; 0 for NaN.
uint32_t count_less(__m256 first, __m256 second, __m256 x) {
  const __m256i low = _mm256_castps_si256(_mm256_cmp_ps(x, first, _CMP_GT_OQ));
  const __m256i high = _mm256_castps_si256(_mm256_cmp_ps(x, second, _CMP_GT_OQ));
  // Two bits for each of the sixteen.
  const int bits = _mm256_movemask_epi8(_mm256_packs_epi32(low, high));
  return static_cast<uint32_t>(_mm_popcnt_u32(static_cast<uint32_t>(bits))) / 2;
}

}  // namespace

void rank_avx2(const TreePlan& plan, const TreeRun& run, const float* rows, size_t n, size_t stride,
               int8_t* ranks) {
  for (const RankColumn& column : run.columns) {
    if (!column.categorical && !column.twin) {
      const FloatLine* lines = plan.search.data() + column.search;
      const __m256 first = _mm256_load_ps(lines->values), second = _mm256_load_ps(lines->values + 8);
      ++lines;
      const float* x_at = rows + column.feature;
      for (size_t r = 0; r < n; ++r, x_at += stride) {
        const __m256 x = _mm256_set1_ps(*x_at);
        const uint32_t line = count_less(first, second, x);
        const float* values = lines[line].values;
        const uint32_t rank = 16 * line + count_less(_mm256_load_ps(values), _mm256_load_ps(values + 8), x);
        ranks[r] = static_cast<int8_t>(static_cast<int>(rank) + kRankBias);
      }
    }
    ranks += kLanes;
  }
}

void piece_leaves_avx2(const TreeRun& run, const int8_t* ranks, size_t n, uint8_t* leaves) {
  if (n > 32) {
    piece_leaves<Avx2, 2>(run, ranks, leaves);
  } else if (n > 16) {
    piece_leaves<Avx2, 1>(run, ranks, leaves);
  } else {
    piece_leaves<Avx2Half, 1>(run, ranks, leaves);
  }
}

void checkpoint_leaves_avx2(const TreeRun& run, const int8_t* ranks, size_t row, void* masks,
                            uint8_t* leaves) {
  CheckpointRow<32, 8>::leaves(run, ranks, row, masks, leaves);
}

}  // namespace penstock
