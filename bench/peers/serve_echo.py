"""A bare uvloop server that computes nothing: what the round trip alone costs.

Each request of SIZE bytes is answered with its own bytes, or with REPLY bytes of a fixed pattern: the replies
of the server beside it have another length than its requests.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import uvloop


class Echo(asyncio.Protocol):
    """Sends back what it receives."""

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Answer(asyncio.Protocol):
    """Sends the reply as often as whole requests have arrived."""

    def __init__(self, size: int, reply: bytes) -> None:
        self.size, self.reply, self.pending = size, reply, 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        requests, self.pending = divmod(self.pending + len(data), self.size)
        if requests:
            self.transport.write(self.reply * requests)


def pattern(size: int) -> bytes:
    """The bytes of a fixed reply."""
    return bytes(range(251)) * (size // 251) + bytes(range(size % 251))


async def main(path: str, port: int, size: int, reply: int) -> None:
    """Serve a Unix socket at `path` and TCP on 127.0.0.1:`port`."""
    loop = asyncio.get_running_loop()
    make = Echo if reply == 0 else lambda: Answer(size, pattern(reply))
    servers = [
        await loop.create_unix_server(make, path),
        await loop.create_server(make, "127.0.0.1", port),
    ]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--size", type=int, default=1, help="bytes of a request")
    parser.add_argument("--reply", type=int, default=0, help="bytes of a reply; 0: the request's own")
    given = parser.parse_args()
    uvloop.run(main(given.path, given.port, given.size, given.reply))
