"""Window aggregates, as a feature repository declares them.

A window of length w at the time T holds the events in (T - w, T]; `closed` says which ends belong to it. T
is the time asked, floored to `every` and then moved back by `lag`. With `as_known`, only events that were
known by T count. Nulls are no values. A window is cut at multiples of `tile_us(w)` since 1970: each segment
is folded in event order from the identity, and the partial results are combined from left to right, so that
stored partials change no bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from penstock.errors import DefinitionError
from penstock.features.arguments import named_arguments
from penstock.features.expressions import Expr, digest, uses_now

_WINDOW = re.compile(r"([1-9][0-9]*)(s|m|h|d)\Z")
_UNIT_US = {"s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_CLOSED = ("right", "left", "both", "neither")
_TILES = ("1s", "5s", "15s", "1m", "5m", "15m", "1h", "3h", "6h", "12h", "1d", "7d")
_SEGMENTS = 256  # a window has at least that many segments, or one

# Numbers are those of AggregateKind in csrc/features/aggregate.h.
KINDS = {"count": 0, "sum": 1, "mean": 2, "min": 3, "max": 4, "var": 5, "std": 6, "first": 7, "last": 8,
         "ewma": 9, "distinct": 10, "top_k": 11}  # fmt: skip
MAX_EXACT = 65_536
_SUM_DTYPES = {"float32": "float64", "float64": "float64", "int64": "int64", "bool": "int64",
               "duration": "duration"}  # fmt: skip
_REAL_DTYPES = {"float32": "float64", "float64": "float64", "int64": "float64", "bool": "float64"}


def parse_window(text: str, what: str = "window") -> int:
    """Microseconds of a length such as "90s", "60m", "7h" or "1d"; DefinitionError if it is none."""
    match = _WINDOW.match(text) if isinstance(text, str) else None
    length = int(match[1]) * _UNIT_US[match[2]] if match else 0
    if not 0 < length < 2**62:
        raise DefinitionError(f"{what} is {text!r}; expected a length such as '90s', '60m', '7h' or '1d'")
    return length


def tile_us(window_us: int) -> int:
    """Width of the segments of a window: the greatest standard one that it holds 256 times, or 0 for one."""
    fitting = [tile for tile in map(parse_window, _TILES) if tile * _SEGMENTS <= window_us]
    return fitting[-1] if fitting else 0


@dataclass(frozen=True, eq=False)
class WindowAggregate:
    """An aggregate over the events of a window.

    Attributes:
        kind: one of `KINDS`.
        value: what is aggregated; None counts events.
        window_us: length of the window.
        every_us: the time asked is floored to multiples of it; None: it is not.
        closed: which ends belong to the window: right, left, both or neither.
        lag_us: how far the window is moved back.
        as_known: only events known by the window's end count.
        param: ddof of var and std, rank of top_k, exact bound of distinct, half-life of ewma in microseconds.
    """

    kind: str
    value: Expr | None
    window_us: int
    every_us: int | None
    closed: str = "right"
    lag_us: int = 0
    as_known: bool = False
    param: int = 0

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the declaration."""
        value = None if self.value is None else self.value.fingerprint()
        more = [self.closed, self.lag_us, self.as_known, self.param]
        plain = more == ["right", 0, False, 0]
        return digest([self.kind, value, self.window_us, self.every_us, *([] if plain else more)])

    @property
    def enters_us(self) -> int:
        """An event of time t is in the window at T from T = t + this on."""
        return 0 if self.closed in ("right", "both") else 1

    @property
    def leaves_us(self) -> int:
        """An event of time t is in the window until before T = t + this."""
        return self.window_us + (1 if self.closed in ("left", "both") else 0)

    def dtype(self, value: str | None) -> str | None:
        """Its dtype over values of dtype `value`; None if it is not defined on them."""
        if self.kind in ("count", "distinct"):
            return "int64"
        if self.kind in ("first", "last", "top_k"):
            return value
        if self.kind in ("min", "max"):
            return None if value == "string" else value
        return (_SUM_DTYPES if self.kind == "sum" else _REAL_DTYPES).get(value or "")


def _aggregate(
    kind: str,
    value: Any,
    window: str,
    every: str | None,
    closed: str,
    lag: str | None,
    as_known: bool,
    param: int = 0,
) -> WindowAggregate:
    if value is None and kind == "count":
        pass
    elif not isinstance(value, Expr):
        raise DefinitionError(f"{kind}: value is {value!r}; expected an expression such as col('amount')")
    elif uses_now(value):
        raise DefinitionError(f"{kind}: an aggregated expression cannot read now()")
    if closed not in _CLOSED:
        raise DefinitionError(f"{kind}: closed is {closed!r}; expected one of {', '.join(_CLOSED)}")
    if not isinstance(as_known, bool):
        raise DefinitionError(f"{kind}: as_known is {as_known!r}; expected True or False")
    every_us = None if every is None else parse_window(every, f"{kind}: every")
    lag_us = 0 if lag is None else parse_window(lag, f"{kind}: lag")
    window_us = parse_window(window, f"{kind}: window")
    return WindowAggregate(kind, value, window_us, every_us, closed, lag_us, as_known, param)


def _whole(what: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise DefinitionError(f"{what} is {value!r}; expected a whole number from {low} to {high}")
    return value


@named_arguments
def count(
    value: Expr | None = None,
    *,
    window: str,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """Events in the window, or those where `value` is not null."""
    return _aggregate("count", value, window, every, closed, lag, as_known)


@named_arguments
def sum(
    value: Expr,
    *,
    window: str,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """Sum; 0 for an empty window. Integers wrap modulo 2**64."""
    return _aggregate("sum", value, window, every, closed, lag, as_known)


@named_arguments
def mean(
    value: Expr,
    *,
    window: str,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """Mean, float64; null for an empty window."""
    return _aggregate("mean", value, window, every, closed, lag, as_known)


@named_arguments
def min(
    value: Expr,
    *,
    window: str,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """Least value; null for an empty window, NaN if any value is NaN."""
    return _aggregate("min", value, window, every, closed, lag, as_known)


@named_arguments
def max(
    value: Expr,
    *,
    window: str,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """Greatest value; null for an empty window, NaN if any value is NaN."""
    return _aggregate("max", value, window, every, closed, lag, as_known)


@named_arguments
def var(
    value: Expr,
    *,
    window: str,
    ddof: int = 1,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """Variance, float64: the sum of squared deviations over n - ddof; null where n <= ddof."""
    ddof = _whole("var: ddof", ddof, 0, 2**31)
    return _aggregate("var", value, window, every, closed, lag, as_known, ddof)


@named_arguments
def std(
    value: Expr,
    *,
    window: str,
    ddof: int = 1,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """Standard deviation: the square root of `var`."""
    ddof = _whole("std: ddof", ddof, 0, 2**31)
    return _aggregate("std", value, window, every, closed, lag, as_known, ddof)


@named_arguments
def first(
    value: Expr,
    *,
    window: str,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """The first value in event order that is not null; null for an empty window."""
    return _aggregate("first", value, window, every, closed, lag, as_known)


@named_arguments
def last(
    value: Expr,
    *,
    window: str,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """The last value in event order that is not null; null for an empty window."""
    return _aggregate("last", value, window, every, closed, lag, as_known)


@named_arguments
def distinct(
    value: Expr,
    *,
    window: str,
    exact: int = 1024,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """How many different values there are; 0 for an empty window. NaN is one value, and so is zero.

    Up to `exact` of them the number is exact. Above, it is a HyperLogLog estimate (Flajolet et al., 2007;
    4096 registers, 64-bit hashes, standard error 1.6 percent) that depends on the set of values alone.
    """
    exact = _whole("distinct: exact", exact, 1, MAX_EXACT)
    return _aggregate("distinct", value, window, every, closed, lag, as_known, exact)


@named_arguments
def top_k(
    value: Expr,
    *,
    window: str,
    rank: int = 1,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """The value that is `rank`-th by how often it occurs; of equally frequent ones the lesser comes first.

    Null if there are fewer different values. NaN is above all numbers; strings are compared by their bytes.
    """
    rank = _whole("top_k: rank", rank, 1, 2**31)
    return _aggregate("top_k", value, window, every, closed, lag, as_known, rank)


@named_arguments
def ewma(
    value: Expr,
    *,
    half_life: str,
    window: str,
    every: str | None = None,
    closed: str = "right",
    lag: str | None = None,
    as_known: bool = False,
) -> WindowAggregate:
    """Mean with the weights 2 ** -((T - t) / half_life) of events at t; null for an empty window.

    Weights are taken relative to the newest event, which changes their ratio to T in no way.
    """
    half_life_us = parse_window(half_life, "ewma: half_life")
    return _aggregate("ewma", value, window, every, closed, lag, as_known, half_life_us)
