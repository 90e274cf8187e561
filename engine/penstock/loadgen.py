"""Loading a server: requests encoded before the run, the native generator, and figures of what came of it.

The generator (`_core.run_load`) is one thread that verifies every reply. A load that shall not share the GIL
with anything runs in a process of its own: `run_apart`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack
import numpy as np

from penstock import _core
from penstock.errors import InvalidArgumentError, UnavailableError

Protocol = Literal["rpc", "http", "fixed"]
BodyFormat = Literal["none", "f32", "f64", "f32-tail", "json", "msgpack"]
Watch = Callable[[str, float, int, int], "bool | None"]

GREETING_ID = 2**32 - 1
REFUSALS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "p9999": 0.9999}


@dataclass(frozen=True)
class Requests:
    """Encoded requests in rotation.

    Attributes:
        data: the requests, one behind the other.
        offsets: uint64 [n + 1]; request i is data[offsets[i]:offsets[i + 1]].
        protocol: how replies are found: MessagePack-RPC, HTTP/1.1, or "fixed": each reply is the request's
            own bytes, or `fixed_reply`.
        expected: float64 [n, k] scores, or None: replies are not verified.
        tolerance: the largest absolute difference from an expected score.
        order: uint32, the requests in the order of sending, repeated; None: 0, 1, ...
        body_format, json_key: where the scores stand in an HTTP body (csrc/load/load.h).
        greeting: an RPC request with the msgid GREETING_ID, sent first on each connection.
    """

    data: bytes
    offsets: np.ndarray
    protocol: Protocol = "rpc"
    expected: np.ndarray | None = None
    tolerance: float = 1e-5
    order: np.ndarray | None = None
    body_format: BodyFormat = "none"
    json_key: str = ""
    fixed_reply: bytes = b""
    greeting: bytes = b""

    def __len__(self) -> int:
        return len(self.offsets) - 1


def rpc_request(method: str, params: Sequence[Any], msgid: int = 0) -> bytes:
    """One MessagePack-RPC request whose msgid takes four bytes, so that another can be put in its place."""
    return b"".join(
        (b"\x94\x00\xce", msgid.to_bytes(4, "big"), msgpack.packb(method), msgpack.packb(list(params)))
    )


def http_request(
    path: str, body: bytes, *, host: str = "localhost", headers: Mapping[str, str] | None = None
) -> bytes:
    """One HTTP/1.1 POST that keeps the connection."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def requests_of(frames: Sequence[bytes], **settings: Any) -> Requests:
    """`frames` as Requests, with the other fields from `settings`."""
    offsets = np.zeros(len(frames) + 1, np.uint64)
    np.cumsum([len(frame) for frame in frames], out=offsets[1:])
    return Requests(b"".join(frames), offsets, **settings)


def vector_requests(
    model: str,
    rows: np.ndarray,
    *,
    rows_per_request: int = 1,
    expected: np.ndarray | None = None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Requests:
    """`predict_vectors` calls over `rows` (float32 [n, F]), as many whole requests as they make.

    Args:
        expected: scores of `rows`, [n] or [n, outputs].
    """
    count = len(rows) // rows_per_request
    if count == 0:
        raise InvalidArgumentError(
            f"rows are {len(rows)}; expected at least {rows_per_request}, the rows of one request"
        )
    parts = rows[: count * rows_per_request].astype("<f4", copy=False).reshape(count, -1)
    tail = [dict(options)] if options else []
    frames = [
        rpc_request("predict_vectors", [model, part.tobytes(), rows_per_request, *tail]) for part in parts
    ]
    if expected is not None:
        if len(expected) != len(rows):
            raise InvalidArgumentError(
                f"expected scores are {len(expected)}; expected {len(rows)}, one per row"
            )
        settings["expected"] = np.asarray(expected, np.float64)[: count * rows_per_request].reshape(count, -1)
    return requests_of(frames, **settings)


@dataclass(frozen=True)
class Load:
    """What to do to a server. A rate makes it an open loop: requests per second, whatever the server does."""

    address: str
    connections: int = 1
    in_flight: int = 1  # per connection; open loop: at most
    rate: float | None = None
    poisson: bool = True  # open loop: a Poisson process; False: evenly spaced
    shed: bool = False  # open loop: what falls due while every connection is full fails; False: is sent late
    seed: int = 0
    warmup: float = 1.0  # seconds, not counted
    duration: float = 5.0  # seconds
    drain: float = 2.0  # seconds in which the last answers are awaited
    tick_us: float = 50.0  # open loop: requests that fall due within a tick leave together
    goodput_ms: float = 50.0  # an ok answer within it is good
    series: bool = False


@dataclass(frozen=True)
class Latency:
    """Microseconds, from a histogram of three significant digits."""

    count: int
    mean: float
    min: float
    max: float
    p50: float
    p90: float
    p99: float
    p999: float
    p9999: float

    @staticmethod
    def of(histogram: _core.HdrHistogram) -> Latency:
        shares = {name: histogram.quantile(q) / 1e3 for name, q in _QUANTILES.items()}
        return Latency(
            histogram.count, histogram.mean / 1e3, histogram.min / 1e3, histogram.max / 1e3, **shares
        )


@dataclass(frozen=True)
class LoadResult:
    """What came of a load. Requests are those of the timed window: due in it, or sent in it (closed loop).

    Attributes:
        rate: ok answers that arrived in the window, per second.
        goodput: ok answers within `Load.goodput_ms`, per second.
        outcomes: answers by "OK", an error code of the wire, "WRONG_ANSWER", "HTTP_ERROR" or "OTHER_ERROR",
            with the latency from the due time; from_send: from the write.
        unsent: due, and never sent since every connection was full; held_back: sent late for
            that; shed: given up for that.
        unanswered: sent, and no answer came within the drain time.
        cpu: share of one core that the generator used.
        series: per second of the window: ok answers, others, the largest latency in microseconds.
    """

    window: float
    rate: float
    goodput: float
    outcomes: dict[str, Latency]
    from_send: dict[str, Latency]
    due: int
    sent: int
    unsent: int
    shed: int
    held_back: int
    unanswered: int
    transport_errors: int
    broken_connections: int
    reconnects: int
    unexpected: int
    http_statuses: dict[int, int]
    other_errors: dict[str, int]
    bytes_sent: int
    bytes_received: int
    max_error: float
    cpu: float
    stopped: bool
    series: list[tuple[int, int, float]] = field(default_factory=list)

    @property
    def ok(self) -> Latency | None:
        return self.outcomes.get("OK")

    @property
    def failed(self) -> int:
        """Requests of the window without a right answer."""
        refused = sum(latency.count for name, latency in self.outcomes.items() if name != "OK")
        return refused + self.unsent + self.shed + self.unanswered + self.transport_errors

    @property
    def wrong(self) -> int:
        return self.outcomes["WRONG_ANSWER"].count if "WRONG_ANSWER" in self.outcomes else 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "failed": self.failed}


def run(load: Load, requests: Requests, watch: Watch | None = None) -> LoadResult:
    """Load the server from this thread; the GIL is free meanwhile.

    Args:
        watch: called a few times a second and at each change of phase ("connect", "warmup", "window",
            "drain") with the phase, seconds, ok answers and others so far; False ends the run.

    Raises:
        InvalidArgumentError: a setting is wrong; the text names it.
        UnavailableError: the server cannot be connected to, or refuses the greeting.
    """
    expected = requests.expected
    try:
        made = _core.run_load(
            load.address,
            requests.data,
            np.ascontiguousarray(requests.offsets, np.uint64),
            protocol=requests.protocol,
            order=None if requests.order is None else np.ascontiguousarray(requests.order, np.uint32),
            expected=None if expected is None else np.ascontiguousarray(expected, np.float64).reshape(-1),
            scores_per_request=1 if expected is None else int(np.size(expected) // max(len(requests), 1)),
            tolerance=requests.tolerance,
            body_format=requests.body_format,
            json_key=requests.json_key,
            fixed_reply=requests.fixed_reply,
            greeting=requests.greeting,
            connections=load.connections,
            in_flight=load.in_flight,
            rate=load.rate or 0.0,
            poisson=load.poisson,
            shed=load.shed,
            seed=load.seed,
            warmup_s=load.warmup,
            duration_s=load.duration,
            drain_s=load.drain,
            tick_us=load.tick_us,
            goodput_ms=load.goodput_ms,
            series=load.series,
            watch=watch,
        )
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from error
    except ConnectionError as error:
        raise UnavailableError(str(error)) from error
    window = made.pop("window_s")
    outcomes = made.pop("outcomes")
    seconds = max(window, 1e-9)
    return LoadResult(
        window=window,
        rate=made.pop("answers_in_window") / seconds,
        goodput=made.pop("good") / seconds,
        outcomes={name: Latency.of(one["latency"]) for name, one in outcomes.items()},
        from_send={name: Latency.of(one["from_send"]) for name, one in outcomes.items()},
        cpu=made.pop("thread_cpu_s") / seconds,
        series=[(ok, bad, ns / 1e3) for ok, bad, ns in made.pop("series")],
        **made,
    )


def environment() -> dict[str, str]:
    """Variables under which a child process imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def run_apart(load: Load, requests: Requests, watch: Watch | None = None) -> LoadResult:
    """As `run`, in a process of its own. `watch` runs here and is told the changes of phase and the progress.

    Raises:
        InvalidArgumentError, UnavailableError: as `run`.
    """
    command = [sys.executable, "-m", "penstock.loadgen"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
    assert child.stdin is not None and child.stdout is not None
    try:
        with child.stdin:
            pickle.dump((load, requests), child.stdin)
        last: dict[str, Any] = {}
        for line in child.stdout:
            last = json.loads(line)
            told = (last["phase"], last["seconds"], last["ok"], last["failed"]) if "phase" in last else None
            if told and watch is not None and watch(*told) is False:
                child.terminate()
        child.wait()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    if "result" in last:
        return _result_of(last["result"])
    if "invalid" in last:
        raise InvalidArgumentError(last["invalid"])
    raise UnavailableError(last.get("unavailable", f"the load generator ended with {child.returncode}"))


def _result_of(made: dict[str, Any]) -> LoadResult:
    del made["failed"]
    for name in ("outcomes", "from_send"):
        made[name] = {key: Latency(**value) for key, value in made[name].items()}
    made["http_statuses"] = {int(key): value for key, value in made["http_statuses"].items()}
    made["series"] = [(ok, bad, us) for ok, bad, us in made["series"]]
    return LoadResult(**made)


def _child() -> None:
    import signal

    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it here too; the parent decides
    load, requests = pickle.load(sys.stdin.buffer)

    def watch(phase: str, seconds: float, ok: int, failed: int) -> bool:
        print(json.dumps({"phase": phase, "seconds": seconds, "ok": ok, "failed": failed}), flush=True)
        return not stopping

    answer: dict[str, Any]
    try:
        answer = {"result": run(load, requests, watch).to_dict()}
    except InvalidArgumentError as error:
        answer = {"invalid": str(error)}
    except UnavailableError as error:
        answer = {"unavailable": str(error)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _child()
