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
        ("low_share", 0.0),
        ("low_share", 0.6),
        ("low_share", float("nan")),
        ("breaker_timeout_ms", 0.0),
        ("breaker_timeout_ms", float("inf")),
        ("breaker_probe_ms", 0.0),
        ("breaker_failures", 0),
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


def request_of(msgid: int, priority: str, rows: int = 1) -> bytes:
    options = {"priority": priority}
    return msgpack.packb([0, msgid, "predict_vectors", ["m", bytes(4 * F * rows), rows, options]])


def test_low_requests_wait_for_high_ones_but_for_their_share(core: Any, image: bytes) -> None:
    served = core.load(
        "m", "1", image, max_latency_ms=60_000, max_batch_rows=1, low_share=0.25, inline_limit_us=10**6
    )
    core.publish(served)
    served._hold(True)
    connection = connect(core)
    send(connection, request(100))
    while not served.stats()["breaker"]["busy"]:  # the first batch is out, and holds the others up
        pass
    send(connection, b"".join(request_of(i, "low") for i in range(4)))
    send(connection, b"".join(request_of(i, "high") for i in range(10, 22)))
    waiting = served.stats()["classes"]
    assert waiting["low"]["queued_rows"] == 4 and waiting["high"]["queued_rows"] == 12
    served._hold(False)
    order = [reply[1] for reply in wait_replies(core, connection, 17)]
    assert order == [100, 10, 11, 12, 0, 13, 14, 15, 1, 16, 17, 18, 2, 19, 20, 21, 3]
    stats = served.stats()
    conserved(stats)
    for name, requests in (("high", 13), ("low", 4)):
        conserved(stats["classes"][name])
        assert stats["classes"][name]["requests"]["ok"] == requests
        assert stats["classes"][name]["queued_rows"] == 0
        assert stats["classes"][name]["max_wait_ns"] > 0


def test_a_flood_of_low_requests_does_not_refuse_a_high_one(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000, max_requests=8)
    core.publish(served)
    served._hold(True)
    connection = connect(core)
    send(connection, b"".join(request_of(i, "low") for i in range(50)))
    refused = replies(connection)
    assert 40 < len(refused) < 50 and {r[2]["code"] for r in refused} == {"RESOURCE_EXHAUSTED"}
    for i in range(100, 104):
        send(connection, request_of(i, "high"))
    assert replies(connection) == []
    served._hold(False)
    assert all(reply[2] is None for reply in wait_replies(core, connection, 50 - len(refused) + 4))
    conserved(served.stats())


def test_a_connection_is_served_beside_one_that_floods(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000, max_batch_rows=2, inline_limit_us=10**6)
    core.publish(served)
    served._hold(True)
    greedy, modest = connect(core, max_in_flight=10_000), connect(core)
    send(greedy, request(0))
    while not served.stats()["breaker"]["busy"]:
        pass
    send(greedy, b"".join(request(i) for i in range(1, 10_000)))
    flood = len(replies(greedy))
    assert 0 < flood < 9_000  # more is refused than the lane may hold of one connection
    send(modest, request(1))
    served._hold(False)
    # Less than three rounds of the greedy one come before it.
    assert wait_replies(core, modest, 1)[0][2] is None
    stats = served.stats()["classes"]["high"]
    conserved(stats)


def test_a_hung_run_opens_the_breaker_and_its_end_closes_it(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000, breaker_timeout_ms=20, breaker_probe_ms=77)
    core.publish(served)
    core.publish(core.load("well", "1", image, max_latency_ms=60_000))
    served._hold(True)
    connection = connect(core)
    send(connection, request(1) + request(2))
    # The run in progress and what queues behind it, long before their deadlines.
    first, second = wait_replies(core, connection, 2)
    assert first[2]["code"] == second[2]["code"] == "UNAVAILABLE"
    assert first[2]["retryable"] and first[2]["retry_after_ms"] == 77
    assert served.stats()["breaker"] == {"state": "open", "busy": True, "opens": 1, "probes": 0}
    send(connection, request(3))
    (third,) = replies(connection)  # at once
    assert third[2]["code"] == "UNAVAILABLE" and third[2]["retry_after_ms"] == 77
    well = core.call(True, msgpack.packb(["well", bytes(4 * F), 1]))
    assert isinstance(well[0], np.ndarray)
    runs = served.stats()["run"]["count"]
    served._hold(False)
    while served.stats()["breaker"]["state"] != "closed":
        pass
    assert served.stats()["breaker"] == {"state": "closed", "busy": False, "opens": 1, "probes": 1}
    assert served.stats()["run"]["count"] == runs  # no run for those who had their answer
    send(connection, request(4))
    assert wait_replies(core, connection, 1)[0][2] is None
    stats = served.stats()
    conserved(stats)
    assert stats["requests"]["failed"] == 2 and stats["requests"]["rejected"] == 1


def test_stopping_does_not_wait_for_a_run_that_hangs(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000, breaker_timeout_ms=20)
    core.publish(served)
    served._hold(True)
    connection = connect(core)
    send(connection, request(1))
    served.stop()
    (reply,) = wait_replies(core, connection, 1)
    assert reply[2]["code"] == "UNAVAILABLE"


def test_a_lost_connection_costs_only_its_own_requests(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000)
    core.publish(served)
    served._hold(True)
    lost, kept = connect(core), connect(core)
    for i in range(20):
        send(lost, request(i))
        send(kept, request(i))
    send(kept, msgpack.packb([2, "cancel", [7]]))
    send(kept, msgpack.packb([2, "cancel", [99]]))
    lost.drop()
    served._hold(False)
    answers = {reply[1]: reply[2] for reply in wait_replies(core, kept, 20)}
    assert answers.pop(7)["code"] == "CANCELLED"
    assert all(error is None for error in answers.values()) and len(answers) == 19
    while served.stats()["requests"]["in_flight"]:
        core.wake()
    stats = served.stats()
    conserved(stats)
    assert stats["requests"]["cancelled"] == 21 and stats["requests"]["ok"] == 19


def test_what_is_refused_on_arrival_is_timed(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_requests=4)
    core.publish(served)
    connection = connect(core)
    send(connection, request(1, 0))
    assert served.stats()["stages"]["refuse"]["count"] == 1
    served._hold(True)
    send(connection, b"".join(request(msgid) for msgid in range(2, 12)))
    stats = served.stats()
    assert stats["stages"]["refuse"]["count"] == stats["requests"]["rejected"] > 1
    served._hold(False)
