"""Drift counts as plain Python keeps them: the slow, obvious form of `_core.DriftPanes`, for tests."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock import _core
from penstock.errors import InvalidArgumentError
from penstock.models.reference import ReferenceDistribution, score_column
from penstock.monitoring.drift_stats import DriftReport, DriftThresholds, compare
from penstock.monitoring.panes import PaneRing, request_times
from penstock_kernels.reference import Counts

_OPEN_PANES = 2  # the running pane and the one before it, for rows that come a little late
_VALUES_PER_CALL = 1 << 16  # native counting holds the GIL: a fraction of a millisecond at a time


@dataclass(frozen=True)
class _Sum:
    """Closed counts of one pane: rows, input slots and score slots of the narrowest unsigned dtype."""

    rows: int
    inputs: Counts
    scores: Counts


class _Open:
    """Native counts of one pane since it was opened."""

    def __init__(self, reference: ReferenceDistribution) -> None:
        self.rows = 0
        self.inputs = _core.HistogramCounts(reference.native_spec())
        self.scores = _core.HistogramCounts(reference.native_score_spec())

    def clear(self) -> None:
        self.rows = 0
        self.inputs.clear()
        self.scores.clear()

    def total(self) -> _Sum:
        return _Sum(self.rows, self.inputs.snapshot(), self.scores.snapshot())


class OracleMonitor:
    """Counts what one model version serves and compares windows of it with the version's reference.

    Args:
        reference: distributions at training; its inputs are the columns of the rows.
        pane_us: width of a pane, microseconds of request time.
        window_us: the longest window, microseconds, a whole number of panes.
        thresholds: effect sizes and minimum rows.

    Memory: at most 8 bytes a slot and pane; 4 below 2**32 rows a pane, 2 below 2**16 in each slot.
    """

    def __init__(
        self,
        reference: ReferenceDistribution,
        *,
        pane_us: int,
        window_us: int,
        thresholds: DriftThresholds | None = None,
    ) -> None:
        self._reference = reference
        self._thresholds = thresholds or DriftThresholds()
        self._ring = PaneRing(pane_us, window_us)
        self._lock = threading.Lock()
        self._closed: dict[int, _Sum] = {}
        self._open: dict[int, _Open] = {}  # least recently used first
        self._spare: list[_Open] = []
        self._rows = self._late = self._expired = 0

    def add(self, now_us: NDArray[np.int64], rows: NDArray[np.float32], scores: NDArray[np.float64]) -> int:
        """Count served rows; returns how many came too late for the ring.

        Args:
            now_us: request times, int64 microseconds UTC [n], in any order.
            rows: model inputs, float32 [n, F]; NaN is missing.
            scores: first output, float64 [n]; NaN is missing.

        Raises InvalidArgumentError for another shape or dtype, or a negative time.
        """
        width = len(self._reference.names)
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != width:
            raise InvalidArgumentError(f"rows is {rows.dtype} {rows.shape}; expected float32 [n, {width}]")
        n = len(rows)
        times = request_times(now_us, n)
        if scores.dtype != np.float64 or scores.shape != (n,):
            raise InvalidArgumentError(f"scores is {scores.dtype} {scores.shape}; expected float64 [{n}]")
        if n == 0:
            return 0
        column = score_column(scores)
        with self._lock:
            placed = self._ring.place(times)
            for pane in placed.gone:
                self._forget(pane)
            self._rows += n
            self._late += placed.late
            self._expired += placed.passed
            for pane, chosen in placed.groups:
                counts = self._opened(pane)
                step = max(1, _VALUES_PER_CALL // max(1, width))
                for start in range(0, len(chosen), step):
                    part = chosen[start : start + step]
                    counts.inputs.count(np.ascontiguousarray(rows[part]))
                    counts.scores.count(column[part])
                counts.rows += len(chosen)
        return placed.late

    def merge(self, other: OracleMonitor) -> None:
        """Add what another monitor of the same reference and pane width holds; `other` stays as it is.

        Raises InvalidArgumentError, the state unchanged, where reference, pane or window differ.
        """
        mine, theirs = self._reference, other._reference
        same = mine.names == theirs.names and all(
            np.array_equal(a, b)
            for a, b in zip(
                [*mine.native_spec(), *mine.native_score_spec()],
                [*theirs.native_spec(), *theirs.native_score_spec()],
            )
        )
        if not same:
            raise InvalidArgumentError("other has another reference; expected the same inputs and bins")
        for name in ("pane_us", "window_us"):
            a, b = getattr(self._ring, name), getattr(other._ring, name)
            if a != b:
                raise InvalidArgumentError(f"other has {name} {b}; expected {a}")
        with other._lock:
            held = other._sums(range((other._ring.newest() or 0) + 1))
            counters = other._rows, other._late, other._expired
        with self._lock:
            self._rows += counters[0]
            self._late += counters[1]
            self._expired += counters[2]
            for pane, part in held:
                kept, gone = self._ring.admit(pane)
                if gone is not None:
                    self._forget(gone)
                if kept:
                    self._close(pane, part)
                else:
                    self._expired += part.rows

    def report(self, *, end_us: int | None = None, window_us: int | None = None) -> DriftReport:
        """Compare a window with the reference.

        Args:
            end_us: request time, microseconds; its pane is the window's last. None: the newest pane held.
            window_us: microseconds, a multiple of the pane, at most the monitor's window. None: that.

        Raises InvalidArgumentError.
        """
        with self._lock:
            panes = self._ring.window(end_us, window_us)
            parts = self._sums(panes)
            counters = self._rows, self._late, self._expired
        inputs = np.zeros(self._reference.spec.n_slots, np.uint64)
        scores = np.zeros(self._reference.score_spec.n_slots, np.uint64)
        for _, part in parts:
            inputs += part.inputs
            scores += part.scores
        features, score = compare(self._reference, inputs, scores, self._thresholds)
        return DriftReport(
            start_us=panes.start * self._ring.pane_us if panes else None,
            end_us=panes.stop * self._ring.pane_us if panes else None,
            n=sum(part.rows for _, part in parts),
            rows=counters[0],
            late=counters[1],
            expired=counters[2],
            features=features,
            score=score,
            thresholds=self._thresholds,
        )

    def _sums(self, panes: range) -> list[tuple[int, _Sum]]:
        """What is held of these panes, by parts; the parts never change afterwards."""
        closed = [(pane, part) for pane, part in self._closed.items() if pane in panes]
        return closed + [(pane, counts.total()) for pane, counts in self._open.items() if pane in panes]

    def _opened(self, pane: int) -> _Open:
        counts = self._open.pop(pane, None)
        if counts is None:
            if len(self._open) == _OPEN_PANES:
                oldest = next(iter(self._open))
                counts = self._open.pop(oldest)
                self._close(oldest, counts.total())
                counts.clear()
            else:
                counts = self._spare.pop() if self._spare else _Open(self._reference)
        self._open[pane] = counts
        return counts

    def _close(self, pane: int, part: _Sum) -> None:
        held = self._closed.get(pane)
        if held is not None:
            part = _Sum(
                held.rows + part.rows,
                held.inputs.astype(np.uint64) + part.inputs,
                held.scores.astype(np.uint64) + part.scores,
            )
        self._closed[pane] = _Sum(part.rows, _narrow(part.inputs), _narrow(part.scores))

    def _forget(self, pane: int) -> None:
        held = self._closed.pop(pane, None)
        self._expired += held.rows if held is not None else 0
        counts = self._open.pop(pane, None)
        if counts is not None:
            self._expired += counts.rows
            counts.clear()
            self._spare.append(counts)


def _narrow(counts: Counts) -> Counts:
    return counts.astype(np.min_scalar_type(int(counts.max(initial=0))))
