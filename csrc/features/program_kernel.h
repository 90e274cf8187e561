// The loop over a program's instructions, compiled once per instruction set: a file defines
// PENSTOCK_PROGRAM_KERNEL as the function's name and includes this. Everything here has internal linkage, and
// no standard template is instantiated that the linker could share between instruction sets.
//
// An operation without a data-dependent step runs over whole groups of 8 rows; what it makes of rows past the
// end is never seen. The others stop at the last row. No operation traps, whatever the rows hold.
#include <bit>
#include <cmath>
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "features/float_math.h"
#include "features/operations.h"
#include "features/program_code.h"

// A call left in a loop would keep it from vectorising.
#define PENSTOCK_ALWAYS __attribute__((always_inline))

namespace penstock {

namespace {

constexpr int64_t kSecondUs = 1000000, kMinuteUs = 60 * kSecondUs, kHourUs = 60 * kMinuteUs,
                  kDayUs = 24 * kHourUs;

inline int64_t down_by(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}
inline int64_t rest_by(int64_t a, int64_t b) {
  const int64_t rest = a % b;
  return rest < 0 ? rest + b : rest;
}
inline int64_t wrap(uint64_t bits) {
  return static_cast<int64_t>(bits);
}
inline uint64_t raw(int64_t value) {
  return static_cast<uint64_t>(value);
}

// A day counted from 1970-01-01 in the Gregorian calendar; H. Hinnant, "chrono-Compatible Low-Level Date
// Algorithms", civil_from_days and days_from_civil.
struct Civil {
  int64_t year, month, day, first_of_year;
};
inline Civil civil(int64_t days) {
  const int64_t z = days + 719468;
  const int64_t era = down_by(z, 146097);
  const int64_t doe = z - era * 146097;
  const int64_t yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
  const int64_t doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
  const int64_t mp = (5 * doy + 2) / 153;
  Civil found{};
  found.day = doy - (153 * mp + 2) / 5 + 1;
  found.month = mp < 10 ? mp + 3 : mp - 9;
  found.year = yoe + era * 400 + (found.month <= 2);
  const int64_t before = found.year - 1, its_era = down_by(before, 400), y = before - its_era * 400;
  found.first_of_year = its_era * 146097 + y * 365 + y / 4 - y / 100 + 306 - 719468;
  return found;
}

// NaN wins; -0.0 is below +0.0.
inline double min_f(double a, double b) {
  using namespace float_math;
  const double lesser = select(either(a < b, both(a == b, bits(a) < 0)), a, b);
  return select(a == a, select(b == b, lesser, b), a);
}
inline double max_f(double a, double b) {
  using namespace float_math;
  const double greater = select(either(a > b, both(a == b, bits(b) < 0)), a, b);
  return select(a == a, select(b == b, greater, b), a);
}
inline double with_sign(double x, double sign) {
  return float_math::value((float_math::bits(x) & INT64_MAX) | (float_math::bits(sign) & INT64_MIN));
}
inline double round_f(double a) {
  const double size = float_math::magnitude(a);
  return float_math::select(size < 0x1p52, with_sign((size + 0x1p52) - 0x1p52, a), a);
}
// Python's float `%` and `//` (Objects/floatobject.c), extended to a zero divisor.
inline double mod_f(double a, double b) {
  const double rest = std::fmod(a, b);
  if (rest == 0) return with_sign(rest, b);
  return (rest < 0) != (b < 0) ? rest + b : rest;
}
inline double floor_div_f(double a, double b) {
  if (b == 0) return a / b;
  const double rest = std::fmod(a, b);
  double exact = (a - rest) / b;
  if (rest != 0 && (rest < 0) != (b < 0)) exact -= 1;
  if (exact == 0) return with_sign(exact, a / b);
  const double down = std::floor(exact);
  return exact - down > 0.5 ? down + 1 : down;
}
inline int64_t divisor(int64_t b) {
  return b == 0 || b == -1 ? 1 : b;
}
inline int64_t floor_div_i(int64_t a, int64_t b) {
  if (b == -1) return wrap(0 - raw(a));
  const int64_t d = divisor(b), rest = a % d;
  return a / d - (rest != 0 && (rest < 0) != (d < 0));
}
inline int64_t mod_i(int64_t a, int64_t b) {
  const int64_t d = divisor(b), rest = a % d;
  return rest != 0 && (rest < 0) != (d < 0) ? rest + d : rest;
}
// SplitMix64's next output from state a.
inline int64_t hash_i(int64_t a) {
  uint64_t z = raw(a) + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return wrap(z ^ (z >> 31));
}

// How many of `table` are below x (or_equal: not above it); 0 for NaN.
template <bool or_equal, class T>
inline size_t count_below(const T* table, size_t n, T x) {
  size_t low = 0;
  while (n > 0) {
    const size_t half = n / 2;
    const bool below = or_equal ? table[low + half] <= x : table[low + half] < x;
    low = below ? low + half + 1 : low;
    n = below ? n - half - 1 : half;
  }
  return low;
}

// Bit r: values[r] is not zero, for the first n rows rounded up to 8.
inline uint64_t nonzero(const int64_t* values, size_t n) {
  uint64_t found = 0;
#if defined(__AVX512F__)
  for (size_t r = 0; r < n; r += 8) {
    const __m512i v = _mm512_load_si512(values + r);
    found |= uint64_t{_mm512_test_epi64_mask(v, v)} << r;
  }
#elif defined(__AVX2__)
  for (size_t r = 0; r < n; r += 4) {
    const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(values + r));
    const __m256i zero = _mm256_cmpeq_epi64(v, _mm256_setzero_si256());
    found |= uint64_t{~static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(zero))) & 15} << r;
  }
#else
  for (size_t r = 0; r < n; ++r) found |= uint64_t{values[r] != 0} << r;
#endif
  return found;
}

template <class T, class F>
PENSTOCK_ALWAYS inline void groups(T* out, size_t n, F value) {
  const size_t whole = (n + 7) / 8;
#pragma GCC ivdep
  for (size_t r = 0; r < whole * 8; ++r) out[r] = value(r);
}
template <class T, class F>
PENSTOCK_ALWAYS inline void rows(T* out, size_t n, F value) {
  for (size_t r = 0; r < n; ++r) out[r] = value(r);
}

inline int64_t bit(uint64_t word, size_t r) {
  return static_cast<int64_t>(word >> r & 1);
}

}  // namespace

void PENSTOCK_PROGRAM_KERNEL(const ProgramInstruction* code, size_t count, const ProgramTable* tables,
                             size_t n, const Block** registers, Block* results) {
  for (size_t i = 0; i < count; ++i) {
    const ProgramInstruction& at = code[i];
    Block* out = results + i;
    // An absent operand, or a table's number, stands for the first register and is not read.
    const Block& block_a = *registers[at.a];
    const Block& block_b = *registers[at.operands > 1 ? at.b : at.a];
    const Block& block_c = *registers[at.operands > 2 ? at.c : at.a];
    const double *a = block_a.f64, *b = block_b.f64;
    const int64_t *ai = block_a.i64, *bi = block_b.i64, *ci = block_c.i64;
    double* f = out->f64;
    int64_t* x = out->i64;
    uint64_t valid = block_a.valid & block_b.valid;
    switch (at.op) {
#define PENSTOCK_GROUPS(op, to, expression)                              \
  case op:                                                               \
    groups(to, n, [=](size_t r) PENSTOCK_ALWAYS { return expression; }); \
    break;
#define PENSTOCK_ROWS(op, to, expression)                              \
  case op:                                                             \
    rows(to, n, [=](size_t r) PENSTOCK_ALWAYS { return expression; }); \
    break;
      PENSTOCK_GROUPS(kAddF, f, a[r] + b[r])
      PENSTOCK_GROUPS(kSubF, f, a[r] - b[r])
      PENSTOCK_GROUPS(kMulF, f, a[r] * b[r])
      PENSTOCK_GROUPS(kDivF, f, a[r] / b[r])
      PENSTOCK_GROUPS(kNegF, f, -a[r])
      PENSTOCK_GROUPS(kAbsF, f, std::fabs(a[r]))
      PENSTOCK_GROUPS(kSqrtF, f, std::sqrt(a[r]))
      PENSTOCK_GROUPS(kFloorF, f, std::floor(a[r]))
      PENSTOCK_GROUPS(kCeilF, f, std::ceil(a[r]))
      PENSTOCK_GROUPS(kMinF, f, min_f(a[r], b[r]))
      PENSTOCK_GROUPS(kMaxF, f, max_f(a[r], b[r]))
      PENSTOCK_GROUPS(kLtF, x, int64_t{a[r] < b[r]})
      PENSTOCK_GROUPS(kLeF, x, int64_t{a[r] <= b[r]})
      PENSTOCK_GROUPS(kEqF, x, int64_t{a[r] == b[r]})
      PENSTOCK_GROUPS(kAddI, x, wrap(raw(ai[r]) + raw(bi[r])))
      PENSTOCK_GROUPS(kSubI, x, wrap(raw(ai[r]) - raw(bi[r])))
      PENSTOCK_GROUPS(kMulI, x, wrap(raw(ai[r]) * raw(bi[r])))
      PENSTOCK_GROUPS(kNegI, x, wrap(0 - raw(ai[r])))
      PENSTOCK_GROUPS(kAbsI, x, ai[r] < 0 ? wrap(0 - raw(ai[r])) : ai[r])
      PENSTOCK_GROUPS(kMinI, x, ai[r] < bi[r] ? ai[r] : bi[r])
      PENSTOCK_GROUPS(kMaxI, x, ai[r] < bi[r] ? bi[r] : ai[r])
      PENSTOCK_GROUPS(kLtI, x, int64_t{ai[r] < bi[r]})
      PENSTOCK_GROUPS(kLeI, x, int64_t{ai[r] <= bi[r]})
      PENSTOCK_GROUPS(kEqI, x, int64_t{ai[r] == bi[r]})
      PENSTOCK_GROUPS(kNot, x, int64_t{ai[r] == 0})
      PENSTOCK_GROUPS(kIntToF, f, static_cast<double>(ai[r]))
      PENSTOCK_GROUPS(kFToF32, f, static_cast<double>(static_cast<float>(a[r])))
      PENSTOCK_GROUPS(kIntToBool, x, int64_t{ai[r] != 0})
      PENSTOCK_GROUPS(kFToBool, x, int64_t{a[r] != 0.0})
      PENSTOCK_GROUPS(kIsNan, x, int64_t{a[r] != a[r]})
      PENSTOCK_GROUPS(kSignF, f, float_math::select(a[r] > 0, 1.0, float_math::select(a[r] < 0, -1.0, a[r])))
      PENSTOCK_GROUPS(kSignI, x, int64_t{ai[r] > 0} - int64_t{ai[r] < 0})
      PENSTOCK_GROUPS(kRoundF, f, round_f(a[r]))
      PENSTOCK_GROUPS(kExp, f, float_math::exp(a[r]))
      PENSTOCK_GROUPS(kExpm1, f, float_math::expm1(a[r]))
      PENSTOCK_GROUPS(kExp2, f, float_math::exp2(a[r]))
      PENSTOCK_GROUPS(kLog, f, float_math::log(a[r]))
      PENSTOCK_GROUPS(kLog1p, f, float_math::log1p(a[r]))
      PENSTOCK_GROUPS(kLog2, f, float_math::log2(a[r]))
      PENSTOCK_GROUPS(kLog10, f, float_math::log10(a[r]))
      PENSTOCK_GROUPS(kTanh, f, float_math::tanh(a[r]))
      PENSTOCK_GROUPS(kPow, f, float_math::pow(a[r], b[r]))
      PENSTOCK_GROUPS(kHashI, x, hash_i(ai[r]))
      PENSTOCK_ROWS(kModF, f, mod_f(a[r], b[r]))
      PENSTOCK_ROWS(kFloorDivF, f, floor_div_f(a[r], b[r]))
      PENSTOCK_ROWS(kSecond, x, rest_by(ai[r], kMinuteUs) / kSecondUs)
      PENSTOCK_ROWS(kMinute, x, rest_by(ai[r], kHourUs) / kMinuteUs)
      PENSTOCK_ROWS(kHour, x, rest_by(down_by(ai[r], kHourUs), 24))
      // Monday is 0; 1970-01-01 was a Thursday.
      PENSTOCK_ROWS(kWeekday, x, rest_by(down_by(ai[r], kDayUs) + 3, 7))
      PENSTOCK_ROWS(kDay, x, civil(down_by(ai[r], kDayUs)).day)
      PENSTOCK_ROWS(kMonth, x, civil(down_by(ai[r], kDayUs)).month)
      PENSTOCK_ROWS(kYear, x, civil(down_by(ai[r], kDayUs)).year)
#undef PENSTOCK_GROUPS
#undef PENSTOCK_ROWS
      case kDayOfYear:
        rows(x, n, [=](size_t r) PENSTOCK_ALWAYS {
          const int64_t day = down_by(ai[r], kDayUs);
          return day - civil(day).first_of_year + 1;
        });
        break;
      case kFloorTo:  // the bytes hold a positive constant; any other value is taken as 1
        rows(x, n, [=](size_t r) PENSTOCK_ALWAYS {
          const int64_t length = bi[r] > 0 ? bi[r] : 1;
          return wrap(raw(down_by(ai[r], length)) * raw(length));
        });
        break;
      case kWeekStart:
        rows(x, n, [=](size_t r) PENSTOCK_ALWAYS {
          const int64_t day = down_by(ai[r], kDayUs);
          return wrap(raw(day - rest_by(day + 3, 7)) * raw(kDayUs));
        });
        break;
      case kMonthStart:
        rows(x, n, [=](size_t r) PENSTOCK_ALWAYS {
          const int64_t day = down_by(ai[r], kDayUs);
          return wrap(raw(day - civil(day).day + 1) * raw(kDayUs));
        });
        break;
      case kYearStart:
        rows(x, n, [=](size_t r) PENSTOCK_ALWAYS {
          return wrap(raw(civil(down_by(ai[r], kDayUs)).first_of_year) * raw(kDayUs));
        });
        break;
      case kFloorDivI:
      case kModI:
        valid &= nonzero(bi, n);
        if (at.op == kModI) {
          rows(x, n, [=](size_t r) PENSTOCK_ALWAYS { return mod_i(ai[r], bi[r]); });
        } else {
          rows(x, n, [=](size_t r) PENSTOCK_ALWAYS { return floor_div_i(ai[r], bi[r]); });
        }
        break;
      case kBucketOf:
        rows(x, n, [=](size_t r) PENSTOCK_ALWAYS {
          const int64_t buckets = bi[r] > 0 ? bi[r] : 1;
          return wrap(raw(ai[r]) >> 1) % buckets;
        });
        break;
      case kAnd:
      case kOr: {  // Kleene: a known false decides `and`, a known true decides `or`
        const uint64_t ta = nonzero(ai, n), tb = nonzero(bi, n);
        const uint64_t decided = at.op == kAnd ? (block_a.valid & ~ta) | (block_b.valid & ~tb)
                                               : (block_a.valid & ta) | (block_b.valid & tb);
        valid |= decided;
        const uint64_t truth = at.op == kAnd ? ~decided : decided;
        groups(x, n, [=](size_t r) PENSTOCK_ALWAYS { return bit(truth, r); });
        break;
      }
      case kWhereF:
      case kWhereI: {
        const uint64_t chosen = nonzero(ai, n);
        valid = block_a.valid & ((chosen & block_b.valid) | (~chosen & block_c.valid));
        groups(x, n, [=](size_t r) PENSTOCK_ALWAYS {
          return ai[r] != 0 ? bi[r] : ci[r];
        });  // the bits of either kind
        break;
      }
      case kIsNullF:
      case kIsNullI: {
        const uint64_t nulls = ~block_a.valid;
        groups(x, n, [=](size_t r) PENSTOCK_ALWAYS { return bit(nulls, r); });
        valid = ~uint64_t{0};
        break;
      }
      case kFillF:
      case kFillI: {
        const uint64_t own = block_a.valid;
        groups(x, n, [=](size_t r) PENSTOCK_ALWAYS { return bit(own, r) != 0 ? ai[r] : bi[r]; });
        valid = block_a.valid | block_b.valid;
        break;
      }
      case kFToInt:  // toward zero; NaN and what int64 cannot hold are null
        for (size_t r = 0; r < n; ++r) {
          const bool fits = a[r] >= -0x1p63 && a[r] < 0x1p63;
          x[r] = fits ? static_cast<int64_t>(a[r]) : 0;
          valid &= ~(uint64_t{!fits} << r);
        }
        break;
      case kIsinF: {
        const ProgramTable& table = tables[at.b];
        for (size_t r = 0; r < n; ++r) {
          const size_t k = count_below<false>(table.f64, table.size, a[r]);
          x[r] = k < table.size && table.f64[k] == a[r];
        }
        break;
      }
      case kIsinI: {
        const ProgramTable& table = tables[at.b];
        for (size_t r = 0; r < n; ++r) {
          const size_t k = count_below<false>(table.i64, table.size, ai[r]);
          x[r] = k < table.size && table.i64[k] == ai[r];
        }
        break;
      }
      case kBucketF:
      case kBucketRightF: {
        const ProgramTable& table = tables[at.b];
        for (size_t r = 0; r < n; ++r) {
          x[r] = static_cast<int64_t>(at.op == kBucketF ? count_below<true>(table.f64, table.size, a[r])
                                                        : count_below<false>(table.f64, table.size, a[r]));
          valid &= ~(uint64_t{a[r] != a[r]} << r);
        }
        break;
      }
      case kBucketI:
      case kBucketRightI: {
        const ProgramTable& table = tables[at.b];
        for (size_t r = 0; r < n; ++r) {
          x[r] = static_cast<int64_t>(at.op == kBucketI ? count_below<true>(table.i64, table.size, ai[r])
                                                        : count_below<false>(table.i64, table.size, ai[r]));
        }
        break;
      }
      case kRank: {
        const ProgramTable& table = tables[at.b];
        const auto total = static_cast<double>(table.i64[table.size - 1]);
        for (size_t r = 0; r < n; ++r) {
          const size_t k = count_below<false>(table.f64, table.size, a[r]);
          const int64_t below = k == 0 ? 0 : table.i64[k - 1];
          const int64_t equal = k < table.size && table.f64[k] == a[r] ? table.i64[k] - below : 0;
          const double share = (static_cast<double>(below) + 0.5 * static_cast<double>(equal)) / total;
          f[r] = a[r] == a[r] ? share : a[r];
        }
        break;
      }
      default:
        break;  // parse() admits no other operation
    }
    out->valid = valid;
  }
}

}  // namespace penstock
