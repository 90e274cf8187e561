"""The labels of an engine: checked, made durable, joined to what was served, and again when it opens."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.clock import SystemClock
from penstock.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from penstock.monitoring.record_log import RecordLog
from penstock.monitoring.served_log import ServedLog
from penstock.serving import protocol
from penstock.serving.live import SHADOW_ROW, LiveModels

Checked = tuple[list[int], list[int], list[int]]  # ids, labels, times in microseconds


class Labels:
    """Joins labels to the rows of `live`. Any thread; the caller drains the models first."""

    def __init__(
        self, live: LiveModels, served_log: ServedLog, label_log: RecordLog, clock: SystemClock
    ) -> None:
        self._live, self._served_log, self._label_log, self._clock = live, served_log, label_log, clock

    def replay(self) -> None:
        """Give the label join what was served and labelled before a restart."""
        import pyarrow.compute as pc

        for name, performance in self._live.performance.items():
            try:
                table = self._served_log.read(name)
            except NotFoundError:
                continue
            if table.num_rows:  # windows end where they did
                self._live.get(name).newest_us = pc.max(table["now_us"]).as_py()
            for version in table["version"].unique().to_pylist():
                part = table.filter(pc.equal(table["version"], version))
                scores = part["score"].to_numpy()
                if not (len(scores) and scores.min() >= 0.0 and scores.max() <= 1.0):
                    continue
                ids, times = part["rid"].to_numpy(), part["now_us"].to_numpy()
                shadow = (part["status"].to_numpy() & SHADOW_ROW) != 0
                for tracker, mine in ((performance, ~shadow), (self._live.unseen.get(name), shadow)):
                    if tracker is not None and mine.any():
                        tracker.record(ids[mine], times[mine], scores[mine], str(version))
        if self._live.performance:
            for ids, labels, times in self._label_log.read():
                self._join(ids, labels, times)

    def check(self, request_ids: Any, labels: Any, times: Any = None) -> Checked:
        """The arguments of `label` as plain lists. Raises InvalidArgumentError, FailedPreconditionError."""
        ids, values = _listed("request_ids", request_ids), _listed("labels", labels)
        stamps = [self._clock.now_us()] * len(ids) if times is None else _listed("times", times)
        for name, given in (("labels", values), ("times", stamps)):
            if len(given) != len(ids):
                raise InvalidArgumentError(
                    f"{name} has {len(given)} values; expected {len(ids)}, one per row"
                )
        for row, (rid, label) in enumerate(zip(ids, values)):
            if type(rid) is not int or not 0 <= rid < 1 << 64:
                raise InvalidArgumentError(f"request_ids[{row}] is {rid!r}; expected a uint64")
            if label not in (0, 1):
                raise InvalidArgumentError(f"labels[{row}] is {label!r}; expected 0 or 1")
        stamps = [protocol.to_micros(t, f"times[{row}]") for row, t in enumerate(stamps)]
        for row, stamp in enumerate(stamps):  # all is checked before the log: what it holds is joined again
            if not 0 <= stamp < 1 << 63:
                raise InvalidArgumentError(
                    f"times[{row}] is {stamp}; expected int64 microseconds UTC, at least 0"
                )
        if not self._live.performance:
            raise FailedPreconditionError("no model with probability scores is served; labels have no use")
        return ids, [int(label) for label in values], stamps

    def take(self, ids: list[int], labels: list[int], times: list[int]) -> dict[str, int]:
        """Join what `check` gave once it is on disk. Counts by outcome; OSError from the disk."""
        self._served_log.flush()  # a label on disk is of no use after a crash without its row
        self._label_log.append([[ids, labels, times]])
        return self._join(ids, labels, times)

    def _join(self, ids: list[int], labels: list[int], times: list[int]) -> dict[str, int]:
        """Counts by outcome. An id belongs to one model at most: to the others it is an orphan.

        What a shadow scored is joined too, but counted only where it was answered.
        """
        for unseen in list(self._live.unseen.values()):
            unseen.label(np.array(ids, np.uint64), labels, np.array(times, np.int64))
        totals: dict[str, int] = {}
        for performance in self._live.performance.values():
            counts = performance.label(np.array(ids, np.uint64), labels, np.array(times, np.int64))
            for what, n in counts.items():
                totals[what] = totals.get(what, 0) + n
        totals["orphan"] -= len(ids) * (len(self._live.performance) - 1)
        return totals


def _listed(name: str, values: Any) -> list[Any]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise InvalidArgumentError(f"{name} is {values!r}; expected a list")
    return list(values)
