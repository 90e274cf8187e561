"""Streams that are pushed as they come: a small consumer interface, one in this process, and the ingest loop.

The positions up to which a stream was taken in are written with its events, in one transaction, and the loop
begins there: whatever is killed when, each event is taken in once. `commit` only tells the stream.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any, Protocol

from penstock.errors import (
    InternalError,
    InvalidArgumentError,
    PenstockError,
    ResourceExhaustedError,
    UnavailableError,
)
from penstock.features.event_log import EventLog
from penstock.features.pushes import Pushes

_log = logging.getLogger("penstock.features")
_RETRY_S = 0.05
Offsets = Mapping[int, int]
"""By partition: the position behind the last event."""


class StreamSource(Protocol):
    """What a stream of events must do, as a consumer of Kafka does. One thread at a time calls."""

    def seek(self, offsets: Offsets) -> None:
        """Go on at these positions; a partition that is not named begins at its start."""

    def poll(self, most: int) -> tuple[Offsets, Any] | None:
        """Up to `most` events: the positions behind them, and their columns as a push takes them.

        None if there is none now. Events of a partition come in its order.
        """

    def commit(self, offsets: Offsets) -> None:
        """The events up to these positions are durable; they need not be given again."""


class MemoryStream:
    """A stream in this process, with partitions and positions. Any thread may send and read."""

    def __init__(self, partitions: int = 1) -> None:
        if partitions < 1:
            raise InvalidArgumentError(f"partitions is {partitions}; expected at least 1")
        self._lock = threading.Lock()
        self._events: list[list[Mapping[str, Any]]] = [[] for _ in range(partitions)]
        self._at = [0] * partitions
        self.committed: dict[int, int] = {}

    def send(self, event: Mapping[str, Any], partition: int = 0) -> int:
        """Append an event; returns its position."""
        if not 0 <= partition < len(self._events):
            raise InvalidArgumentError(f"partition is {partition}; expected 0 to {len(self._events) - 1}")
        with self._lock:
            self._events[partition].append(dict(event))
            return len(self._events[partition]) - 1

    def seek(self, offsets: Offsets) -> None:
        with self._lock:
            self._at = [offsets.get(partition, 0) for partition in range(len(self._events))]

    def poll(self, most: int) -> tuple[Offsets, Any] | None:
        with self._lock:
            taken: list[Mapping[str, Any]] = []
            offsets: dict[int, int] = {}
            for partition, events in enumerate(self._events):
                part = events[self._at[partition] : self._at[partition] + most - len(taken)]
                if part:
                    taken += part
                    self._at[partition] += len(part)
                    offsets[partition] = self._at[partition]
            return (offsets, taken) if taken else None

    def commit(self, offsets: Offsets) -> None:
        with self._lock:
            self.committed.update(offsets)


class Ingest:
    """Takes a stream into a push source, on a thread of its own once it is started.

    Attributes:
        accepted: events taken in.
        error: why the loop has ended by itself, or None. An event that the source refuses ends it.
    """

    def __init__(
        self, pushes: Pushes, log: EventLog, source: str, stream: StreamSource, *, consumer: str, most: int,
        idle_s: float,
    ) -> None:  # fmt: skip
        for name, value in (("most", most), ("idle_s", idle_s)):
            if not value > 0:
                raise InvalidArgumentError(f"{name} is {value}; expected more than 0")
        if not consumer or "\0" in consumer or len(consumer) > 128:
            raise InvalidArgumentError(f"consumer is {consumer!r}; expected a name of 1 to 128 characters")
        self._pushes, self._log, self._source, self._stream = pushes, log, source, stream
        self._consumer, self._most, self._idle_s = consumer, most, idle_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="penstock-ingest", daemon=True)
        self.accepted = 0
        self.error: BaseException | None = None
        stream.seek(log.offsets(consumer))

    def start(self) -> Ingest:
        self._thread.start()
        return self

    def step(self) -> int:
        """Take in what the stream has now, up to `most` events; returns how many."""
        polled = self._stream.poll(self._most)
        if polled is None:
            return 0
        offsets, columns = polled
        named = {(self._consumer, partition): offset for partition, offset in offsets.items()}
        while True:
            try:
                count = self._pushes.push(self._source, columns, named)
                break
            except ResourceExhaustedError:
                if self._stop.wait(_RETRY_S):
                    raise
        self.accepted += count
        self._stream.commit(offsets)
        return count

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if not self.step():
                    self._stop.wait(self._idle_s)
            except (UnavailableError, InternalError) as error:  # from where what is durable ends
                _log.warning("the stream of '%s' could not be taken in: %s", self._source, error)
                self._stop.wait(self._idle_s)
                self._stream.seek(self._log.offsets(self._consumer))
            except Exception as error:
                self.error = error
                if not isinstance(error, PenstockError):
                    _log.exception("the stream of '%s' has ended", self._source)
                return

    def stop(self) -> None:
        """End the loop after the push under way. Raises the error that ended it before."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Ingest:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
