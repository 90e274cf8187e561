"""Serving over a socket: Penstock beside its peers, same model, same rows, same machine, same run.

The load generator (penstock.loadgen) runs in a process of its own, rotates 4096 distinct rows and verifies
every answer against LightGBM. Contenders take turns, round after round, and only one is loaded at a time.
bench/README.md says how the figures are made and what they do not show.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "peers"))

import in_process
from common import RESULTS, Absent, machine, rows_of, write
from forest import FEATURES, LEAVES, ROWS, TREES, onnx_model, onnx_score, train
from lines import Book, attempt, kernel_lines, report
from overload import edge_lines, hung_line, open_loop_line, overload_lines, sustained_line
from peers import PEERS, Peer
from serve_echo import pattern
from servers import Contender, Server, configuration, free_port, measure, penstock

from penstock.loadgen import Load, Requests, vector_requests

SERVE_ECHO = str(Path(__file__).resolve().parents[1] / "peers" / "serve_echo.py")
OURS, OURS_UNIX = "Penstock", "Penstock, Unix socket"
ECHO, ECHO_UNIX, ECHO_REPLY = "echo", "echo, Unix socket", "echo of replies"
C64, C512, ONE = "64 in flight, answers/s", "512 in flight, answers/s", "one at a time"
ROWS64 = "64 rows a request, rows/s"
TABLE = (C64, C512, f"{ONE}, p50 us", f"{ONE}, p99 us", ROWS64)  # columns beside the peers


@dataclass(frozen=True)
class Plan:
    """How long each part takes, seconds."""

    rounds: int
    warmup: float
    window: float
    open_window: float
    sustained: float


FULL = Plan(rounds=3, warmup=0.5, window=2.0, open_window=8.0, sustained=60.0)
QUICK = Plan(rounds=1, warmup=0.3, window=0.7, open_window=2.0, sustained=3.0)


class Run:
    """The trained model, what is measured, and the servers that run meanwhile."""

    def __init__(self, folder: Path, plan: Plan, stack: contextlib.ExitStack) -> None:
        self.folder, self.plan, self.stack = folder, plan, stack
        self.book = Book()
        self.booster, self.columns, self.rows = train()
        self.expected = np.asarray(self.booster.predict(self.rows, num_threads=1))
        self.onnx: bytes | None = None
        self.versions: dict[str, str] = {}
        self.cores: dict[str, dict[str, float]] = {}  # by "contender, column": server and client
        try:
            self.onnx = onnx_model(self.booster)
            (folder / "model.onnx").write_bytes(self.onnx)
        except Absent as error:
            self.book.absent.append(f"onnxruntime and every peer: {error}")
        self.bundle = in_process.save_vectors(self.booster, self.columns, folder / "models")
        self.requests = vector_requests("forest", self.rows, expected=self.expected)
        self.full = vector_requests("forest", self.rows, rows_per_request=64, expected=self.expected)

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def start(
        self, name: str, server: Server, address: str, requests: Requests, *, pipelined: bool
    ) -> Contender:
        """Await it; it is stopped at the end of the run. Raises Absent."""
        self.stack.callback(server.stop)
        server.await_answers(address, requests, name)
        self.say(f"{name} is up")
        return Contender(name, address, requests, server, pipelined)

    def ours(self, name: str, **sections: Any) -> dict[str, Contender]:
        """A Penstock server with its TCP and its Unix address."""
        path, port = str(self.folder / f"{name}.sock"), free_port()
        addresses = [f"tcp://127.0.0.1:{port}", f"unix://{path}"]
        config = configuration(self.folder / name, {"forest": self.bundle}, addresses, **sections)
        server = penstock(config)
        tcp = self.start(OURS, server, addresses[0], self.requests, pipelined=True)
        unix = Contender(OURS_UNIX, addresses[1], self.requests, server, True)
        return {OURS: tcp, OURS_UNIX: unix}

    def echoes(self) -> dict[str, Contender]:
        """The same bytes back, and replies as long as ours."""
        size = len(self.requests.data) // len(self.requests)
        reply = len(self.reply_of_ours)
        found = {}
        for name, length in ((ECHO, 0), (ECHO_REPLY, reply)):
            path, port = str(self.folder / f"echo{length}.sock"), free_port()
            options = ["--path", path, "--port", str(port), "--size", str(size), "--reply", str(length)]
            server = Server([sys.executable, SERVE_ECHO, *options], self.folder / f"echo{length}.log")
            requests = Requests(
                self.requests.data,
                self.requests.offsets,
                protocol="fixed",
                fixed_reply=pattern(length) if length else b"",
            )
            tcp = f"tcp://127.0.0.1:{port}"
            found[name] = self.start(name, server, tcp, requests, pipelined=True)
            if not length:
                found[ECHO_UNIX] = Contender(ECHO_UNIX, f"unix://{path}", requests, server, True)
        return found

    def peer(self, peer: Peer) -> Contender:
        if self.onnx is None:
            raise Absent("the model is not there as ONNX")
        folder = self.folder / peer.name.replace(" ", "_")
        folder.mkdir()
        port = free_port()
        command = peer.command(self.folder / "model.onnx", port)
        server = Server(command, folder / "log", peer.variables())
        requests = peer.encode(self.rows, self.expected)
        made = self.start(peer.name, server, f"tcp://127.0.0.1:{port}", requests, pipelined=peer.pipelined)
        self.versions |= peer.versions()
        return made

    def sample(
        self, who: Contender, column: str, load: dict[str, Any], requests: Requests | None = None
    ) -> Any:
        """One closed-loop window; books failures and the processor shares."""
        made = measure(
            who, Load(who.address, **load, warmup=self.plan.warmup, duration=self.plan.window), requests
        )
        if made.result.failed:
            self.book.failures[who.name] = self.book.failures.get(who.name, 0) + made.result.failed
        self.cores[f"{who.name}, {column}"] = {
            "server": round(made.server_cores, 2),
            "client": round(made.client_cores, 2),
        }
        return made.result

    def rate(self, who: Contender, column: str, **load: Any) -> None:
        self.book.add(who.name, column, self.sample(who, column, load).rate)

    def round_trip(self, who: Contender) -> None:
        ok = self.sample(who, ONE, {}).ok
        if ok is not None:
            self.book.add(who.name, f"{ONE}, p50 us", ok.p50)
            self.book.add(who.name, f"{ONE}, p99 us", ok.p99)

    @property
    def reply_of_ours(self) -> bytes:
        """One reply as the server sends it, for its length."""
        import msgpack

        result = {"scores": b"\0\0\0\0", "version": "1", "request_ids": [2**40]}
        return bytes(msgpack.packb([1, 2**31, None, result]))


def interleave(rounds: int, work: list[Callable[[], None]]) -> None:
    for _ in range(rounds):
        for one in work:
            one()


def beside_the_peers(run: Run, ours: dict[str, Contender]) -> None:
    """The four socket lines that have a peer."""
    book, plan = run.book, run.plan
    contenders = dict(ours)
    for name, make in (
        ("the echo", run.echoes),
        *((peer.name, lambda peer=peer: {peer.name: run.peer(peer)}) for peer in PEERS),
    ):
        try:
            contenders |= make()
        except Absent as error:
            book.absent.append(f"{name}: {error}")
            run.say(f"left out: {name}: {error}")
    loaded = [who for name, who in contenders.items() if not name.startswith("echo") and name != OURS_UNIX]
    run.say("64 in flight, one per connection")
    interleave(plan.rounds, [lambda who=who: run.rate(who, C64, connections=64) for who in loaded])
    run.say("512 in flight")
    interleave(
        plan.rounds,
        [
            lambda who=who: run.rate(
                who, C512, **({"connections": 8, "in_flight": 64} if who.pipelined else {"connections": 512})
            )
            for who in loaded
        ],
    )
    run.say("one at a time")
    interleave(plan.rounds, [lambda who=who: run.round_trip(who) for who in contenders.values()])
    book.compare("64 in flight, one per connection", C64, OURS, "mosec", "/s", 3, below=False)
    book.compare(
        "512 in flight, pipelined over 8 connections (mosec: 512 connections)",
        C512, OURS, "mosec", "/s", 10, below=False,
    )  # fmt: skip
    book.compare("one request at a time, p50, TCP", f"{ONE}, p50 us", OURS, ECHO, "us", 1.3, below=True)
    book.compare(
        "one request at a time, p50, Unix socket",
        f"{ONE}, p50 us",
        OURS_UNIX,
        ECHO_UNIX,
        "us",
        1.3,
        below=True,
    )


def many_rows(run: Run, ours: Contender) -> None:
    """Requests of 64 rows beside onnxruntime in process, one thread."""
    book, plan = run.book, run.plan
    score = None if run.onnx is None else onnx_score(run.onnx)
    parts = [np.ascontiguousarray(run.rows[at : at + 64]) for at in range(0, ROWS, 64)]

    def onnxruntime() -> None:
        if score is None:
            return
        until, done, start = time.monotonic() + plan.window, 0, time.monotonic()
        while time.monotonic() < until:
            for part in parts:
                score(part)
            done += ROWS
        book.add("onnxruntime in process", ROWS64, done / (time.monotonic() - start))

    def served() -> None:
        result = run.sample(ours, ROWS64, {"connections": 4, "in_flight": 4}, run.full)
        book.add(OURS, ROWS64, 64 * result.rate)

    run.say("requests of 64 rows")
    interleave(plan.rounds, [onnxruntime, served])
    text = "rows over the socket, requests of 64 rows as bin"
    book.compare(text, ROWS64, OURS, "onnxruntime in process", "rows/s", 10, below=False)


def without_a_socket(run: Run) -> None:
    run.say("in process")
    samples, facts = in_process.measure(max(2, run.plan.rounds))
    run.book.samples |= {(f"in process, {case}", f"{column} us"): v for (case, column), v in samples.items()}
    note = "" if "added_us" in facts else "not available: no compiler for the kernel alone"
    if not note:
        note = f"{facts['predict_p50_us']:.1f} us, the kernel alone {facts['kernel_us']:.1f} us"
    run.book.limit(
        "predict in process of one cached entity, p50 over the tree kernel",
        facts.get("added_us"),
        "us",
        5,
        note,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about two minutes, figures of little weight")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    facts = machine()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        run = Run(Path(name), plan, stack)
        book = run.book
        without_a_socket(run)
        ours = run.ours("plain")
        beside_the_peers(run, ours)
        stack.close()  # the peers' processes are not idle for free
        ours = run.ours("alone")
        many_rows(run, ours[OURS])
        open_loop_line(run, ours[OURS], book.median(OURS, C512))
        sustained_line(run, ours[OURS])
        stack.close()
        overload_lines(run)
        attempt(book, "hung model, latest reply after its deadline", "<= 2 ms", lambda: hung_line(run))
        edge_lines(run)
        stack.close()
        path = RESULTS / "model.json"
        kernel_lines(book, json.loads(path.read_text()) if path.exists() else None)
    settings = {
        "trees": TREES,
        "leaves": LEAVES,
        "features": FEATURES,
        "distinct_rows": ROWS,
        "rounds": plan.rounds,
        "window_s": plan.window,
        "quick": options.quick,
        "unit": "contender",
        "cores_used": run.cores,
        "failed_requests": book.failures,
        "peer_versions": run.versions,
        "other_samples": {
            f"{who}, {column}": values
            for (who, column), values in book.samples.items()
            if column not in TABLE
        },
    }
    report(run.book, "Targets of serving")
    write(
        "serving-quick" if options.quick else "serving",
        rows_of({key: values for key, values in book.samples.items() if key[1] in TABLE}),
        facts=facts,
        settings=settings,
        packages=["numpy", "msgpack", "uvloop", "lightgbm", "onnxruntime", "penstock"],
        absent=book.absent,
        targets=book.plain_lines(),
    )


if __name__ == "__main__":
    main()
