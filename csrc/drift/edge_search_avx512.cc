// A line of 16 edges a compare. See edge_search.h; built for x86-64-v4 alone.
#include <immintrin.h>

#include "drift/edge_search.h"

namespace penstock {
namespace {

uint32_t lower(const EdgeLine& line, __m512 value) {
  const __mmask16 below = _mm512_cmp_ps_mask(_mm512_load_ps(line.edges), value, _CMP_LT_OQ);
  return static_cast<uint32_t>(_mm_popcnt_u32(below));
}

}  // namespace

void edge_search_avx512(const EdgeIndex& index, const float* values, size_t count, uint32_t* below) {
  for (size_t i = 0; i < count; ++i) {
    const __m512 value = _mm512_set1_ps(values[i]);
    uint32_t block = 0;
    for (size_t line = 0; line < index.pivot_lines; ++line) block += lower(index.pivots[line], value);
    const EdgeLine* const lines = index.blocks + EdgeIndex::kBlockLines * block;
    static_assert(EdgeIndex::kBlockLines == 2);
    below[i] =
        static_cast<uint32_t>(EdgeIndex::kBlock) * block + lower(lines[0], value) + lower(lines[1], value);
  }
}

}  // namespace penstock
