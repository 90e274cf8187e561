// The AVX2 kernel: 8, 16 or 32 rows at a time. See bitvector.h; built for x86-64-v3 alone.
#include <immintrin.h>

#include <bit>
#include <cstring>

#include "model/bitvector.h"

namespace penstock {
namespace {

// kRegisters: registers of eight rows that go through an entry together.
template <int kCompare, bool kNarrow, size_t kRegisters>
void scan(const BitvectorEntry* entry, const BitvectorEntry* end, const float* column, uint64_t* masks) {
  __m256 x[kRegisters];
  for (size_t i = 0; i < kRegisters; ++i) x[i] = _mm256_loadu_ps(column + 8 * i);
  for (; entry != end; ++entry) {
    const __m256 threshold = _mm256_set1_ps(entry->threshold);
    __m256i fails[kRegisters];
    __m256i any = _mm256_setzero_si256();
    for (size_t i = 0; i < kRegisters; ++i) {
      fails[i] = _mm256_castps_si256(_mm256_cmp_ps(x[i], threshold, kCompare));
      any = _mm256_or_si256(any, fails[i]);
    }
    if (_mm256_testz_si256(any, any)) return;
    if constexpr (kNarrow) {
      auto* at = reinterpret_cast<__m256i*>(masks) + kRegisters * entry->tree;
      const __m256i clear = _mm256_set1_epi32(static_cast<int>(~entry->keep));
      for (size_t i = 0; i < kRegisters; ++i) {
        const __m256i cleared = _mm256_and_si256(fails[i], clear);
        _mm256_storeu_si256(at + i, _mm256_andnot_si256(cleared, _mm256_loadu_si256(at + i)));
      }
    } else {
      auto* at = reinterpret_cast<__m256i*>(masks) + 2 * kRegisters * entry->tree;
      const __m256i clear = _mm256_set1_epi64x(static_cast<long long>(~entry->keep));
      for (size_t i = 0; i < kRegisters; ++i, at += 2) {
        const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(fails[i]));
        const __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(fails[i], 1));
        _mm256_storeu_si256(at, _mm256_andnot_si256(_mm256_and_si256(low, clear), _mm256_loadu_si256(at)));
        _mm256_storeu_si256(at + 1,
                            _mm256_andnot_si256(_mm256_and_si256(high, clear), _mm256_loadu_si256(at + 1)));
      }
    }
  }
}

template <bool kNarrow, size_t kRegisters>
void run(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees, const float* columns,
         uint64_t* masks, uint32_t* leaves, size_t stride) {
  constexpr size_t kWidth = 8 * kRegisters;
  std::memset(masks, 0xff, n_trees * kWidth * (kNarrow ? 4 : 8));
  const BitvectorEntry* entries = plan.entries.data();
  for (size_t f = 0; f < n_features; ++f) {
    const float* column = columns + f * kWidth;
    const uint32_t* begin = plan.begin.data() + 2 * f;
    // An ordered > is false for NaN (left); a not-<= is true for it (right).
    scan<_CMP_GT_OQ, kNarrow, kRegisters>(entries + begin[0], entries + begin[1], column, masks);
    scan<_CMP_NLE_UQ, kNarrow, kRegisters>(entries + begin[1], entries + begin[2], column, masks);
  }
  for (size_t t = 0; t < n_trees; ++t) {
    if constexpr (kNarrow) {
      const auto* from = reinterpret_cast<const __m256i*>(masks) + t * kRegisters;
      for (size_t i = 0; i < kRegisters; ++i) {
        const __m256i mask = _mm256_loadu_si256(from + i);
        const __m256i lowest = _mm256_and_si256(mask, _mm256_sub_epi32(_mm256_setzero_si256(), mask));
        // A power of two converts exactly; its exponent is the bit's number (bit 31 adds only a sign).
        const __m256i power = _mm256_castps_si256(_mm256_cvtepi32_ps(lowest));
        const __m256i exponent = _mm256_and_si256(_mm256_srli_epi32(power, 23), _mm256_set1_epi32(0xff));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(leaves + t * stride + 8 * i),
                            _mm256_sub_epi32(exponent, _mm256_set1_epi32(127)));
      }
    } else {
      for (size_t lane = 0; lane < kWidth; ++lane) {
        leaves[t * stride + lane] = static_cast<uint32_t>(std::countr_zero(masks[t * kWidth + lane]));
      }
    }
  }
}

template <bool kNarrow>
void dispatch(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees, size_t lanes,
              const float* columns, uint64_t* masks, uint32_t* leaves, size_t stride) {
  if (lanes == 32) {
    run<kNarrow, 4>(plan, n_features, n_trees, columns, masks, leaves, stride);
  } else if (lanes == 16) {
    run<kNarrow, 2>(plan, n_features, n_trees, columns, masks, leaves, stride);
  } else {
    run<kNarrow, 1>(plan, n_features, n_trees, columns, masks, leaves, stride);
  }
}

}  // namespace

void bitvector_leaves_avx2(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees, size_t lanes,
                           const float* columns, uint64_t* masks, uint32_t* leaves, size_t stride) {
  if (plan.narrow) {
    dispatch<true>(plan, n_features, n_trees, lanes, columns, masks, leaves, stride);
  } else {
    dispatch<false>(plan, n_features, n_trees, lanes, columns, masks, leaves, stride);
  }
}

}  // namespace penstock
