// The AVX2 kernel: eight rows at a time. See bitvector.h; built for x86-64-v3 alone.
#include <immintrin.h>

#include <bit>
#include <cstring>

#include "model/bitvector.h"

namespace penstock {
namespace {

template <int kCompare, bool kNarrow>
void scan(const BitvectorEntry* entry, const BitvectorEntry* end, __m256 x, uint64_t* masks) {
  for (; entry != end; ++entry) {
    const __m256i fails = _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_set1_ps(entry->threshold), kCompare));
    if (_mm256_testz_si256(fails, fails)) return;
    if constexpr (kNarrow) {
      auto* at = reinterpret_cast<__m256i*>(masks) + entry->tree;
      const __m256i clear = _mm256_set1_epi32(static_cast<int>(~entry->keep));
      _mm256_storeu_si256(at, _mm256_andnot_si256(_mm256_and_si256(fails, clear), _mm256_loadu_si256(at)));
    } else {
      auto* at = reinterpret_cast<__m256i*>(masks) + 2 * static_cast<size_t>(entry->tree);
      const __m256i clear = _mm256_set1_epi64x(static_cast<long long>(~entry->keep));
      const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(fails));
      const __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(fails, 1));
      _mm256_storeu_si256(at, _mm256_andnot_si256(_mm256_and_si256(low, clear), _mm256_loadu_si256(at)));
      _mm256_storeu_si256(at + 1,
                          _mm256_andnot_si256(_mm256_and_si256(high, clear), _mm256_loadu_si256(at + 1)));
    }
  }
}

template <bool kNarrow>
void run(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees, const float* columns,
         uint64_t* masks, uint32_t* leaves, size_t stride) {
  std::memset(masks, 0xff, n_trees * kLanes * (kNarrow ? 4 : 8));
  const BitvectorEntry* entries = plan.entries.data();
  for (uint32_t f = 0; f < n_features; ++f) {
    const __m256 x = _mm256_loadu_ps(columns + f * kLanes);
    const uint32_t* begin = plan.begin.data() + 2 * static_cast<size_t>(f);
    // An ordered > is false for NaN (left); a not-<= is true for it (right).
    scan<_CMP_GT_OQ, kNarrow>(entries + begin[0], entries + begin[1], x, masks);
    scan<_CMP_NLE_UQ, kNarrow>(entries + begin[1], entries + begin[2], x, masks);
  }
  for (size_t t = 0; t < n_trees; ++t) {
    if constexpr (kNarrow) {
      const __m256i mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(masks) + t);
      const __m256i lowest = _mm256_and_si256(mask, _mm256_sub_epi32(_mm256_setzero_si256(), mask));
      // A power of two converts exactly; its exponent is the bit's number (bit 31 adds only a sign).
      const __m256i power = _mm256_castps_si256(_mm256_cvtepi32_ps(lowest));
      const __m256i exponent = _mm256_and_si256(_mm256_srli_epi32(power, 23), _mm256_set1_epi32(0xff));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(leaves + t * stride),
                          _mm256_sub_epi32(exponent, _mm256_set1_epi32(127)));
    } else {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        leaves[t * stride + lane] = static_cast<uint32_t>(std::countr_zero(masks[t * kLanes + lane]));
      }
    }
  }
}

}  // namespace

void bitvector_leaves_avx2(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees,
                           const float* columns, uint64_t* masks, uint32_t* leaves, size_t stride) {
  if (plan.narrow) {
    run<true>(plan, n_features, n_trees, columns, masks, leaves, stride);
  } else {
    run<false>(plan, n_features, n_trees, columns, masks, leaves, stride);
  }
}

}  // namespace penstock
