"""Window aggregates, as a feature repository declares them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from penstock.errors import DefinitionError
from penstock.features.expressions import Expr, digest, uses_now

_WINDOW = re.compile(r"([1-9][0-9]*)(s|m|h|d)\Z")
_UNIT_US = {"s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}


def parse_window(text: str, what: str = "window") -> int:
    """Microseconds of a length such as "90s", "60m", "7h" or "1d"; DefinitionError if it is none."""
    match = _WINDOW.match(text) if isinstance(text, str) else None
    length = int(match[1]) * _UNIT_US[match[2]] if match else 0
    if not 0 < length < 2**62:
        raise DefinitionError(f"{what} is {text!r}; expected a length such as '90s', '60m', '7h' or '1d'")
    return length


@dataclass(frozen=True, eq=False)
class WindowAggregate:
    """An aggregate over events in (T - window_us, T]; T is the time asked, floored to `every_us` if set."""

    kind: str
    value: Expr | None
    window_us: int
    every_us: int | None

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the declaration."""
        value = None if self.value is None else self.value.fingerprint()
        return digest([self.kind, value, self.window_us, self.every_us])


def _aggregate(kind: str, value: Any, window: str, every: str | None) -> WindowAggregate:
    if value is None and kind == "count":
        pass
    elif not isinstance(value, Expr):
        raise DefinitionError(f"{kind}: value is {value!r}; expected an expression such as col('amount')")
    elif uses_now(value):
        raise DefinitionError(f"{kind}: an aggregated expression cannot read now()")
    every_us = None if every is None else parse_window(every, f"{kind}: every")
    return WindowAggregate(kind, value, parse_window(window, f"{kind}: window"), every_us)


def count(value: Expr | None = None, *, window: str, every: str | None = None) -> WindowAggregate:
    """Rows in the window, or those where `value` is not null."""
    return _aggregate("count", value, window, every)


def sum(value: Expr, *, window: str, every: str | None = None) -> WindowAggregate:
    """Sum in event order; 0 for an empty window."""
    return _aggregate("sum", value, window, every)


def mean(value: Expr, *, window: str, every: str | None = None) -> WindowAggregate:
    """Mean; null for an empty window."""
    return _aggregate("mean", value, window, every)


def min(value: Expr, *, window: str, every: str | None = None) -> WindowAggregate:
    """Least value; null for an empty window."""
    return _aggregate("min", value, window, every)


def max(value: Expr, *, window: str, every: str | None = None) -> WindowAggregate:
    """Greatest value; null for an empty window."""
    return _aggregate("max", value, window, every)
