"""Servers of a few lines for the tests of the load generator: MessagePack-RPC, HTTP/1.1 and bare bytes.

Each runs on an event loop in a thread of its own. What it answers is the test's: a function of the request.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np


@dataclass
class Link:
    """One connection as the server sees it."""

    transport: asyncio.Transport
    number: int
    waiting: list[Any] = field(default_factory=list)  # requests that were kept back
    seen: int = 0
    most: int = 0  # in flight at once


class Server(threading.Thread):
    """Hands each protocol message to `answer(link, message)`, which returns bytes to write, or None.

    `cut` takes a bytearray and returns one message from its front, or None.
    """

    def __init__(
        self,
        cut: Callable[[bytearray], Any],
        answer: Callable[[Link, Any], bytes | None],
        path: str | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self.cut, self.answer, self.path = cut, answer, path
        self.links: list[Link] = []
        self.faults: list[BaseException] = []
        self.loop = asyncio.new_event_loop()
        self._ready = threading.Event()

    def run(self) -> None:
        outer = self

        class Peer(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.data = bytearray()
                self.link = Link(transport, len(outer.links))  # type: ignore[arg-type]
                outer.links.append(self.link)

            def data_received(self, data: bytes) -> None:
                self.data += data
                out = []
                try:
                    while (message := outer.cut(self.data)) is not None:
                        self.link.seen += 1
                        out.append(outer.answer(self.link, message) or b"")
                except BaseException as error:
                    outer.faults.append(error)
                    self.link.transport.abort()
                self.link.transport.write(b"".join(out))

        async def serve() -> None:
            if self.path is None:
                self._server = await self.loop.create_server(Peer, "127.0.0.1", 0)
                self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
            else:
                self._server = await self.loop.create_unix_server(Peer, self.path)
                self.address = f"unix://{self.path}"
            self._ready.set()

        self.loop.run_until_complete(serve())
        self.loop.run_forever()
        for link in self.links:
            link.transport.abort()
        self._server.close()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()

    def __enter__(self) -> Server:
        self.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.join(30)
        assert not self.faults, self.faults


def cut_rpc(data: bytearray) -> Any:
    """(msgid, method, params)."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    try:
        kind, msgid, method, params = unpacker.unpack()
    except msgpack.OutOfData:
        return None
    assert kind == 0
    del data[: unpacker.tell()]
    return msgid, method, params


def cut_http(data: bytearray) -> Any:
    """(head, body)."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(data[:end]).decode()
    length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("Content-Length"))
    if len(data) < end + 4 + length:
        return None
    body = bytes(data[end + 4 : end + 4 + length])
    del data[: end + 4 + length]
    return head, body


def cut_size(size: int) -> Callable[[bytearray], bytes | None]:
    """Messages of `size` bytes."""

    def cut(data: bytearray) -> bytes | None:
        if len(data) < size:
            return None
        message = bytes(data[:size])
        del data[:size]
        return message

    return cut


def scores_reply(msgid: int, scores: Any) -> bytes:
    """As a Penstock server answers predict_vectors."""
    result = {"scores": np.asarray(scores, "<f4").tobytes(), "version": "1", "request_ids": [msgid]}
    return bytes(msgpack.packb([1, msgid, None, result]))


def error_reply(msgid: int, code: str) -> bytes:
    error = {"code": code, "message": "no", "retryable": False}
    return bytes(msgpack.packb([1, msgid, error, None]))
