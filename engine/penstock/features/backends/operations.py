"""What each operation of a program computes, once for the numpy, numba and Triton back ends.

Those back ends take the text below and give it their own primitives (numpy's are arrays, Triton's blocks).
The functions before the line are the primitives as numba compiles them, on scalars.

An operation is the function of its name (`and_`, `or_`, `not_` for those of Kleene). Its result is null where
an operand is null, unless there is a function NAME_ok: then both are given the operands with their validity
after each, and NAME_ok returns the validity. Bools are int64 0 and 1, validity is bool; a table operand is
(values, size, steps of a binary search), a distribution (values, cumulative counts, size, steps). Values of
null rows are arbitrary, so no function may trap. `plus`, `minus`, `times` wrap; what cannot overflow uses +.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.features.float_math import bits, magnitude, select, value

SIGN = -(2**63)
MAGNITUDE = 2**63 - 1
NAN = float("nan")
TWO_52 = 4503599627370496.0
MINUTE_US = 60_000_000
HOUR_US = 3_600_000_000
DAY_US = 86_400_000_000
INT_END = 2.0**63
GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def as_int(condition: Any) -> Any:
    return np.int64(condition)


def as_float(i: Any) -> Any:
    return np.float64(i)


def whole(x: Any) -> Any:
    return np.int64(x)


def narrow(x: Any) -> Any:
    return np.float64(np.float32(x))


def floor(x: Any) -> Any:
    return np.floor(x)


def ceil(x: Any) -> Any:
    return np.ceil(x)


def root(x: Any) -> Any:
    return np.sqrt(x)


def rest(x: Any, y: Any) -> Any:
    return np.fmod(x, y)


def quotient(a: Any, b: Any) -> Any:
    return a // b


def plus(a: Any, b: Any) -> Any:
    # Signed overflow is undefined to numba's compiler; of unsigned numbers it wraps.
    return np.int64(np.uint64(a) + np.uint64(b))


def minus(a: Any, b: Any) -> Any:
    return np.int64(np.uint64(a) - np.uint64(b))


def times(a: Any, b: Any) -> Any:
    return np.int64(np.uint64(a) * np.uint64(b))


def at(table: Any, i: Any) -> Any:
    return table[i]


def lower_bound(table: Any, n: int, steps: int, x: Any) -> Any:
    low = 0
    high = n
    while low < high:
        middle = (low + high) >> 1
        if table[middle] < x:
            low = middle + 1
        else:
            high = middle
    return low


def upper_bound(table: Any, n: int, steps: int, x: Any) -> Any:
    low = 0
    high = n
    while low < high:
        middle = (low + high) >> 1
        if table[middle] <= x:
            low = middle + 1
        else:
            high = middle
    return low


# The operations begin here; those of `float_math` join them.


def add_f(a: Any, b: Any) -> Any:
    return a + b


def sub_f(a: Any, b: Any) -> Any:
    return a - b


def mul_f(a: Any, b: Any) -> Any:
    return a * b


def div_f(a: Any, b: Any) -> Any:
    return a / b


def neg_f(a: Any) -> Any:
    return -a


def abs_f(a: Any) -> Any:
    return magnitude(a)


def sqrt_f(a: Any) -> Any:
    return root(a)


def floor_f(a: Any) -> Any:
    return floor(a)


def ceil_f(a: Any) -> Any:
    return ceil(a)


def with_sign(x: Any, sign: Any) -> Any:
    return value((bits(x) & MAGNITUDE) | (bits(sign) & SIGN))


def round_f(a: Any) -> Any:
    size = magnitude(a)
    return select(size < TWO_52, with_sign((size + TWO_52) - TWO_52, a), a)


def sign_f(a: Any) -> Any:
    return select(a > 0.0, 1.0, select(a < 0.0, -1.0, a))


def minimum_f(a: Any, b: Any) -> Any:
    lesser = select(a < b, a, b)
    lesser = select((a == b) & (bits(a) < 0), a, lesser)
    return select(a == a, select(b == b, lesser, b), a)


def maximum_f(a: Any, b: Any) -> Any:
    greater = select(a > b, a, b)
    greater = select((a == b) & (bits(b) < 0), a, greater)
    return select(a == a, select(b == b, greater, b), a)


def safe_rest(a: Any, b: Any) -> Any:
    usable = (magnitude(a) < 1e309) & (b == b) & (b != 0.0)
    return rest(select(usable, a, 0.0), select(usable, b, 1.0))


def undefined(a: Any, b: Any) -> Any:
    return (magnitude(a) == 1e309) | (a != a) | (b != b)


def mod_f(a: Any, b: Any) -> Any:
    r = safe_rest(a, b)
    moved = select((r < 0.0) != (b < 0.0), r + b, r)
    found = select(r == 0.0, with_sign(r, b), moved)
    return select(undefined(a, b) | (b == 0.0), NAN, found)


def floor_div_f(a: Any, b: Any) -> Any:
    r = safe_rest(a, b)
    exact = (a - r) / b
    exact = select((r != 0.0) & ((r < 0.0) != (b < 0.0)), exact - 1.0, exact)
    down = floor(exact)
    down = select(exact - down > 0.5, down + 1.0, down)
    found = select(exact == 0.0, with_sign(exact, a / b), down)
    return select(b == 0.0, a / b, select(undefined(a, b), NAN, found))


def lt_f(a: Any, b: Any) -> Any:
    return as_int(a < b)


def le_f(a: Any, b: Any) -> Any:
    return as_int(a <= b)


def eq_f(a: Any, b: Any) -> Any:
    return as_int(a == b)


def is_nan(a: Any) -> Any:
    return as_int(a != a)


def add_i(a: Any, b: Any) -> Any:
    return plus(a, b)


def sub_i(a: Any, b: Any) -> Any:
    return minus(a, b)


def mul_i(a: Any, b: Any) -> Any:
    return times(a, b)


def neg_i(a: Any) -> Any:
    return minus(0, a)


def abs_i(a: Any) -> Any:
    return select(a < 0, minus(0, a), a)


def sign_i(a: Any) -> Any:
    return as_int(a > 0) - as_int(a < 0)


def minimum_i(a: Any, b: Any) -> Any:
    return select(a < b, a, b)


def maximum_i(a: Any, b: Any) -> Any:
    return select(a < b, b, a)


def lt_i(a: Any, b: Any) -> Any:
    return as_int(a < b)


def le_i(a: Any, b: Any) -> Any:
    return as_int(a <= b)


def eq_i(a: Any, b: Any) -> Any:
    return as_int(a == b)


def divisor(b: Any) -> Any:
    return select((b == 0) | (b == -1), 1, b)


def floor_div_i(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    d = divisor(b)
    q = quotient(a, d)
    r = minus(a, times(q, d))
    q = select((r != 0) & ((r < 0) != (d < 0)), q - 1, q)
    return select(b == -1, minus(0, a), q)


def floor_div_i_ok(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    return ka & kb & (b != 0)


def mod_i(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    d = divisor(b)
    r = minus(a, times(quotient(a, d), d))
    return select((r != 0) & ((r < 0) != (d < 0)), r + d, r)


def mod_i_ok(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    return ka & kb & (b != 0)


def and_(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    return 1 - as_int((ka & (a == 0)) | (kb & (b == 0)))


def and__ok(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    return (ka & kb) | (ka & (a == 0)) | (kb & (b == 0))


def or_(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    return as_int((ka & (a != 0)) | (kb & (b != 0)))


def or__ok(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    return (ka & kb) | (ka & (a != 0)) | (kb & (b != 0))


def not_(a: Any) -> Any:
    return as_int(a == 0)


def where_f(a: Any, ka: Any, b: Any, kb: Any, c: Any, kc: Any) -> Any:
    return select(a != 0, b, c)


def where_f_ok(a: Any, ka: Any, b: Any, kb: Any, c: Any, kc: Any) -> Any:
    return ka & (((a != 0) & kb) | ((a == 0) & kc))


def where_i(a: Any, ka: Any, b: Any, kb: Any, c: Any, kc: Any) -> Any:
    return select(a != 0, b, c)


def where_i_ok(a: Any, ka: Any, b: Any, kb: Any, c: Any, kc: Any) -> Any:
    return ka & (((a != 0) & kb) | ((a == 0) & kc))


def is_null_f(a: Any, ka: Any) -> Any:
    return 1 - as_int(ka)


def is_null_f_ok(a: Any, ka: Any) -> Any:
    return ka == ka


def is_null_i(a: Any, ka: Any) -> Any:
    return 1 - as_int(ka)


def is_null_i_ok(a: Any, ka: Any) -> Any:
    return ka == ka


def fill_null_f(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    return select(ka, a, b)


def fill_null_f_ok(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    return ka | kb


def fill_null_i(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    return select(ka, a, b)


def fill_null_i_ok(a: Any, ka: Any, b: Any, kb: Any) -> Any:
    return ka | kb


def int_to_f(a: Any) -> Any:
    return as_float(a)


def f_to_int(a: Any, ka: Any) -> Any:
    return whole(select((a >= -INT_END) & (a < INT_END), a, 0.0))


def f_to_int_ok(a: Any, ka: Any) -> Any:
    return ka & (a >= -INT_END) & (a < INT_END)


def f_to_f32(a: Any) -> Any:
    return narrow(a)


def int_to_bool(a: Any) -> Any:
    return as_int(a != 0)


def f_to_bool(a: Any) -> Any:
    return as_int(a != 0.0)


def down_by(a: Any, n: Any) -> Any:
    # Floor of a / n, n > 0, whichever way `quotient` rounds.
    q = quotient(a, n)
    return select(minus(a, times(q, n)) < 0, q - 1, q)


def second(a: Any) -> Any:
    return quotient(minus(a, times(down_by(a, MINUTE_US), MINUTE_US)), 1_000_000)


def minute(a: Any) -> Any:
    return quotient(minus(a, times(down_by(a, HOUR_US), HOUR_US)), MINUTE_US)


def hour(a: Any) -> Any:
    h = down_by(a, HOUR_US)
    return h - down_by(h, 24) * 24


def day_of_week(d: Any) -> Any:
    return d + 3 - down_by(d + 3, 7) * 7


def weekday(a: Any) -> Any:
    return day_of_week(down_by(a, DAY_US))


# The calendar is H. Hinnant's civil_from_days and days_from_civil: years that begin in March, in eras of 400.


def era_of(d: Any) -> Any:
    return down_by(d + 719468, 146097)


def year_of_era(d: Any) -> Any:
    doe = d + 719468 - era_of(d) * 146097
    return quotient(doe - quotient(doe, 1460) + quotient(doe, 36524) - quotient(doe, 146096), 365)


def day_of_march_year(d: Any) -> Any:
    yoe = year_of_era(d)
    doe = d + 719468 - era_of(d) * 146097
    return doe - (365 * yoe + quotient(yoe, 4) - quotient(yoe, 100))


def month_of(d: Any) -> Any:
    mp = quotient(5 * day_of_march_year(d) + 2, 153)
    return select(mp < 10, mp + 3, mp - 9)


def day_of(d: Any) -> Any:
    doy = day_of_march_year(d)
    mp = quotient(5 * doy + 2, 153)
    return doy - quotient(153 * mp + 2, 5) + 1


def year_of(d: Any) -> Any:
    return year_of_era(d) + era_of(d) * 400 + as_int(month_of(d) <= 2)


def first_of_year(d: Any) -> Any:
    y = year_of(d) - 1
    era = down_by(y, 400)
    yoe = y - era * 400
    return era * 146097 + yoe * 365 + quotient(yoe, 4) - quotient(yoe, 100) + 306 - 719468


def day(a: Any) -> Any:
    return day_of(down_by(a, DAY_US))


def month(a: Any) -> Any:
    return month_of(down_by(a, DAY_US))


def year(a: Any) -> Any:
    return year_of(down_by(a, DAY_US))


def day_of_year(a: Any) -> Any:
    d = down_by(a, DAY_US)
    return d - first_of_year(d) + 1


def floor_to(a: Any, n: Any) -> Any:
    return times(down_by(a, n), n)


def week_start(a: Any) -> Any:
    d = down_by(a, DAY_US)
    return times(d - day_of_week(d), DAY_US)


def month_start(a: Any) -> Any:
    d = down_by(a, DAY_US)
    return times(d - day_of(d) + 1, DAY_US)


def year_start(a: Any) -> Any:
    return times(first_of_year(down_by(a, DAY_US)), DAY_US)


def isin_f(a: Any, table: Any, n: Any, steps: Any) -> Any:
    k = lower_bound(table, n, steps, a)
    return as_int((k < n) & (at(table, select(k < n, k, 0)) == a))


def isin_i(a: Any, table: Any, n: Any, steps: Any) -> Any:
    k = lower_bound(table, n, steps, a)
    return as_int((k < n) & (at(table, select(k < n, k, 0)) == a))


def bucket_f(a: Any, ka: Any, table: Any, n: Any, steps: Any) -> Any:
    return upper_bound(table, n, steps, a)


def bucket_f_ok(a: Any, ka: Any, table: Any, n: Any, steps: Any) -> Any:
    return ka & (a == a)


def bucket_right_f(a: Any, ka: Any, table: Any, n: Any, steps: Any) -> Any:
    return lower_bound(table, n, steps, a)


def bucket_right_f_ok(a: Any, ka: Any, table: Any, n: Any, steps: Any) -> Any:
    return ka & (a == a)


def bucket_i(a: Any, table: Any, n: Any, steps: Any) -> Any:
    return upper_bound(table, n, steps, a)


def bucket_right_i(a: Any, table: Any, n: Any, steps: Any) -> Any:
    return lower_bound(table, n, steps, a)


def rank(a: Any, table: Any, counts: Any, n: Any, steps: Any) -> Any:
    k = lower_bound(table, n, steps, a)
    near = select(k < n, k, n - 1)
    below = select(k > 0, at(counts, select(k > 0, k - 1, 0)), 0)
    equal = select((k < n) & (at(table, near) == a), at(counts, near) - below, 0)
    found = (as_float(below) + 0.5 * as_float(equal)) / as_float(at(counts, n - 1))
    return select(a == a, found, a)


def hash_i(a: Any) -> Any:
    # SplitMix64's next output from state a; masks make the shifts logical.
    z = plus(a, GAMMA)
    z = times(z ^ ((z >> 30) & 0x3FFFFFFFF), MIX_1)
    z = times(z ^ ((z >> 27) & 0x1FFFFFFFFF), MIX_2)
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def bucket_of(h: Any, n: Any) -> Any:
    half = (h >> 1) & MAGNITUDE
    return half - quotient(half, n) * n
