"""The engines of the processes that serve together: worker 0 (`Leader`) and the others (`Follower`).

Every worker answers predictions by itself, from feature caches in files that all of them map (`arena/` in
the data folder). Worker 0 alone writes: it has the online store's materialisation, the model registry, the
monitors, the log of served rows and the labels. A follower passes every other method on to it, and sends it
the rows that it served; `label`, `stats` and `drift` fetch what is still on its way first. What worker 0
changes (a version, the reading of the sources) it tells the followers and waits for them, at most `SYNC_S`;
one that cannot follow ends and is started anew.

Rows that cannot be sent are counted: while worker 0 is away they wait in each model's ring (`served_dropped`
when it is full), and those that were on their way when it died are `lost_rows`. A follower that is killed
takes with it what it had not sent, at most what it served in some 20 ms: it counts what it serves in a file
(`arena/served`), by which worker 0 knows how many those are (`killed_rows`).

Epochs number the readings of the sources. A row is stored with a stamp that begins with its reader's epoch,
and a new epoch empties the caches and refuses older stamps: so no follower puts back a row of a source that
has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock import _core
from penstock.config import Config
from penstock.data_lock import DataDirLock
from penstock.diskio import write_file
from penstock.errors import FailedPreconditionError, PenstockError, UnavailableError
from penstock.models.registry import Trial
from penstock.serving.engine import Engine
from penstock.serving.link import CallPool, Link, unknown_method
from penstock.serving.live import LiveModel
from penstock.serving.protocol import ADMIN_METHODS
from penstock.serving.telemetry import Telemetry
from penstock.serving.worker_stats import merge_stats

SYNC_S = 30.0  # a follower must have loaded a version by then
PULL_S = 2.0  # a follower must have sent its rows or counters by then
FORWARD_S = 60.0
FORWARD_ADMIN_S = 24 * 3600.0
JOIN_S = 60.0  # worker 0 must have let a new follower in by then
OWNERS = 64  # workers of a server, and so owner numbers of one generation
ARENA = "arena"
CONTROL = "control"
_EPOCH = "epoch"
_SERVED = "served"
_SERVED_WORDS = 64 * OWNERS  # generations that may be told apart at once

_log = logging.getLogger("penstock.serving")
Part = tuple[Any, ...]


@dataclass(frozen=True)
class WorkerSpec:
    """One worker process. `generation` rises each time the worker is started again."""

    index: int
    generation: int
    workers: int

    @property
    def owner(self) -> int:
        """Its number as a writer of the feature caches; never used again."""
        return self.generation * OWNERS + self.index


def control_address(folder_fd: int) -> str:
    """The control socket by its folder's descriptor: a path that is short enough for a socket."""
    return f"/proc/self/fd/{folder_fd}/{CONTROL}"


def _served_words(data_dir: Path) -> NDArray[np.uint64]:
    """Rows served by each of the last worker processes, in a file that all of them map: by owner number."""
    file = data_dir / ARENA / _SERVED
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, 8 * _SERVED_WORDS)
        return np.frombuffer(mmap.mmap(fd, 8 * _SERVED_WORDS), np.uint64)
    finally:
        os.close(fd)


class WorkerEngine(Engine):
    """What leader and follower have in common: their number, and caches in the shared arena."""

    def __init__(self, config: Config, spec: WorkerSpec) -> None:
        self.spec, self.worker = spec, spec.index
        self.server_stats: Callable[[], dict[str, int]] = dict
        super().__init__(config)

    def _take_lock(self) -> DataDirLock | None:
        return None  # the supervisor's

    def _new_core(self) -> _core.ServingCore:
        return _core.ServingCore(self.spec.index, self.spec.owner)

    def _prepare(self) -> None:
        self.live.new_cache = self._shared_cache
        self.live.cache_owner = self.spec.owner
        self.refresher.owner = self.spec.owner

    def _shared_cache(self, view: str, row_words: int) -> _core.FeatureCache:
        store = self._store()
        computer = store.computer(view)
        layout = json.dumps([computer.view.fingerprint(), computer.schema, list(computer.join_dtypes)])
        identity = _core.siphash128(f"penstock arena {layout}".encode(), store.key_seed)[:8]
        name = hashlib.sha256(view.encode()).hexdigest()[:32]
        path = self.config.data_dir / ARENA / f"{name}.rows"
        try:
            return _core.FeatureCache.open_shared(
                str(path), identity=int.from_bytes(identity, "little"), **self.live.cache_settings(row_words)
            )
        except RuntimeError as error:
            raise FailedPreconditionError(f"the feature cache of view '{view}': {error}") from error

    def health(self) -> dict[str, Any]:
        return {**super().health(), "worker": self.spec.index, "workers": self.spec.workers}


@dataclass
class _Follower:
    """A follower as the leader sees it."""

    index: int
    generation: int
    pid: int
    link: Link
    owner: int
    rows: int  # it served so many that it need not send any more: taken in here, or accounted for before


class Leader(WorkerEngine):
    """Worker 0."""

    def __init__(self, config: Config, spec: WorkerSpec, control: socket.socket) -> None:
        self._control = control
        self._followers: dict[int, _Follower] = {}
        self._followers_changed = threading.Condition()
        self._told: dict[str, Any] | None = None
        self.strange_rows = 0  # of versions that are not here any more
        self.killed_rows = 0  # that followers had served and not sent when they died
        limits = config.server.limits
        self._calls = CallPool("penstock-forwarded", config.server.call_threads, limits.max_calls)
        self._admin_calls = CallPool("penstock-forwarded-admin", 1, limits.max_admin_calls)
        super().__init__(config, spec)

    def _prepare(self) -> None:
        super()._prepare()
        if self.store is not None:
            self.store.epoch = self._next_epoch()

    def _shared_cache(self, view: str, row_words: int) -> _core.FeatureCache:
        cache = super()._shared_cache(view, row_words)
        cache.clear(self.spec.owner, self._store().first_stamp())  # of a leader before this one
        return cache

    def _next_epoch(self) -> int:
        """A new number, also where this process follows one that died."""
        file = self.config.data_dir / ARENA / _EPOCH
        try:
            last = int(file.read_text())
        except FileNotFoundError:
            last = 0
        write_file(file, str(last + 1).encode())
        return last + 1

    def _open(self) -> None:
        super()._open()
        self._served = _served_words(self.config.data_dir)
        self._told = self._state()
        threading.Thread(target=self._accept, name="penstock-control", daemon=True).start()

    # Followers

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._control.accept()
            except OSError:  # closed
                return
            _Joining(self, sock)

    def join(self, follower: _Follower) -> dict[str, Any]:
        """Let a follower in; returns the state that it must take on."""
        with self._followers_changed:  # first: a change from here on is told to it
            self._followers[follower.index] = follower
        return self._state()

    def leave(self, follower: _Follower) -> None:
        with self._followers_changed:
            if self._followers.get(follower.index) is follower:
                del self._followers[follower.index]
                served = int(self._served[follower.owner % _SERVED_WORDS])
                self.killed_rows += max(0, served - follower.rows)
            self._followers_changed.notify_all()

    def _present(self) -> list[_Follower]:
        with self._followers_changed:
            return sorted(self._followers.values(), key=lambda follower: follower.index)

    def _ask_all(self, method: str, params: list[Any], timeout: float) -> dict[int, Any]:
        """The answers of the followers by index; the error of those that failed."""
        followers = self._present()
        if not followers:
            return {}

        def ask(follower: _Follower) -> Any:
            try:
                return follower.link.call(method, params, timeout)
            except PenstockError as error:
                return error

        with ThreadPoolExecutor(len(followers)) as executor:
            return dict(zip([f.index for f in followers], executor.map(ask, followers)))

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": 0 if self.store is None else self.store.epoch,
            "models": {name: model.bundle.version for name, model in dict(self.live.live).items()},
            "trials": {name: asdict(trial) for name, trial in self.trials.recorded().items()},
        }

    def _spread(self) -> dict[str, list[int]] | None:
        """Tell the followers what has changed and wait for them; None if nothing has."""
        with self._changing:
            state = self._state()
            if state == self._told:
                return None
            answers = self._ask_all("sync", [state], SYNC_S)
            self._told = state
        late = [index for index, answer in answers.items() if isinstance(answer, PenstockError)]
        for index in late:
            _log.warning("worker %d did not take on a change: %s", index, answers[index])
        return {"changed": [0, *(index for index in answers if index not in late)], "late": late}

    def take_rows(self, follower: _Follower, params: list[Any]) -> None:
        """Rows that a follower served, into the monitors here."""
        name, version, sent, arrays = params
        part = tuple(_unpack_array(array) for array in arrays)
        found = [
            model
            for model in self.live.all()
            if model.bundle.name == name and model.bundle.version == version
        ]
        if found:
            found[0].take_in(*part, counted=False)
        else:
            self.strange_rows += len(part[0])
        follower.rows += len(part[0])
        with contextlib.suppress(UnavailableError):
            follower.link.note("taken", [sent])

    def _monitor(self) -> None:
        super()._monitor()
        if self._told not in (None, self._state()) and self._changing.acquire(blocking=False):
            try:  # a change that came by no call
                self._spread()
            finally:
                self._changing.release()

    def drain_served(self) -> None:
        self._ask_all("flush", [], PULL_S)
        super().drain_served()

    def call(self, method: str, params: list[Any], *, admin: bool = True) -> Any:
        result = super().call(method, params, admin=admin)
        if method in ADMIN_METHODS:
            spread = self._spread()
            if spread is not None and isinstance(result, dict):
                result = {**result, "workers": spread}
        return result

    def stats(self) -> dict[str, Any]:
        """As `Engine.stats`, summed over the workers that run now, and by worker under "workers".

        Of latency quantiles the sum gives the greatest of any worker. Counters begin with their process.
        """
        own = {**super().stats(), "server": self.server_stats()}
        parts = {0: own}
        for index, answer in self._ask_all("stats", [], PULL_S).items():
            if isinstance(answer, dict):
                parts[index] = answer
        processes = {0: {"pid": os.getpid(), "generation": self.spec.generation}}
        for follower in self._present():
            processes[follower.index] = {"pid": follower.pid, "generation": follower.generation}
        return {
            **merge_stats(parts, processes),
            "strange_rows": self.strange_rows,
            "killed_rows": self.killed_rows,
        }

    # Life

    def answer(self, follower: _Follower, method: str, params: list[Any]) -> Any:
        """A call of a follower."""
        if method == "call":
            return self.call(params[0], params[1], admin=params[0] in ADMIN_METHODS)
        raise unknown_method(method)

    def pool(self, method: str, params: list[Any]) -> CallPool:
        return self._admin_calls if method == "call" and params[0] in ADMIN_METHODS else self._calls

    def close(self) -> None:
        """Wait for the followers' last rows, then as `Engine.close`."""
        if self._closing.is_set():
            return
        self.drain()
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        limit = time.monotonic() + self.config.server.drain_timeout
        with self._followers_changed:
            while self._followers and (left := limit - time.monotonic()) > 0:
                self._followers_changed.wait(left)
            left_over = list(self._followers.values())
        for follower in left_over:
            follower.link.close()
        super().close()
        self._calls.close()
        self._admin_calls.close()


class _Joining:
    """A connection to the control socket: nobody until it has said hello, then a follower."""

    def __init__(self, leader: Leader, sock: socket.socket) -> None:
        self._leader = leader
        self._follower: _Follower | None = None
        inline = frozenset({"hello", "rows"})
        self._link = Link(sock, self._handle, leader.pool, inline, self._closed)
        self._link.start()

    def _handle(self, method: str, params: list[Any]) -> Any:
        if method == "hello":
            index, generation, pid, owner, accounted = params
            self._follower = _Follower(index, generation, pid, self._link, owner, accounted)
            return self._leader.join(self._follower)
        if self._follower is None:
            raise FailedPreconditionError("say hello first")
        if method == "rows":
            self._leader.take_rows(self._follower, params)
            return None
        return self._leader.answer(self._follower, method, params)

    def _closed(self) -> None:
        if self._follower is not None:
            self._leader.leave(self._follower)


class Follower(WorkerEngine):
    """A worker that is not worker 0.

    Attributes:
        fault: why it cannot serve what worker 0 serves, or None; `failed` is called then.
    """

    def __init__(self, config: Config, spec: WorkerSpec) -> None:
        self._link: Link | None = None
        self._joined = threading.Event()
        self._state: dict[str, Any] = {}
        self._sent_rows = self._taken_rows = 0  # over the link that is open now
        self._popped_rows = 0  # of the rings: sent, or lost
        self.lost_rows = 0
        self.fault: str | None = None
        self.failed: Callable[[], object] = lambda: None
        self._calls = CallPool("penstock-control", 4, 64)
        super().__init__(config, spec)

    def _open_logs(self) -> None:
        self.served_log = _NoLog()  # type: ignore[assignment]
        self.label_log = _NoLog()  # type: ignore[assignment]

    def _replay_logs(self) -> None:
        return

    def _new_telemetry(self) -> Telemetry:
        """Without the exposition: worker 0 has that of all."""
        monitoring = self.config.monitoring.model_copy(update={"prometheus": None})
        return Telemetry(self.config.model_copy(update={"monitoring": monitoring}), self.stats)

    def _prepare(self) -> None:
        super()._prepare()
        self.live.counts_drift = False  # worker 0 does, of the rows that it is sent

    def _deploy_all(self) -> None:
        self._served = _served_words(self.config.data_dir)
        self._served[self.spec.owner % _SERVED_WORDS] = 0
        thread = threading.Thread(target=self._follow, name="penstock-follow", daemon=True)
        with self._changing:  # what worker 0 tells meanwhile waits
            thread.start()
            if not self._joined.wait(JOIN_S):
                raise UnavailableError(f"worker 0 did not answer in {JOIN_S:g} s")
            if self.store is not None:
                self.store.epoch = self._state["epoch"]
            self._take_on(self._state)

    # Worker 0

    def _follow(self) -> None:
        """Stay connected to worker 0: again, with its state, whenever one takes the place of another."""
        while not self._closing.is_set():
            sock = self._connect()
            if sock is None:
                continue
            link = Link(sock, self._answer, lambda method, params: self._calls, frozenset({"taken"}))
            link.start()
            try:
                spec = self.spec
                hello = [spec.index, spec.generation, os.getpid(), spec.owner, self._popped_rows]
                state = link.call("hello", hello, JOIN_S)
            except PenstockError:
                link.close()
                self._closing.wait(0.05)
                continue
            if self._joined.is_set():
                try:
                    self._sync(state)
                except Exception as error:
                    link.close()
                    self._fail(error)
                    return
            self._state = state
            self._link = link
            self._joined.set()
            link.closed.wait()
            self._link = None
            self.lost_rows += self._sent_rows - self._taken_rows
            self._sent_rows = self._taken_rows = 0

    def _connect(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            folder = os.open(self.config.data_dir / ARENA, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sock.connect(control_address(folder))
            finally:
                os.close(folder)
        except OSError:
            sock.close()
            self._closing.wait(0.05)
            return None
        return sock

    def _answer(self, method: str, params: list[Any]) -> Any:
        if method == "taken":
            self._taken_rows = params[0]
            return None
        if method == "flush":
            self._drain_models()
            return None
        if method == "stats":
            return self.stats()
        if method == "sync":
            try:
                self._sync(params[0])
            except Exception as error:
                self._fail(error)
                raise
            return None
        raise unknown_method(method)

    def _fail(self, error: Exception) -> None:
        _log.error("worker %d cannot serve what worker 0 serves: %s", self.spec.index, error)
        self.fault = str(error)
        self.failed()

    def _sync(self, state: Mapping[str, Any]) -> None:
        """Take on the state of worker 0."""
        with self._changing:
            store = self.store
            if store is not None and store.epoch != state["epoch"]:
                store.reread()
                with self._filling:
                    self._generation += 1
                    store.epoch = state["epoch"]
                self.live.retire_strangers()
            self._take_on(state)

    def _take_on(self, state: Mapping[str, Any]) -> None:
        versions: Mapping[str, str] = state["models"]
        for name, model in list(self.live.live.items()):
            if name not in versions:
                self.live.end_trial(name)
                self.core.retire(name)
                del self.live.live[name]
                model.stop()
        for name, version in versions.items():
            current = self.live.live.get(name)
            if current is not None and current.bundle.version == version:
                continue
            model = self.live.warm(name, version) or self.live.load(self.registry.get(name, version))
            self._forward(model)
            self.live.publish(model)
        self.trials.take_on({name: Trial(**trial) for name, trial in state["trials"].items()}, self._forward)

    def _forward(self, model: LiveModel) -> None:
        if model.forward is None:
            model.forward = self._send_rows
            model.served.count_in(self._served[self.spec.owner % _SERVED_WORDS :][:1])

    def _drain_models(self) -> None:
        if self._link is not None:  # else they wait in their rings
            super()._drain_models()

    def _send_rows(self, model: LiveModel, part: Part) -> None:
        link = self._link
        rows = len(part[0])
        self._popped_rows += rows
        if link is None:
            self.lost_rows += rows
            return
        self._sent_rows += rows
        arrays = [_pack_array(array) for array in part]
        with contextlib.suppress(UnavailableError):  # what was not taken is counted when the link ends
            link.note("rows", [model.bundle.name, model.bundle.version, self._sent_rows, arrays])

    def call(self, method: str, params: list[Any], *, admin: bool = True) -> Any:
        link = self._link
        if link is None:
            raise UnavailableError("worker 0 is being restarted", retry_after_ms=200)
        limit = FORWARD_ADMIN_S if method in ADMIN_METHODS else FORWARD_S
        return link.call("call", [method, params], limit)

    def stats(self) -> dict[str, Any]:
        """The counters of this worker alone."""
        return {
            **super().stats(),
            "server": self.server_stats(),
            "rows_sent": self._sent_rows,
            "lost_rows": self.lost_rows,
        }

    def close(self) -> None:
        """As `Engine.close`; the last rows are with worker 0 then, if it runs."""
        super().close()
        link = self._link
        if link is not None:
            limit = time.monotonic() + PULL_S
            while self._taken_rows < self._sent_rows and time.monotonic() < limit:
                if link.closed.wait(0.005):
                    break
            link.close()
            link.join(PULL_S)
        self._calls.close()


class _NoLog:
    """Stands where worker 0 has a log."""

    def flush(self, at_us: int | None = None) -> None:
        return

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        return


def _pack_array(array: Any) -> list[Any]:
    return [array.dtype.str, list(array.shape), np.ascontiguousarray(array).tobytes()]


def _unpack_array(packed: list[Any]) -> Any:
    dtype, shape, data = packed
    return np.frombuffer(data, dtype).reshape(shape)


def arena_folder(data_dir: Path) -> Path:
    """Where the workers' shared files are."""
    return data_dir / ARENA
