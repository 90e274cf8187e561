"""What a report is made of, and how its figures are written. The terminal and the HTML report share both."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any, NotRequired, TypedDict

from penstock.errors import InvalidArgumentError


class LatencyData(TypedDict):
    """A model's "latency" of `Engine.stats`, nanoseconds, with its limit where that is known."""

    count: int
    p50_ns: int
    p99_ns: int
    max_ns: int
    p90_ns: NotRequired[int]
    p999_ns: NotRequired[int]
    sum_ns: NotRequired[int]
    limit_ms: NotRequired[float]


class HistoryPoint(TypedDict):
    """Figures at one time, microseconds UTC; a figure that is absent or None leaves a gap in its line."""

    time_us: int
    p50_ns: NotRequired[float | None]
    p99_ns: NotRequired[float | None]
    auc: NotRequired[float | None]


class ReportData(TypedDict):
    """One model version. Only the first four are needed; what is absent or None is left out of the report.

    `drift` is `DriftReport.to_dict()`, `freshness` is `FreshnessReport.to_dict()`, `performance` is
    `PerformanceTracker.metrics()` (NaN or None where there is no figure).
    """

    model: str
    version: str
    generated_us: int
    drift: dict[str, Any]
    freshness: NotRequired[dict[str, Any] | None]
    performance: NotRequired[dict[str, Any] | None]
    latency: NotRequired[LatencyData | None]
    history: NotRequired[list[HistoryPoint] | None]


STATES = ("alert", "warn", "insufficient", "ok")

PERFORMANCE = (
    ("auc", "AUC"),
    ("logloss", "Log loss"),
    ("brier", "Brier score"),
    ("accuracy", "Accuracy"),
)


def check_data(data: ReportData) -> None:
    """Raises InvalidArgumentError naming a part that is missing."""
    for key in ("model", "version", "generated_us", "drift"):
        if key not in data:
            raise InvalidArgumentError(f"report data lacks {key!r}; expected a ReportData")
    for key in ("features", "score", "state", "n"):
        if key not in data["drift"]:
            raise InvalidArgumentError(f"report data: drift lacks {key!r}; expected DriftReport.to_dict()")


def by_severity(features: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Features from the worst state to the best, the greatest effect first in each."""
    return sorted(features, key=lambda item: (STATES.index(item["state"]), -(item["psi_adj"] or 0.0)))


def number(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` decimals, or "-" where there is none; a small one is "< 0.001", not 0."""
    if value is None or not math.isfinite(value):
        return "-"
    if 0.0 < value < 0.5 * 10**-digits:
        return f"< {10**-digits:.{digits}f}"
    return f"{value:.{digits}f}"


def probability(value: float | None) -> str:
    """A p- or q-value; one that rounds to 0, or underflowed, is "< 0.001"."""
    return "< 0.001" if value is not None and value < 0.0005 else number(value)


def count(value: int | None) -> str:
    """A whole number in groups of three digits."""
    return "-" if value is None else f"{value:,}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100.0 * value:.1f} %" if value == 0.0 or value >= 0.0005 else "< 0.1 %"


def duration(us: float | None) -> str:
    """Microseconds in the unit that fits."""
    if us is None:
        return "-"
    for unit, size in (("d", 86.4e9), ("h", 3.6e9), ("min", 60e6), ("s", 1e6), ("ms", 1e3)):
        if abs(us) >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} us"


def nanoseconds(ns: float | None) -> str:
    """Nanoseconds in the unit that fits."""
    return "-" if ns is None else duration(ns / 1e3)


def time(us: int | None) -> str:
    """A time, microseconds UTC, to the second; as plain microseconds where no calendar has it."""
    if us is None:
        return "-"
    try:
        return datetime.fromtimestamp(us // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{us} us"
