"""The server's side of one connection: between its transport and its native session.

Replies on a plain socket are sent by the native core; the transport gets what the socket does not take at
once, and everything of a connection whose bytes it must encrypt. Only the loop thread runs this. `Server`
decides; a Peer moves bytes and keeps the back-pressure.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from penstock.credentials import Grant
    from penstock.serving.server import Server

_TLS_PIECE = 1 << 16
_BYTES_ACKED = slice(120, 128)  # of the kernel's struct tcp_info


class Peer(asyncio.BufferedProtocol):
    """One connection: its transport and its native side."""

    __slots__ = (
        "_received",
        "_server",
        "address",
        "auth_failures",
        "blocked",
        "calls",
        "connection",
        "direct",
        "eof",
        "get_buffer",
        "grant",
        "lost",
        "made",
        "over",
        "paused",
        "stalled_bytes",
        "stalled_since",
        "tls",
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
        self.over = False  # no more requests are taken from it, though it might send some
        self.made = False
        self.tls = False
        self.address: str | None = None  # of its host
        self.grant: Grant | None = None
        self.auth_failures = 0
        self.calls = 0  # of other methods than predictions, that wait or run
        self.stalled_since = 0.0
        self.stalled_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.made = True
        self.tls = transport.get_extra_info("sslcontext") is not None
        self.transport = cast(asyncio.Transport, _TlsTransport(transport)) if self.tls else transport
        where = transport.get_extra_info("peername")
        self.address = where[0] if isinstance(where, tuple) else None
        # pause_writing tells whenever a write is not all sent. TLS pauses at its limit, others above it.
        transport.set_write_buffer_limits(high=1 if self.tls else 0, low=0)
        if not self.tls:
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
                self.connection.touch()
                self.transport.resume_reading()

    def eof_received(self) -> bool:
        self.eof = True
        self.connection.watch()
        # The replies that are due still go out; over TLS only those that are there already.
        return not self.tls and not self.idle

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._server.remove(self)

    def untaken_bytes(self) -> int:
        """Return a count that falls by the bytes that the peer takes while it is blocked."""
        if not self.tls:
            return self.transport.get_write_buffer_size()
        # What TLS has passed on is out of its sight: the kernel knows what arrived.
        sock = self.transport.get_extra_info("socket")
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.stop)
        return -int.from_bytes(info[_BYTES_ACKED], sys.byteorder)

    @property
    def idle(self) -> bool:
        """Everything that was asked is answered and sent."""
        return not self.blocked and not self.connection.in_flight and not self.connection.pending_output_bytes


class _TlsTransport:
    """Writes in pieces: TLS tells that a peer takes nothing only by what is written after that.

    It hands all it has to the socket's transport, however much that holds already, and counts the rest.
    """

    __slots__ = ("_inner", "write_one")

    def __init__(self, inner: asyncio.Transport) -> None:
        self._inner = inner
        self.write_one = inner.write

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _TLS_PIECE):
            self.write_one(view[start : start + _TLS_PIECE])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


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
        else:  # TLS: sends what waits and its own goodbye
            transport.close()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._discarded

    def buffer_updated(self, nbytes: int) -> None:
        return

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.gone(self)
