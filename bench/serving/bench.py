"""Serving: `predict_vectors` in process and over a socket, beside a bare uvloop echo of the same bytes.

The model and its rows are those of the tree benchmark. Every answer of a first pass over the rows is
checked against LightGBM. The client is one thread with `socket` and `msgpack`; client and server share the
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Absent, machine, rows_of, write
from forest import FEATURES, LEAVES, ROWS, TREES, train

Samples = dict[tuple[str, str], list[float]]
PIPELINE = 64


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connect(address: str | tuple[str, int], server: subprocess.Popen[bytes]) -> socket.socket:
    """A connected socket; the server may still be starting. Raises Absent if it ended instead."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    until = time.monotonic() + 60
    while True:
        connection = socket.socket(family)
        try:
            connection.connect(address)
        except OSError:
            connection.close()
            if server.poll() is not None:
                raise Absent(f"{server.args[-2:]} ended with {server.returncode}") from None
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
            continue
        if family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server process, ended by SIGTERM."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        try:
            yield running
        finally:
            running.terminate()


def request(msgid: int, rows: np.ndarray) -> bytes:
    return bytes(msgpack.packb([0, msgid, "predict_vectors", ["forest", rows.tobytes(), len(rows)]]))


def scores_of(message: Any) -> np.ndarray:
    if message[2] is not None:
        raise SystemExit(f"the server answered {message[2]}")
    return np.frombuffer(message[3]["scores"], np.float32)


class Peer:
    """One connection and the requests that go over it in rotation."""

    def __init__(
        self, name: str, address: str | tuple[str, int], server: subprocess.Popen[bytes], *, echo: bool
    ) -> None:
        self.name, self.echo = name, echo
        self.connection = connect(address, server)
        self.unpacker = msgpack.Unpacker()
        self.at = 0

    def check(self, rows: np.ndarray, batch: int, expected: np.ndarray) -> None:
        """Every row's score, once."""
        if self.echo:
            return
        for at in range(0, ROWS, batch):
            self.connection.sendall(request(at, rows[at : at + batch]))
            (message,) = self.answers(1)
            worst = np.abs(scores_of(message) - expected[at : at + batch]).max()
            if message[1] != at or not worst < 1e-5:
                raise SystemExit(f"{self.name}: scores differ from LightGBM's by {worst}")

    def received(self) -> bytes:
        data = self.connection.recv(1 << 16)
        if not data:
            raise SystemExit(f"{self.name}: the server closed the connection")
        return data

    def answers(self, count: int) -> list[Any]:
        messages: list[Any] = []
        while len(messages) < count:
            self.unpacker.feed(self.received())
            messages += self.unpacker
        return messages

    def receive(self, bytes_sent: int, count: int) -> None:
        if not self.echo:
            for message in self.answers(count):
                scores_of(message)
            return
        while bytes_sent > 0:
            bytes_sent -= len(self.received())

    def one_at_a_time(self, requests: list[bytes], times: int) -> list[float]:
        """Round trips, microseconds."""
        taken = []
        for _ in range(times):
            data = requests[self.at % len(requests)]
            self.at += 1
            start = time.perf_counter_ns()
            self.connection.sendall(data)
            self.receive(len(data), 1)
            taken.append((time.perf_counter_ns() - start) / 1e3)
        return taken

    def pipelined(self, bursts: list[bytes], times: int) -> list[float]:
        """Time for PIPELINE requests sent at once, per request, microseconds."""
        taken = []
        for _ in range(times):
            data = bursts[self.at % len(bursts)]
            self.at += 1
            start = time.perf_counter_ns()
            self.connection.sendall(data)
            self.receive(len(data), PIPELINE)
            taken.append((time.perf_counter_ns() - start) / 1e3 / PIPELINE)
        return taken


def over_sockets(peers: list[Peer], rows: np.ndarray, rounds: int, times: int) -> Samples:
    ones = [request(at, rows[at : at + 1]) for at in range(ROWS)]
    full = [request(at, rows[at : at + 64]) for at in range(0, ROWS, 64)]
    bursts = [b"".join(ones[at : at + PIPELINE]) for at in range(0, ROWS, PIPELINE)]
    samples: Samples = {}
    for round_number in range(rounds + 1):
        for peer in peers:
            for column, taken in (
                ("1 row", peer.one_at_a_time(ones, times)),
                ("64 rows", peer.one_at_a_time(full, times // 2)),
                (f"1 row of {PIPELINE} in flight", peer.pipelined(bursts, times // 20)),
            ):
                if round_number == 0:
                    continue
                samples.setdefault((peer.name, f"{column}, p50"), []).append(float(np.percentile(taken, 50)))
                if "in flight" not in column:
                    p99 = float(np.percentile(taken, 99))
                    samples.setdefault((peer.name, f"{column}, p99"), []).append(p99)
    return samples


def configure(folder: Path, bundle: Path, listen: list[str]) -> Path:
    """An inference-config.yaml of its own data_dir, so that an engine and a server can run side by side."""
    folder.mkdir()
    lines = [f"data_dir: {folder / 'data'}", "models:", "  forest:", f"    path: {bundle}"]
    if listen:
        lines += ["server:", "  listen:", *(f'    - "{address}"' for address in listen)]
    path = folder / "inference-config.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def save(booster: Any, columns: np.ndarray, folder: Path) -> Path:
    import pandas

    try:
        bundles = importlib.import_module("penstock.models.bundle")
        importlib.import_module("penstock.serving.engine")
    except ImportError as error:
        raise Absent(f"the engine is not in this build ({error})") from error
    frame = pandas.DataFrame(columns, columns=[*(f"f{i}" for i in range(FEATURES)), "label"])
    bundle = bundles.save_bundle(booster, frame, name="forest", directory=folder / "models", label="label")
    return Path(bundle.path)


def in_process(config: Path, rows: np.ndarray, expected: np.ndarray, rounds: int) -> Samples:
    engine_module = importlib.import_module("penstock.serving.engine")
    samples: Samples = {}
    with engine_module.Engine.from_config(config) as engine:
        parts_of = {
            batch: [np.ascontiguousarray(rows[at : at + batch]) for at in range(0, ROWS, batch)]
            for batch in (1, 64)
        }
        for round_number in range(rounds + 1):
            for batch, parts in parts_of.items():
                taken, scores = [], []
                for part in parts:
                    start = time.perf_counter_ns()
                    prediction = engine.predict_vectors("forest", part)
                    taken.append((time.perf_counter_ns() - start) / 1e3)
                    scores.append(prediction.scores)
                if not np.abs(np.concatenate(scores) - expected).max() < 1e-5:
                    raise SystemExit("Engine.predict_vectors: scores differ from LightGBM's")
                if round_number == 0:
                    continue
                column = "1 row" if batch == 1 else "64 rows"
                for percent in (50, 99):
                    key = ("Penstock in process", f"{column}, p{percent}")
                    samples.setdefault(key, []).append(float(np.percentile(taken, percent)))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--times", type=int, default=1000, help="requests a round")
    options = parser.parse_args()
    facts = machine()
    absent: list[str] = []
    samples: Samples = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        booster, columns, rows = train()
        expected = np.asarray(booster.predict(rows, num_threads=1))
        echo_path, echo_port = str(folder / "echo.sock"), free_port()
        echo = str(Path(__file__).with_name("echo.py"))
        server = stack.enter_context(process([sys.executable, echo, echo_path, str(echo_port)]))
        peers = [
            Peer("bare uvloop echo, Unix socket", echo_path, server, echo=True),
            Peer("bare uvloop echo, TCP", ("127.0.0.1", echo_port), server, echo=True),
        ]
        try:
            bundle = save(booster, columns, folder)
            samples |= in_process(configure(folder / "embedded", bundle, []), rows, expected, options.rounds)
            path, port = str(folder / "penstock.sock"), free_port()
            config = configure(folder / "served", bundle, [f"unix://{path}", f"tcp://127.0.0.1:{port}"])
            command = "from penstock.cli import main; main()"
            serve = [sys.executable, "-c", command, "serve", str(config)]
            server = stack.enter_context(process(serve))
            peers += [
                Peer("Penstock, Unix socket", path, server, echo=False),
                Peer("Penstock, TCP", ("127.0.0.1", port), server, echo=False),
            ]
        except Absent as error:
            absent.append(str(error))
        for peer in peers:
            for batch in (1, 64):
                peer.check(rows, batch, expected)
        samples |= over_sockets(peers, rows, options.rounds, options.times)
        for peer in peers:
            peer.connection.close()
    settings = {
        "trees": TREES,
        "leaves": LEAVES,
        "features": FEATURES,
        "distinct_rows": ROWS,
        "rounds": options.rounds,
        "requests_a_round": options.times,
        "connections": 1,
        "unit": "us per request",
    }
    packages = ["numpy", "msgpack", "uvloop", "lightgbm", "penstock"]
    write("serving", rows_of(samples), facts=facts, settings=settings, packages=packages, absent=absent)
    for text in absent:
        print(f"left out: {text}")


if __name__ == "__main__":
    main()
