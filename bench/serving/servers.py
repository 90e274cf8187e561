"""Server processes of the serving benchmark: started, awaited, watched and ended.

Each runs in a session of its own, so that its workers are found (CPU time, memory) and ended with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import Absent

from penstock import loadgen
from penstock.errors import UnavailableError
from penstock.loadgen import Load, LoadResult, Requests

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
START_SECONDS = 90


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A process and its descendants."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=None if env is None else dict(env),
                cwd=log.parent,
            )

    def pids(self) -> list[int]:
        """Of the session, and of descendants that began sessions of their own."""
        parents: dict[int, tuple[int, int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                parents[int(path.parent.name)] = (int(fields[1]), int(fields[3]))  # parent, session
        found = {pid for pid, (_, session) in parents.items() if session == self.process.pid}
        while more := {pid for pid, (parent, _) in parents.items() if parent in found} - found:
            found |= more
        return sorted(found)

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15]))  # its own and its dead children's
        return total / _TICKS

    def rss_bytes(self) -> int:
        """Resident memory of all processes; shared pages count in each."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return total * _PAGE

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def await_answers(self, address: str, requests: Requests, name: str) -> None:
        """Return when it answers rightly. Absent if it ends instead, or does not in time."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise Absent(f"{name} ended with {self.process.returncode}: {self.last_words()}")
            with contextlib.suppress(UnavailableError):
                result = loadgen.run(Load(address, warmup=0, duration=0.05, drain=5), requests)
                if result.wrong:
                    raise SystemExit(f"{name}: its scores differ from LightGBM's")
                if result.ok is not None and result.failed == 0:
                    return
            time.sleep(0.1)
        raise Absent(f"{name} did not answer within {START_SECONDS} s: {self.last_words()}")

    def stop(self) -> None:
        """SIGTERM, then an end to whatever is left of it."""
        left = self.pids()
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in {*left, *self.pids()}:
            if pid != self.process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@dataclass
class Contender:
    """A running server, and the requests that it gets."""

    name: str
    address: str
    requests: Requests
    server: Server
    pipelined: bool


@dataclass
class Measured:
    """A load's result, with the processor shares of its window: cores used by the server and the client."""

    result: LoadResult
    server_cores: float
    client_cores: float


def measure(contender: Contender, load: Load, requests: Requests | None = None) -> Measured:
    """Load it from a process of its own. SystemExit on a wrong answer: no figure of such a server counts."""
    marks: dict[str, tuple[float, float]] = {}

    def watch(phase: str, *_: Any) -> bool:
        if phase in ("window", "drain") and phase not in marks:
            marks[phase] = (time.monotonic(), contender.server.cpu_seconds())
        return True

    result = loadgen.run_apart(load, requests or contender.requests, watch)
    if result.wrong:
        raise SystemExit(f"{contender.name}: {result.wrong} of {result.due} answers are wrong")
    (begin, cpu_begin), (end, cpu_end) = marks["window"], marks["drain"]
    return Measured(result, (cpu_end - cpu_begin) / max(end - begin, 1e-9), result.cpu)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.stop()


def configuration(folder: Path, bundles: Mapping[str, Path], listen: Sequence[str], **sections: Any) -> Path:
    """An inference-config.yaml in `folder`, with a data folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "data_dir": str(folder / "data"),
        "models": {name: {"path": str(path)} for name, path in bundles.items()},
        "server": {"listen": list(listen), "limits": {"max_connections": 4096}},
        **sections,
    }
    path = folder / "inference-config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def penstock(config: Path) -> Server:
    """`penstock serve`."""
    script = "from penstock.cli import main; main()"
    command = [sys.executable, "-c", script, "serve", str(config)]
    return Server(command, config.with_name("server.log"), loadgen.environment())
