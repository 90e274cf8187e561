// exp, log, pow and their kin with the same bits on every machine and back end.
//
// Written by penstock.features.backends.float_math_cpp from penstock/features/float_math.py, which explains
// the methods and bounds; do not edit. Pure functions without branches or tables: any thread may call them,
// and a loop over them vectorises. They need IEEE 754 double arithmetic without contraction to FMA.
// Internal linkage, because files built for one instruction set include this.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

// A call left in a loop would keep it from vectorising.
#define PENSTOCK_INLINE [[gnu::always_inline]] static inline

namespace penstock::float_math {

PENSTOCK_INLINE int64_t bits(double x) {
  return std::bit_cast<int64_t>(x);
}
PENSTOCK_INLINE double value(int64_t i) {
  return std::bit_cast<double>(i);
}
PENSTOCK_INLINE int64_t shift_right(int64_t i, int n) {
  return static_cast<int64_t>(static_cast<uint64_t>(i) >> n);
}
PENSTOCK_INLINE int64_t shift_left(int64_t i, int n) {
  return static_cast<int64_t>(static_cast<uint64_t>(i) << n);
}
PENSTOCK_INLINE bool both(bool a, bool b) {
  return a & b;
}
PENSTOCK_INLINE bool either(bool a, bool b) {
  return a | b;
}
// By mask: of `?:` compilers make jumps, which keep a loop from vectorising.
PENSTOCK_INLINE int64_t select(bool condition, int64_t then, int64_t other) {
  return other ^ ((then ^ other) & -int64_t{condition});
}
PENSTOCK_INLINE double select(bool condition, double then, double other) {
  return value(select(condition, bits(then), bits(other)));
}

PENSTOCK_INLINE double magnitude(double x) {
  return value((bits(x) & INT64_C(9223372036854775807)));
}

PENSTOCK_INLINE double high_part(double x) {
  return value((bits(x) & INT64_C(-4294967296)));
}

PENSTOCK_INLINE int64_t integer_of(double rounder) {
  return (bits(rounder) - INT64_C(4843621399236968448));
}

PENSTOCK_INLINE double float_of(int64_t n) {
  return (value((n + INT64_C(4843621399236968448))) - 6755399441055744.0);
}

PENSTOCK_INLINE double power_of_two(int64_t n) {
  return value(shift_left((n + INT64_C(1023)), 52));
}

PENSTOCK_INLINE double scale(double y, int64_t n) {
  auto first =
      select((n > INT64_C(1000)), INT64_C(1000), select((n < (-INT64_C(1000))), (-INT64_C(1000)), n));
  return ((y * power_of_two(first)) * power_of_two((n - first)));
}

PENSTOCK_INLINE double exp_of_parts(double hi, double lo, int64_t n) {
  auto r = (hi - lo);
  auto t = (r * r);
  auto c = (r - (t * (0.16666666666666602 +
                      (t * (-0.0027777777777015593 +
                            (t * (6.613756321437934e-05 +
                                  (t * (-1.6533902205465252e-06 + (t * 4.1381367970572385e-08))))))))));
  return scale((1.0 - ((lo - ((r * c) / (2.0 - c))) - hi)), n);
}

PENSTOCK_INLINE double exp(double x) {
  auto a = select((x < 710.0), x, 710.0);
  auto b = select((a > (-746.0)), a, (-746.0));
  auto t = ((b * 1.4426950408889634) + 6755399441055744.0);
  auto k = (t - 6755399441055744.0);
  auto y = exp_of_parts((b - (k * 0.6931471803691238)), (k * 1.9082149292705877e-10), integer_of(t));
  return select((x == x), y, x);
}

PENSTOCK_INLINE double exp2(double x) {
  auto a = select((x < 1025.0), x, 1025.0);
  auto b = select((a > (-1076.0)), a, (-1076.0));
  auto t = (b + 6755399441055744.0);
  auto r = (b - (t - 6755399441055744.0));
  auto h = high_part(r);
  auto y = exp_of_parts((h * 0.6931471803691238),
                        (-(((r - h) * 0.6931471805599453) + (h * 1.9082149292705877e-10))), integer_of(t));
  return select((x == x), y, x);
}

PENSTOCK_INLINE double expm1(double x) {
  auto a = select((x < 710.0), x, 710.0);
  auto b = select((a > (-50.0)), a, (-50.0));
  auto t = ((b * 1.4426950408889634) + 6755399441055744.0);
  auto k = (t - 6755399441055744.0);
  auto n = integer_of(t);
  auto hi = (b - (k * 0.6931471803691238));
  auto lo = (k * 1.9082149292705877e-10);
  auto r = (hi - lo);
  auto c = ((hi - r) - lo);
  auto half = (0.5 * r);
  auto rr = (r * half);
  auto p = (1.0 + (rr * (-0.03333333333333313 +
                         (rr * (0.0015873015872548146 +
                                (rr * (-7.93650757867488e-05 +
                                       (rr * (4.008217827329362e-06 + (rr * -2.0109921818362437e-07))))))))));
  auto q = (3.0 - (p * half));
  auto e = (rr * ((p - q) / (6.0 - (r * q))));
  auto small = (r - ((r * e) - rr));
  auto d = (((r * (e - c)) - c) - rr);
  auto minus_one = ((0.5 * (r - d)) - 0.5);
  auto one = select((r < (-0.25)), ((-2.0) * (d - (r + 0.5))), (1.0 + (2.0 * (r - d))));
  auto far = (scale((1.0 - (d - r)), n) - 1.0);
  auto inverse = power_of_two((-select((n < INT64_C(60)), n, INT64_C(60))));
  auto middle = scale(((1.0 - inverse) - (d - r)), n);
  auto large = scale(((r - (d + inverse)) + 1.0), n);
  auto y = select((n < INT64_C(20)), middle, large);
  y = select(either((n <= (-INT64_C(2))), (n > INT64_C(56))), far, y);
  y = select((n == INT64_C(1)), one, y);
  y = select((n == (-INT64_C(1))), minus_one, y);
  y = select((n == INT64_C(0)), small, y);
  y = select((x == 0.0), x, y);
  return select((x == x), y, x);
}

PENSTOCK_INLINE double tanh(double x) {
  auto a = magnitude(x);
  auto b = select((a < 22.0), a, 22.0);
  auto t = expm1(select((b >= 1.0), (2.0 * b), ((-2.0) * b)));
  auto z = select((b >= 1.0), (1.0 - (2.0 / (t + 2.0))), ((-t) / (t + 2.0)));
  auto y = value(((bits(z) & INT64_C(9223372036854775807)) | (bits(x) & INT64_MIN)));
  return select((x == x), y, x);
}

PENSTOCK_INLINE int64_t log_bits(double x) {
  return (bits(select((x < 2.2250738585072014e-308), (x * 1.8014398509481984e+16), x)) +
          INT64_C(2638149301829632));
}

PENSTOCK_INLINE double log_exponent(double x) {
  return float_of(
      (shift_right(log_bits(x), 52) - select((x < 2.2250738585072014e-308), INT64_C(1077), INT64_C(1023))));
}

PENSTOCK_INLINE double log_fraction(double x) {
  return value(((log_bits(x) & INT64_C(4503599627370495)) + INT64_C(4604544269498187776)));
}

PENSTOCK_INLINE double log_tail(double f) {
  auto s = (f / (2.0 + f));
  auto z = (s * s);
  auto w = (z * z);
  auto t = (w * (0.3999999999940942 + (w * (0.22222198432149784 + (w * 0.15313837699209373)))));
  auto u = (z * (0.6666666666666735 +
                 (w * (0.2857142874366239 + (w * (0.1818357216161805 + (w * 0.14798198605116586)))))));
  return (s * (((0.5 * f) * f) + (u + t)));
}

PENSTOCK_INLINE double log_limits(double x, double y) {
  y = select((x == std::numeric_limits<double>::infinity()), x, y);
  y = select((x == 0.0), (-std::numeric_limits<double>::infinity()), y);
  y = select((x < 0.0), (std::numeric_limits<double>::infinity() - std::numeric_limits<double>::infinity()),
             y);
  return select((x == x), y, x);
}

PENSTOCK_INLINE double log_argument(double x) {
  return select(both((x > 0.0), (x < std::numeric_limits<double>::infinity())), x, 1.0);
}

PENSTOCK_INLINE double log(double x) {
  auto a = log_argument(x);
  auto k = log_exponent(a);
  auto f = (log_fraction(a) - 1.0);
  auto y =
      ((((log_tail(f) + (k * 1.9082149292705877e-10)) - ((0.5 * f) * f)) + f) + (k * 0.6931471803691238));
  return log_limits(x, y);
}

PENSTOCK_INLINE double log2(double x) {
  auto a = log_argument(x);
  auto k = log_exponent(a);
  auto f = (log_fraction(a) - 1.0);
  auto half = ((0.5 * f) * f);
  auto hi = high_part((f - half));
  auto lo = (((f - hi) - half) + log_tail(f));
  auto top = (hi * 1.4426950407214463);
  auto w = (k + top);
  auto y = (((((lo + hi) * 1.6751713164886512e-10) + (lo * 1.4426950407214463)) + ((k - w) + top)) + w);
  return log_limits(x, y);
}

PENSTOCK_INLINE double log10(double x) {
  auto a = log_argument(x);
  auto k = log_exponent(a);
  auto f = (log_fraction(a) - 1.0);
  auto half = ((0.5 * f) * f);
  auto hi = high_part((f - half));
  auto lo = (((f - hi) - half) + log_tail(f));
  auto top = (hi * 0.4342944818781689);
  auto base = (k * 0.30102999566361177);
  auto w = (base + top);
  auto y =
      (((((k * 3.694239077158931e-13) + ((lo + hi) * 2.5082946711645275e-11)) + (lo * 0.4342944818781689)) +
        ((base - w) + top)) +
       w);
  return log_limits(x, y);
}

PENSTOCK_INLINE double log1p(double x) {
  auto a = select(both((x > (-1.0)), (x < std::numeric_limits<double>::infinity())), x, 1.0);
  auto u = (1.0 + a);
  auto small = both((a > (-0.2928)), (a < 0.4142));
  auto k = select(small, (0.0 * a), log_exponent(u));
  auto f = select(small, a, (log_fraction(u) - 1.0));
  auto c = (select((k >= 2.0), (1.0 - (u - a)), (a - (u - 1.0))) / u);
  c = select(either(small, (k >= 54.0)), (0.0 * a), c);
  auto y = ((((log_tail(f) + ((k * 1.9082149292705877e-10) + c)) - ((0.5 * f) * f)) + f) +
            (k * 0.6931471803691238));
  y = select((x == std::numeric_limits<double>::infinity()), x, y);
  y = select((x == (-1.0)), (-std::numeric_limits<double>::infinity()), y);
  y = select((x < (-1.0)),
             (std::numeric_limits<double>::infinity() - std::numeric_limits<double>::infinity()), y);
  y = select((x == 0.0), x, y);
  return select((x == x), y, x);
}

PENSTOCK_INLINE double pow(double x, double y) {
  auto a = magnitude(x);
  auto b = select(both((a > 0.0), (a < std::numeric_limits<double>::infinity())), a, 1.5);
  auto scaled = bits(select((b < 2.2250738585072014e-308), (b * 1.8014398509481984e+16), b));
  auto fraction = (scaled & INT64_C(4503599627370495));
  auto wraps = (fraction >= INT64_C(3296859846082560));
  auto middle = both((fraction > INT64_C(1012164877877247)), (fraction < INT64_C(3296859846082560)));
  auto n = ((shift_right(scaled, 52) - select((b < 2.2250738585072014e-308), INT64_C(1077), INT64_C(1023))) +
            select(wraps, INT64_C(1), INT64_C(0)));
  auto m_bits = (fraction + select(wraps, INT64_C(4602678819172646912), INT64_C(4607182418800017408)));
  auto m = value(m_bits);
  auto base = select(middle, (1.5 + (0.0 * m)), 1.0);
  auto u = (m - base);
  auto v = (1.0 / (m + base));
  auto s = (u * v);
  auto s_hi = high_part(s);
  auto shifted = ((shift_right(m_bits, 1) | INT64_C(2305843009213693952)) + INT64_C(2251799813685248));
  auto t_hi =
      value(((shifted + select(middle, INT64_C(1125899906842624), INT64_C(0))) & INT64_C(-4294967296)));
  auto t_lo = (m - (t_hi - base));
  auto s_lo = (v * ((u - (s_hi * t_hi)) - (s_hi * t_lo)));
  auto s2 = (s * s);
  auto r =
      (((s2 * s2) * (0.5999999999999946 +
                     (s2 * (0.4285714285785502 +
                            (s2 * (0.33333332981837743 +
                                   (s2 * (0.272728123808534 +
                                          (s2 * (0.23066074577556175 + (s2 * 0.20697501780033842))))))))))) +
       (s_lo * (s_hi + s)));
  s2 = (s_hi * s_hi);
  t_hi = high_part(((3.0 + s2) + r));
  t_lo = (r - ((t_hi - 3.0) - s2));
  u = (s_hi * t_hi);
  v = ((s_lo * t_hi) + (t_lo * s));
  auto p_hi = high_part((u + v));
  auto p_lo = (v - (p_hi - u));
  auto z_hi = (0.9617967009544373 * p_hi);
  auto z_lo = (((-7.028461650952758e-09 * p_hi) + (p_lo * 0.9617966939259756)) +
               select(middle, (1.350039202129749e-08 + (0.0 * p_hi)), 0.0));
  auto step = select(middle, (0.5849624872207642 + (0.0 * p_hi)), 0.0);
  auto t = float_of(n);
  auto t1 = high_part((((z_hi + z_lo) + step) + t));
  auto t2 = (z_lo - (((t1 - t) - step) - z_hi));
  auto e = select((y < 1e+21), y, 1e+21);
  e = select((e > (-1e+21)), e, (-1e+21));
  auto e1 = high_part(e);
  auto q_lo = (((e - e1) * t1) + (e * t2));
  auto q_hi = (e1 * t1);
  auto z = (q_lo + q_hi);
  auto far = either((z > 1025.0), (z < (-1076.0)));
  q_hi = select(far, select((z > 0.0), (1025.0 + (0.0 * s)), (-1076.0)), q_hi);
  q_lo = select(far, (0.0 * s), q_lo);
  auto rounder = ((q_hi + q_lo) + 6755399441055744.0);
  q_hi = (q_hi - (rounder - 6755399441055744.0));
  t = high_part((q_lo + q_hi));
  u = (t * 0.6931471824645996);
  v = (((q_lo - (t - q_hi)) * 0.6931471805599453) + (t * -1.904654299957768e-09));
  z = (u + v);
  auto w = (v - (z - u));
  t = (z * z);
  auto c = (z - (t * (0.16666666666666602 +
                      (t * (-0.0027777777777015593 +
                            (t * (6.613756321437934e-05 +
                                  (t * (-1.6533902205465252e-06 + (t * 4.1381367970572385e-08))))))))));
  auto result = scale((1.0 - ((((z * c) / (c - 2.0)) - (w + (z * w))) - z)), integer_of(rounder));
  auto up = ((a == std::numeric_limits<double>::infinity()) == (y > 0.0));
  result = select(either((a == 0.0), (a == std::numeric_limits<double>::infinity())),
                  select(up, (std::numeric_limits<double>::infinity() + (0.0 * s)), 0.0), result);
  auto size = select((magnitude(y) < 1.8014398509481984e+16), magnitude(y), 1.8014398509481984e+16);
  auto near = select((size < 4503599627370496.0), ((size + 4503599627370496.0) - 4503599627370496.0), size);
  auto halves = (0.5 * near);
  auto even_near =
      select((halves < 4503599627370496.0), ((halves + 4503599627370496.0) - 4503599627370496.0), halves);
  auto whole = (near == size);
  auto odd = both(whole, (even_near != halves));
  auto negative = (bits(x) < INT64_C(0));
  result = select(both(negative, odd), (-result), result);
  result =
      select(both(both((x < 0.0), (a < std::numeric_limits<double>::infinity())), (near != size)),
             (std::numeric_limits<double>::infinity() - std::numeric_limits<double>::infinity()), result);
  result = select(both((x == x), (y == y)), result, (x + y));
  result = select(both((a == 1.0), (magnitude(y) == std::numeric_limits<double>::infinity())), 1.0, result);
  return select(either((x == 1.0), (y == 0.0)), 1.0, result);
}

}  // namespace penstock::float_math

#undef PENSTOCK_INLINE
