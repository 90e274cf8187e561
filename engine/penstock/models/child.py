"""The parent's side of an entry point that runs in a child process: start, watch, restart, stop.

One supervisor thread per model starts every child (the kernel ends a child with the thread that started it,
so that thread lives as long as the model), writes what the child prints to the log, and replaces it when it
dies, hangs or breaks the protocol. Runs go through `channel`, in C++, without this thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from penstock import _core
from penstock.errors import FailedPreconditionError

_log = logging.getLogger("penstock.models")
_LINE_BYTES = 4096  # a longer line of the child's output is cut into several
_EXIT_WAIT_S = 1.0
_PACKET_BYTES = 1 << 16
# Modules are found where this process finds them.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])['path']; "
    "from penstock.models.child_main import main; main()"
)


@dataclass(frozen=True)
class ChildSettings:
    """Seconds: for a child to become ready, for one run, the first and the longest pause before a restart.

    A child that was ready for `steady` seconds starts the pauses anew.
    """

    start_timeout: float = 30.0
    run_timeout: float = 2.0
    restart_backoff: float = 0.1
    restart_backoff_max: float = 10.0
    steady: float = 10.0


@dataclass(frozen=True)
class ChildSpec:
    """What a child runs. `width`: columns of its scores; `column`, `probability`: of `_core.ChildChannel`."""

    name: str
    entry_point: str
    folder: Path
    n_features: int
    width: int
    column: int | None
    probability: bool


class _Child:
    """One process. Of the supervisor thread alone."""

    def __init__(self, spec: ChildSpec, channel: _core.ChildChannel | None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            scores, text, size = _core.ChildChannel.layout(spec.n_features, spec.width)
            arguments = {
                "entry_point": spec.entry_point,
                "folder": str(spec.folder),
                "n_features": spec.n_features,
                "width": None if channel is None else spec.width,
                "socket": theirs.fileno(),
                "memory": None if channel is None else channel.memory_fd,
                "scores": scores,
                "text": text,
                "bytes": size,
                "parent": os.getpid(),
                "path": [entry for entry in sys.path if entry],
            }
            passed = [theirs.fileno()] + ([] if channel is None else [channel.memory_fd])
            try:
                # -P: the working folder is no place to import from; -B: a bundle's folder never changes.
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-B", "-c", _PROGRAM, json.dumps(arguments)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=passed,
                )
            except BaseException:
                ours.close()
                raise
        assert self.process.stdout is not None
        self.socket: socket.socket | None = ours
        self._name = f"model '{spec.name}' process {self.process.pid}"
        self._output = self.process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._output_open = True
        self._line = b""
        self.pidfd = -1
        with contextlib.suppress(OSError):  # an old kernel: the socket's end says it too
            self.pidfd = os.pidfd_open(self.process.pid)

    def wait(self, others: list[int], seconds: float | None) -> list[int]:
        """Wait until one of `others` is readable, the process is dead (its pidfd) or time is up."""
        poll = select.poll()
        for fd in (*others, self.pidfd):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        if self._output_open:
            poll.register(self._output.fileno(), select.POLLIN)
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            ready = [fd for fd, _ in poll.poll(None if left is None else left * 1000)]
            if self._output.fileno() in ready:
                ready.remove(self._output.fileno())
                self._read_output()
                if not self._output_open:
                    poll.unregister(self._output.fileno())
                    if self.pidfd < 0:
                        return ready
            if ready or (until is not None and time.monotonic() >= until):
                return ready

    def _read_output(self) -> None:
        try:
            data = os.read(self._output.fileno(), _PACKET_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._output_open = False
        *lines, self._line = (self._line + data).split(b"\n")
        if len(self._line) > _LINE_BYTES or (self._line and not data):
            lines.append(self._line)
            self._line = b""
        for line in lines:
            for start in range(0, max(1, len(line)), _LINE_BYTES):
                text = line[start : start + _LINE_BYTES].decode(errors="replace").rstrip()
                _log.info("%s: %s", self._name, text)

    def ending(self) -> str:
        """How the process ended, of one that is about to."""
        try:
            status = self.process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            return "its socket is closed"
        return f"signal {-status}" if status < 0 else f"exit status {status}"

    def end(self, grace: float) -> None:
        """Close its socket, give it `grace` seconds, kill it; reap it and log the rest of its output."""
        if self.socket is not None:
            self.socket.close()
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for _ in range(64):  # what its own children print after it is not waited for
            before = self._line
            if not self._output_open:
                break
            self._read_output()
            if self._line == before:
                break
        self._output.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)


class ChildProcess:
    """An entry point in a child process, from the moment it is made until `close`. Any thread.

    Raises FailedPreconditionError where the first child does not become ready.
    """

    def __init__(self, spec: ChildSpec, settings: ChildSettings, *, probe: bool = False) -> None:
        self._spec, self._settings, self._probe = spec, settings, probe
        self.channel = _core.ChildChannel(
            spec.n_features,
            spec.width,
            column=spec.column,
            probability=spec.probability,
            run_timeout_s=settings.run_timeout,
        )
        self.width = 0  # of its scores, once ready
        self.pid: int | None = None
        self.restarts = 0
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopping = False
        self._first = threading.Event()
        self._fault: str | None = None
        self._thread = threading.Thread(target=self._supervise, name=f"child-{spec.name}", daemon=True)
        self._thread.start()
        self._first.wait()
        if self._fault is not None:
            self.close()
            raise FailedPreconditionError(f"model '{spec.name}': {self._fault}")

    def resident_bytes(self) -> int:
        """Resident memory of the child, bytes; 0 while there is none."""
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """End the child and the supervisor. Idempotent; one caller at once."""
        self.channel.close()
        if self._stopping:
            return
        self._stopping = True
        os.write(self._stop_write, b"x")
        self._thread.join()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def _supervise(self) -> None:
        pause = self._settings.restart_backoff
        while not self._stopping:
            started = time.monotonic()
            fault, started_in = self._live_once(pause)
            if not self._first.is_set():
                self._fault = fault
                self._first.set()
                return
            if self._stopping or self._probe:
                return
            if time.monotonic() - started > self._settings.steady:
                pause = self._settings.restart_backoff
            _log.warning("model '%s': %s; it starts again in %g s", self._spec.name, fault, pause)
            self.channel.detach(fault)
            self.channel.expect_after(pause + started_in)
            self._wait_stop(pause)
            pause = min(2 * pause, self._settings.restart_backoff_max)
            self.restarts += 1

    def _live_once(self, pause: float) -> tuple[str, float]:
        """Start a child and watch it until it must be replaced; returns why, and how long its start took."""
        started = time.monotonic()
        try:
            child = _Child(self._spec, None if self._probe else self.channel)
        except OSError as error:
            return f"its process cannot be started: {error}", 0.0
        grace = 0.0
        try:
            fault = self._wait_ready(child)
            started_in = time.monotonic() - started
            if fault is not None:
                return fault, started_in
            if self._probe:
                grace = _EXIT_WAIT_S
                return "", started_in
            self.pid = child.process.pid
            assert child.socket is not None
            pidfd = -1 if child.pidfd < 0 else os.dup(child.pidfd)
            self.channel.read_alarm()
            self.channel.attach(child.socket.detach(), pidfd, pause + started_in)
            child.socket = None
            self._first.set()
            ready = child.wait([self.channel.alarm_fd, self._stop_read], None)
            if self._stop_read in ready:
                grace = _EXIT_WAIT_S
                return "the model was unloaded", started_in
            if self.channel.alarm_fd in ready and child.pidfd not in ready:
                return self.channel.reason, started_in
            return f"its process died ({child.ending()})", started_in
        finally:
            if not self._probe:
                self.channel.detach("its process is being replaced")
            self.pid = None
            child.end(grace)

    def _wait_ready(self, child: _Child) -> str | None:
        """Wait for the child's word that it is ready; returns what is wrong, or None."""
        assert child.socket is not None
        ready = child.wait([child.socket.fileno(), self._stop_read], self._settings.start_timeout)
        if self._stop_read in ready:
            return "stopped"
        if not ready:
            return f"its process was not ready within {self._settings.start_timeout:g} s"
        try:
            packet = child.socket.recv(_PACKET_BYTES, socket.MSG_DONTWAIT)
        except OSError:
            packet = b""
        if not packet:
            return f"its process died before it was ready ({child.ending()})"
        said = json.loads(packet)
        if "error" in said:
            return f"its entry point {self._spec.entry_point} failed: {said['error']}"
        self.width = int(said["width"])
        if self._probe:
            self._first.set()
        return None

    def _wait_stop(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._stop_read, select.POLLIN)
        poll.poll(seconds * 1000)
