// Half a line of 16 edges a compare. See edge_search.h; built for x86-64-v3 alone.
#include <immintrin.h>

#include "drift/edge_search.h"

namespace penstock {
namespace {

// Minus the number of edges of the line below the value, spread over the lanes.
__m256i minus_lower(const EdgeLine& line, __m256 value, __m256i sum) {
  const __m256 low = _mm256_cmp_ps(_mm256_load_ps(line.edges), value, _CMP_LT_OQ);
  const __m256 high = _mm256_cmp_ps(_mm256_load_ps(line.edges + 8), value, _CMP_LT_OQ);
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_castps_si256(low), _mm256_castps_si256(high)));
}

uint32_t total(__m256i minus) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(minus), _mm256_extracti128_si256(minus, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
  return 0u - static_cast<uint32_t>(_mm_cvtsi128_si32(sum));
}

}  // namespace

void edge_search_avx2(const EdgeIndex& index, const float* values, size_t count, uint32_t* below) {
  for (size_t i = 0; i < count; ++i) {
    const __m256 value = _mm256_set1_ps(values[i]);
    __m256i sum = _mm256_setzero_si256();
    for (size_t line = 0; line < index.pivot_lines; ++line) sum = minus_lower(index.pivots[line], value, sum);
    const uint32_t block = total(sum);
    const EdgeLine* const lines = index.blocks + EdgeIndex::kBlockLines * block;
    sum = _mm256_setzero_si256();
    for (size_t line = 0; line < EdgeIndex::kBlockLines; ++line) sum = minus_lower(lines[line], value, sum);
    below[i] = static_cast<uint32_t>(EdgeIndex::kBlock) * block + total(sum);
  }
}

}  // namespace penstock
