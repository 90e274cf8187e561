// Eight words a register. See wide_reads.h; built for x86-64-v4 alone.
#include <immintrin.h>

#include "cache/wide_reads.h"

namespace penstock {
namespace {

// Equal tags leave only version bits in the exclusive or.
constexpr long long kVersionMask = (1LL << 48) - 1;

void match_tags(const uint64_t* const* buckets, const uint64_t* tags, size_t n, uint32_t* ways) {
  const __m512i limit = _mm512_set1_epi64(kVersionMask);
  for (size_t i = 0; i < n; ++i) {
    const __m512i tag = _mm512_set1_epi64(static_cast<long long>(tags[i] << 48));
    const __m512i low = _mm512_xor_si512(_mm512_load_si512(buckets[i]), tag);
    const __m512i high = _mm512_xor_si512(_mm512_load_si512(buckets[i] + 8), tag);
    const auto low_bits = static_cast<uint32_t>(_mm512_cmple_epu64_mask(low, limit));
    const auto high_bits = static_cast<uint32_t>(_mm512_cmple_epu64_mask(high, limit));
    ways[i] = low_bits >> 1 | high_bits << 7;
  }
}

template <size_t kLines>
bool copy_lines(const uint64_t* row, uint64_t* out, size_t n, const uint64_t* slot_word, uint64_t seen) {
  __m512i lines[kLines];
  for (size_t i = 0; i < kLines; ++i) lines[i] = _mm512_load_si512(row + 8 * i);
  __asm__ volatile("" ::: "memory");
  if (__atomic_load_n(slot_word, __ATOMIC_RELAXED) != seen) return false;
  for (size_t i = 0; i + 1 < kLines; ++i) _mm512_storeu_si512(out + 8 * i, lines[i]);
  const auto last = static_cast<__mmask8>(0xffU >> (8 * kLines - n));
  _mm512_mask_storeu_epi64(out + 8 * (kLines - 1), last, lines[kLines - 1]);
  return true;
}

bool copy_confirmed(const uint64_t* row, uint64_t* out, size_t n, const uint64_t* slot_word, uint64_t seen) {
  static_assert(WideReads::kMaxWords == 32);
  switch ((n + 7) / 8) {
    case 1:
      return copy_lines<1>(row, out, n, slot_word, seen);
    case 2:
      return copy_lines<2>(row, out, n, slot_word, seen);
    case 3:
      return copy_lines<3>(row, out, n, slot_word, seen);
    default:
      return copy_lines<4>(row, out, n, slot_word, seen);
  }
}

}  // namespace

const WideReads kWideReadsAvx512 = {match_tags, copy_confirmed};

}  // namespace penstock
