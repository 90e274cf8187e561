"""What a connection knows of its peer: until when it may predict, and since when it is silent or stuck."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import GradientBoostingRegressor

from penstock import _core
from penstock.models import trees

FOREVER = 2**63 - 1


@pytest.fixture(scope="module")
def image() -> bytes:
    rows = np.random.default_rng(7).normal(size=(100, 2)).astype(np.float32)
    return trees.from_sklearn(GradientBoostingRegressor(n_estimators=2).fit(rows, rows[:, 0]))


@pytest.fixture
def core(image: bytes) -> Iterator[Any]:
    core = _core.ServingCore()
    core.publish(core.load("m", "1", image, inline_limit_us=10_000_000, max_latency_ms=60_000))
    yield core
    core.close()


def connect(core: Any) -> Any:
    return core.connection(
        max_message_bytes=1 << 20, max_depth=16, max_in_flight=64, max_output_bytes=1 << 20
    )


def send(connection: Any, data: bytes, step: int = 1 << 20) -> list[Any]:
    """Feed the bytes as `Server` does: what comes behind an `auth` waits until that is decided."""
    others = []
    while data:
        room = connection.get_buffer(len(data))
        n = min(len(room), len(data), step)
        room[:n] = data[:n]
        data = data[n:]
        found = connection.received(n)
        while found:
            others += found
            for msgid, method, params in found:
                if method == "auth":
                    if msgpack.unpackb(params) == ["right"]:
                        connection.authorize(FOREVER)
                    connection.reply(msgid, msgpack.packb(None))
            found = connection.received(0)
    return others


def replies(core: Any, connection: Any) -> list[Any]:
    core.wake()
    data = connection.take_output()
    connection.output_sent()
    unpacker = msgpack.Unpacker()
    unpacker.feed(data or b"")
    return list(unpacker)


def ask(msgid: int) -> bytes:
    return msgpack.packb([0, msgid, "predict_vectors", ["m", bytes(8), 1]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["predict", "stats", "right", "wrong"]), max_size=30), st.integers(1, 200))
def test_predictions_are_refused_until_the_token_is_shown(image: bytes, sent: list[str], step: int) -> None:
    core = _core.ServingCore()
    core.publish(core.load("m", "1", image, inline_limit_us=10_000_000, max_latency_ms=60_000))
    connection = connect(core)
    connection.authorize(0)
    data = b""
    expected = {}
    known = False
    for msgid, what in enumerate(sent):
        if what == "predict":
            data += ask(msgid)
            expected[msgid] = None if known else "UNAUTHENTICATED"
        elif what == "stats":
            data += msgpack.packb([0, msgid, "stats", []])
        else:
            data += msgpack.packb([0, msgid, "auth", [what]])
            expected[msgid] = None
            known |= what == "right"
    others = send(connection, data, step)
    assert [msgid for msgid, _, _ in others] == [i for i, what in enumerate(sent) if what != "predict"]
    got = {msgid: error and error["code"] for _, msgid, error, _ in replies(core, connection)}
    assert got == expected
    core.close()


def test_a_permission_ends_at_its_wall_clock_time(core: Any) -> None:
    connection = connect(core)
    connection.authorize(time.time_ns() // 1000 + 3_600_000_000)
    send(connection, ask(1))
    connection.authorize(time.time_ns() // 1000 - 1)
    send(connection, ask(2))
    (first, second) = replies(core, connection)
    assert (first[1], first[2]) == (1, None)
    assert (second[1], second[2]["code"], second[2]["retryable"]) == (2, "UNAUTHENTICATED", False)
    assert connection.in_flight == 0


def test_idle_is_who_waits_for_nothing_and_stuck_who_sends_half(core: Any) -> None:
    silent, waiting, half, gone = (connect(core) for _ in range(4))
    send(waiting, msgpack.packb([0, 1, "stats", []]))
    send(half, ask(1) + ask(2)[:-1])
    gone.drop()
    assert core.overdue(0, 0) == ([silent.id], [half.id])
    assert core.overdue(math.inf, math.inf) == ([], [])
    waiting.reply(1, msgpack.packb(None))
    idle, stuck = core.overdue(0, 0)
    assert sorted(idle) == [silent.id, waiting.id] and stuck == [half.id]
    send(half, ask(2)[-1:])
    idle, stuck = core.overdue(0, 0)
    assert sorted(idle) == [silent.id, waiting.id, half.id] and stuck == []


def test_a_message_that_grows_by_64_kib_is_not_stuck(core: Any) -> None:
    connection = connect(core)
    limit = 1.0  # seconds; the machine may be slow

    def stuck() -> bool:
        return core.overdue(math.inf, limit)[1] == [connection.id]

    def wait() -> None:
        while not stuck():
            pass

    send(connection, b"\x94\x00\x01\xa7predict\x91\xc6\x00\x0f\x00\x00")
    wait()
    send(connection, b"x" * ((64 << 10) - 1))
    assert stuck()
    send(connection, b"x")
    assert not stuck()
    wait()
    connection.touch()  # it could not go on, as it was not read from
    assert not stuck()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2**32 - 1)), max_size=600), st.integers(1, 300))
def test_requests_in_flight_are_a_bounded_set(steps: list[tuple[bool, int]], limit: int) -> None:
    session = _core.WireSession(1 << 16, 16, limit, 1 << 20)
    model: set[int] = set()
    for opens, number in steps:
        if opens:
            msgid = number % 1009 * 4096  # many in one run of slots
            data = msgpack.packb([0, msgid, "stats", []])
            room = session.get_buffer(len(data))
            room[: len(data)] = data
            session.advance(len(data))
            kind = session.next_message()[0]
            assert kind == ("bad" if msgid in model or len(model) == limit else "other")
            if kind == "other":
                model.add(msgid)
        elif model:
            msgid = sorted(model)[number % len(model)]
            assert session.finish(msgid)
            assert not session.finish(msgid)
            model.remove(msgid)
        assert session.in_flight == len(model)
    assert all(session.finish(msgid) for msgid in model)
