"""What a commit of pushed events is made of: the pushes, the rows that wait for it, the arrivals.

`Pushes` drives them; see there for the order of its locks. The locks here are taken last, for moments.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from penstock.clock import SystemClock
from penstock.errors import PenstockError, StoreError
from penstock.features.event_log import EventLog, NewBatch
from penstock.features.live import LiveView
from penstock.features.online import header_in, put_header_in, put_rows
from penstock.features.online_adapter import OnlineAdapter
from penstock.features.store_settings import PushSettings

if TYPE_CHECKING:
    import lmdb
    from numpy.typing import NDArray

_log = logging.getLogger("penstock.features")

Touched = dict[str, tuple["NDArray[np.uint64]", "NDArray[np.uint64]", "NDArray[np.int64]"]]
"""By view: keys uint64[k, 2], their rows uint64[k, row_words] and meta int64[k, 4]."""


class ConflictError(StoreError):
    """Sequence numbers were given that another process had used."""


@dataclass(eq=False)
class Entry:
    """A push on its way to the disk.

    Attributes:
        batch: what to log; its message may be empty until `pack` has made it.
        touched: the keys of its rows, by view.
        done: held until it is durable or has failed.
    """

    batch: NewBatch
    touched: dict[str, NDArray[np.uint64]]
    pack: Callable[[], bytes] | None = None
    done: threading.Lock = field(default_factory=threading.Lock)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.done.acquire()

    def packed(self) -> NewBatch:
        return self.batch if self.pack is None else replace(self.batch, message=self.pack())


@dataclass(eq=False)
class Group:
    """What one transaction writes."""

    entries: list[Entry]
    now_us: int
    rows: list[tuple[LiveView, NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]]

    def touched(self) -> Touched:
        return {live.computer.view.name: (keys, rows, meta) for live, keys, rows, meta in self.rows}


class PendingRows:
    """Keys whose rows in the store are older than what was pushed, by view. Any thread."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[tuple[int, int], int]] = {}
        self._lock = threading.Lock()

    def mark(self, view: str, keys: NDArray[np.uint64], change: int) -> None:
        """Count one push more (1) or less (-1) on its way with these keys uint64[k, 2]."""
        with self._lock:
            counts = self._counts.setdefault(view, {})
            for lo, hi in keys.tolist():
                count = counts.get((lo, hi), 0) + change
                if count > 0:
                    counts[lo, hi] = count
                else:
                    counts.pop((lo, hi), None)

    def release(self, entries: Sequence[Entry]) -> None:
        """These pushes are no longer on their way."""
        for entry in entries:
            for view, keys in entry.touched.items():
                self.mark(view, keys, -1)

    def among(self, view: str, keys: NDArray[np.uint64]) -> NDArray[np.bool_] | None:
        """Which keys uint64[n, 2] wait; None: none."""
        counts = self._counts.get(view)
        if not counts:
            return None
        with self._lock:
            return np.array([(lo, hi) in counts for lo, hi in keys.tolist()], np.bool_)


class Arrivals:
    """When events arrive: now, but never before those of their source that came earlier. Any thread.

    An arrival is the event's known-at where it names none, so a clock that was set back would make a
    correction lose to what it corrects.
    """

    def __init__(self, log: EventLog, clock: SystemClock) -> None:
        self._log, self._clock = log, clock
        self._newest: dict[str, int] = {}
        self._lock = threading.Lock()

    def next(self, source: str) -> int:
        """Of an event that arrives now, microseconds."""
        with self._lock:
            known = self._newest.get(source)
            newest = self._log.newest_arrival(source) if known is None else known
            self._newest[source] = newest = max(self._clock.now_us(), newest)
            return newest

    def look(self, source: str) -> None:
        """Others may have pushed."""
        with self._lock:
            if source in self._newest:
                self._newest[source] = max(self._newest[source], self._log.newest_arrival(source))


class RowWriter:
    """Puts rows of pushed events into the store. The committer's; `writing` is shared.

    Attributes:
        writing: see `Pushes.writing`: by view number, up to which push its rows are written.
    """

    def __init__(self, online: OnlineAdapter) -> None:
        self._online = online
        self.writing: dict[int, int] = {}

    def put(
        self, txn: lmdb.Transaction, live: LiveView, keys: NDArray[np.uint64], rows: NDArray[np.uint64],
        meta: NDArray[np.int64], first: int, last: int,
    ) -> None:  # fmt: skip
        """Rows in the transaction of the log, of pushes `first` to `last`."""
        header = header_in(txn, live.number)
        if header is None and live.number not in self.writing:
            return
        put_rows(txn, live.number, keys, rows, meta, last)
        if self.writing.get(live.number) == first - 1:
            self.writing[live.number] = last
        if header is not None and header.sequence == first - 1:
            put_header_in(txn, live.number, replace(header, sequence=last))

    def put_remote(
        self, live: LiveView, keys: NDArray[np.uint64], rows: NDArray[np.uint64],
        meta: NDArray[np.int64], first: int, last: int,
    ) -> None:  # fmt: skip
        """Rows in a store of its own. If it fails, its header stays behind the log, so its rows do not count
        until they are materialised again; the events are durable all the same."""
        try:
            header = self._online.header(live.number)
            if header is None and live.number not in self.writing:
                return
            advanced = None
            if header is not None and header.sequence == first - 1:
                advanced = replace(header, sequence=last)
            self._online.put_many(live.number, keys, rows, meta, advanced, sequence=last, replace=True)
            if self.writing.get(live.number) == first - 1:
                self.writing[live.number] = last
        except StoreError as error:
            _log.warning("rows of pushed events could not be written: %s", error)


class Compaction:
    """Moves what was pushed from the log's batches into segments. Any thread.

    Attributes:
        running: held meanwhile.
    """

    def __init__(self, log: EventLog, settings: PushSettings) -> None:
        self._log, self._settings = log, settings
        self.running = threading.Lock()
        self._batches: dict[str, int] = {}

    def count(self, source: str, batches: int) -> None:
        """So many more were logged."""
        self._batches[source] = self._batches.get(source, 0) + batches

    def start_due(self) -> None:
        """Compact the sources with many batches on a thread of its own, unless that is under way."""
        due = [s for s, count in self._batches.items() if count >= self._settings.compact_after]
        if due and self.running.acquire(blocking=False):
            threading.Thread(target=self._work, args=(due,), name="penstock-compact", daemon=True).start()

    def _work(self, due: list[str]) -> None:
        try:
            for source in due:
                self._batches[source] = 0
                self._log.compact(source, self._settings.segment_rows)
        except PenstockError as error:
            _log.warning("the event log could not be compacted: %s", error)
        finally:
            self.running.release()

    def compact(self, source: str) -> int:
        """Move the batches of a source now. Returns how many rows were moved."""
        with self.running:
            self._batches[source] = 0
            return self._log.compact(source, self._settings.segment_rows)
