"""Rows that are read again before they end, so that no request waits for them.

A feature cache offers rows that were read in the last part of their life (`caches.features.refresh_ahead`).
A row whose memory TTL ends is loaded for now and put back at once; one whose validity ends is loaded for the
moment when it will hold, kept here, and put into the cache at that moment. Stamps keep order: whatever was
written after the load wins. Of the loader thread; bounded.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.clock import SystemClock

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from penstock import _core

    Loaded = tuple[NDArray[np.uint64], NDArray[np.int64], int]

BATCH_ROWS = 64  # of one load: requests that miss wait behind it
MOST_HELD = 4096
_LATE_US = 1_000_000  # a moment longer past than this is no end of a row that serves now (a replay)


class Refresher:
    """Loads what the caches offer.

    Attributes:
        loaded: rows read ahead; dropped: offers that came too late or found `MOST_HELD` rows waiting.
    """

    def __init__(
        self,
        caches: Mapping[str, _core.FeatureCache],
        load: Callable[[str, NDArray[np.uint64], NDArray[np.int64]], Loaded],
        clock: SystemClock,
        owner: int,
    ) -> None:
        """`load(view, keys uint64[n, 2], now_us int64[n])` gives rows, meta and the stamp to put with."""
        self._caches, self._load, self._clock, self.owner = caches, load, clock, owner
        self._held: list[tuple[int, int, str, Any, Any, Any, int]] = []
        self._order = itertools.count()
        self.loaded = self.dropped = 0

    def run(self) -> None:
        """Load up to `BATCH_ROWS` offers of each view, and store the held rows whose time has come."""
        for view, cache in list(self._caches.items()):
            keys, at_us, hold = cache.take_refreshes(BATCH_ROWS)
            late = hold & (at_us < self._clock.now_us() - _LATE_US)
            room = MOST_HELD - len(self._held)
            chosen = ~late & (~hold | (np.cumsum(hold) <= room))
            self.dropped += int(len(keys) - chosen.sum())
            if chosen.any():
                self._read(view, cache, keys[chosen], at_us[chosen], hold[chosen])
        self._store_due()

    def _read(
        self,
        view: str,
        cache: _core.FeatureCache,
        keys: NDArray[np.uint64],
        at_us: NDArray[np.int64],
        hold: NDArray[np.bool_],
    ) -> None:
        rows, meta, stamp = self._load(view, keys, at_us)
        self.loaded += len(keys)
        now = ~hold
        if now.any():
            cache.put_many(keys[now], rows[now], meta[now], stamp, self._clock.mono_ns(), self.owner)
        for i in np.flatnonzero(hold):
            part = slice(i, i + 1)
            entry = (int(at_us[i]), next(self._order), view, keys[part], rows[part], meta[part], stamp)
            heapq.heappush(self._held, entry)

    def _store_due(self) -> None:
        while self._held and self._held[0][0] <= self._clock.now_us():
            _, _, view, keys, rows, meta, stamp = heapq.heappop(self._held)
            cache = self._caches.get(view)
            if cache is not None:
                cache.put_many(keys, rows, meta, stamp, self._clock.mono_ns(), self.owner)

    def wait_s(self, most: float) -> float:
        """Seconds until `run` has something to do by itself, at most `most`."""
        if not self._held:
            return most
        return min(most, max(0.0, (self._held[0][0] - self._clock.now_us()) / 1e6))

    def stats(self) -> dict[str, int]:
        return {"loaded": self.loaded, "dropped": self.dropped, "held": len(self._held)}
