"""exp, log, pow and their kin: the one definition from which every back end takes them.

Each function is a straight line of IEEE 754 float64 operations and bit operations in a fixed order: no table,
no FMA, no library call, no branch. So the text below, run over Python floats (the oracle), over numpy arrays,
by numba and by Triton, and translated to C++ (csrc/features/float_math.h, written by `float_math_cpp`), gives
the same bits everywhere. NaNs are equal as NaN; their payload is not promised.

The methods are those of FreeBSD's msun (fdlibm): argument reduction with a constant in two parts, a short
polynomial, and for pow a logarithm in two doubles. Largest errors seen in units in the last place, and the
bounds that the tests hold them to, are in `ULP_BOUNDS`.

The text uses `bits` (float64 to int64), `value` (back) and `select`; constants in capitals; int64 operations
that do not overflow; `>>` on numbers that are not negative alone. One argument of a `select` of floats is
never a constant, because Triton would make two of them float32.
"""

from __future__ import annotations

import struct
from typing import Any

# Bounds of the error against the exact result, in units in the last place.
ULP_BOUNDS = {
    "exp": 1.0, "expm1": 1.0, "exp2": 1.0, "log": 1.0, "log1p": 1.0, "log2": 1.0, "log10": 1.0,
    "tanh": 2.5, "pow": 1.0,
}  # fmt: skip

INF = float("inf")
NAN = INF - INF
SIGN = -(2**63)
MAGNITUDE = 2**63 - 1
HIGH_WORD = -(2**32)  # clears the low half
MANTISSA = 2**52 - 1
ROUNDER = 6755399441055744.0  # 1.5 * 2**52: adding it rounds to an integer, halves to even
ROUNDER_BITS = 0x4338000000000000
TINY = 2.0**-1022
TWO_52 = 2.0**52
TWO_54 = 2.0**54
SQRT_HALF = 0x3FE6A09E00000000  # bits of sqrt(1/2), cut
ONE_LESS_SQRT_HALF = 0x3FF0000000000000 - 0x3FE6A09E00000000

INV_LN2 = 1.44269504088896338700e00
LN2 = 6.93147180559945286227e-01
LN2_HI = 6.93147180369123816490e-01
LN2_LO = 1.90821492927058770002e-10
P1 = 1.66666666666666019037e-01
P2 = -2.77777777770155933842e-03
P3 = 6.61375632143793436117e-05
P4 = -1.65339022054652515390e-06
P5 = 4.13813679705723846039e-08
Q1 = -3.33333333333331316428e-02
Q2 = 1.58730158725481460165e-03
Q3 = -7.93650757867487942473e-05
Q4 = 4.00821782732936239552e-06
Q5 = -2.01099218183624371326e-07
LG1 = 6.666666666666735130e-01
LG2 = 3.999999999940941908e-01
LG3 = 2.857142874366239149e-01
LG4 = 2.222219843214978396e-01
LG5 = 1.818357216161805012e-01
LG6 = 1.531383769920937332e-01
LG7 = 1.479819860511658591e-01
INV_LN2_HI = 1.44269504072144627571e00
INV_LN2_LO = 1.67517131648865118353e-10
INV_LN10_HI = 4.34294481878168880939e-01
INV_LN10_LO = 2.50829467116452752298e-11
LOG10_2_HI = 3.01029995663611771306e-01
LOG10_2_LO = 3.69423907715893078616e-13
L1 = 5.99999999999994648725e-01
L2 = 4.28571428578550184252e-01
L3 = 3.33333329818377432918e-01
L4 = 2.72728123808534006489e-01
L5 = 2.30660745775561754067e-01
L6 = 2.06975017800338417784e-01
CP = 9.61796693925975554329e-01
CP_HI = 9.61796700954437255859e-01
CP_LO = -7.02846165095275826516e-09
LOG2_1_5_HI = 5.84962487220764160156e-01
LOG2_1_5_LO = 1.35003920212974897128e-08
LG2_HI = 6.93147182464599609375e-01
LG2_LO = -1.90465429995776804525e-09


def bits(x: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def value(i: int) -> float:
    return float(struct.unpack("<d", struct.pack("<Q", i & (2**64 - 1)))[0])


def select(condition: bool, then: Any, other: Any) -> Any:
    return then if condition else other


# The text that every back end takes begins here.


def magnitude(x: Any) -> Any:
    return value(bits(x) & MAGNITUDE)


def high_part(x: Any) -> Any:
    return value(bits(x) & HIGH_WORD)


def integer_of(rounder: Any) -> Any:
    return bits(rounder) - ROUNDER_BITS


def float_of(n: Any) -> Any:
    return value(n + ROUNDER_BITS) - ROUNDER


def power_of_two(n: Any) -> Any:
    return value((n + 1023) << 52)


def scale(y: Any, n: Any) -> Any:
    # y * 2**n for y near 1 and |n| < 2000: the first product is exact, so one rounding.
    first = select(n > 1000, 1000, select(n < -1000, -1000, n))
    return y * power_of_two(first) * power_of_two(n - first)


def exp_of_parts(hi: Any, lo: Any, n: Any) -> Any:
    # 2**n * e**(hi - lo)
    r = hi - lo
    t = r * r
    c = r - t * (P1 + t * (P2 + t * (P3 + t * (P4 + t * P5))))
    return scale(1.0 - ((lo - (r * c) / (2.0 - c)) - hi), n)


def exp(x: Any) -> Any:
    a = select(x < 710.0, x, 710.0)
    b = select(a > -746.0, a, -746.0)
    t = b * INV_LN2 + ROUNDER
    k = t - ROUNDER
    y = exp_of_parts(b - k * LN2_HI, k * LN2_LO, integer_of(t))
    return select(x == x, y, x)


def exp2(x: Any) -> Any:
    a = select(x < 1025.0, x, 1025.0)
    b = select(a > -1076.0, a, -1076.0)
    t = b + ROUNDER
    r = b - (t - ROUNDER)
    h = high_part(r)
    y = exp_of_parts(h * LN2_HI, -((r - h) * LN2 + h * LN2_LO), integer_of(t))
    return select(x == x, y, x)


def expm1(x: Any) -> Any:
    a = select(x < 710.0, x, 710.0)
    b = select(a > -50.0, a, -50.0)
    t = b * INV_LN2 + ROUNDER
    k = t - ROUNDER
    n = integer_of(t)
    hi = b - k * LN2_HI
    lo = k * LN2_LO
    r = hi - lo
    c = (hi - r) - lo
    half = 0.5 * r
    rr = r * half
    p = 1.0 + rr * (Q1 + rr * (Q2 + rr * (Q3 + rr * (Q4 + rr * Q5))))
    q = 3.0 - p * half
    e = rr * ((p - q) / (6.0 - r * q))
    small = r - (r * e - rr)
    d = (r * (e - c) - c) - rr
    minus_one = 0.5 * (r - d) - 0.5
    one = select(r < -0.25, -2.0 * (d - (r + 0.5)), 1.0 + 2.0 * (r - d))
    far = scale(1.0 - (d - r), n) - 1.0
    inverse = power_of_two(-select(n < 60, n, 60))
    middle = scale((1.0 - inverse) - (d - r), n)
    large = scale((r - (d + inverse)) + 1.0, n)
    y = select(n < 20, middle, large)
    y = select((n <= -2) | (n > 56), far, y)
    y = select(n == 1, one, y)
    y = select(n == -1, minus_one, y)
    y = select(n == 0, small, y)
    y = select(x == 0.0, x, y)
    return select(x == x, y, x)


def tanh(x: Any) -> Any:
    a = magnitude(x)
    b = select(a < 22.0, a, 22.0)
    t = expm1(select(b >= 1.0, 2.0 * b, -2.0 * b))
    z = select(b >= 1.0, 1.0 - 2.0 / (t + 2.0), -t / (t + 2.0))
    y = value((bits(z) & MAGNITUDE) | (bits(x) & SIGN))
    return select(x == x, y, x)


def log_bits(x: Any) -> Any:
    # Bits of a positive x, moved so that the exponent changes at sqrt(1/2); a subnormal is scaled first.
    return bits(select(x < TINY, x * TWO_54, x)) + ONE_LESS_SQRT_HALF


def log_exponent(x: Any) -> Any:
    return float_of((log_bits(x) >> 52) - select(x < TINY, 1077, 1023))


def log_fraction(x: Any) -> Any:
    # In [sqrt(1/2), sqrt(2)); x = fraction * 2**exponent.
    return value((log_bits(x) & MANTISSA) + SQRT_HALF)


def log_tail(f: Any) -> Any:
    # log(1 + f) = f - (f * f / 2 - tail)
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    t = w * (LG2 + w * (LG4 + w * LG6))
    u = z * (LG1 + w * (LG3 + w * (LG5 + w * LG7)))
    return s * (0.5 * f * f + (u + t))


def log_limits(x: Any, y: Any) -> Any:
    y = select(x == INF, x, y)
    y = select(x == 0.0, -INF, y)
    y = select(x < 0.0, NAN, y)
    return select(x == x, y, x)


def log_argument(x: Any) -> Any:
    return select((x > 0.0) & (x < INF), x, 1.0)


def log(x: Any) -> Any:
    a = log_argument(x)
    k = log_exponent(a)
    f = log_fraction(a) - 1.0
    y = log_tail(f) + k * LN2_LO - 0.5 * f * f + f + k * LN2_HI
    return log_limits(x, y)


def log2(x: Any) -> Any:
    a = log_argument(x)
    k = log_exponent(a)
    f = log_fraction(a) - 1.0
    half = 0.5 * f * f
    hi = high_part(f - half)
    lo = ((f - hi) - half) + log_tail(f)
    top = hi * INV_LN2_HI
    w = k + top
    y = ((lo + hi) * INV_LN2_LO + lo * INV_LN2_HI + ((k - w) + top)) + w
    return log_limits(x, y)


def log10(x: Any) -> Any:
    a = log_argument(x)
    k = log_exponent(a)
    f = log_fraction(a) - 1.0
    half = 0.5 * f * f
    hi = high_part(f - half)
    lo = ((f - hi) - half) + log_tail(f)
    top = hi * INV_LN10_HI
    base = k * LOG10_2_HI
    w = base + top
    y = ((k * LOG10_2_LO + (lo + hi) * INV_LN10_LO + lo * INV_LN10_HI) + ((base - w) + top)) + w
    return log_limits(x, y)


def log1p(x: Any) -> Any:
    a = select((x > -1.0) & (x < INF), x, 1.0)
    u = 1.0 + a
    small = (a > -0.2928) & (a < 0.4142)
    k = select(small, 0.0 * a, log_exponent(u))
    f = select(small, a, log_fraction(u) - 1.0)
    # The rounding error of 1 + a, relative to it.
    c = select(k >= 2.0, 1.0 - (u - a), a - (u - 1.0)) / u
    c = select(small | (k >= 54.0), 0.0 * a, c)
    y = log_tail(f) + (k * LN2_LO + c) - 0.5 * f * f + f + k * LN2_HI
    y = select(x == INF, x, y)
    y = select(x == -1.0, -INF, y)
    y = select(x < -1.0, NAN, y)
    y = select(x == 0.0, x, y)
    return select(x == x, y, x)


def pow(x: Any, y: Any) -> Any:
    a = magnitude(x)
    b = select((a > 0.0) & (a < INF), a, 1.5)
    # log2(b) = t1 + t2, t1 of 21 bits. b = 2**n * m, m from sqrt(3)/2 to sqrt(3), reduced at 1 or 1.5.
    scaled = bits(select(b < TINY, b * TWO_54, b))
    fraction = scaled & MANTISSA
    wraps = fraction >= 0xBB67A00000000
    middle = (fraction > 0x3988EFFFFFFFF) & (fraction < 0xBB67A00000000)
    n = (scaled >> 52) - select(b < TINY, 1077, 1023) + select(wraps, 1, 0)
    m_bits = fraction + select(wraps, 0x3FE0000000000000, 0x3FF0000000000000)
    m = value(m_bits)
    base = select(middle, 1.5 + 0.0 * m, 1.0)
    u = m - base
    v = 1.0 / (m + base)
    s = u * v
    s_hi = high_part(s)
    shifted = ((m_bits >> 1) | 0x2000000000000000) + 0x0008000000000000
    t_hi = value((shifted + select(middle, 0x0004000000000000, 0)) & HIGH_WORD)
    t_lo = m - (t_hi - base)
    s_lo = v * ((u - s_hi * t_hi) - s_hi * t_lo)
    s2 = s * s
    r = s2 * s2 * (L1 + s2 * (L2 + s2 * (L3 + s2 * (L4 + s2 * (L5 + s2 * L6))))) + s_lo * (s_hi + s)
    s2 = s_hi * s_hi
    t_hi = high_part(3.0 + s2 + r)
    t_lo = r - ((t_hi - 3.0) - s2)
    u = s_hi * t_hi
    v = s_lo * t_hi + t_lo * s
    p_hi = high_part(u + v)
    p_lo = v - (p_hi - u)
    z_hi = CP_HI * p_hi
    z_lo = CP_LO * p_hi + p_lo * CP + select(middle, LOG2_1_5_LO + 0.0 * p_hi, 0.0)
    step = select(middle, LOG2_1_5_HI + 0.0 * p_hi, 0.0)
    t = float_of(n)
    t1 = high_part(((z_hi + z_lo) + step) + t)
    t2 = z_lo - (((t1 - t) - step) - z_hi)
    # z + w = y * (t1 + t2); a larger |y| gives the limits as well.
    e = select(y < 1e21, y, 1e21)
    e = select(e > -1e21, e, -1e21)
    e1 = high_part(e)
    q_lo = (e - e1) * t1 + e * t2
    q_hi = e1 * t1
    z = q_lo + q_hi
    far = (z > 1025.0) | (z < -1076.0)
    q_hi = select(far, select(z > 0.0, 1025.0 + 0.0 * s, -1076.0), q_hi)
    q_lo = select(far, 0.0 * s, q_lo)
    rounder = (q_hi + q_lo) + ROUNDER
    q_hi = q_hi - (rounder - ROUNDER)
    t = high_part(q_lo + q_hi)
    u = t * LG2_HI
    v = (q_lo - (t - q_hi)) * LN2 + t * LG2_LO
    z = u + v
    w = v - (z - u)
    t = z * z
    c = z - t * (P1 + t * (P2 + t * (P3 + t * (P4 + t * P5))))
    result = scale(1.0 - (((z * c) / (c - 2.0) - (w + z * w)) - z), integer_of(rounder))
    # Zero and infinite bases, then signs, then the fixed points of C99.
    up = (a == INF) == (y > 0.0)
    result = select((a == 0.0) | (a == INF), select(up, INF + 0.0 * s, 0.0), result)
    size = select(magnitude(y) < TWO_54, magnitude(y), TWO_54)
    near = select(size < TWO_52, (size + TWO_52) - TWO_52, size)
    halves = 0.5 * near
    even_near = select(halves < TWO_52, (halves + TWO_52) - TWO_52, halves)
    whole = near == size
    odd = whole & (even_near != halves)
    negative = bits(x) < 0
    result = select(negative & odd, -result, result)
    result = select((x < 0.0) & (a < INF) & (near != size), NAN, result)
    result = select((x == x) & (y == y), result, x + y)
    result = select((a == 1.0) & (magnitude(y) == INF), 1.0, result)
    return select((x == 1.0) | (y == 0.0), 1.0, result)
