// The AVX-512 kernel: 16 or 32 rows at a time, 64 where every tree has at most 32 leaves; and the sum of a
// block's leaves. See bitvector.h; built for x86-64-v4 alone.
#include <immintrin.h>

#include <cstring>

#include "model/bitvector.h"

namespace penstock {
namespace {

// kRegisters: registers of 16 rows that go through an entry together.
template <int kCompare, bool kNarrow, size_t kRegisters>
void scan(const BitvectorEntry* entry, const BitvectorEntry* end, const float* column, uint64_t* masks) {
  __m512 x[kRegisters];
  for (size_t i = 0; i < kRegisters; ++i) x[i] = _mm512_loadu_ps(column + 16 * i);
  for (; entry != end; ++entry) {
    const __m512 threshold = _mm512_set1_ps(entry->threshold);
    __mmask16 fails[kRegisters];
    uint32_t any = 0;
    for (size_t i = 0; i < kRegisters; ++i) {
      fails[i] = _mm512_cmp_ps_mask(x[i], threshold, kCompare);
      any |= fails[i];
    }
    if (any == 0) return;
    if constexpr (kNarrow) {
      auto* at = reinterpret_cast<__m512i*>(masks) + kRegisters * entry->tree;
      const __m512i keep = _mm512_set1_epi32(static_cast<int>(entry->keep));
      for (size_t i = 0; i < kRegisters; ++i) {
        const __m512i mask = _mm512_load_si512(at + i);
        _mm512_store_si512(at + i, _mm512_mask_and_epi32(mask, fails[i], mask, keep));
      }
    } else {
      auto* at = reinterpret_cast<__m512i*>(masks) + 2 * kRegisters * entry->tree;
      const __m512i keep = _mm512_set1_epi64(static_cast<long long>(entry->keep));
      for (size_t i = 0; i < kRegisters; ++i, at += 2) {
        const __m512i low = _mm512_load_si512(at), high = _mm512_load_si512(at + 1);
        _mm512_store_si512(at, _mm512_mask_and_epi64(low, static_cast<__mmask8>(fails[i]), low, keep));
        _mm512_store_si512(at + 1,
                           _mm512_mask_and_epi64(high, static_cast<__mmask8>(fails[i] >> 8), high, keep));
      }
    }
  }
}

template <bool kNarrow, size_t kRegisters>
void run(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees, const float* columns,
         uint64_t* masks, uint32_t* leaves, size_t stride) {
  constexpr size_t kWidth = 16 * kRegisters;
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
    uint32_t* out = leaves + t * stride;
    if constexpr (kNarrow) {
      const auto* from = reinterpret_cast<const __m512i*>(masks) + t * kRegisters;
      for (size_t i = 0; i < kRegisters; ++i) {
        const __m512i mask = _mm512_load_si512(from + i);
        const __m512i lowest = _mm512_and_si512(mask, _mm512_sub_epi32(_mm512_setzero_si512(), mask));
        _mm512_storeu_si512(out + 16 * i,
                            _mm512_sub_epi32(_mm512_set1_epi32(31), _mm512_lzcnt_epi32(lowest)));
      }
    } else {
      const auto* from = reinterpret_cast<const __m512i*>(masks) + t * 2 * kRegisters;
      for (size_t i = 0; i < 2 * kRegisters; ++i) {
        const __m512i mask = _mm512_load_si512(from + i);
        const __m512i lowest = _mm512_and_si512(mask, _mm512_sub_epi64(_mm512_setzero_si512(), mask));
        const __m512i leaf = _mm512_sub_epi64(_mm512_set1_epi64(63), _mm512_lzcnt_epi64(lowest));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * i), _mm512_maskz_cvtepi64_epi32(0xff, leaf));
      }
    }
  }
}

}  // namespace

void bitvector_leaves_avx512(const BitvectorPlan& plan, uint32_t n_features, uint32_t n_trees, size_t lanes,
                             const float* columns, uint64_t* masks, uint32_t* leaves, size_t stride) {
  if (plan.narrow) {
    const auto kernel = lanes == 64 ? run<true, 4> : lanes == 32 ? run<true, 2> : run<true, 1>;
    kernel(plan, n_features, n_trees, columns, masks, leaves, stride);
  } else {
    const auto kernel = lanes == 32 ? run<false, 2> : run<false, 1>;
    kernel(plan, n_features, n_trees, columns, masks, leaves, stride);
  }
}

void sum_leaves_avx512(const double* values, const uint32_t* value_begin, const uint32_t* leaves,
                       uint32_t n_trees, size_t n, size_t stride, double* sums) {
  constexpr size_t kRegisters = 8;
  for (size_t start = 0; start < n; start += 8 * kRegisters) {
    const size_t rows = n - start < 8 * kRegisters ? n - start : 8 * kRegisters;
    const size_t registers = (rows + 7) / 8;
    __m512d sum[kRegisters];
    for (__m512d& s : sum) s = _mm512_setzero_pd();
    for (size_t t = 0; t < n_trees; ++t) {
      const double* of_tree = values + value_begin[t];
      const uint32_t* at = leaves + t * stride + start;
      for (size_t i = 0; i < registers; ++i) {
        const auto leaf = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 8 * i));
        sum[i] = _mm512_add_pd(sum[i], _mm512_mask_i32gather_pd(_mm512_setzero_pd(), 0xff, leaf, of_tree, 8));
      }
    }
    for (size_t i = 0; i < registers; ++i) {
      const size_t left = rows - 8 * i;
      const auto keep = static_cast<__mmask8>(left >= 8 ? 0xffU : (1U << left) - 1);
      _mm512_mask_storeu_pd(sums + start + 8 * i, keep, sum[i]);
    }
  }
}

}  // namespace penstock
