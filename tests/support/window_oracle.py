"""The meaning of stored rows, slowly: one row at a time, by loops over all events of a source.

`Rule` holds each decision that is easy to get wrong at a boundary, so that a test can break one at a time.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Any

from penstock import _core
from penstock.features.compute import EXPIRED, FUTURE, NOT_FOUND, PRESENT

UNKNOWN = -(2**63)
SECOND = 1_000_000
_TILES_S = (1, 5, 15, 60, 300, 900, 3600, 10800, 21600, 43200, 86400, 604800)


@dataclass(frozen=True)
class Rule:
    """How boundaries are decided. The defaults are the definition; each other value is a fault."""

    low: int = 0  # microseconds by which the lower end of a window is moved
    high: int = 0  # the same, upper end
    known: int = 0  # by which known-at cuts are moved
    ttl: int = 0  # by which the ttl is longer
    now: int = 0  # by which the newest event may be later than the time asked
    lag: int = 1  # factor of the lag
    floor_last: bool = False  # the lag goes before the floor
    tile: int = 1  # factor of the tile width
    ties_first: bool = False  # of equal events the first counts
    versions_by_arrival: bool = False  # known-at does not order versions
    keep_deleted: bool = False
    old_version_known: bool = False  # a version counts at the time when the next becomes known
    ddof: int = 0  # added to ddof
    rank: int = 0  # added to rank
    count_null: bool = False


FAULTS = {
    "low edge closed": Rule(low=-1), "low edge later": Rule(low=1),
    "high edge open": Rule(high=-1), "high edge later": Rule(high=1),
    "known too late": Rule(known=1), "known too early": Rule(known=-1),
    "ttl longer": Rule(ttl=1), "ttl shorter": Rule(ttl=-1),
    "future event": Rule(now=1), "event of now left out": Rule(now=-1),
    "no lag": Rule(lag=0), "lag forwards": Rule(lag=-1), "floor after lag": Rule(floor_last=True),
    "another tile": Rule(tile=2), "ties by first": Rule(ties_first=True),
    "versions by arrival": Rule(versions_by_arrival=True), "deleted kept": Rule(keep_deleted=True),
    "old version kept a moment": Rule(old_version_known=True),
    "ddof plus one": Rule(ddof=1), "rank plus one": Rule(rank=1), "nulls counted": Rule(count_null=True),
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One aggregate: times in microseconds, `of` a column of the events or None."""

    kind: str
    of: str | None
    window: int
    every: int = 0
    closed: str = "right"
    lag: int = 0
    as_known: bool = False
    param: int = 0


def tile_of(window: int) -> int:
    fitting = [t * SECOND for t in _TILES_S if t * SECOND <= window / 256]
    return fitting[-1] if fitting else 0


# 2 ** x

_TERMS = [1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477,
          0.0013333558146428443, 0.0001540353039338161, 1.5252733804059841e-05, 1.321548679014431e-06,
          1.01780860092397e-07, 7.054911620801123e-09, 4.4455382718708116e-10, 2.5678435993488206e-11,
          1.3691488853904128e-12]  # fmt: skip


def exp2(x: float) -> float:
    """2 ** x for x <= 0, in the order of operations of csrc/features/aggregate_exp2.h."""
    if not x > -1100.0:
        return x if math.isnan(x) else 0.0
    n = math.floor(x + 0.5)
    f = x - n
    total = _TERMS[13]
    for k in range(12, -1, -1):
        total = total * f + _TERMS[k]
    return math.ldexp(total, n)


# Partial results: fold an event in, combine two from left to right. None is the identity.


def _less(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a)
        return (a, math.copysign(1.0, a)) < (b, math.copysign(1.0, b))
    return a < b


def _more(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a)
        return (a, math.copysign(1.0, a)) > (b, math.copysign(1.0, b))
    return a > b


def _pick(a: Any, b: Any, better: Any) -> Any:
    if isinstance(a, float) and math.isnan(a):
        return a
    return b if better(b, a) else a


def fold(kind: str, values: list[tuple[int, Any]], half_life: int) -> Any:
    """The partial of one segment; values are (time, value) in event order, at least one."""
    if kind in ("sum", "mean"):
        total = 0.0 if isinstance(values[0][1], float) else 0
        for _, x in values:
            total = total + x
        return (total, len(values))
    if kind in ("var", "std"):
        n, mean, m2 = 0, 0.0, 0.0
        for _, x in values:
            n += 1
            delta = x - mean
            mean += delta / n
            m2 += delta * (x - mean)
        return (n, mean, m2)
    if kind in ("min", "max"):
        best = values[0][1]
        for _, x in values[1:]:
            best = _pick(best, x, _less if kind == "min" else _more)
        return best
    if kind == "ewma":
        total, weight, newest = values[0][1], 1.0, values[0][0]
        for t, x in values[1:]:
            keep = exp2(-(float(t - newest) / half_life))
            total, weight, newest = total * keep + x, weight * keep + 1.0, t
        return (total, weight, newest)
    raise AssertionError(kind)


def combine(kind: str, a: Any, b: Any, half_life: int) -> Any:
    if a is None:
        return (0.0 + b[0], b[1]) if kind in ("sum", "mean") and isinstance(b[0], float) else b
    if kind in ("sum", "mean"):
        return (a[0] + b[0], a[1] + b[1])
    if kind in ("var", "std"):
        (na, ma, sa), (nb, mb, sb) = a, b
        n = na + nb
        share, delta = nb / n, mb - ma
        return (n, ma + delta * share, sa + sb + delta * delta * (na * share))
    if kind in ("min", "max"):
        return _pick(a, b, _less if kind == "min" else _more)
    keep = exp2(-(float(b[2] - a[2]) / half_life))
    return (a[0] * keep + b[0], a[1] * keep + b[1], b[2])


# Distinct values


def _canonical(x: Any) -> Any:
    if isinstance(x, float):
        return math.inf if x == math.inf else "nan" if math.isnan(x) else x + 0.0 if x else 0.0
    return x


def _mix64(x: int) -> int:
    mask = 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


def hash_of(x: Any) -> int:
    if isinstance(x, str) and x != "nan":
        return int.from_bytes(_core.siphash128(x.encode(), bytes(16))[:8], "little")
    if x == "nan":
        bits = 0x7FF8000000000000
    elif isinstance(x, float):
        (signed,) = struct.unpack("<q", struct.pack("<d", x))
        bits = signed ^ (2**63 - 1) if signed < 0 else signed
    else:
        bits = x
    return _mix64((bits + 0x9E3779B97F4A7C15) % 2**64)


def hll(hashes: set[int]) -> int:
    """The estimate of Flajolet et al. (2007), figure 3, for m = 4096 without the 32-bit case."""
    registers = [0] * 4096
    for h in hashes:
        rest = h & (2**52 - 1)
        rank = 53 - rest.bit_length()
        registers[h >> 52] = max(registers[h >> 52], rank)
    total = sum(2.0**-r for r in sorted(registers, reverse=True))
    estimate = 0.7213 / (1 + 1.079 / 4096) * 4096 * 4096 / total
    empty = registers.count(0)
    if estimate <= 2.5 * 4096 and empty:
        return math.floor(4096 * math.log(4096 / empty) + 0.5)
    return math.floor(estimate + 0.5)


def _sort_key(x: Any) -> Any:
    return (1, 0) if x == "nan" else (0, x)


def aggregate(spec: Spec, segments: list[list[tuple[int, Any]]], real: bool, rule: Rule) -> Any:
    """The value over segments of (time, value); None is null."""
    flat = [x for segment in segments for _, x in segment]
    kind = spec.kind
    if kind == "count":
        return len(flat)
    flat = [x for x in flat if x is not None]
    if kind == "distinct":
        found = {_canonical(x) for x in flat}
        return len(found) if len(found) <= spec.param else hll({hash_of(x) for x in found})
    if kind == "top_k":
        counts = Counter(_canonical(x) for x in flat)
        rank = spec.param + rule.rank
        if rank > len(counts):
            return None
        value = sorted(counts, key=lambda x: (-counts[x], _sort_key(x)))[rank - 1]
        return math.nan if value == "nan" else value
    if kind in ("first", "last"):
        return (flat[0] if kind == "first" else flat[-1]) if flat else None
    total: Any = None
    for segment in segments:
        values = [(t, x) for t, x in segment if x is not None]
        if kind in ("mean", "var", "std", "ewma"):
            values = [(t, float(x)) for t, x in values]
        if values:
            total = combine(kind, total, fold(kind, values, spec.param), spec.param)
    if kind == "sum":
        if total is None:
            return 0.0 if real else 0
        return total[0] if real else (total[0] + 2**63) % 2**64 - 2**63
    if total is None:
        return None
    if kind == "mean":
        return total[0] / total[1]
    if kind in ("var", "std"):
        n, _, m2 = total
        ddof = spec.param + rule.ddof
        if n <= ddof:
            return None
        return m2 / (n - ddof) if kind == "var" else math.sqrt(m2 / (n - ddof))
    if kind == "ewma":
        return total[0] / total[1]
    return total


# Rows


def _visible(event: dict[str, Any], cut: int | None, rule: Rule) -> bool:
    """Whether the event counts for a cut, None being no cut."""
    if cut is None:
        return event["until"] is None
    if event["known"] == UNKNOWN or event["known"] > cut + rule.known:
        return False
    return event["until"] is None or cut + rule.known < event["until"] + (1 if rule.old_version_known else 0)


def history(events: list[dict[str, Any]], user: Any, rule: Rule) -> list[dict[str, Any]]:
    """The events of a key in event order; `until`: when the next version became known, or None."""
    own = [dict(e, row=row) for row, e in enumerate(events) if e["user"] is not None and e["user"] == user]
    for e in own:
        e["known"] = UNKNOWN if e["k"] is None else e["k"]
        e["until"] = None
    versions: dict[Any, list[dict[str, Any]]] = {}
    for e in own:
        if e.get("id") is not None:
            versions.setdefault(e["id"], []).append(e)
    for found in versions.values():
        found.sort(key=lambda e: (0 if rule.versions_by_arrival else e["known"], e["row"]))
        for this, after in itertools.pairwise(found):
            this["until"] = after["known"]
    alive = [e for e in own if rule.keep_deleted or not e.get("deleted")]
    # A version that was known for no time counts for no cut.
    alive = [e for e in alive if e["until"] is None or UNKNOWN < e["known"] < e["until"]]
    return sorted(alive, key=lambda e: (e["t"], e["known"], -e["row"] if rule.ties_first else e["row"]))


def row_at(
    events: list[dict[str, Any]],
    user: Any,
    now: int,
    specs: dict[str, Spec],
    *,
    plain: tuple[str, ...] = (),
    reals: frozenset[str] = frozenset(),
    ttl: int = 0,
    known_by: int | None = None,
    as_known: bool = False,
    rule: Rule = Rule(),
) -> tuple[int, dict[str, Any], int]:
    """Status, values by name and event time of the newest event (UNKNOWN for none)."""
    own = history(events, user, rule)
    cut = known_by
    if as_known:
        cut = now if cut is None else min(cut, now)
    seen = [e for e in own if e["t"] <= now + rule.now and _visible(e, cut, rule)]
    if not seen:
        ahead = [e for e in own if e["until"] is None or (cut is not None and e["until"] > cut)]
        return (FUTURE if ahead else NOT_FOUND), {}, UNKNOWN
    newest = seen[-1]
    if ttl and newest["t"] < now - ttl - rule.ttl:
        return EXPIRED, {}, newest["t"]
    row = {f"last_{c}": newest[c] for c in plain}
    for name, spec in specs.items():
        every, lag = spec.every, spec.lag * rule.lag
        if rule.floor_last and every:
            t = (now - lag) // every * every
        else:
            t = (now // every * every if every else now) - lag
        by = known_by
        if spec.as_known or as_known:
            by = t if by is None else min(by, t)
        low, high = t - spec.window + rule.low, t + rule.high
        inside = [
            e
            for e in own
            if (e["t"] >= low if spec.closed in ("left", "both") else e["t"] > low)
            and (e["t"] <= high if spec.closed in ("right", "both") else e["t"] < high)
            and _visible(e, by, rule)
        ]
        segments: dict[int, list[tuple[int, Any]]] = {}
        tile = tile_of(spec.window) * rule.tile
        for e in inside:
            value = 1 if spec.of is None else e[spec.of]
            if value is None and spec.kind == "count" and not rule.count_null:
                continue
            segments.setdefault(e["t"] // tile if tile else 0, []).append((e["t"], value))
        row[name] = aggregate(spec, list(segments.values()), spec.of in reals, rule)
    return PRESENT, row, newest["t"]


__all__ = ["FAULTS", "Rule", "Spec", "aggregate", "exp2", "hash_of", "hll", "row_at", "tile_of"]
