"""A read of more requests than there is room for: full batches are run and answered while it is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor

from penstock import _core
from penstock.models import trees

F = 4
ROWS = np.random.default_rng(0).normal(size=(300, F)).astype(np.float32)


@pytest.fixture(scope="module")
def image() -> bytes:
    return trees.from_sklearn(RandomForestRegressor(3, max_depth=3, random_state=0).fit(ROWS, ROWS[:, 0]))


@pytest.fixture
def core() -> Iterator[Any]:
    core = _core.ServingCore()
    yield core
    core.close()


def replies_to_one_read(core: Any, in_flight: int) -> list[Any]:
    """The replies that are there when `received` returns, to a request for each row."""
    connection = core.connection(1 << 20, 16, in_flight, 1 << 20)
    data = b"".join(
        msgpack.packb([0, i, "predict_vectors", ["m", row.tobytes(), 1]]) for i, row in enumerate(ROWS)
    )
    connection.get_buffer(len(data))[: len(data)] = data
    connection.received(len(data))
    unpacker = msgpack.Unpacker()
    unpacker.feed(connection.take_output() or b"")
    connection.output_sent()
    return list(unpacker)


@pytest.mark.parametrize("room", [{"in_flight": 100}, {"max_requests": 150}, {"max_queued_rows": 150}])
def test_a_long_read_needs_room_for_a_batch_only(core: Any, image: bytes, room: dict[str, int]) -> None:
    in_flight = room.pop("in_flight", 2000)
    served = core.load("m", "1", image, max_latency_ms=60_000, inline_limit_us=1_000_000, **room)
    core.publish(served)
    replies = replies_to_one_read(core, in_flight)
    assert [reply[1] for reply in replies] == list(range(len(ROWS)))  # in order: each batch is answered
    scores = np.array([np.frombuffer(reply[3]["scores"], np.float32)[0] for reply in replies])
    assert (scores == _core.TreeEnsemble(image).predict(ROWS)[:, 0].astype(np.float32)).all()
    stats = served.stats()
    assert stats["batches"] == {64: 4, 44: 1}
    assert stats["executor_runs"] == 0
    assert stats["requests"]["ok"] == len(ROWS)


def test_batches_that_are_not_cheap_are_left_to_the_end_of_the_read(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000, inline_limit_us=0, max_requests=150)
    core.publish(served)
    refused = [reply for reply in replies_to_one_read(core, 2000) if reply[2] is not None]
    assert refused
    assert {reply[2]["code"] for reply in refused} == {"RESOURCE_EXHAUSTED"}
