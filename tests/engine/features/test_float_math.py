"""exp, log, pow and their kin: error bounds against exact values, limits, and one text for every language."""

from __future__ import annotations

import inspect
import math
import random
import re
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest

from penstock import _core
from penstock.features import float_math
from penstock.features.backends import float_math_cpp
from penstock.features.expressions import MATH, col
from penstock.features.float_math import ULP_BOUNDS
from penstock.features.program import compile_program

EXACT = {
    "exp": mpmath.exp, "expm1": mpmath.expm1, "exp2": lambda x: mpmath.mpf(2) ** x, "log": mpmath.log,
    "log1p": mpmath.log1p, "log2": lambda x: mpmath.log(x, 2), "log10": mpmath.log10, "tanh": mpmath.tanh,
}  # fmt: skip
EDGES = [
    0.0, 1.0, 2.0, 3.0, 0.5, 1.5, math.inf, 5e-324, 2.0**-1022, 1.7e308, 2.0**53 - 1, 2.0**53 + 2,
    2.0**52 + 1, 2.0**51 + 1, 2.0**51 + 0.5,
    1e300, 709.782712893384, 709.8, 745.133, 745.2, 1023.9999, 1024.0, 1074.0, 1075.0, 22.0, 0.34657, 1.0397,
    1 - 2.0**-53, 1 + 2.0**-52, 4503599627370497.5,
]  # fmt: skip
EDGES += [-x for x in EDGES] + [math.nan]


def ulps(got: float, exact: mpmath.mpf) -> float:
    """Error in units of the last place of the rounded exact value; below the least normal, of 2**-1074."""
    near = float(exact)
    if math.isinf(near) or math.isinf(got):
        return 0.0 if near == got else math.inf
    return float(abs(mpmath.mpf(got) - exact) / mpmath.mpf(math.ulp(near)))


def argument(name: str, rng: random.Random) -> float:
    anywhere = float_math.value(rng.randrange(1, 0x7FF << 52))
    near = rng.gauss(0, 1) * 10.0 ** -rng.randrange(0, 12)
    if name in ("log", "log2", "log10"):
        return rng.choice((anywhere, rng.uniform(0.5, 2), abs(1 + near) or 1.0, rng.uniform(0, 100)))
    if name == "log1p":
        return rng.choice((anywhere, max(near, -0.999), rng.uniform(-0.9999, 1), rng.uniform(-0.4, 0.5)))
    return rng.choice((near, rng.uniform(-745, 710), rng.uniform(-3, 3), rng.uniform(-0.6, 0.6), -anywhere))


def check_function(name: str, count: int, seed: int) -> None:
    rng = random.Random(seed)
    function, exact = getattr(float_math, name), EXACT[name]
    with mpmath.workprec(250):
        for _ in range(count):
            x = argument(name, rng)
            assert ulps(function(x), exact(mpmath.mpf(x))) <= ULP_BOUNDS[name], (name, x)


def check_pow(count: int, seed: int) -> None:
    rng = random.Random(seed)
    with mpmath.workprec(300):
        for _ in range(count):
            x = rng.choice((
                rng.uniform(0, 4), float_math.value(rng.randrange(1, 0x7FF << 52)),
                float(rng.randrange(1, 99)), 1 + rng.choice((-1, 1)) * 2.0 ** -rng.randrange(2, 53),
                1 + rng.gauss(0, 1e-6),
            ))  # fmt: skip
            y = rng.choice((
                rng.uniform(-10, 10), float(rng.randrange(-40, 40)), rng.uniform(-1000, 1000),
                rng.uniform(-745, 709) / (math.log(abs(x)) or 1.0), rng.choice((0.5, -0.5, 1 / 3)),
            ))  # fmt: skip
            if x > 0 and math.isfinite(y):
                got = float_math.pow(x, y)
                assert ulps(got, mpmath.mpf(x) ** mpmath.mpf(y)) <= ULP_BOUNDS["pow"], (x, y)


@pytest.mark.parametrize("name", MATH)
def test_error_is_within_the_bound(name: str) -> None:
    check_function(name, 4000, 1)


def test_error_of_pow_is_within_the_bound() -> None:
    check_pow(6000, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", MATH)
def test_error_is_within_the_bound_in_many_points(name: str) -> None:
    check_function(name, 150_000, 2)


@pytest.mark.long
def test_error_of_pow_is_within_the_bound_in_many_points() -> None:
    check_pow(200_000, 2)


def reference(function, *args: float) -> float:
    """C's value: Python raises where C returns an infinity or NaN."""
    try:
        return function(*args)
    except OverflowError:
        base, power = (args[0], args[1]) if len(args) == 2 else (1.0, 1.0)
        return -math.inf if base < 0 and abs(math.fmod(power, 2)) == 1 else math.inf
    except ValueError:
        if function is math.pow:
            x, y = args
            if x == 0 and y < 0:
                return math.copysign(math.inf, x) if abs(math.fmod(y, 2)) == 1 else math.inf
            return math.nan
        return -math.inf if args[0] in (0.0, -1.0) and (function is math.log1p or args[0] == 0) else math.nan


def agrees(got: float, want: float) -> bool:
    if math.isnan(want) or math.isnan(got):
        return math.isnan(want) and math.isnan(got)
    if want == 0 or math.isinf(want):
        return float_math.bits(got) == float_math.bits(want)
    return abs(float_math.bits(got) - float_math.bits(want)) <= 3


@pytest.mark.parametrize("name", MATH)
def test_limits_are_those_of_c(name: str) -> None:
    for x in EDGES:
        got, want = getattr(float_math, name)(x), reference(getattr(math, name), x)
        assert agrees(got, want), (name, x, got, want)


def test_limits_of_pow_are_those_of_c() -> None:
    for x in EDGES:
        for y in EDGES:
            got, want = float_math.pow(x, y), reference(math.pow, x, y)
            assert agrees(got, want), (x, y, got, want)


def test_exact_results_are_exact() -> None:
    for k in range(-1074, 1024):
        assert float_math.exp2(float(k)) == math.ldexp(1.0, k)
        assert float_math.log2(math.ldexp(1.0, k)) == k
    for base in (2, 3, 5, 10, 12):
        for power in range(1, 15):
            assert Fraction(float_math.pow(float(base), float(power))) == base**power
    assert [float_math.exp(0.0), float_math.log(1.0), float_math.tanh(0.0)] == [1.0, 0.0, 0.0]


def test_the_header_is_the_translation() -> None:
    header = Path(__file__).parents[3] / "csrc/features/float_math.h"
    if not header.exists():
        pytest.skip("the C++ sources are not beside the tests")

    def squeeze(text: str) -> str:
        return re.sub(r"\s+|//", "", text)

    assert squeeze(header.read_text()) == squeeze(float_math_cpp.header())


def test_core_gives_the_bits_of_the_definition() -> None:
    rng = random.Random(3)
    for name in MATH:
        x = np.array([argument(name, rng) for _ in range(2000)] + EDGES)
        program = _core.FeatureProgram(compile_program([("x", getattr(col("f"), name)())], {"f": "float64"}))
        got = program.run([(x, None)])[0][0]
        want = np.array([getattr(float_math, name)(v) for v in x.tolist()])
        same = (got.view(np.int64) == want.view(np.int64)) | (np.isnan(got) & np.isnan(want))
        assert same.all(), (name, x[~same][:3])


def test_the_text_keeps_to_what_every_language_has() -> None:
    """No library call, and no choice between two literals, which Triton would make float32."""
    text = inspect.getsource(float_math).split("# The text that every back end takes begins here.")[1]
    assert "math." not in text
    assert not re.search(r"select\([^()]*, -?[0-9.]+[eE.][0-9.]*, -?[0-9]+\.[0-9]*\)", text)
