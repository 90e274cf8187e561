"""An engine without models for the tests of the server and the clients; as a script, a server process.

The wire is the real one (`_core.WireSession`); only what a prediction is, is made up. Models: "echo" answers
each row with its `id` at once; "hold" answers when released; "busy" refuses as often as `busy` says, then
echoes; "wide" answers with a megabyte; "boom" breaks the core. `label` steers: "release" answers those held,
last first; "open" lets `materialize`, which blocks, end. While draining, a refused prediction releases those
held.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

from penstock import _core
from penstock.errors import InvalidArgumentError, PenstockError
from penstock.serving.server import ServerSettings, run

_NEVER = 2**63 - 1


@dataclasses.dataclass
class Held:
    connection: FakeConnection
    msgid: int
    scores: list[float]
    deadline_ns: int


class FakeConnection:
    def __init__(self, core: FakeCore, number: int, *limits: int) -> None:
        self.id = number
        self.core = core
        self.session = _core.WireSession(*limits)
        self.get_buffer = self.session.get_buffer
        self.take_output = self.session.take_output
        self.output_sent = self.session.output_sent
        self.goaway = self.session.goaway
        self.until_us = _NEVER
        self.last_read = self.stuck_since = time.monotonic()
        self.stuck = False

    def authorize(self, until_us: int) -> None:
        self.until_us = until_us

    def touch(self) -> None:
        self.last_read = self.stuck_since = time.monotonic()

    def refuse(self, code: str, message: str) -> None:
        self.session.reply_error(None, code, message, code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"))

    def attach(self, fd: int) -> bool:
        return False

    def send_output(self) -> bool:
        return True

    def watch(self) -> None:
        return

    @property
    def closed(self) -> bool:
        return self.session.closed

    @property
    def in_flight(self) -> int:
        return self.session.in_flight

    @property
    def pending_output_bytes(self) -> int:
        return self.session.pending_output_bytes

    @property
    def dropped_notifications(self) -> int:
        return self.session.dropped

    def received(self, n: int) -> list[tuple[int, str, bytes]]:
        self.session.advance(n)
        others = []
        authorized = self.core.clock() < self.until_us
        complete = False
        self.last_read = time.monotonic()
        while (message := self.session.next_message()) is not None:
            kind, msgid, method, params, status = message
            complete = True
            if kind in ("predict", "predict_vectors") and not authorized:
                self.core.unauthenticated += 1
                self.reply_error(msgid, "UNAUTHENTICATED", "no valid token was given", False)
            elif kind in ("predict", "predict_vectors"):
                self.predict(kind, msgid, params)
            elif kind == "cancel":
                self.core.cancelled += 1
                self.core.held = [h for h in self.core.held if (h.connection, h.msgid) != (self, msgid)]
                self.reply_error(msgid, "CANCELLED", "the request was cancelled", False)
            elif kind == "bad":
                self.session.reply_error(msgid, status[0], status[1], False)
            elif kind == "other":
                others.append((msgid, method, params))
                if method == "auth" and not authorized:
                    break
        if complete or not self.stuck:
            self.stuck_since = self.last_read
        self.stuck = self.session.unfinished_bytes > 0
        return others

    def predict(self, kind: str, msgid: int, params: bytes) -> None:
        self.core.predictions += 1
        if self.core.draining:
            self.reply_error(msgid, "UNAVAILABLE", "the engine is shutting down", True)
            self.core.release()
            return
        try:
            if kind == "predict_vectors":
                call = _core.wire_decode_predict_vectors(params)
                scores = [float(byte) for byte in call["data"]]
            else:
                call = _core.wire_decode_predict(params, {"km": "float64"})
                scores = [float(value) for value in call["entities"]["id"]]
        except ValueError as error:
            self.reply_error(msgid, "INVALID_ARGUMENT", str(error), False)
            return
        self.core.calls.append(call)
        model = call["model"]
        deadline_us = call["options"]["deadline_us"]
        if model == "hold":
            deadline = _NEVER if deadline_us == 0 else time.monotonic_ns() + 1000 * deadline_us
            self.core.held.append(Held(self, msgid, scores, deadline))
            if deadline_us:
                timer = threading.Timer(deadline_us / 1e6, os.eventfd_write, (self.core.timer_fd, 1))
                timer.daemon = True
                timer.start()
            self.core.arrived.release()
        elif model == "busy" and self.core.busy > 0:
            self.core.busy -= 1
            self.reply_error(msgid, "RESOURCE_EXHAUSTED", "the queue is full", True, 1)
        elif model == "boom":
            raise RuntimeError("the core broke")
        elif model == "wide":
            self.scores(msgid, [1.0] * 131_072)
        elif model in ("echo", "busy"):
            self.scores(msgid, scores)
        else:
            self.reply_error(msgid, "NOT_FOUND", f'model is "{model}"; expected one of: echo, hold', False)

    def scores(self, msgid: int, scores: list[float]) -> None:
        self.session.finish(msgid)
        self.session.reply_scores(msgid, scores, "1", list(range(len(scores))))

    def reply(self, msgid: int, result: bytes) -> bool:
        self.session.finish(msgid)
        if self.session.reply_raw(msgid, result):
            return True
        full = "the result does not fit the connection's output buffer"
        self.session.reply_error(msgid, "RESOURCE_EXHAUSTED", full, self.pending_output_bytes > 0)
        return False

    def reply_error(
        self, msgid: int, code: str, message: str, retryable: bool, retry_after_ms: int | None = None
    ) -> None:
        self.session.finish(msgid)
        self.session.reply_error(msgid, code, message, retryable, retry_after_ms)

    def drop(self) -> None:
        self.core.held = [held for held in self.core.held if held.connection is not self]
        self.core.live.pop(self.id, None)
        self.core.dropped.release()


class FakeCore:
    """Used by the loop thread, but for `release`."""

    def __init__(self) -> None:
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.timer_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.held: list[Held] = []
        self.calls: list[dict[str, Any]] = []
        self.arrived = threading.Semaphore(0)  # one permit for each request that is held
        self.dropped = threading.Semaphore(0)  # one permit for each connection that ended
        self.cancelled = self.predictions = self.busy = self.unauthenticated = 0
        self.draining = False
        self._count: int | None = None  # how many the next wake answers; None: all
        self._connections = 0
        self.live: dict[int, FakeConnection] = {}
        self.clock = lambda: time.time_ns() // 1000  # what tokens expire by, microseconds

    def connection(self, *limits: int) -> FakeConnection:
        self._connections += 1
        made = self.live[self._connections] = FakeConnection(self, self._connections, *limits)
        return made

    def overdue(self, idle_s: float, read_s: float) -> tuple[list[int], list[int]]:
        now = time.monotonic()
        live = self.live.values()
        stuck = [c.id for c in live if c.stuck and now - c.stuck_since >= read_s]
        idle = [c.id for c in live if not c.stuck and not c.in_flight and now - c.last_read >= idle_s]
        return idle, stuck

    def release(self) -> None:
        os.eventfd_write(self.event_fd, 1)

    def release_first(self) -> None:
        """Answer the request held longest."""
        self._count = 1
        self.release()

    def wake(self) -> list[int]:
        try:
            os.eventfd_read(self.event_fd)
        except BlockingIOError:
            return []
        count, self._count = self._count, None
        done = self.held[:count][::-1]
        self.held = [] if count is None else self.held[count:]
        for held in done:
            held.connection.scores(held.msgid, held.scores)
        return [held.connection.id for held in done]

    def expire(self) -> list[int]:
        os.eventfd_read(self.timer_fd)
        now = time.monotonic_ns()
        late = [held for held in self.held if held.deadline_ns <= now]
        self.held = [held for held in self.held if held.deadline_ns > now]
        for held in late:
            held.connection.reply_error(held.msgid, "DEADLINE_EXCEEDED", "the deadline has passed", False)
        return [held.connection.id for held in late]


class FakeEngine:
    def __init__(self) -> None:
        self.core = FakeCore()
        self.telemetry = SimpleNamespace(server_stats=None)
        self.ready = True
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)  # one permit for each materialize that runs
        self.calls: list[tuple[str, list[Any], bool]] = []

    def call(self, method: str, params: list[Any], *, admin: bool) -> Any:
        self.calls.append((method, params, admin))
        if method == "label" and params[0] == "release":
            self.core.release()
        if method == "label" and params[0] == "open":
            self.gate.set()
        if method == "materialize":
            self.started.release()
            self.gate.wait(60)
            return {"rows": {}}
        if method == "models":
            return {"echo": {"version": "1", "entities": ["id"], "inputs": ["km"]}}
        if method == "drift":
            raise RuntimeError("no reference")
        if method == "promote":
            raise InvalidArgumentError(f"model is {params[0]!r}; expected one that is loaded")
        if method == "features":
            return {"columns": {"big": "x" * int(params[0])}}
        return {"method": method}

    def health(self) -> dict[str, Any]:
        return {"ready": self.ready, "models": {"echo": "1"}}

    def drain(self) -> None:
        self.ready = False
        self.core.draining = True


def main() -> int:
    def on_listening(addresses: list[str]) -> None:
        print(json.dumps(addresses), flush=True)

    given = json.loads(sys.argv[1])
    settings = ServerSettings(**{**given, "listen": tuple(given["listen"])})
    try:
        return run(FakeEngine(), settings, on_listening)
    except PenstockError as error:
        print(f"penstock: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
