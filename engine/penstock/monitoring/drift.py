"""Drift of the served rows: counts by pane of request time, and reports over windows of panes.

The counts are native (`_core.DriftPanes`): a served model counts each row that it answers there, without
Python, so that none is missed however fast they come. They are over the fine bins of the reference, so
counts of panes, windows and replicas add up exactly.

Invariants: every row that came is held, expired or late, never dropped silently; any split of the rows over
calls, in order, gives equal reports. Any thread may call. A call that raises leaves the state unchanged.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock import _core
from penstock.errors import InvalidArgumentError
from penstock.models.reference import ReferenceDistribution
from penstock.monitoring.drift_stats import DriftReport, DriftThresholds, compare
from penstock.monitoring.panes import request_times, window_panes


class DriftMonitor:
    """Counts what one model version serves and compares windows of it with the version's reference.

    Args:
        reference: distributions at training; its inputs are the columns of the rows.
        pane_us: width of a pane, microseconds of request time.
        window_us: the longest window, microseconds, a whole number of panes.
        thresholds: effect sizes and minimum rows.

    Attributes:
        panes: the native counts; a `_core.ServedModel` adds to them.

    Memory: at most 8 bytes a slot and pane; 4 below 2**31 rows in each slot, 2 below 2**15.
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
        self._pane_us, self._window_us = pane_us, window_us
        try:
            self.panes = _core.DriftPanes(
                reference.native_spec(), reference.native_score_spec(), pane_us=pane_us, window_us=window_us
            )
        except ValueError as error:
            raise InvalidArgumentError(str(error)) from error

    def add(self, now_us: NDArray[np.int64], rows: NDArray[np.float32], scores: NDArray[np.float64]) -> int:
        """Count rows that no served model counts by itself; returns how many came too late for the ring.

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
        return self.panes.add(*map(np.ascontiguousarray, (times, rows, scores)))

    def merge(self, other: DriftMonitor) -> None:
        """Add what another monitor of the same reference and pane width holds; `other` stays as it is.

        Raises InvalidArgumentError, the state unchanged, where reference, pane or window differ.
        """
        if self._reference.names != other._reference.names:
            raise InvalidArgumentError("other has another reference; expected the same inputs and bins")
        try:
            self.panes.merge(other.panes)
        except ValueError as error:
            raise InvalidArgumentError(str(error)) from error

    def report(self, *, end_us: int | None = None, window_us: int | None = None) -> DriftReport:
        """Compare a window with the reference.

        Args:
            end_us: request time, microseconds; its pane is the window's last. None: the newest pane held.
            window_us: microseconds, a multiple of the pane, at most the monitor's window. None: that.

        Raises InvalidArgumentError.
        """
        count = window_panes(self._pane_us, self._window_us, end_us, window_us)
        wanted = None if end_us is None else end_us // self._pane_us
        last, n, rows, late, expired, inputs, scores = self.panes.window(wanted, count)
        features, score = compare(self._reference, inputs, scores, self._thresholds)
        return DriftReport(
            start_us=max(0, last - count + 1) * self._pane_us if last >= 0 else None,
            end_us=(last + 1) * self._pane_us if last >= 0 else None,
            n=n,
            rows=rows,
            late=late,
            expired=expired,
            features=features,
            score=score,
            thresholds=self._thresholds,
        )
