"""The server's side of one connection: between its transport and its native session.

Replies on a plain socket are sent by the native core; the transport gets what the socket does not take at
once, and everything of a connection whose bytes it must encrypt. Only the loop thread runs this. `Server`
decides; a Peer moves bytes and keeps the back-pressure.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.serving.server import Server


class Peer(asyncio.BufferedProtocol):
    """One connection: its transport and its native side."""

    __slots__ = (
        "_received",
        "_server",
        "blocked",
        "connection",
        "direct",
        "eof",
        "get_buffer",
        "lost",
        "paused",
        "stalled_bytes",
        "stalled_since",
        "transport",
    )

    def __init__(self, server: Server) -> None:
        settings = server.settings
        self._server = server
        self.connection = server.core.connection(
            settings.max_message_bytes,
            settings.max_depth,
            settings.max_in_flight,
            settings.max_output_bytes,
        )
        # Straight into the native buffer, without a Python frame.
        self.get_buffer = self.connection.get_buffer  # type: ignore[method-assign]
        self._received = self.connection.received
        self.transport: asyncio.Transport
        self.direct = False  # the native core sends the replies
        self.blocked = False  # the transport holds bytes that the peer has not taken
        self.paused = False  # reading stopped until the peer takes its replies
        self.eof = False  # the peer has sent its last request
        self.lost = False
        self.stalled_since = 0.0
        self.stalled_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.set_write_buffer_limits(high=0)  # pause_writing tells whenever a write is not all sent
        if transport.get_extra_info("sslcontext") is None:
            self.direct = self.connection.attach(transport.get_extra_info("socket").fileno())
        self._server.add(self)

    def buffer_updated(self, nbytes: int) -> None:
        others = self._received(nbytes)
        if others:
            self._server.dispatch(self, others)
            self.flush()
        elif not self.direct:
            self.flush()

    def flush(self) -> None:
        """Send the replies that wait, one buffer at a time."""
        connection = self.connection
        if not self.blocked:
            connection.send_output()
        while not self.blocked and (data := connection.take_output()) is not None:
            self.transport.write(data)
            if not self.blocked:
                connection.output_sent()
        if not self.blocked:
            if self.eof or connection.closed or self._server.draining:
                self._server.settle(self)
        elif not self.paused:
            limit = self._server.settings.pause_output_bytes
            if connection.closed or connection.pending_output_bytes > limit:
                self.paused = True
                self._server.slow_readers += 1
                self.transport.pause_reading()

    def pause_writing(self) -> None:
        self.blocked = True
        self._server.stalled(self)

    def resume_writing(self) -> None:
        self.blocked = False
        self.connection.output_sent()
        self.flush()
        if self.paused and not self.blocked:
            self.paused = False
            if not self.connection.closed and not self.eof:
                self.transport.resume_reading()

    def eof_received(self) -> bool:
        self.eof = True
        self.connection.watch()
        return not self.idle  # the replies that are due still go out

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._server.remove(self)

    @property
    def idle(self) -> bool:
        """Everything that was asked is answered and sent."""
        return not self.blocked and not self.connection.in_flight and not self.connection.pending_output_bytes


class Farewell(asyncio.BufferedProtocol):
    """A connection that is over: sends its last bytes, then discards what comes until the peer hangs up.

    Closing at once would reset the connection and could take the last reply from the peer.
    """

    _discarded = bytearray(1 << 16)

    def __init__(self, server: Server, last_words: bytes = b"") -> None:
        self._server = server
        self._last_words = last_words
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        if not self._server.linger(self):
            transport.abort()
            return
        if self._last_words:
            transport.write(self._last_words)
        if transport.can_write_eof():
            transport.write_eof()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._discarded

    def buffer_updated(self, nbytes: int) -> None:
        return

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.gone(self)
