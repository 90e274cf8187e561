"""One worker process of a server with several: `python -m penstock.serving.worker SPEC`, started by the
supervisor.

SPEC is the JSON of a `WorkerOrder`. The process tells that it listens by a line on the descriptor
`status_fd`. It drains on SIGTERM or SIGINT, or when the supervisor is gone (the end of the stream
`lifeline_fd`), and ends with 0 when everything was answered, else with 1.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from penstock.config import Config, load_config
from penstock.errors import PenstockError
from penstock.serving.listeners import Listener, share_all
from penstock.serving.protocol import ADMIN_METHODS, pack_result, unpack_params
from penstock.serving.server import (
    _SWITCH_INTERVAL,
    Server,
    ServerSettings,
    _fit_files,
    reload_on_hangup,
)
from penstock.serving.worker_engine import Follower, Leader, WorkerEngine, WorkerSpec


@dataclass(frozen=True)
class WorkerOrder:
    """What a worker is told.

    Attributes:
        config: path of the configuration; listen: addresses with real ports.
        unix_fds: descriptors of listening Unix sockets, by address.
        control_fd: the listening control socket, which worker 0 accepts from.
    """

    config: str
    index: int
    generation: int
    workers: int
    listen: list[str]
    unix_fds: dict[str, int]
    control_fd: int
    status_fd: int
    lifeline_fd: int

    def text(self) -> str:
        return json.dumps(asdict(self))


class WorkerServer(Server):
    """The server of one worker: shared sockets, and `stats` that speak of all workers."""

    def __init__(self, engine: WorkerEngine, settings: ServerSettings, order: WorkerOrder) -> None:
        super().__init__(engine, settings)
        self._order = order

    def _bind(self) -> list[Listener]:
        return share_all(list(self.settings.listen), self._order.unix_fds)

    def _call(self, method: str, params: bytes) -> bytes:
        return pack_result(self._engine.call(method, unpack_params(params), admin=method in ADMIN_METHODS))


def run(engine: WorkerEngine, settings: ServerSettings, order: WorkerOrder) -> int:
    """Serve until told to stop; return the exit status."""
    import uvloop

    settings = replace(settings, max_connections=_fit_files(settings.max_connections))
    sys.setswitchinterval(_SWITCH_INTERVAL)

    async def main() -> bool:
        loop = asyncio.get_running_loop()
        server = WorkerServer(engine, settings, order)
        engine.server_stats = server.stats
        engine.telemetry.server_stats = server.stats
        reload_on_hangup(server, lambda: settings_of(load_config(order.config), order))

        def on_signal() -> None:
            if server.draining:
                os._exit(1)
            server.stop()

        def on_lifeline() -> None:
            loop.remove_reader(order.lifeline_fd)
            server.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        loop.add_reader(order.lifeline_fd, on_lifeline)
        await server.start()
        if isinstance(engine, Follower):
            engine.failed = lambda: loop.call_soon_threadsafe(server.stop)
            if engine.fault is not None:
                server.stop()
        gc.collect()
        gc.freeze()
        os.write(order.status_fd, b"listening\n")
        return await server.finished()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        answered = runner.run(main())
    return 0 if answered and getattr(engine, "fault", None) is None else 1


def settings_of(config: Config, order: WorkerOrder) -> ServerSettings:
    """The settings of this worker's server."""
    return replace(ServerSettings.from_config(config), listen=tuple(order.listen))


def main(text: str) -> int:
    """A worker's life; returns its exit status."""
    given: dict[str, Any] = json.loads(text)
    order = WorkerOrder(**given)
    logging.basicConfig(format=f"penstock worker {order.index}: %(message)s")
    # Until it serves, a signal ends it: there is nothing to answer.
    try:
        config = load_config(order.config)
        spec = WorkerSpec(order.index, order.generation, order.workers)
        engine: WorkerEngine
        if order.index == 0:
            engine = Leader(config, spec, socket.socket(fileno=order.control_fd))
        else:
            engine = Follower(config, spec)
        try:
            return run(engine, settings_of(config, order), order)
        finally:
            engine.close()
    except PenstockError as error:
        print(f"penstock: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
