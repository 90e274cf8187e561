"""Servers for the tests: on a thread (`serve`) and as processes (`spawn`), both around the fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import uvloop
from certs import Certs
from raw_peer import Raw

from penstock.serving.auth import wall_us
from penstock.serving.server import Server, ServerSettings

_SCRIPT = Path(__file__).with_name("fake_engine.py")
_spec = importlib.util.spec_from_file_location("fake_engine", _SCRIPT)
assert _spec is not None
assert _spec.loader is not None
_fake = importlib.util.module_from_spec(_spec)
sys.modules["fake_engine"] = _fake
_spec.loader.exec_module(_fake)


class Running:
    """A server on a thread of its own."""

    def __init__(self, **settings: Any) -> None:
        self.engine = _fake.FakeEngine()
        self.core = self.engine.core
        settings.setdefault("listen", ("tcp://127.0.0.1:0",))
        settings.setdefault("goaway_grace", 0.02)
        self._clock = settings.pop("clock", wall_us)  # that tokens expire by
        self.core.clock = self._clock
        self._settings = ServerSettings(**settings)
        started: Future[list[str]] = Future()
        self.answered: Future[bool] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        self.addresses = started.result(30)
        self.address = self.addresses[0]

    def _run(self, started: Future[list[str]]) -> None:
        async def main() -> bool:
            self.loop = asyncio.get_running_loop()
            self.server = Server(self.engine, self._settings, self._clock)
            try:
                started.set_result(await self.server.start())
            except BaseException as error:
                started.set_exception(error)
                return False
            return await self.server.finished()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self.answered.set_result(runner.run(main()))

    def begin_stop(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.server.stop)

    def stop(self) -> bool:
        self.begin_stop()
        answered = self.answered.result(30)
        self._thread.join(30)
        return answered


class Spawned:
    """A server process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        settings.setdefault("listen", ["tcp://127.0.0.1:0"])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.addresses: list[str] = json.loads(line) if line else []

    def wait(self) -> tuple[int, str]:
        """Exit status and what was printed to stderr."""
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def start(**settings: Any) -> Running:
        made.append(Running(**settings))
        return made[-1]

    yield start
    for running in made:
        running.core.release()
        running.engine.gate.set()
        running.stop()


@pytest.fixture
def spawn() -> Iterator[Callable[..., Spawned]]:
    made: list[Spawned] = []

    def start(**settings: Any) -> Spawned:
        made.append(Spawned(settings))
        return made[-1]

    yield start
    for spawned in made:
        if spawned.process.poll() is None:
            spawned.process.kill()
            spawned.process.communicate()


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certs:
    return Certs(tmp_path_factory.mktemp("certs"))


@pytest.fixture
def connect() -> Iterator[Callable[..., Raw]]:
    made: list[Raw] = []

    def open_raw(address: str, tls: ssl.SSLContext | None = None) -> Raw:
        made.append(Raw(address, tls))
        return made[-1]

    yield open_raw
    for raw in made:
        raw.close()
