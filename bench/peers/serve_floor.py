"""The floor: uvloop, msgpack and onnxruntime in thirty lines, without features, limits, deadlines or metrics.

It batches what arrived in one turn of the loop, up to 64 rows, and answers MessagePack-RPC with bare scores.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import msgpack
import numpy as np
import uvloop
from session import FEATURES, open_session, score

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--port", type=int, required=True)
given = parser.parse_args()
session = open_session(given.model)
waiting: list[tuple[Any, int, bytes]] = []


def run() -> None:
    while waiting:
        batch = waiting[:64]
        del waiting[:64]
        rows = np.frombuffer(b"".join(row for _, _, row in batch), np.float32).reshape(-1, FEATURES)
        out: dict[Any, list[bytes]] = {}
        for (transport, msgid, _), value in zip(batch, score(session, rows).tolist()):
            out.setdefault(transport, []).append(msgpack.packb([1, msgid, None, value]))
        for transport, replies in out.items():
            transport.write(b"".join(replies))


class Peer(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport, self.unpacker = transport, msgpack.Unpacker()

    def data_received(self, data: bytes) -> None:
        self.unpacker.feed(data)
        if not waiting:
            asyncio.get_running_loop().call_soon(run)
        waiting.extend((self.transport, msgid, params[1]) for _, msgid, _, params in self.unpacker)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Peer, "127.0.0.1", given.port)
    await server.serve_forever()


uvloop.run(main())
