"""A peer with nothing but a socket and msgpack."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import msgpack

from penstock.serving.protocol import parse_address


class Raw:
    """Writes bytes and reads messages."""

    def __init__(self, address: str, tls: ssl.SSLContext | None = None) -> None:
        """`tls`: for a "tls://" address, whose host must be in the certificate."""
        where = parse_address(address)
        if where.path is not None:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(where.path)
        else:
            self.socket = socket.create_connection((where.host or "", where.port))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(30)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname=where.host)
        self._unpacker = msgpack.Unpacker(max_buffer_size=0)

    def send(self, *messages: Any) -> None:
        self.socket.sendall(b"".join(msgpack.packb(message) for message in messages))

    def read(self) -> Any:
        """The next message; None at the end of the stream."""
        while True:
            try:
                return next(self._unpacker)
            except StopIteration:
                data = self.socket.recv(1 << 16)
                if not data:
                    return None
                self._unpacker.feed(data)

    def close(self) -> None:
        self.socket.close()
