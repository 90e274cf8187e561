"""Replay flights through a server's socket in the order of their time, as if each hour were now.

An hour goes like this: every flight of the hour is asked for, over all connections at once, each with its own
`now`; when all are answered, the labels that have become known by the hour's end are sent, and the server
materialises as of that end. Then the next hour. So no request can see what was not yet known, and the server
works as it would have that day.

One event loop; the request id of a flight is its row number.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self
from urllib.parse import urlsplit

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from penstock.errors import PenstockError, UnavailableError, from_wire
from penstock.examples.flights.data import HOUR_US
from penstock.examples.flights.train import ENTITIES, MODEL, Span

I64 = NDArray[np.int64]
_REPLY_TIMEOUT_S = 60.0  # far beyond any deadline: a server that hangs ends the run


class Connection(asyncio.Protocol):
    """A pipelined MessagePack-RPC connection: any number of calls wait for their replies at once."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(raw=False, strict_map_key=False)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._next = 0
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, address: str) -> Self:
        """Connect to "tcp://host:port" or "unix:///path"."""
        loop = asyncio.get_running_loop()
        url = urlsplit(address)
        if url.scheme == "unix":
            _, protocol = await loop.create_unix_connection(cls, url.path)
        else:
            _, protocol = await loop.create_connection(cls, url.hostname or "", url.port or 0)
        return protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def call(self, method: str, *params: Any) -> asyncio.Future[Any]:
        """Send a request now; the future gives its result, or raises the server's error."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.closed:
            future.set_exception(UnavailableError("the server has closed the connection"))
            return future
        assert self._transport is not None
        msgid, self._next = self._next, self._next + 1
        self._waiting[msgid] = future
        self._transport.write(msgpack.packb([0, msgid, method, params]))
        return future

    def data_received(self, data: bytes) -> None:
        self._unpacker.feed(data)
        for message in self._unpacker:
            if message[0] != 1:
                continue  # a notification, such as goaway
            future = self._waiting.pop(message[1])
            if future.done():
                continue
            if message[2] is None:
                future.set_result(message[3])
            else:
                future.set_exception(from_wire(message[2]))

    def connection_lost(self, exc: Exception | None) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(UnavailableError("the server has closed the connection"))
        self._waiting.clear()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


@dataclass
class Tally:
    """What came back. `rows`, `now` and `scores` are of the flights answered, `waits_ms` of all of them."""

    requests: int = 0
    ok: int = 0
    labels: int = 0
    matched: int = 0
    serving_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    waits_ms: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def rows_per_s(self) -> float:
        """Answers a second while requests were out, without labels and materialising."""
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


class Replay:
    """Drives one server. Use as an asynchronous context manager."""

    def __init__(self, address: str, connections: int = 16) -> None:
        self.tally = Tally()
        self._address = address
        self._count = connections
        self._connections: list[Connection] = []

    async def __aenter__(self) -> Self:
        for _ in range(self._count):
            self._connections.append(await Connection.open(self._address))
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()

    async def call(self, method: str, *params: Any) -> Any:
        """Call a method that is not part of the load."""
        return await asyncio.wait_for(self._connections[0].call(method, *params), _REPLY_TIMEOUT_S)

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
        await self.call("materialize", span.start_us)
        for hour in range(span.start_us, span.end_us, HOUR_US):
            first, last = np.searchsorted(now, [hour, hour + HOUR_US])
            part = slice(int(first), int(last))
            await self._ask(entities[part], rows[part], now[part].tolist())
            advance(part.stop - part.start)
            await self._label(labels, hour + HOUR_US)
            await self.call("materialize", hour + HOUR_US)
        await self._label(labels, span.end_us + 48 * HOUR_US)

    async def _ask(self, entities: list[dict[str, Any]], rows: list[int], now: list[int]) -> None:
        begun = time.perf_counter()
        waiting = []
        for i, (entity, row, at) in enumerate(zip(entities, rows, now, strict=True)):
            sent = time.perf_counter()
            connection = self._connections[i % self._count]
            future = connection.call("predict", MODEL, entity, None, {"request_id": row, "now": at})
            future.add_done_callback(partial(self._answered, sent, row))
            waiting.append(future)
        if not waiting:
            return
        self.tally.requests += len(waiting)
        await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), _REPLY_TIMEOUT_S)
        self.tally.serving_s += time.perf_counter() - begun
        if any(connection.closed for connection in self._connections):
            raise UnavailableError("the server closed a connection")

    def _answered(self, sent: float, row: int, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            return
        self.tally.waits_ms.append((time.perf_counter() - sent) * 1e3)
        error = future.exception()
        if error is None:
            self.tally.ok += 1
            self.tally.rows.append(row)
            self.tally.scores.append(future.result()["scores"][0])
        else:
            self.tally.errors[error.code if isinstance(error, PenstockError) else "INTERNAL"] += 1

    async def _label(self, labels: _Labels, now_us: int) -> None:
        ids, values, times = labels.until(now_us)
        if ids:
            counts = await self.call("label", ids, values, times)
            self.tally.labels += len(ids)
            self.tally.matched += counts["matched"]
