"""The counters of the workers of one server, added up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SUMMED = ("models", "refresh", "monitor_errors", "server", "lost_rows")
_OF_WORKER = ("models", "refresh", "monitor_errors", "server", "rows_sent", "lost_rows")
_OF_CONFIG = ("limit_ms", "share")  # the same in every worker
_GREATEST = frozenset(
    ("p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns", "max_wait_ns", "busy_ratio", "queue_delay_ratio")
)
_LEAST = frozenset(("attainment", "attainment_10s", "attainment_60s"))


def _add(key: str, known: Any, value: Any) -> Any:
    """One figure of two workers; None where neither has one."""
    if isinstance(value, dict) or isinstance(known, dict):
        names = dict.fromkeys([*(known or {}), *(value or {})])
        return {name: _add(name, (known or {}).get(name), (value or {}).get(name)) for name in names}
    if known is None or value is None:
        return value if known is None else known
    if key == "le_us":  # cumulative counts at the same edges
        return [[edge, count + more] for (edge, count), (_, more) in zip(known, value)]
    if key == "state":  # of a breaker: one that is not closed is what matters
        return value if known == "closed" else known
    if isinstance(value, bool):
        return known or value
    if key in _OF_CONFIG or not isinstance(value, int | float):
        return known
    if key in _GREATEST:
        return max(known, value)
    return min(known, value) if key in _LEAST else known + value


def _add_all(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of counts, name by name; the worst worker's quantiles and ratios; the first of anything else."""
    result: dict[str, Any] = {}
    for part in parts:
        result = _add("", result, part)
    return result


def merge_stats(
    parts: Mapping[int, dict[str, Any]], processes: Mapping[int, dict[str, int]]
) -> dict[str, Any]:
    """One `stats` from those of each worker.

    Args:
        parts: stats by worker; 0 is there, and what only it has (label metrics, the log) is taken from it.
        processes: {"pid", "generation"} by worker.

    Returns the stats of worker 0 with sums in their places, and by worker under "workers".
    """
    own = parts[0]
    result = _add_all([{key: part[key] for key in _SUMMED if key in part} for part in parts.values()])
    for name, model in result["models"].items():
        if "performance" in own["models"].get(name, {}):
            model["performance"] = own["models"][name]["performance"]
        for key in ("performance", "live_performance"):
            if key in own["models"].get(name, {}).get("trial", {}):
                model["trial"][key] = own["models"][name]["trial"][key]
    caches = {}
    for name, cache in own["caches"].items():  # one arena: only what is of a process is added up
        others = [part["caches"].get(name, {}) for index, part in parts.items() if index]
        caches[name] = {
            key: value + sum(other.get(key, 0) for other in others) if key.startswith("refresh") else value
            for key, value in cache.items()
        }
    workers = {
        str(index): {
            **processes.get(index, {}),
            **{key: part[key] for key in _OF_WORKER if key in part},
        }
        for index, part in parts.items()
    }
    return {**own, **result, "caches": caches, "workers": workers}
