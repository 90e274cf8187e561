"""Feature rows that change while they are served: what was materialised or pushed goes into the caches.

A row carries the stamp of the store when it was read. Whatever has a later stamp stays, so that a load that
began before a change never replaces what came after it. Any thread; `lock` keeps fills apart from the moment
at which all cached rows stop counting.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from penstock.clock import SystemClock
    from penstock.features.push_commit import Touched
    from penstock.features.store import FeatureStore
    from penstock.serving.live import LiveModels

_REFILL_ROWS = 1024  # of one read: requests that miss wait behind it


class CacheFiller:
    """Fills the feature caches of `live`."""

    def __init__(self, live: LiveModels, clock: SystemClock, lock: threading.Lock) -> None:
        self._live, self._clock, self.lock = live, clock, lock

    def refill(self, store: FeatureStore, view: str, keys: NDArray[np.uint64], now_us: int) -> None:
        """Bring the rows that the cache holds of `keys` up to `now_us`, so that no request waits for them."""
        cache = self._live.caches.get(view)
        if cache is None:
            return
        for start in range(0, len(keys), _REFILL_ROWS):
            part = np.ascontiguousarray(keys[start : start + _REFILL_ROWS])
            known = np.ascontiguousarray(part[cache.resident_many(part)])
            if not len(known):
                continue
            stamp = store.stamp()
            rows, meta = store.load_rows(view, known, np.full(len(known), now_us, np.int64))
            with self.lock:
                cache.put_many(known, rows, meta, stamp, self._clock.mono_ns(), self._live.cache_owner)

    def put_pushed(self, store: FeatureStore, touched: Touched, later: int = 0) -> None:
        """Put the rows of pushed events in place of the older ones, with a stamp `later` than the store's."""
        for view, (keys, rows, meta) in touched.items():
            cache = self._live.caches.get(view)
            if cache is None or not len(keys):
                continue
            there = cache.resident_many(keys)
            stamp, owner = store.stamp() + later, self._live.cache_owner
            with self.lock:
                if there.any():
                    now_ns = self._clock.mono_ns()
                    cache.put_many(keys[there], rows[there], meta[there], stamp, now_ns, owner)
                if not there.all():  # a load that began before the push must not leave its row here
                    cache.discard_many(np.ascontiguousarray(keys[~there]), stamp, owner)
