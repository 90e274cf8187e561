"""A bare uvloop echo server: what a round trip costs when nothing is decoded or computed."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvloop


class Echo(asyncio.Protocol):
    """Sends back what it receives."""

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def main(path: str, port: int) -> None:
    """Serve a Unix socket at `path` and TCP on 127.0.0.1:`port`; say so with one line."""
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_unix_server(Echo, path),
        await loop.create_server(Echo, "127.0.0.1", port),
    ]
    print("listening", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
