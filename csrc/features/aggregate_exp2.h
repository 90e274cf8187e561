// 2^x for x <= 0 by one fixed order of operations, so that every back end gives the same bits.
//
// x = n + f with n = floor(x + 1/2) and f in [-1/2, 1/2]: 2^f is the Taylor polynomial of exp(f ln 2) of
// degree 13 by Horner's rule (truncation below 2e-17, so within 2 ulp), and the scaling by 2^n is exact but
// for subnormal results, which are rounded once. Pure; any thread.
#pragma once

#include <cmath>

namespace penstock {

inline double exp2_of(double x) {
  // ln(2)^k / k!, k = 13 down to 0, each rounded to the nearest double.
  constexpr double kTerms[] = {1.3691488853904128e-12, 2.5678435993488206e-11,
                               4.4455382718708116e-10, 7.054911620801123e-09,
                               1.01780860092397e-07,   1.321548679014431e-06,
                               1.5252733804059841e-05, 0.0001540353039338161,
                               0.0013333558146428443,  0.009618129107628477,
                               0.05550410866482158,    0.2402265069591007,
                               0.6931471805599453,     1.0};
  if (!(x > -1100.0)) return x != x ? x : 0.0;
  const double n = std::floor(x + 0.5);
  const double f = x - n;
  double sum = kTerms[0];
  for (int k = 1; k < 14; ++k) sum = sum * f + kTerms[k];
  return std::ldexp(sum, static_cast<int>(n));
}

}  // namespace penstock
