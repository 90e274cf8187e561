"""Replies that the core sends itself: over real sockets, whole or in part, and the batches of a turn."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingRegressor

from penstock import _core
from penstock.models import trees

F = 2


@pytest.fixture(scope="module")
def image() -> bytes:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(300, F)).astype(np.float32)
    model = GradientBoostingRegressor(n_estimators=10, max_leaf_nodes=7, random_state=1)
    return trees.from_sklearn(model.fit(x, x[:, 0] + x[:, 1] ** 2))


@pytest.fixture
def core(image: bytes) -> Iterator[Any]:
    core = _core.ServingCore()
    core.publish(core.load("m", "1", image, max_latency_ms=60_000, inline_limit_us=1_000_000))
    yield core
    core.close()


class Wire:
    """A connection attached to one end of a socket pair; the test holds the other end."""

    def __init__(self, core: Any, max_output_bytes: int = 1 << 24) -> None:
        self.near, self.far = socket.socketpair()
        self.far.setblocking(False)
        self.connection = core.connection(1 << 24, 16, 4096, max_output_bytes)
        assert self.connection.attach(self.near.fileno())
        self.unpacker = msgpack.Unpacker()

    def send(self, data: bytes) -> None:
        while data:
            room = self.connection.get_buffer(len(data))
            n = min(len(room), len(data))
            room[:n] = data[:n]
            assert self.connection.received(n) == []
            data = data[n:]

    def replies(self) -> list[Any]:
        while True:
            try:
                self.unpacker.feed(self.far.recv(1 << 16))
            except BlockingIOError:
                return list(self.unpacker)

    def close(self) -> None:
        self.connection.drop()
        self.near.close()
        self.far.close()


def request(msgid: int, rows: np.ndarray) -> bytes:
    return msgpack.packb([0, msgid, "predict_vectors", ["m", rows.tobytes(), len(rows)]])


def some_rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, F)).astype(np.float32)


def scores_of(reply: Any) -> np.ndarray:
    assert reply[2] is None, reply
    return np.frombuffer(reply[3]["scores"], np.float32)


def test_a_reply_is_in_the_socket_when_the_read_returns(core: Any, image: bytes) -> None:
    wire = Wire(core)
    rows = some_rows(3)
    wire.send(request(7, rows))
    (reply,) = wire.replies()
    assert reply[1] == 7 and wire.connection.take_output() is None
    expected = _core.TreeEnsemble(image).predict(rows)[:, 0].astype(np.float32)
    np.testing.assert_array_equal(scores_of(reply), expected)
    wire.close()


def test_what_the_socket_does_not_take_is_left_to_the_caller_in_order(core: Any) -> None:
    wire = Wire(core)
    rows = some_rows(2000)
    sent = 0
    while not wire.connection.pending_output_bytes:  # until the far end's buffer is full
        wire.send(request(sent, rows))
        sent += 1
    assert core.wake() == [wire.connection.id]  # somebody must look after the rest
    rest = wire.connection.take_output()
    wire.send(request(sent, rows))  # answered behind the rest, not before it
    assert wire.connection.take_output() is None
    replies = wire.replies()
    assert len(replies) < sent
    wire.unpacker.feed(rest)
    replies += list(wire.unpacker)
    assert [reply[1] for reply in replies] == list(range(sent))
    wire.connection.output_sent()
    assert not wire.connection.send_output()
    (last,) = wire.replies()
    assert last[1] == sent
    wire.close()


def test_a_descriptor_that_is_used_again_gets_nothing_of_the_old_connection(core: Any) -> None:
    wire = Wire(core)
    number = wire.near.fileno()
    wire.near.close()
    stranger, other_end = socket.socketpair()
    if stranger.fileno() != number:
        os.dup2(stranger.fileno(), number)
    other_end.setblocking(False)
    wire.send(request(1, some_rows(1)))
    assert len(wire.replies()) == 1
    with pytest.raises(BlockingIOError):
        other_end.recv(1)
    if stranger.fileno() != number:
        os.close(number)
    stranger.close()
    other_end.close()
    wire.close()


def test_a_dropped_connection_lets_its_socket_go(core: Any) -> None:
    wire = Wire(core)
    wire.connection.drop()
    wire.near.close()
    assert wire.far.recv(1) == b""
    wire.close()


def test_reads_of_one_turn_run_as_one_batch(core: Any, image: bytes) -> None:
    wires = [Wire(core) for _ in range(8)]
    ensemble = _core.TreeEnsemble(image)
    (served,) = core.live()
    turns = 0
    while max(served.stats()["batches"], default=0) < 8:  # the first reads of a burst are answered at once
        turns += 1
        assert turns < 10_000
        rows = some_rows(8, turns)
        for i, wire in enumerate(wires):
            wire.send(request(turns, rows[i : i + 1]))
        while select.select([core.event_fd], [], [], 0)[0]:
            assert core.wake() == []
        for i, wire in enumerate(wires):
            (reply,) = wire.replies()
            assert reply[1] == turns
            assert scores_of(reply)[0] == np.float32(ensemble.predict(rows[i : i + 1])[0, 0])
    stats = served.stats()["requests"]
    assert stats["ok"] == stats["submitted"] == 8 * turns
    # One connection alone is not kept waiting.
    for msgid in range(2):
        wires[0].send(request(msgid, some_rows(1)))
        while select.select([core.event_fd], [], [], 0)[0]:
            core.wake()
        wires[0].replies()
    wires[0].send(request(3, some_rows(1)))
    assert [reply[1] for reply in wires[0].replies()] == [3]
    for wire in wires:
        wire.close()


def test_the_timer_says_when_the_next_deadline_is_due(core: Any) -> None:
    (served,) = core.live()
    served._hold(True)
    wire = Wire(core)
    rows = some_rows(1)
    for msgid, deadline_ms in ((1, 30), (2, 5)):
        params = ["m", rows.tobytes(), 1, {"deadline_ms": deadline_ms}]
        wire.send(msgpack.packb([0, msgid, "predict_vectors", params]))
        core.wake()
    found: list[Any] = []
    while len(found) < 2:
        assert select.select([core.timer_fd], [], [], 60)[0]
        core.expire()
        found += wire.replies()
    assert [(reply[1], reply[2]["code"]) for reply in found] == [(i, "DEADLINE_EXCEEDED") for i in (2, 1)]
    assert not select.select([core.timer_fd], [], [], 0)[0]  # nothing is due any more
    served._hold(False)
    wire.close()
