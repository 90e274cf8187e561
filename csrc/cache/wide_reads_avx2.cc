// Four words a register. See wide_reads.h; built for x86-64-v3 alone.
#include <immintrin.h>

#include "cache/wide_reads.h"

namespace penstock {
namespace {

const __m256i* at(const uint64_t* words) {
  return reinterpret_cast<const __m256i*>(words);
}

void match_tags(const uint64_t* const* buckets, const uint64_t* tags, size_t n, uint32_t* ways) {
  for (size_t i = 0; i < n; ++i) {
    const __m256i tag = _mm256_set1_epi64x(static_cast<long long>(tags[i]));
    uint32_t bits = 0;
    for (int part = 0; part < 4; ++part) {
      const __m256i words = _mm256_load_si256(at(buckets[i] + 4 * part));
      const __m256i same = _mm256_cmpeq_epi64(_mm256_srli_epi64(words, 48), tag);
      bits |= static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(same))) << (4 * part);
    }
    ways[i] = bits >> 1;
  }
}

template <size_t kParts>
bool copy_parts(const uint64_t* row, uint64_t* out, size_t n, const uint64_t* slot_word, uint64_t seen) {
  __m256i parts[kParts];
  for (size_t i = 0; i < kParts; ++i) parts[i] = _mm256_load_si256(at(row + 4 * i));
  __asm__ volatile("" ::: "memory");
  if (__atomic_load_n(slot_word, __ATOMIC_RELAXED) != seen) return false;
  for (size_t i = 0; i < kParts; ++i) {
    const auto left = _mm256_set1_epi64x(static_cast<long long>(n) - static_cast<long long>(4 * i));
    const __m256i keep = _mm256_cmpgt_epi64(left, _mm256_setr_epi64x(0, 1, 2, 3));
    _mm256_maskstore_epi64(reinterpret_cast<long long*>(out + 4 * i), keep, parts[i]);
  }
  return true;
}

bool copy_confirmed(const uint64_t* row, uint64_t* out, size_t n, const uint64_t* slot_word, uint64_t seen) {
  static_assert(WideReads::kMaxWords == 32);
  switch ((n + 7) / 8) {
    case 1:
      return copy_parts<2>(row, out, n, slot_word, seen);
    case 2:
      return copy_parts<4>(row, out, n, slot_word, seen);
    case 3:
      return copy_parts<6>(row, out, n, slot_word, seen);
    default:
      return copy_parts<8>(row, out, n, slot_word, seen);
  }
}

}  // namespace

const WideReads kWideReadsAvx2 = {match_tags, copy_confirmed};

}  // namespace penstock
