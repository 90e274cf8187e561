"""Accepts TLS connections: each shakes hands in a task of its own and is a peer only when it has.

A handshake counts against the limits of connections from the first byte, and ends after `handshake_timeout`.
Above a limit the connection is closed unheard: a word in the clear would mean nothing to the other side, and
a handshake to be refused after it would cost what the limit is there to save. Loop thread only.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from penstock.serving.listeners import Listener
from penstock.serving.peer import Peer

if TYPE_CHECKING:
    from penstock.serving.server import Server

_MOST_AT_ONCE = 64  # before the loop gets to other things
_OUT_OF_FILES = 0.5  # seconds until accepting is tried again


class TlsAcceptor:
    """The TLS side of one listening socket."""

    def __init__(self, server: Server, listener: Listener, linger: float) -> None:
        """`linger`: seconds that a peer has to answer the end of its connection."""
        self._server = server
        self._linger = linger
        self._loop = asyncio.get_running_loop()
        self._socket = listener.socket
        self._socket.setblocking(False)
        self._tasks: set[asyncio.Task[None]] = set()
        self._resume: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """Accept nothing more; who has not shaken hands yet is dropped. The socket is the caller's."""
        self._loop.remove_reader(self._socket)
        if self._resume is not None:
            self._resume.cancel()
        for task in self._tasks:
            task.cancel()

    def _listen(self) -> None:
        self._resume = None
        self._loop.add_reader(self._socket, self._ready)

    def _ready(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                sock, where = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(self._socket)
                self._resume = self._loop.call_later(_OUT_OF_FILES, self._listen)
                return
            if not self._server.has_room(where[0]):
                self._server.refused += 1
                sock.close()
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._server.handshaking += 1
            task = self._loop.create_task(self._shake(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _shake(self, sock: socket.socket) -> None:
        peer = Peer(self._server)
        try:
            await self._loop.connect_accepted_socket(
                lambda: peer,
                sock,
                ssl=self._server.tls,
                ssl_handshake_timeout=self._server.settings.handshake_timeout,
                ssl_shutdown_timeout=self._linger,
            )
            done = peer.made  # the peer may have hung up in the middle, which is no exception
        except OSError:  # of which TLS errors and time-outs are kinds
            done = False
        finally:
            self._server.handshaking -= 1
        if not done:
            self._server.handshakes_failed += 1
