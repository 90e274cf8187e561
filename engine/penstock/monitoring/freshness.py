"""How old the served values were: per view, the age (request time less event time) by pane of request time.

Ages are counted in integer bins of 1/32 octave from 1.024 ms on, so a quantile is within `QUANTILE_ERROR` of
an age that was really served. Rows that served no value of the view (never seen, or past its ttl) are counted
apart, and so are ages below zero, which mean that two clocks disagree.

Invariant: per view and pane, rows = fresh + negative + not_found + expired. Any thread may call; one lock
guards the state. A call that raises leaves the state unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import InvalidArgumentError
from penstock.monitoring.panes import I64, PaneRing, request_times

_PER_OCTAVE, _FIRST, _LAST = 32, 10, 53  # bins from 2**10 us to 2**53 us, 285 years
_BOUNDS: I64 = np.ceil(
    2.0 ** (np.arange(_PER_OCTAVE * _FIRST, _PER_OCTAVE * _LAST + 1) / _PER_OCTAVE)
).astype(np.int64)
_NO_EVENT = np.iinfo(np.int64).min
_STATUS_EXPIRED = 3
_NOT_FOUND, _EXPIRED, _NEGATIVE = range(3)

QUANTILE_ERROR = 2.0 ** (0.5 / _PER_OCTAVE) - 1.0
"""Greatest relative error of a quantile of at least 1.024 ms (below that: 0.512 ms)."""


@dataclass(frozen=True)
class ViewFreshness:
    """One view in a window. Ages are microseconds, None where no value was served.

    `fresh` rows had a value, of an age >= 0; `negative` a value of a later event time than the request;
    `not_found` no event; `expired` an event older than the ttl. `max_us` is exact. `newest_event_us` is the
    newest event time served since the monitor was made, and `newest_age_us` its age at the end of the window.
    """

    view: str
    ttl_us: int | None
    rows: int
    fresh: int
    negative: int
    not_found: int
    expired: int
    p50_us: float | None
    p95_us: float | None
    p99_us: float | None
    max_us: int | None
    newest_event_us: int | None
    newest_age_us: int | None


@dataclass(frozen=True)
class FreshnessReport:
    """A window of request time [start_us, end_us) (None: nothing was ever counted) with `n` rows.

    Over the life of the monitor `late` rows came after their pane had left, and are in no window.
    """

    start_us: int | None
    end_us: int | None
    n: int
    late: int
    quantile_error: float
    views: tuple[ViewFreshness, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers, text and None, as JSON can hold them."""
        return {**asdict(self), "views": [asdict(view) for view in self.views]}


class _Pane:
    def __init__(self, views: int) -> None:
        self.rows = 0
        self.ages = np.zeros((views, len(_BOUNDS) + 1), np.uint32)
        self.apart = np.zeros((views, 3), np.int64)
        self.oldest = np.full(views, -1, np.int64)


class FreshnessMonitor:
    """Counts the ages of what one model version serves.

    Args:
        views: the views of the model's service in order, each with its ttl in microseconds or None.
        pane_us: width of a pane, microseconds of request time.
        window_us: the longest window, microseconds, a whole number of panes.
    """

    def __init__(self, views: Mapping[str, int | None], *, pane_us: int, window_us: int) -> None:
        for name, ttl in views.items():
            if ttl is not None and ttl < 0:
                raise InvalidArgumentError(f"views[{name!r}] has ttl {ttl}; expected microseconds or None")
        self._views = dict(views)
        self._ring = PaneRing(pane_us, window_us)
        self._lock = threading.Lock()
        self._panes: dict[int, _Pane] = {}
        self._newest: I64 = np.full(len(views), _NO_EVENT, np.int64)
        self._late = 0

    def add(self, now_us: NDArray[np.int64], event_time: NDArray[np.int64], status: NDArray[np.uint8]) -> int:
        """Count served rows; returns how many came too late for the ring.

        Args:
            now_us: request times, int64 microseconds UTC [n], in any order.
            event_time: newest event behind each view's values, int64 microseconds [n, V]; INT64_MIN: none.
            status: the worst row status of the row's views, uint8 [n]. A view's value is expired where that
                is EXPIRED and its age exceeds its ttl.

        Raises InvalidArgumentError for another shape or dtype, or a negative request time.
        """
        times = request_times(now_us)
        n, width = len(times), len(self._views)
        for name, given, dtype, shape in (
            ("event_time", event_time, np.int64, (n, width)),
            ("status", status, np.uint8, (n,)),
        ):
            if given.dtype != dtype or given.shape != shape:
                raise InvalidArgumentError(
                    f"{name} is {given.dtype} {given.shape}; expected {np.dtype(dtype).name} {shape}"
                )
        if n == 0:
            return 0
        has_event = event_time != _NO_EVENT
        age = times[:, None] - np.where(has_event, event_time, 0)
        ttls = [np.iinfo(np.int64).max if ttl is None else ttl for ttl in self._views.values()]
        expired = has_event & (status == _STATUS_EXPIRED)[:, None] & (age > np.array(ttls, np.int64))
        served = has_event & ~expired
        fresh = served & (age >= 0)
        bins = np.searchsorted(_BOUNDS, age, side="right")
        with self._lock:
            placed = self._ring.place(times)
            for gone in placed.gone:
                del self._panes[gone]
            self._late += placed.late
            for number, rows in placed.groups:
                pane = self._panes.get(number)
                if pane is None:
                    pane = self._panes[number] = _Pane(width)
                pane.rows += len(rows)
                pane.apart[:, _NOT_FOUND] += (~has_event[rows]).sum(axis=0)
                pane.apart[:, _EXPIRED] += expired[rows].sum(axis=0)
                pane.apart[:, _NEGATIVE] += (served & ~fresh)[rows].sum(axis=0)
                np.maximum(pane.oldest, np.where(fresh, age, -1)[rows].max(axis=0), out=pane.oldest)
                for view in range(width):
                    chosen = bins[rows, view][fresh[rows, view]]
                    pane.ages[view] += np.bincount(chosen, minlength=len(_BOUNDS) + 1).astype(np.uint32)
            newest = np.where(served, event_time, _NO_EVENT).max(axis=0, initial=_NO_EVENT)
            np.maximum(self._newest, newest, out=self._newest)
        return placed.late

    def report(self, *, end_us: int | None = None, window_us: int | None = None) -> FreshnessReport:
        """The ages of a window; `end_us` and `window_us` as in `DriftMonitor.report`.

        Ask on a timer too: a feed that stopped shows in `newest_age_us` and not in the ages of no traffic.
        """
        width = len(self._views)
        ages = np.zeros((width, len(_BOUNDS) + 1), np.int64)
        apart = np.zeros((width, 3), np.int64)
        oldest = np.full(width, -1, np.int64)
        n = 0
        with self._lock:
            window = self._ring.window(end_us, window_us)
            for number, pane in self._panes.items():
                if number in window:
                    n += pane.rows
                    ages += pane.ages
                    apart += pane.apart
                    np.maximum(oldest, pane.oldest, out=oldest)
            newest, late = self._newest.tolist(), self._late
        start, end = (
            (window.start * self._ring.pane_us, window.stop * self._ring.pane_us) if window else (None, None)
        )
        now = end if end_us is None else end_us
        views = []
        for v, (name, ttl) in enumerate(self._views.items()):
            p50, p95, p99 = (_quantile(ages[v], q) for q in (50, 95, 99))
            event = None if newest[v] == _NO_EVENT else newest[v]
            views.append(
                ViewFreshness(
                    view=name,
                    ttl_us=ttl,
                    rows=n,
                    fresh=int(ages[v].sum()),
                    negative=int(apart[v, _NEGATIVE]),
                    not_found=int(apart[v, _NOT_FOUND]),
                    expired=int(apart[v, _EXPIRED]),
                    p50_us=p50,
                    p95_us=p95,
                    p99_us=p99,
                    max_us=int(oldest[v]) if oldest[v] >= 0 else None,
                    newest_event_us=event,
                    newest_age_us=now - event if event is not None and now is not None else None,
                )
            )
        return FreshnessReport(start, end, n, late, QUANTILE_ERROR, tuple(views))


def _quantile(counts: I64, percent: int) -> float | None:
    """The middle of the bin that holds the ceil(q n)-th smallest age."""
    total = int(counts.sum())
    if total == 0:
        return None
    k = int(np.searchsorted(np.cumsum(counts), -(-percent * total // 100)))
    if k == 0:
        return float(_BOUNDS[0]) / 2.0
    k = min(k, len(_BOUNDS) - 1)
    # The edges as real numbers: their ceilings would shift the middle of the narrow bins.
    return float(2.0 ** (_FIRST + (k - 0.5) / _PER_OCTAVE))
