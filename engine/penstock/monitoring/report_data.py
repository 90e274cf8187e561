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


class ServiceData(TypedDict):
    """How a model serves: parts of `Engine.stats` by their names there. A share is None without requests."""

    slo: dict[str, Any]
    goodput: dict[str, float]
    busy_ratio: float
    queue_delay_ratio: float


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
    stages: NotRequired[dict[str, LatencyData] | None]
    service: NotRequired[ServiceData | None]
    history: NotRequired[list[HistoryPoint] | None]


STATES = ("alert", "warn", "insufficient", "ok")

STAGES = (
    ("receive", "Receive and decode"),
    ("gather", "Gather features"),
    ("queue", "Wait for a run"),
    ("run", "Run the model"),
    ("encode", "Encode the reply"),
)

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


def stage_rows(stages: dict[str, LatencyData]) -> list[list[str]]:
    """Cells of each stage that was passed: name, requests, p50, p99, longest, share of the time."""
    whole = sum(stages[key].get("sum_ns", 0) for key, _ in STAGES)
    return [
        [
            text,
            count(stages[key]["count"]),
            nanoseconds(stages[key]["p50_ns"]),
            nanoseconds(stages[key]["p99_ns"]),
            nanoseconds(stages[key]["max_ns"]),
            share(stages[key].get("sum_ns", 0) / whole if whole else None),
        ]
        for key, text in STAGES
        if stages[key]["count"]
    ]


def service_cells(service: ServiceData) -> list[tuple[str, str]]:
    """(text, figure) of each figure of how a model serves."""
    slo = service["slo"]
    return [
        ("Answered in time", share(slo["attainment"])),
        ("of the last minute", share(slo["attainment_60s"])),
        ("Good answers a second", number(service["goodput"]["requests_per_s_60s"], 1)),
        ("Busy", share(service["busy_ratio"])),
        ("Queue delay of the limit", share(service["queue_delay_ratio"])),
    ]


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
