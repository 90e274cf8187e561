"""The parent of a server with several worker processes.

It holds the data folder's lock and reserves the addresses, starts worker 0 and then the others, and serves
nothing itself. A worker that dies is started again, after a pause that grows while it keeps dying; the
locks that it held in the shared feature caches are given up first, so that no other worker waits for them.
Workers that die more than `max_restarts` times in `restart_window` seconds, all together, end the server,
as does one that never listened.

SIGTERM and SIGINT are passed on: every worker drains, worker 0 last, for it takes in the others' last rows.
A second signal ends all at once. Should the supervisor itself be killed, the workers see the end of a pipe
and drain; they hold the data folder's lock until they are gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from penstock import _core
from penstock.config import Config
from penstock.data_lock import DataDirLock
from penstock.serving.listeners import Listener, reserve_all
from penstock.serving.worker import WorkerOrder
from penstock.serving.worker_engine import CONTROL, OWNERS, WorkerSpec, arena_folder, control_address

_POLL_S = 0.2
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_KILL_AFTER_S = 10.0  # beyond the drain limits of the workers
_BACKLOG = 64
_SUPERVISOR = OWNERS - 1  # its owner number in the caches: of no worker

_log = logging.getLogger("penstock.serving")


@dataclass
class _Worker:
    """A worker's place. `process` is None while it waits to be started again."""

    index: int
    generation: int = 0
    process: subprocess.Popen[bytes] | None = None
    status_fd: int = -1
    listening: bool = False
    ever_listened: bool = False
    start_at: float = 0.0
    deaths: int = 0  # in a row, none of them `restart_window` after the one before
    died_at: float = float("-inf")


class Supervisor:
    """Runs `workers` processes of the configuration file at `path`."""

    def __init__(self, path: Path, config: Config, workers: int, listen: list[str]) -> None:
        self._path, self._config, self._listen = path, config, listen
        self._workers = [_Worker(index) for index in range(workers)]
        self._selector = selectors.DefaultSelector()
        self._listeners: list[Listener] = []
        self._addresses: list[str] = []
        self._restarts: deque[float] = deque()
        self._signals = 0
        self._hangups = 0
        self._stopping_since: float | None = None
        self._status = 0
        self.lock: DataDirLock | None = None

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    def run(self, on_listening: Callable[[list[str]], None]) -> int:
        """Serve until a signal, in the main thread; the exit status.

        0: every worker answered what was in flight; 1: one did not, or they kept dying.

        Raises:
            FailedPreconditionError, InvalidArgumentError: the data folder or an address cannot be had.
        """
        self.lock = DataDirLock(self._config.data_dir)
        try:
            self._prepare()
            with self._handling_signals():
                self._serve(on_listening)
        finally:
            self._end()
        return self._status

    def _prepare(self) -> None:
        folder = arena_folder(self._config.data_dir)
        shutil.rmtree(folder, ignore_errors=True)  # of a server before this one
        folder.mkdir(mode=0o700)
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._control.bind(control_address(folder_fd))
        finally:
            os.close(folder_fd)
        (folder / CONTROL).chmod(0o600)
        self._control.listen(_BACKLOG)
        self._listeners = reserve_all(self._listen)
        self._addresses = list(dict.fromkeys(str(listener.address) for listener in self._listeners))
        self._lifeline, self._lifeline_end = os.pipe()
        self._wake, self._wake_end = os.pipe()
        for fd in (self._wake, self._wake_end):
            os.set_blocking(fd, False)
        self._selector.register(self._wake, selectors.EVENT_READ)

    @contextlib.contextmanager
    def _handling_signals(self):  # type: ignore[no-untyped-def]
        def on_signal(number: int, frame: FrameType | None) -> None:
            self._signals += number in (signal.SIGTERM, signal.SIGINT)
            self._hangups += number == signal.SIGHUP

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
        before = {number: signal.signal(number, on_signal) for number in numbers}
        wakeup = signal.set_wakeup_fd(self._wake_end, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _serve(self, on_listening: Callable[[list[str]], None]) -> None:
        self._start(self._workers[0])
        told = False
        while True:
            self._wait()
            self._reap()
            self._obey()
            self._pass_hangups_on()
            if self._stopping_since is not None:
                if not self.pids:
                    return
                self._press()
                continue
            if self._workers[0].ever_listened:
                for worker in self._workers:
                    if worker.process is None and time.monotonic() >= worker.start_at:
                        self._start(worker)
            if not told and all(worker.listening for worker in self._workers):
                told = True
                assert self.lock is not None
                self.lock.announce(self._addresses)
                on_listening(self._addresses)

    def _pass_hangups_on(self) -> None:
        """The workers that serve read the certificates and tokens again; the others do when they start."""
        if self._hangups:
            self._hangups = 0
            for worker in self._workers:
                if worker.process is not None and worker.listening:
                    worker.process.send_signal(signal.SIGHUP)

    def _wait(self) -> None:
        for key, _ in self._selector.select(_POLL_S):
            if key.fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, 4096)
                continue
            worker = key.data
            if os.read(key.fd, 64):
                worker.listening = worker.ever_listened = True
            else:
                self._forget_status(worker)

    def _forget_status(self, worker: _Worker) -> None:
        if worker.status_fd >= 0:
            self._selector.unregister(worker.status_fd)
            os.close(worker.status_fd)
            worker.status_fd = -1

    # Workers

    def _start(self, worker: _Worker) -> None:
        assert self.lock is not None
        worker.generation += 1
        worker.listening = False
        worker.status_fd, told = os.pipe()
        unix = {
            str(listener.address): listener.socket.fileno()
            for listener in self._listeners
            if listener.address.path is not None
        }
        order = WorkerOrder(
            str(self._path),
            worker.index,
            worker.generation,
            len(self._workers),
            self._addresses,
            unix,
            self._control.fileno(),
            told,
            self._lifeline,
        )
        passed = [*unix.values(), self._control.fileno(), told, self._lifeline, self.lock.fileno()]
        try:
            worker.process = subprocess.Popen(
                [sys.executable, "-m", "penstock.serving.worker", order.text()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                pass_fds=passed,
                start_new_session=True,  # signals of the terminal come through the supervisor alone
            )
        finally:
            os.close(told)
        self._selector.register(worker.status_fd, selectors.EVENT_READ, worker)

    def _reap(self) -> None:
        for worker in self._workers:
            if worker.process is None:
                continue
            status = worker.process.poll()
            if status is None:
                continue
            served, worker.listening = worker.listening, False
            worker.process = None
            self._forget_status(worker)
            self._reclaim(WorkerSpec(worker.index, worker.generation, len(self._workers)).owner)
            if self._stopping_since is not None:
                self._status = self._status or int(served and status != 0)  # else it had nothing to answer
            else:
                self._died(worker, status)

    def _reclaim(self, owner: int) -> None:
        """Give up the locks of a dead worker. It was waited for, so its last stores are seen."""
        for file in arena_folder(self._config.data_dir).glob("*.rows"):
            try:
                with file.open("r+b") as opened:
                    taken = _core.FeatureCache.attach(opened.fileno()).reclaim_owner(owner, _SUPERVISOR)
            except (OSError, RuntimeError) as error:
                _log.error("the locks of a dead worker in %s cannot be given up: %s", file, error)
                continue
            if taken:
                _log.warning("a dead worker held %d locks of %s", taken, file.name)

    def _died(self, worker: _Worker, status: int) -> None:
        now = time.monotonic()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        if not worker.ever_listened:
            _log.error("worker %d ended with %s before it listened; the server ends", worker.index, how)
            self._stop(1)
            return
        window = self._config.server.restart_window
        self._restarts.append(now)
        while now - self._restarts[0] > window:
            self._restarts.popleft()
        if len(self._restarts) > self._config.server.max_restarts:
            _log.error(
                "worker %d ended with %s; workers have died %d times in %g s, more than server.max_restarts; "
                "the server ends",
                worker.index,
                how,
                len(self._restarts),
                window,
            )
            self._stop(1)
            return
        worker.deaths = worker.deaths + 1 if now - worker.died_at < window else 0
        worker.died_at = now
        pause = 0.0
        if worker.deaths:
            pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(worker.deaths - 1, 10))
        worker.start_at = now + pause
        _log.error("worker %d ended with %s; it is started again in %g s", worker.index, how, pause)

    # The end

    def _obey(self) -> None:
        if self._signals and self._stopping_since is None:
            self._stop(0)
        elif self._signals > 1:
            self._status = 1
            self._kill_all()

    def _stop(self, status: int) -> None:
        self._status = self._status or status
        self._stopping_since = time.monotonic()
        for listener in self._listeners:
            listener.close()
        for worker in self._workers:
            if worker.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.send_signal(signal.SIGTERM)
                if not worker.listening:  # it has no handler yet, and nothing to answer
                    worker.process.kill()

    def _press(self) -> None:
        """Kill what does not end."""
        assert self._stopping_since is not None
        limit = 2 * self._config.server.drain_timeout + _KILL_AFTER_S
        if time.monotonic() - self._stopping_since > limit:
            _log.error("workers %s did not end in %g s and are killed", self.pids, limit)
            self._status = 1
            self._kill_all()

    def _kill_all(self) -> None:
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill()

    def _end(self) -> None:
        self._kill_all()
        for worker in self._workers:
            if worker.process is not None:
                worker.process.wait()
            self._forget_status(worker)
        for listener in self._listeners:
            listener.close()
        if hasattr(self, "_control"):
            self._control.close()
        for name in ("_lifeline", "_lifeline_end", "_wake", "_wake_end"):
            if hasattr(self, name):
                os.close(getattr(self, name))
        self._selector.close()
        shutil.rmtree(arena_folder(self._config.data_dir), ignore_errors=True)
        if self.lock is not None:
            self.lock.release()
