"""Model performance from labels that arrive late: a bounded join and sums by prediction-time pane.

A served row is kept in a ring by its 64-bit request id; its label, whenever it comes, is counted in the pane
of the *prediction*. AUC comes from two score histograms with half credit in a bin, and is given with a
bound on its distance to the exact AUC. Losses are summed in fixed point, so a correction takes back exactly
what was added and the sums do not depend on the order of arrival.

Recording is kept cheap, because rows come fast and labels seldom: the index of request ids is brought up to
date when labels come.

Invariants: each counted label belongs to a resident pane; the index, once up to date, names the newest ring
slot of each id that is held, and nothing else.
Any thread may call; one lock guards the whole state. A call that raises leaves the state unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import InvalidArgumentError

I64 = NDArray[np.int64]
_SCALE = float(1 << 30)  # fixed-point units of a loss; one row's rounding is at most 2**-31
_INDEX_STEP = 1024  # rows indexed in one go: other threads get the interpreter in between
_CLIP = 1e-15  # scores 0 and 1 have a finite log loss


def auc_from_histograms(positive: NDArray[Any], negative: NDArray[Any]) -> tuple[float, float]:
    """AUC and its certified error bound from score histograms of equal shape ``[bins]``, ascending score.

    A pair in one bin gets half credit, so the error is at most ``sum P_k N_k / (2 P N)``. Without a positive
    or a negative the AUC is undefined: ``(nan, nan)``.
    """
    p = positive.astype(np.float64)
    n = negative.astype(np.float64)
    pairs = p.sum() * n.sum()
    if pairs == 0:
        return float("nan"), float("nan")
    below = np.cumsum(n) - n
    tied = float(p @ n)
    return float((p @ below + 0.5 * tied) / pairs), 0.5 * tied / float(pairs)


class _Panes:
    """The sums of one model version: a ring of panes, slot ``pane % count``."""

    def __init__(self, count: int, bins: int) -> None:
        self.pane = np.full(count, -1, np.int64)
        self.served = np.zeros(count, np.int64)
        self.histogram = np.zeros((count, 2, bins), np.uint32)  # [slot, label, bin]
        self.logloss = np.zeros(count, np.int64)
        self.brier = np.zeros(count, np.int64)
        self.correct = np.zeros(count, np.int64)

    def advance(self, panes: I64) -> None:
        """Give each pane its slot, clearing an older one; a slot never goes back."""
        first = panes[:1]
        for pane in (first if (panes == first).all() else np.unique(panes)).tolist():
            slot = pane % len(self.pane)
            if pane > self.pane[slot]:
                self.pane[slot] = pane
                for sums in (self.served, self.histogram, self.logloss, self.brier, self.correct):
                    sums[slot] = 0

    def resident(self, panes: I64) -> NDArray[np.bool_]:
        return np.asarray(self.pane[panes % len(self.pane)] == panes)

    def add(self, panes: I64, scores: NDArray[np.float64], labels: I64, sign: int, threshold: float) -> None:
        """Count the labelled rows (sign 1) or take them back exactly (sign -1)."""
        slots = panes % len(self.pane)
        bins = self.histogram.shape[2]
        cells = (slots, labels, np.minimum((scores * bins).astype(np.int64), bins - 1))
        if sign > 0:
            np.add.at(self.histogram, cells, np.uint32(1))
        else:
            np.subtract.at(self.histogram, cells, np.uint32(1))
        p = np.clip(scores, _CLIP, 1.0 - _CLIP)
        loss = -np.where(labels == 1, np.log(p), np.log1p(-p))
        np.add.at(self.logloss, slots, sign * np.rint(loss * _SCALE).astype(np.int64))
        np.add.at(self.brier, slots, sign * np.rint((scores - labels) ** 2 * _SCALE).astype(np.int64))
        np.add.at(self.correct, slots, sign * ((scores >= threshold) == (labels == 1)).astype(np.int64))


class PerformanceTracker:
    """Joins labels to served binary scores and gives metrics over windows of prediction time.

    Args:
        capacity: served rows kept for the join; the oldest leaves first and its label is then an orphan.
        pane_us: width of a pane, microseconds. Windows are whole panes.
        horizon_us: the longest window, microseconds, a multiple of `pane_us`. A label of a row whose pane has
            left the horizon is late.
        bins: equal-width score bins over [0, 1].
        threshold: a score at or above it predicts label 1 (accuracy only).
        max_versions: model versions held at once; the one first seen longest ago leaves first.
    """

    def __init__(
        self,
        *,
        capacity: int = 1 << 20,
        pane_us: int = 300_000_000,
        horizon_us: int = 86_400_000_000,
        bins: int = 1024,
        threshold: float = 0.5,
        max_versions: int = 8,
    ) -> None:
        for name, value in (
            ("capacity", capacity),
            ("pane_us", pane_us),
            ("bins", bins),
            ("max_versions", max_versions),
        ):
            if value < 1:
                raise InvalidArgumentError(f"{name} is {value}; expected at least 1")
        if horizon_us < pane_us or horizon_us % pane_us:
            raise InvalidArgumentError(
                f"horizon_us is {horizon_us}; expected a multiple of pane_us ({pane_us})"
            )
        if not 0.0 <= threshold <= 1.0:
            raise InvalidArgumentError(f"threshold is {threshold}; expected 0 to 1")
        self._capacity = capacity
        self._pane_us = pane_us
        self._n_panes = horizon_us // pane_us
        self._bins = bins
        self._threshold = threshold
        self._max_versions = max_versions
        self._lock = threading.Lock()
        self._index: dict[int, int] = {}
        self._id = np.zeros(capacity, np.uint64)
        self._pane = np.zeros(capacity, np.int64)
        self._score = np.zeros(capacity, np.float64)
        self._serial = np.full(capacity, -1, np.int64)
        self._label = np.full(capacity, -1, np.int64)
        self._label_time = np.zeros(capacity, np.int64)
        self._recorded = 0  # rows ever; row k is in slot k % capacity
        self._indexed = 0  # of them, those that the index knows
        self._index_id = np.zeros(capacity, np.uint64)  # what the index has for a slot, if in_index
        self._in_index = np.zeros(capacity, np.bool_)
        self._next_serial = 0
        self._serial_of: dict[str, int] = {}
        self._panes: dict[int, _Panes] = {}

    def record(
        self,
        ids: NDArray[Any] | Sequence[int],
        times_us: NDArray[Any] | Sequence[int] | int,
        scores: NDArray[Any] | Sequence[float],
        version: str,
    ) -> int:
        """Record served rows and return how many were kept.

        Args:
            ids: request ids, uint64 ``[n]``. An id used again names its newest row.
            times_us: request times, int64 microseconds UTC, ``[n]`` or one for all.
            scores: probabilities of label 1 in [0, 1], ``[n]``.
            version: model version that made the scores.

        Rows of a pane that has already left the horizon are not kept. Raises InvalidArgumentError.
        """
        keys = _request_ids(ids)
        times = _times(times_us, len(keys))
        given = np.asarray(scores)
        if len(keys) and given.dtype.kind not in "iuf":
            raise InvalidArgumentError(f"scores has dtype {given.dtype}; expected float64")
        values = given.astype(np.float64)
        if values.shape != keys.shape:
            raise InvalidArgumentError(f"scores has shape {values.shape}; expected {keys.shape}")
        wrong = ~((values >= 0.0) & (values <= 1.0))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InvalidArgumentError(f"scores[{row}] is {values[row]}; expected a number in 0 to 1")
        kept = 0
        with self._lock:
            serial = self._version(version)
            sums = self._panes[serial]
            panes = times // self._pane_us
            sums.advance(panes)
            fresh = sums.resident(panes)
            np.add.at(sums.served, panes[fresh] % self._n_panes, 1)
            keys, panes, values = keys[fresh], panes[fresh], values[fresh]
            kept = len(keys)
            for start in range(0, kept, self._capacity):
                part = slice(start, start + self._capacity)
                self._append(keys[part], panes[part], values[part], serial)
        return kept

    def label(
        self,
        ids: NDArray[Any] | Sequence[int],
        labels: NDArray[Any] | Sequence[int],
        times_us: NDArray[Any] | Sequence[int] | int,
    ) -> dict[str, int]:
        """Join labels (0 or 1, ``[n]``) that became known at `times_us` (int64 microseconds UTC).

        Returns counts that add up to n: ``matched`` (first label of a row), ``corrected`` (another label took
        its place, known at the same time or later), ``duplicate`` (the held label again or an older one),
        ``late`` (the row's pane or version has left), ``orphan`` (no such row).
        Raises InvalidArgumentError.
        """
        keys = _request_ids(ids)
        times = _times(times_us, len(keys))
        given = np.asarray(labels)
        if given.shape != keys.shape:
            raise InvalidArgumentError(f"labels has shape {given.shape}; expected {keys.shape}")
        if len(given) and given.dtype.kind not in "biuf":
            raise InvalidArgumentError(f"labels has dtype {given.dtype}; expected 0 or 1")
        wrong = ~((given == 0) | (given == 1))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InvalidArgumentError(f"labels[{row}] is {given[row]}; expected 0 or 1")
        values = given.astype(np.int64)
        counts = dict.fromkeys(("matched", "corrected", "duplicate", "late", "orphan"), 0)
        with self._lock:
            self._update_index()
            find = self._index.get
            slots = np.fromiter((find(key, -1) for key in keys.tolist()), np.int64, len(keys))
            known = slots >= 0
            counts["orphan"] = int(len(keys) - known.sum())
            slots, values, times = slots[known], values[known], times[known]
            # A round takes the first label left for each row, so repeats in one call keep their order.
            while len(slots):
                first = np.unique(slots, return_index=True)[1]
                self._join(slots[first], values[first], times[first], counts)
                rest = np.ones(len(slots), bool)
                rest[first] = False
                slots, values, times = slots[rest], values[rest], times[rest]
        return counts

    def metrics(self, now_us: int, window_us: int, *, version: str | None = None) -> dict[str, float]:
        """Metrics of the rows served in the last ``window_us / pane_us`` panes, the one of `now_us` included.

        Args:
            now_us: end of the window, microseconds UTC; for mature cohorts pass now less the label maturity.
            window_us: microseconds, a multiple of the pane, at most the horizon.
            version: only this model version; None takes all that are held.

        Returns ``n`` (rows served), ``labelled``, ``coverage`` (labelled / n), ``auc``, ``auc_error_bound``,
        ``logloss``, ``brier``, ``accuracy``; a figure without data is NaN. Raises InvalidArgumentError.
        """
        if window_us < self._pane_us or window_us % self._pane_us:
            raise InvalidArgumentError(f"window_us is {window_us}; expected a multiple of {self._pane_us}")
        if window_us > self._n_panes * self._pane_us:
            raise InvalidArgumentError(
                f"window_us is {window_us}; expected at most the horizon, {self._n_panes * self._pane_us}"
            )
        last = now_us // self._pane_us
        panes = np.arange(max(0, last - window_us // self._pane_us + 1), last + 1, dtype=np.int64)
        histogram = np.zeros((2, self._bins), np.int64)
        n = logloss = brier = correct = 0
        with self._lock:
            if version is None:
                chosen = list(self._panes.values())
            else:
                chosen = [self._panes[self._serial_of[version]]] if version in self._serial_of else []
            for sums in chosen:
                slots = panes[sums.resident(panes)] % self._n_panes
                histogram += sums.histogram[slots].sum(axis=0, dtype=np.int64)
                n += int(sums.served[slots].sum())
                logloss += int(sums.logloss[slots].sum())
                brier += int(sums.brier[slots].sum())
                correct += int(sums.correct[slots].sum())
        labelled = int(histogram.sum())
        auc, bound = auc_from_histograms(histogram[1], histogram[0])
        nan = float("nan")
        return {
            "n": n,
            "labelled": labelled,
            "coverage": labelled / n if n else nan,
            "auc": auc,
            "auc_error_bound": bound,
            "logloss": logloss / _SCALE / labelled if labelled else nan,
            "brier": brier / _SCALE / labelled if labelled else nan,
            "accuracy": correct / labelled if labelled else nan,
        }

    def _version(self, version: str) -> int:
        serial = self._serial_of.get(version)
        if serial is not None:
            return serial
        if len(self._serial_of) == self._max_versions:
            oldest = next(iter(self._serial_of))
            del self._panes[self._serial_of.pop(oldest)]
        serial = self._next_serial
        self._next_serial += 1
        self._serial_of[version] = serial
        self._panes[serial] = _Panes(self._n_panes, self._bins)
        return serial

    def _append(self, keys: NDArray[np.uint64], panes: I64, scores: NDArray[np.float64], serial: int) -> None:
        slots = (self._recorded + np.arange(len(keys))) % self._capacity
        self._id[slots] = keys
        self._pane[slots] = panes
        self._score[slots] = scores
        self._serial[slots] = serial
        self._label[slots] = -1
        self._recorded += len(keys)

    def _update_index(self) -> None:
        """Index the rows recorded since the last time, in order, in place of those that they pushed out."""
        start = max(self._indexed, self._recorded - self._capacity)
        for at in range(start, self._recorded, _INDEX_STEP):
            slots = np.arange(at, min(at + _INDEX_STEP, self._recorded)) % self._capacity
            keys, places = self._id[slots], slots.tolist()
            left = self._in_index[slots]
            for key, slot in zip(self._index_id[slots[left]].tolist(), slots[left].tolist()):
                if self._index.get(key) == slot:
                    del self._index[key]
            self._index.update(zip(keys.tolist(), places))
            self._index_id[slots] = keys
            self._in_index[slots] = True
        self._indexed = self._recorded

    def _join(self, slots: I64, labels: I64, times: I64, counts: dict[str, int]) -> None:
        serials = self._serial[slots]
        for serial in np.unique(serials).tolist():
            mine = serials == serial
            at, value, time = slots[mine], labels[mine], times[mine]
            sums = self._panes.get(serial)
            if sums is None:
                counts["late"] += len(at)
                continue
            here = sums.resident(self._pane[at])
            counts["late"] += int(len(at) - here.sum())
            at, value, time = at[here], value[here], time[here]
            old = self._label[at]
            first = old < 0
            corrected = ~first & (old != value) & (time >= self._label_time[at])
            counts["matched"] += int(first.sum())
            counts["corrected"] += int(corrected.sum())
            counts["duplicate"] += int((~first & ~corrected).sum())
            fixed = at[corrected]
            sums.add(self._pane[fixed], self._score[fixed], old[corrected], -1, self._threshold)
            taken = first | corrected
            at, value = at[taken], value[taken]
            sums.add(self._pane[at], self._score[at], value, 1, self._threshold)
            self._label[at] = value
            self._label_time[at] = time[taken]


def _request_ids(ids: NDArray[Any] | Sequence[int]) -> NDArray[np.uint64]:
    keys = np.asarray(ids)
    if keys.dtype.kind == "f" and not isinstance(ids, np.ndarray) and all(isinstance(i, int) for i in ids):
        keys = np.array(ids, object)  # NumPy makes floats of a list with ints on both sides of 2**63
        if all(0 <= i < 1 << 64 for i in ids):
            keys = keys.astype(np.uint64)
    if keys.ndim != 1:
        raise InvalidArgumentError(f"ids has {keys.ndim} dimensions; expected 1")
    if keys.dtype.kind not in "iu" and len(keys):
        raise InvalidArgumentError(f"ids has dtype {keys.dtype}; expected uint64")
    if keys.dtype.kind == "i" and (keys < 0).any():
        row = int(np.argmax(keys < 0))
        raise InvalidArgumentError(f"ids[{row}] is {keys[row]}; expected 0 to 2**64 - 1")
    return keys.astype(np.uint64)


def _times(times_us: NDArray[Any] | Sequence[int] | int, n: int) -> I64:
    times = np.asarray(times_us)
    if times.dtype.kind not in "iu" and times.size:
        raise InvalidArgumentError(f"times_us has dtype {times.dtype}; expected int64 microseconds")
    if times.ndim == 0:
        times = np.full(n, times)
    if times.shape != (n,):
        raise InvalidArgumentError(f"times_us has shape {times.shape}; expected ({n},)")
    micros = times.astype(np.int64)
    wrong = micros < 0  # a uint64 beyond int64 wraps below zero
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InvalidArgumentError(f"times_us[{row}] is {times[row]}; expected 0 to 2**63 - 1")
    return micros
