"""Peers' processes as the benchmark sees them, and the Redis server that one of them needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Absent
from peers import ENVIRONMENTS, install
from serving.servers import free_port

HERE = Path(__file__).resolve().parent
_START_TRIES = 200


class Worker:
    """A process of a peer's own interpreter that runs rounds on demand; it ends with its standard input."""

    def __init__(
        self, environment: str, packages: tuple[str, ...], script: str, *options: str, log: Path
    ) -> None:
        python = install(environment, packages)
        self.environment = environment
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [str(python), str(HERE / script), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )

    def ask(self, case: str, **arguments: Any) -> Any:
        """One round. Raises Absent with the peer's own words if it fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"case": case, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            words = Path(self._log.name).read_text().strip().splitlines()
            raise Absent(f"its process ended: {words[-1] if words else 'no message'}")
        reply = json.loads(line)
        if "error" in reply:
            raise Absent(reply["error"])
        return reply["ok"]

    def versions(self) -> dict[str, str]:
        return dict(json.loads((ENVIRONMENTS / self.environment / "versions.json").read_text()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A redis-server without persistence on a free port: "127.0.0.1:PORT". Raises Absent without one."""
    program = shutil.which("redis-server")
    if program is None:
        raise Absent("redis-server is not installed")
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with (folder / "redis.log").open("w") as log:
        process = subprocess.Popen([*command, "--dir", str(folder)], stdout=log, stderr=log)
    try:
        _await_redis(process, port)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _await_redis(process: subprocess.Popen[bytes], port: int) -> None:
    import socket
    import time

    for _ in range(_START_TRIES):
        if process.poll() is not None:
            raise Absent(f"redis-server ended with {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), 0.5) as probe:
                probe.sendall(b"PING\r\n")
                if probe.recv(16).startswith(b"+PONG"):
                    return
        except OSError:
            time.sleep(0.05)
    raise Absent("redis-server does not answer")
