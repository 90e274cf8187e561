"""TLS of one client socket, in memory: an OpenSSL object does not bear a reader and a writer at once, so the
synchronous client encrypts and decrypts under a lock and moves the bytes itself.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time

_READ_BYTES = 1 << 16


class Channel:
    """Encrypts and decrypts for one client socket. `seal` and `open` may be called by two threads at once."""

    def __init__(self, context: ssl.SSLContext, server_name: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._lock = threading.Lock()

    def handshake(self, sock: socket.socket, deadline: float | None) -> None:
        """Shake hands over the non-blocking `sock`; OSError (of which SSLError is one) if that fails."""
        while True:
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                done = False
            data = memoryview(self._outgoing.read())
            while data:
                try:
                    data = data[sock.send(data) :]
                except BlockingIOError:
                    _wait(sock, select.POLLOUT, deadline)
            if done:
                return
            _wait(sock, select.POLLIN, deadline)
            received = sock.recv(_READ_BYTES)
            if not received:
                raise ConnectionResetError("the server closed it during the TLS handshake")
            self._incoming.write(received)

    def seal(self, data: bytes) -> bytes:
        """Return `data` encrypted; what this returns must be sent whole, in the order of the calls."""
        with self._lock:
            self._tls.write(data)
            return self._outgoing.read()

    def open(self, data: bytes) -> tuple[bytes, bool]:
        """Return what `data` from the socket decrypts to, and whether the server said that it is done."""
        parts = []
        with self._lock:
            self._incoming.write(data)
            try:
                while part := self._tls.read(_READ_BYTES):
                    parts.append(part)
                return b"".join(parts), True
            except ssl.SSLWantReadError:
                return b"".join(parts), False
            except ssl.SSLZeroReturnError:
                return b"".join(parts), True


def _wait(sock: socket.socket, events: int, deadline: float | None) -> None:
    poll = select.poll()
    poll.register(sock, events)
    left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
    if not poll.poll(left):
        raise TimeoutError("timed out")
