"""Replay flights through a server's socket in the order of their time, as if each hour were now.

An hour goes like this: its events are pushed, landings, departures that fall due, weather; then every flight
of the hour is asked for, over all connections at once, each with its own `now`, up to which alone events
count; when all are answered, the labels that have become known by the hour's end are sent. Then the next
hour. So no request can see what was not yet known, and the server works as it would have that day.

One event loop; the request id of a flight is its row number.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from penstock.errors import PenstockError, UnavailableError
from penstock.examples.flights.data import HOUR_US, STREAMS
from penstock.examples.flights.train import ENTITIES, MODEL, Span
from penstock.serving.async_client import AsyncClient

I64 = NDArray[np.int64]
_PUSH_ROWS = 4096  # of one call
_TIMEOUT_S = 60.0  # far beyond any deadline: a server that hangs ends the run


@dataclass
class Tally:
    """What came back. `rows` and `scores` are of the flights answered, in one order; `waits_ms` is of all;
    `pushed` counts events."""

    requests: int = 0
    ok: int = 0
    labels: int = 0
    matched: int = 0
    serving_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    waits_ms: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    pushed: int = 0

    @property
    def rows_per_s(self) -> float:
        """Answers a second while requests were out, without pushes and labels."""
        return self.ok / self.serving_s if self.serving_s else 0.0

    def wait_ms(self, quantile: float) -> float:
        """A quantile of the time from a request's write to its reply, seen by the client."""
        return float(np.quantile(self.waits_ms, quantile)) if self.waits_ms else float("nan")


class _Labels:
    """The labels of flights asked for, handed out as they become known."""

    def __init__(self, flights: pa.Table) -> None:
        landed = flights.filter(flights["late"].is_valid()).sort_by("arrival")
        self._known: I64 = pc.cast(landed["arrival"], pa.int64()).to_numpy()
        self._rows: I64 = landed["row"].to_numpy()
        self._late: I64 = landed["late"].cast(pa.int64()).to_numpy()
        self._next = 0

    def until(self, now_us: int) -> tuple[list[int], list[int], list[int]]:
        """Request ids, labels and times of those known by `now_us` that were not handed out yet."""
        end = int(np.searchsorted(self._known, now_us, side="right"))
        part = slice(self._next, end)
        self._next = max(end, self._next)
        return self._rows[part].tolist(), self._late[part].tolist(), self._known[part].tolist()


async def _within(work: Awaitable[Any], what: str) -> None:
    try:
        await asyncio.wait_for(work, _TIMEOUT_S)
    except TimeoutError:
        raise UnavailableError(f"{what}: the server gave no answer in {_TIMEOUT_S:g} s") from None


class _Events:
    """A stream's events, handed out as time goes on."""

    def __init__(self, table: pa.Table, time: str) -> None:
        self._table = table
        self._times: I64 = pc.cast(table[time], pa.int64()).to_numpy()
        self._next = 0

    def until(self, end_us: int) -> Iterator[pa.Table]:
        """Those before `end_us` that were not handed out yet, in parts."""
        end = int(np.searchsorted(self._times, end_us, side="left"))
        while self._next < end:
            part = self._table.slice(self._next, min(_PUSH_ROWS, end - self._next))
            self._next += part.num_rows
            yield part


class Replay:
    """Drives one server over `connections` pipelined connections. Use as an asynchronous context manager.

    Nothing is tried twice: an error reply counts as one. A server that is gone ends the run with its error.
    """

    def __init__(self, address: str, events: Mapping[str, pa.Table], connections: int = 16) -> None:
        """`events`: what is still to be pushed, by source, in order of time."""
        self._events = {name: _Events(table, STREAMS[name]) for name, table in events.items()}
        self.tally = Tally()
        self.client = AsyncClient(address, pool_size=connections, retries=0)
        self._connections = connections

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(self.client.health() for _ in range(self._connections)))  # open all of them
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def run(
        self, flights: pa.Table, span: Span, advance: Callable[[int], None] = lambda n: None
    ) -> None:
        """Replay the flights of `span`, then send the labels that come after it.

        Every label known two days after the span's end is sent; `advance` is told the flights answered, hour
        by hour.
        """
        asked = span.of(flights)
        now = pc.cast(asked["event_timestamp"], pa.int64()).to_numpy()
        entities = asked.select(list(ENTITIES)).to_pylist()
        rows = asked["row"].to_pylist()
        labels = _Labels(asked)
        await self._push(span.start_us)
        for hour in range(span.start_us, span.end_us, HOUR_US):
            first, last = np.searchsorted(now, [hour, hour + HOUR_US]).tolist()
            part = slice(first, last)
            await self._push(hour + HOUR_US)
            await self._ask(entities[part], rows[part], now[part].tolist())
            advance(last - first)
            await self._label(labels, hour + HOUR_US)
        await self._label(labels, span.end_us + 48 * HOUR_US)

    async def _ask(self, entities: list[dict[str, Any]], rows: list[int], now: list[int]) -> None:
        begun = time.perf_counter()
        asked = [self._predict(*each) for each in zip(entities, rows, now, strict=True)]
        await _within(asyncio.gather(*asked), "predictions")
        self.tally.serving_s += time.perf_counter() - begun

    async def _predict(self, entity: dict[str, Any], row: int, now: int) -> None:
        tally = self.tally
        tally.requests += 1
        sent = time.perf_counter()
        try:
            made = await self.client.predict(MODEL, entity, request_id=row, now=now)
        except PenstockError as error:
            tally.errors[error.code] += 1
        else:
            tally.ok += 1
            tally.rows.append(row)
            tally.scores.append(float(made.scores[0]))
        tally.waits_ms.append((time.perf_counter() - sent) * 1e3)

    async def _push(self, end_us: int) -> None:
        for name, events in self._events.items():
            for part in events.until(end_us):
                await _within(self.client.push(name, part.to_pydict()), "push")
                self.tally.pushed += part.num_rows

    async def _label(self, labels: _Labels, now_us: int) -> None:
        ids, values, times = labels.until(now_us)
        if ids:
            counts = await self.client.label(ids, values, times)
            self.tally.labels += len(ids)
            self.tally.matched += counts["matched"]
