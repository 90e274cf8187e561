// The AVX-512 kernels. See tree_kernels.h; built for x86-64-v4 alone.
#include <immintrin.h>

#include <algorithm>

#include "model/checkpoint_kernel.h"

namespace penstock {
namespace {

struct Lanes64 {
  using Register = __m512i;
  using Mask = __mmask64;
  static Register zero() { return _mm512_setzero_si512(); }
  static Register spread(int8_t a) { return _mm512_set1_epi8(a); }
  static Register load(const int8_t* at) { return _mm512_loadu_si512(at); }
  static void store(uint8_t* at, Register a) { _mm512_storeu_si512(at, a); }
  static Register table(__m128i a) { return _mm512_maskz_broadcast_i32x4(0xffff, a); }
  static Mask greater(Register a, Register b) { return _mm512_cmpgt_epi8_mask(a, b); }
  static Mask equal(Register a, Register b) { return _mm512_cmpeq_epi8_mask(a, b); }
  static Register keep(Mask k, Register a) { return _mm512_maskz_mov_epi8(k, a); }
  static Register add(Register a, Mask k, Register b) { return _mm512_mask_add_epi8(a, k, a, b); }
  static Register look_up(Register a, Mask k, Register table, Register code) {
    return _mm512_mask_shuffle_epi8(a, k, table, code);
  }
};

struct Lanes32 {
  using Register = __m256i;
  using Mask = __mmask32;
  static Register zero() { return _mm256_setzero_si256(); }
  static Register spread(int8_t a) { return _mm256_set1_epi8(a); }
  static Register load(const int8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
  static void store(uint8_t* at, Register a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), a); }
  static Register table(__m128i a) { return _mm256_broadcastsi128_si256(a); }
  static Mask greater(Register a, Register b) { return _mm256_cmpgt_epi8_mask(a, b); }
  static Mask equal(Register a, Register b) { return _mm256_cmpeq_epi8_mask(a, b); }
  static Register keep(Mask k, Register a) { return _mm256_maskz_mov_epi8(k, a); }
  static Register add(Register a, Mask k, Register b) { return _mm256_mask_add_epi8(a, k, a, b); }
  static Register look_up(Register a, Mask k, Register table, Register code) {
    return _mm256_mask_shuffle_epi8(a, k, table, code);
  }
};

struct Lanes16 {
  using Register = __m128i;
  using Mask = __mmask16;
  static Register zero() { return _mm_setzero_si128(); }
  static Register spread(int8_t a) { return _mm_set1_epi8(a); }
  static Register load(const int8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
  static void store(uint8_t* at, Register a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), a); }
  static Register table(__m128i a) { return a; }
  static Mask greater(Register a, Register b) { return _mm_cmpgt_epi8_mask(a, b); }
  static Mask equal(Register a, Register b) { return _mm_cmpeq_epi8_mask(a, b); }
  static Register keep(Mask k, Register a) { return _mm_maskz_mov_epi8(k, a); }
  static Register add(Register a, Mask k, Register b) { return _mm_mask_add_epi8(a, k, a, b); }
  static Register look_up(Register a, Mask k, Register table, Register code) {
    return _mm_mask_shuffle_epi8(a, k, table, code);
  }
};

template <class Unit>
void piece_leaves(const TreeRun& run, const int8_t* ranks, uint8_t* leaves) {
  using Register = typename Unit::Register;
  const Register bit0 = Unit::spread(1), bit1 = Unit::spread(2), bit2 = Unit::spread(4),
                 bit3 = Unit::spread(8);
  const TreePiece* piece = run.pieces.data();
  for (size_t t = 0; t < run.n_trees; ++t) {
    const TreePiece* end = run.pieces.data() + run.piece_begin[t + 1];
    Register state = Unit::zero();
    for (; piece != end; ++piece) {
      const auto fails = [&](size_t split) {
        return Unit::greater(Unit::load(ranks + 8 * size_t{piece->column[split]}),
                             Unit::spread(piece->threshold[split]));
      };
      Register code = Unit::keep(fails(0), bit0);
      code = Unit::add(code, fails(1), bit1);
      code = Unit::add(code, fails(2), bit2);
      code = Unit::add(code, fails(3), bit3);
      const Register table = Unit::table(_mm_load_si128(reinterpret_cast<const __m128i*>(piece->next)));
      const auto here = Unit::equal(state, Unit::spread(static_cast<int8_t>(piece->start)));
      state = Unit::look_up(state, here, table, code);
    }
    Unit::store(leaves + t * kLanes, state);
  }
}

// How many of 16 values are less than x; 0 for NaN.
uint32_t count_less(__m512 values, __m512 x) {
  return static_cast<uint32_t>(_mm_popcnt_u32(_cvtmask16_u32(_mm512_cmp_ps_mask(x, values, _CMP_GT_OQ))));
}

// kGroups: of 16 rows.
template <size_t kGroups>
void add_halves(const TreeRun& run, const uint8_t* leaves, double* sums) {
  // Where the halves of 16 rows are joined, the rows come out as 0 1 4 5 8 9 12 13, then 2 3 6 7 10 11 14 15.
  const __m512i first = _mm512_set_epi64(13, 12, 9, 8, 5, 4, 1, 0);
  const __m512i second = _mm512_set_epi64(15, 14, 11, 10, 7, 6, 3, 2);
  __m512d sum[2 * kGroups];
  for (size_t i = 0; i < kGroups; ++i) {
    const __m512d low = _mm512_loadu_pd(sums + 16 * i), high = _mm512_loadu_pd(sums + 16 * i + 8);
    sum[2 * i] = _mm512_permutex2var_pd(low, first, high);
    sum[2 * i + 1] = _mm512_permutex2var_pd(low, second, high);
  }
  const ByteLine* lines = run.halves.data();
  for (size_t t = 0; t < run.n_trees; ++t, lines += 4) {
    const __m512i low0 = _mm512_load_si512(lines), low1 = _mm512_load_si512(lines + 1);
    const __m512i high0 = _mm512_load_si512(lines + 2), high1 = _mm512_load_si512(lines + 3);
    for (size_t i = 0; i < kGroups; ++i) {
      const auto* at = reinterpret_cast<const __m128i*>(leaves + t * kLanes + 16 * i);
      const __m512i leaf = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(at));
      const __m512i low = _mm512_permutex2var_epi32(low0, leaf, low1);
      const __m512i high = _mm512_permutex2var_epi32(high0, leaf, high1);
      sum[2 * i] =
          _mm512_add_pd(sum[2 * i], _mm512_castsi512_pd(_mm512_maskz_unpacklo_epi32(0xffff, low, high)));
      sum[2 * i + 1] =
          _mm512_add_pd(sum[2 * i + 1], _mm512_castsi512_pd(_mm512_maskz_unpackhi_epi32(0xffff, low, high)));
    }
  }
  const __m512i low_rows = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i high_rows = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  for (size_t i = 0; i < kGroups; ++i) {
    _mm512_storeu_pd(sums + 16 * i, _mm512_permutex2var_pd(sum[2 * i], low_rows, sum[2 * i + 1]));
    _mm512_storeu_pd(sums + 16 * i + 8, _mm512_permutex2var_pd(sum[2 * i], high_rows, sum[2 * i + 1]));
  }
}

}  // namespace

void rank_avx512(const TreePlan& plan, const TreeRun& run, const float* rows, size_t n, size_t stride,
                 int8_t* ranks) {
  for (const RankColumn& column : run.columns) {
    if (!column.categorical && !column.twin) {
      const FloatLine* lines = plan.search.data() + column.search;
      const __m512 last_of_line = _mm512_load_ps(lines->values);
      ++lines;
      const float* x_at = rows + column.feature;
      for (size_t r = 0; r < n; ++r, x_at += stride) {
        const __m512 x = _mm512_set1_ps(*x_at);
        const uint32_t line = count_less(last_of_line, x);
        const uint32_t rank = 16 * line + count_less(_mm512_load_ps(lines[line].values), x);
        ranks[r] = static_cast<int8_t>(static_cast<int>(rank) + kRankBias);
      }
    }
    ranks += kLanes;
  }
}

void piece_leaves_avx512(const TreeRun& run, const int8_t* ranks, size_t n, uint8_t* leaves) {
  if (n > 32) {
    piece_leaves<Lanes64>(run, ranks, leaves);
  } else if (n > 16) {
    piece_leaves<Lanes32>(run, ranks, leaves);
  } else {
    piece_leaves<Lanes16>(run, ranks, leaves);
  }
}

void checkpoint_leaves_avx512(const TreeRun& run, const int8_t* ranks, size_t row, void* masks,
                              uint8_t* leaves) {
  CheckpointRow<64, 4>::leaves(run, ranks, row, masks, leaves);
}

void add_leaves_avx512(const TreeRun& run, const uint8_t* leaves, size_t n, double* sums) {
  double padded[kLanes] = {};
  std::copy_n(sums, n, padded);
  if (n > 48) {
    add_halves<4>(run, leaves, padded);
  } else if (n > 32) {
    add_halves<3>(run, leaves, padded);
  } else if (n > 16) {
    add_halves<2>(run, leaves, padded);
  } else {
    add_halves<1>(run, leaves, padded);
  }
  std::copy_n(padded, n, sums);
}

}  // namespace penstock
