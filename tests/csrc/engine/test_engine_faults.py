"""Faults that the serving core once had, each by the request or the order of events that showed it."""

from __future__ import annotations

import datetime as dt
import gc
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingRegressor

from penstock import _core
from penstock.features.expressions import col
from penstock.features.program import compile_program
from penstock.models import trees

F = 2


@pytest.fixture(scope="module")
def image() -> bytes:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(300, F)).astype(np.float32)
    model = GradientBoostingRegressor(n_estimators=10, max_leaf_nodes=7, random_state=1)
    return trees.from_sklearn(model.fit(x, x[:, 0] + x[:, 1] ** 2))


@pytest.fixture
def core() -> Iterator[Any]:
    core = _core.ServingCore()
    yield core
    core.close()


def request(msgid: int, rows: int = 1) -> bytes:
    return msgpack.packb([0, msgid, "predict_vectors", ["m", bytes(4 * F * rows), rows]])


def connect(core: Any, **limits: int) -> Any:
    defaults = {
        "max_message_bytes": 1 << 20,
        "max_depth": 16,
        "max_in_flight": 64,
        "max_output_bytes": 1 << 20,
    }
    return core.connection(**{**defaults, **limits})


def send(connection: Any, data: bytes) -> None:
    while data:
        room = connection.get_buffer(len(data))
        n = min(len(room), len(data))
        room[:n] = data[:n]
        connection.received(n)
        data = data[n:]


def replies(connection: Any) -> list[Any]:
    data = connection.take_output()
    if data is None:
        return []
    connection.output_sent()
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    return list(unpacker)


def conserved(stats: dict[str, Any]) -> None:
    for what in ("requests", "rows"):
        c = stats[what]
        ends = sum(c[end] for end in ("in_flight", "ok", "rejected", "expired", "cancelled", "failed"))
        assert c["submitted"] == ends


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_batch_rows", 0),
        ("max_batch_rows", 65),
        ("max_batch_rows", 1 << 20),
        ("max_latency_ms", 0.0),
        ("max_latency_ms", float("nan")),
        ("max_latency_ms", 1e300),
        ("guard_ms", -1.0),
        ("guard_ms", float("inf")),
        ("inline_limit_us", -1),
        ("inline_limit_us", 1 << 62),
        ("max_requests", 0),
        ("max_queued_rows", 0),
        ("max_queued_rows", 1 << 31),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(
    core: Any, image: bytes, setting: str, value: float
) -> None:
    with pytest.raises(ValueError, match=setting):
        core.load("m", "1", image, **{setting: value})


def wait_replies(core: Any, connection: Any, n: int) -> list[Any]:
    found = replies(connection)
    while len(found) < n:
        core.wake()
        core.expire()
        found += replies(connection)
    return found


def test_a_replaced_version_that_nobody_holds_still_answers(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=30)
    core.publish(served)
    served._hold(True)
    connection = connect(core)
    send(connection, request(5))
    core.publish(core.load("m", "2", image))
    del served
    gc.collect()
    (reply,) = wait_replies(core, connection, 1)
    assert reply[1] == 5 and reply[2]["code"] == "DEADLINE_EXCEEDED"


def test_what_a_peer_left_before_its_reply_was_written_is_cancelled(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, inline_limit_us=0, max_latency_ms=60_000)
    core.publish(served)
    connection = connect(core)
    served._hold(True)  # the run ends after the read, not in it
    send(connection, request(1, 3))
    served._hold(False)
    while not served.stats()["run"]["count"]:
        pass
    connection.drop()
    core.wake()
    stats = served.stats()
    conserved(stats)
    assert stats["rows"]["cancelled"] == 3 and stats["rows"]["ok"] == 0
    assert len(served.drain()[0]) == 0


def test_a_reply_without_room_is_an_error_and_not_counted_ok(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000)
    core.publish(served)
    connection = connect(core, max_output_bytes=400)
    send(connection, request(1, 60))
    (reply,) = replies(connection)
    assert reply[2]["code"] == "RESOURCE_EXHAUSTED"
    stats = served.stats()
    conserved(stats)
    assert stats["rows"]["ok"] == 0 and stats["rows"]["rejected"] == 60
    assert len(served.drain()[0]) == 0


def test_a_connection_without_room_for_an_error_is_closed(core: Any, image: bytes) -> None:
    core.publish(core.load("m", "1", image, max_latency_ms=60_000))
    connection = connect(core, max_output_bytes=400)
    send(connection, b"".join(request(i, 2) for i in range(9)))
    assert connection.closed
    assert 0 < len(replies(connection)) < 9


def make_plan(views: int) -> dict[str, Any]:
    """A service of F features that reads `views` views by user; without a view, the hour of an input."""
    stored = [("amount", "float64")]
    names = [f"users{i}" for i in range(views)]
    schema = {f"{name}:amount": "float64" for name in names} or {"request:at": "timestamp"}
    features = [col(f"users{i % views}:amount") if views else col("request:at").hour() for i in range(F)]
    words = _core.RowSchema(stored).row_words
    return {
        "entities": [("user", "int64")] if views else [],
        "views": [
            {"name": name, "cache": _core.FeatureCache(10, words), "fields": stored, "key_columns": [0]}
            for name in names
        ],
        "request_source": "request",
        "inputs": [] if views else [("at", "timestamp")],
        "program": compile_program([(f"f{i}", feature) for i, feature in enumerate(features)], schema),
        "key_seed": bytes(16),
        "error_on_missing": False,
    }


def test_plans_of_different_shape_may_follow_each_other_at_one_address(image: bytes) -> None:
    reference = _core.TreeEnsemble(image).predict(np.full((1, F), np.nan, np.float32))[:, 0]
    for turn in range(40):
        core = _core.ServingCore()
        views = 1 if turn % 2 == 0 else 40
        core.publish(core.load("m", "1", image, make_plan(views), max_latency_ms=60_000))
        scores = core.call(False, msgpack.packb(["m", {"user": None}]))[0]
        np.testing.assert_array_equal(scores, reference)
        core.close()
        del core
        gc.collect()


@pytest.mark.parametrize("many", [False, True])
def test_a_time_input_may_be_a_number_or_a_timestamp(core: Any, image: bytes, many: bool) -> None:
    served = core.load("m", "1", image, make_plan(0), max_latency_ms=60_000)
    core.publish(served)
    at = dt.datetime(2026, 3, 1, 17, 5, 1, 250, tzinfo=dt.UTC)
    micros = int(at.timestamp()) * 1_000_000 + 250
    far = dt.datetime(2900, 3, 1, 17, tzinfo=dt.UTC)
    early = dt.datetime(1920, 3, 1, 17, tzinfo=dt.UTC)
    whole = at.replace(microsecond=0)
    for value in (micros, at, far, early, whole):
        given = [value, micros] if many else value
        got = core.call(False, msgpack.packb(["m", {}, {"at": given}], datetime=True))
        assert isinstance(got[0], np.ndarray), got
    features = served.drain()[2]
    assert (features == 17).all() and len(features) == (10 if many else 5)
    got = core.call(False, msgpack.packb(["m", {}, {"at": msgpack.ExtType(5, b"abcd")}]))
    assert got[0] == "INVALID_ARGUMENT" and "inputs.at" in got[1] and "timestamp" in got[1]


def test_an_unknown_entity_is_counted_alike_whether_it_was_loaded_or_cached(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, {**make_plan(1), "error_on_missing": True}, max_latency_ms=60_000)
    core.publish(served)
    schema = _core.RowSchema([("amount", "float64")])
    connection = connect(core)
    for msgid in range(2):
        send(connection, msgpack.packb([0, msgid, "predict", ["m", {"user": 1}]]))
        misses = core.wait_misses(0.0)
        assert (misses is None) == (msgid == 1)
        if misses is not None:
            words = schema.encode([(np.zeros(1), np.zeros(1, bool))], np.full(1, 2, np.uint8))
            lowest, highest = np.iinfo(np.int64).min, np.iinfo(np.int64).max
            core.finish_misses(misses, [(words, np.array([[lowest, highest, lowest, lowest]]))], 1)
        (reply,) = wait_replies(core, connection, 1)
        assert reply[2]["code"] == "NOT_FOUND"
    stats = served.stats()
    conserved(stats)
    assert stats["requests"]["rejected"] == 2
