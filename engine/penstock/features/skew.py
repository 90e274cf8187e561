"""The skew check: vectors that were served, made again by the historical join, and compared bit by bit.

A vector is made again at its request's time from the events that were known when it was made: an event that
came later is no difference. One whose `created` is null is known at no time, so a vector that differs is also
made from all events. Reads the store only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from penstock.errors import InvalidArgumentError, NotFoundError
from penstock.features.expressions import is_floating

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from penstock.features.store import FeatureStore

_CHUNK = 65_536  # rows of one join
_MOST_EXAMPLES = 5


class Served(Protocol):
    """Vectors of one request, as `monitoring.vector_log.VectorSample` has them."""

    @property
    def service(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def text_counts(self) -> Mapping[tuple[str, str], int] | None: ...
    @property
    def now_us(self) -> int: ...
    @property
    def made_us(self) -> int: ...
    @property
    def entities(self) -> Mapping[str, Any]: ...
    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def vectors(self) -> NDArray[np.float32]: ...


@dataclass
class FeatureSkew:
    """Of one feature: cells compared, and those that differ.

    `missing`: served NaN, made again a value; `extra`: the reverse; `different`: two values. `largest` is the
    greatest absolute difference of two values, `examples` a few (entities, now_us, served, made again).
    """

    cells: int = 0
    missing: int = 0
    extra: int = 0
    different: int = 0
    largest: float = 0.0
    examples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def mismatches(self) -> int:
        return self.missing + self.extra + self.different


@dataclass
class SkewReport:
    """Of one service: vectors compared, vectors of other definitions (not compared), and each feature."""

    service: str
    vectors: int = 0
    other_definitions: int = 0
    features: dict[str, FeatureSkew] = field(default_factory=dict)

    @property
    def mismatches(self) -> int:
        return sum(found.mismatches for found in self.features.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "service": self.service,
            "vectors": self.vectors,
            "other_definitions": self.other_definitions,
            "mismatches": self.mismatches,
            "features": {
                name: {
                    "cells": f.cells, "mismatches": f.mismatches, "missing": f.missing, "extra": f.extra,
                    "different": f.different, "largest": f.largest, "examples": f.examples,
                }
                for name, f in self.features.items()
            },
        }  # fmt: skip


def verify(store: FeatureStore, served: Iterable[Served], service: str | None = None) -> list[SkewReport]:
    """Compare what was served with the historical join, by service.

    Args:
        store: the definitions and their sources as they are now.
        served: vectors; those of services that the repository has no more count as other definitions.
        service: only this one.

    Raises:
        NotFoundError: `service` is unknown.
    """
    if service is not None and service not in store.services:
        known = ", ".join(sorted(store.services)) or "none"
        raise NotFoundError(f"service '{service}' is unknown; the services are {known}")
    reports: dict[str, SkewReport] = {}
    waiting: dict[str, list[Served]] = {}
    rows: dict[str, int] = {}
    fitting: dict[Any, bool] = {}
    for one in served:
        if service is not None and one.service != service:
            continue
        report = reports.setdefault(one.service, SkewReport(one.service))
        made_with = one.service, one.fingerprint, tuple(sorted((one.text_counts or {}).items()))
        if made_with not in fitting:  # a digest of all texts, so not made for each request
            fitting[made_with] = (
                one.service in store.services
                and store.fitting_plan(one.service, one.fingerprint, one.text_counts) is not None
            )
        if not fitting[made_with]:
            report.other_definitions += len(one.vectors)
            continue
        waiting.setdefault(one.service, []).append(one)
        rows[one.service] = rows.get(one.service, 0) + len(one.vectors)
        if rows[one.service] >= _CHUNK:
            _compare(store, report, waiting.pop(one.service))
            rows[one.service] = 0
    for name, rest in waiting.items():
        _compare(store, reports[name], rest)
    return [reports[name] for name in sorted(reports)]


def _compare(store: FeatureStore, report: SkewReport, served: Sequence[Served]) -> None:
    plan = store.service_plan(report.service)
    counts = np.array([len(one.vectors) for one in served])
    now_us = np.repeat(np.array([one.now_us for one in served], np.int64), counts)
    made_us = np.repeat(np.array([one.made_us for one in served], np.int64), counts)
    entities = _columns([name for name, _ in plan.entities], [one.entities for one in served], counts)
    inputs = _columns([name for name, _ in plan.inputs], [one.inputs for one in served], counts)
    columns = {**entities, **inputs}
    again = remake(store, report.service, columns, now_us, made_us)
    given = np.concatenate([one.vectors for one in served])
    if given.shape != again.shape:
        raise InvalidArgumentError(
            f"service '{report.service}': vectors have {given.shape[1]} features; expected {again.shape[1]}"
        )
    rows = np.flatnonzero(_differs(given, again).any(axis=1))
    if len(rows):
        part = {name: [values[row] for row in rows] for name, values in columns.items()}
        all_events = remake(store, report.service, part, now_us[rows])
        again[rows] = np.where(_differs(given[rows], all_events), again[rows], all_events)
    report.vectors += len(given)
    for f, ref in enumerate(plan.refs):
        _count(report.features.setdefault(ref, FeatureSkew()), given[:, f], again[:, f], entities, now_us)


def _count(
    found: FeatureSkew,
    given: NDArray[np.float32],
    again: NDArray[np.float32],
    entities: Mapping[str, list[Any]],
    now_us: NDArray[np.int64],
) -> None:
    here, there = ~np.isnan(given), ~np.isnan(again)
    differ = here & there & _differs(given, again)
    found.cells += len(given)
    found.missing += int(np.count_nonzero(there & ~here))
    found.extra += int(np.count_nonzero(here & ~there))
    found.different += int(np.count_nonzero(differ))
    if differ.any():
        gaps = np.abs(given[differ].astype(np.float64) - again[differ].astype(np.float64))
        found.largest = max(found.largest, float(np.max(gaps)))
    for row in np.flatnonzero(differ | (here != there))[: _MOST_EXAMPLES - len(found.examples)]:
        found.examples.append(
            {
                "entities": {name: values[row] for name, values in entities.items()},
                "now_us": int(now_us[row]),
                "served": float(given[row]) if here[row] else None,
                "made_again": float(again[row]) if there[row] else None,
            }
        )


def _differs(given: NDArray[np.float32], again: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where the bits differ; any NaN equals any NaN."""
    unequal = np.ascontiguousarray(given).view(np.uint32) != np.ascontiguousarray(again).view(np.uint32)
    return np.asarray(unequal & ~(np.isnan(given) & np.isnan(again)))


def remake(
    store: FeatureStore,
    service: str,
    columns: Mapping[str, list[Any]],
    now_us: NDArray[np.int64],
    known_by: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """The vectors float32[n, F] of a service by the historical join.

    Args:
        columns: join keys and request inputs, n values each.
        now_us: int64[n], request time of each row.
        known_by: int64[n]; only events known by then count. None: all.
    """
    import pyarrow as pa

    plan = store.service_plan(service)
    times = {"timestamp": pa.timestamp("us", "UTC"), "duration": pa.duration("us")}
    dtypes = dict(plan.inputs)
    table = pa.table({n: pa.array(v, times.get(dtypes.get(n, ""))) for n, v in columns.items()})
    table = table.append_column("event_timestamp", pa.array(now_us).cast(pa.timestamp("us", "UTC")))
    joined = store.get_historical_features(
        table, service, full_feature_names=True, known_by=known_by
    ).to_arrow()
    out = np.full((len(now_us), len(plan.refs)), np.nan, np.float32)
    for f, (ref, dtype) in enumerate(zip(plan.refs, plan.output_dtypes)):
        owner, short = ref.split(":")
        column = joined[f"{owner}__{short}"].combine_chunks()
        out[:, f] = _as_f32(column, dtype)
    return out


def _as_f32(column: Any, dtype: str) -> NDArray[np.float32]:
    """The cast that serving does: null is NaN, a string its dictionary code, a time microseconds."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.indices
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    if not is_floating(dtype):
        column = column.cast(pa.int64())
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        return np.where(valid, values.astype(np.float32), np.float32("nan"))


def _columns(
    names: Sequence[str], given: Sequence[Mapping[str, Any]], counts: NDArray[np.int64]
) -> dict[str, list[Any]]:
    """Lists of one value a row from the columns of each request."""
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for one, n in zip(given, counts):
        for name in names:
            values = one[name]
            columns[name] += values if isinstance(values, list) else [values] * int(n)
    return columns
