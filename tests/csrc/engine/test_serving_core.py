"""The serving core through its binding: local calls, connections, misses, hangs, conservation."""

from __future__ import annotations

import select
import threading
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
from penstock.features.expressions import col, now
from penstock.features.program import compile_program
from penstock.models import trees

SEED = bytes(range(16))
F = 4
STORED = [("amount", "float64"), ("visits", "int64")]


@pytest.fixture(scope="module")
def image() -> bytes:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(500, F)).astype(np.float32)
    model = GradientBoostingRegressor(n_estimators=20, max_leaf_nodes=15, random_state=1)
    model.fit(x, x[:, 0] * 2 + x[:, 1] ** 2)
    return trees.from_sklearn(model)


@pytest.fixture
def core() -> Iterator[Any]:
    core = _core.ServingCore()
    yield core
    core.close()


def vectors(model: str, rows: np.ndarray, options: dict[str, Any] | None = None) -> bytes:
    data = np.ascontiguousarray(rows, np.float32).tobytes()
    return msgpack.packb([model, data, len(rows), options])


def conserved(stats: dict[str, Any]) -> None:
    for what in ("requests", "rows"):
        c = stats[what]
        ends = sum(c[end] for end in ("in_flight", "ok", "rejected", "expired", "cancelled", "failed"))
        assert c["submitted"] == ends


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 200, 4096])
@pytest.mark.parametrize("inline_limit_us", [0, 10_000])
def test_vectors_give_the_ensembles_scores_in_batches_of_at_most_64(
    core: Any, image: bytes, n: int, inline_limit_us: int
) -> None:
    served = core.load("m", "3", image, inline_limit_us=inline_limit_us, max_latency_ms=5000)
    core.publish(served)
    rows = np.random.default_rng(n).normal(size=(n, F)).astype(np.float32)
    ids = list(range(1000, 1000 + n))
    scores, version, got, status, timings = core.call(True, vectors("m", rows, {"request_id": ids}))
    assert version == "3" and status is None and got.tolist() == ids
    np.testing.assert_array_equal(scores, _core.TreeEnsemble(image).predict(rows)[:, 0])
    assert timings["total"] >= timings["run"] > 0
    stats = served.stats()
    assert max(stats["batches"]) <= 64
    assert sum(size * runs for size, runs in stats["batches"].items()) == n
    conserved(stats)
    ran = stats["executor_runs"] if inline_limit_us == 0 else stats["inline_runs"]
    assert ran == sum(stats["batches"].values()) or n > 1000  # a long inline burst may go on elsewhere


def test_served_rows_are_drained_once_with_what_was_answered(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, allow_replay=True, served_capacity=100)
    core.publish(served)
    rows = np.random.default_rng(0).normal(size=(80, F)).astype(np.float32)
    rows[3, 2] = np.nan
    ids = list(range(80))
    scores, *_ = core.call(True, vectors("m", rows, {"request_id": ids, "now": 123}))
    got_ids, now_us, features, got_scores, status, event_time = served.drain()
    assert got_ids.tolist() == ids and set(now_us.tolist()) == {123} and not status.any()
    np.testing.assert_array_equal(features, rows)
    np.testing.assert_array_equal(got_scores[:, 0], scores)
    assert event_time.shape == (80, 0)
    assert len(served.drain()[0]) == 0
    for _ in range(2):
        core.call(True, vectors("m", rows))
    assert len(served.drain()[0]) == 100
    assert served.stats()["served_dropped"] == 60


@pytest.mark.parametrize(
    ("params", "code", "words"),
    [
        (["nobody", b"\0" * 16, 1], "NOT_FOUND", "expected one of: "),
        (["m", b"\0" * 12, 1], "INVALID_ARGUMENT", "1 rows of 4 float32"),
        (["m", b"", 0], "INVALID_ARGUMENT", "0 rows"),
        (["m", b"\0" * 16 * 4097, 4097], "INVALID_ARGUMENT", "at most 4096"),
        (["m", b"\0" * 16, 1, {"now": 5}], "FAILED_PRECONDITION", "allow_replay"),
        (["m", b"\0" * 16, 1, {"deadline_ms": 0}], "INVALID_ARGUMENT", "deadline_ms"),
        (["r", b"\0" * 16, 1, {"now": -1}], "INVALID_ARGUMENT", "options.now is -1"),
        (["r", b"\0" * 16, 1, {"now": 1 << 62}], "INVALID_ARGUMENT", "years 1970 to 9999"),
        (["m"], "INVALID_ARGUMENT", "params"),
    ],
)
def test_a_bad_call_is_refused_by_name(
    core: Any, image: bytes, params: list[Any], code: str, words: str
) -> None:
    served = core.load("m", "1", image)
    core.publish(served)
    core.publish(core.load("r", "1", image, allow_replay=True))
    got, message, _ = core.call(True, msgpack.packb(params))
    assert got == code and words in message
    assert core.call(True, vectors("m", np.zeros((1, F))))[1] == "1"
    conserved(served.stats())


def test_predict_without_a_feature_service_is_refused(core: Any, image: bytes) -> None:
    core.publish(core.load("m", "1", image))
    assert core.call(False, msgpack.packb(["m", {"user": 1}]))[0] == "FAILED_PRECONDITION"


def test_a_hung_model_is_answered_at_the_deadline_and_others_do_not_notice(core: Any, image: bytes) -> None:
    hung = core.load("hung", "1", image, max_latency_ms=30)
    core.publish(hung)
    core.publish(core.load("well", "1", image, max_latency_ms=2000))
    hung._hold(True)
    got = core.call(True, vectors("hung", np.zeros((3, F))))
    assert got[0] == "DEADLINE_EXCEEDED"
    assert core.call(True, vectors("well", np.zeros((3, F))))[1] == "1"
    # The next one queues behind the run that hangs, or meets the open breaker, and is answered too.
    assert core.call(True, vectors("hung", np.zeros((1, F))))[0] in (
        "DEADLINE_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "UNAVAILABLE",
    )
    hung._hold(False)
    while hung.stats()["queued_rows"] or core.call(True, vectors("hung", np.zeros((1, F))))[1] != "1":
        pass
    conserved(hung.stats())
    assert hung.stats()["rows"]["expired"] >= 3


def test_stopping_answers_what_waits(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000)
    core.publish(served)
    served._hold(True)
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.append(core.call(True, vectors("m", np.zeros((1, F))))))
    caller.start()
    while served.stats()["requests"]["in_flight"] == 0:
        pass
    served.stop()
    caller.join()
    assert answers[0][0] == "UNAVAILABLE"
    conserved(served.stats())


def test_many_threads_get_their_own_answers(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=10_000)
    core.publish(served)
    reference = _core.TreeEnsemble(image)
    wrong: list[Any] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(150):
            rows = rng.normal(size=(int(rng.integers(1, 100)), F)).astype(np.float32)
            got = core.call(True, vectors("m", rows))
            if not isinstance(got[0], np.ndarray) or not np.array_equal(
                got[0], reference.predict(rows)[:, 0]
            ):
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    stats = served.stats()
    conserved(stats)
    assert stats["requests"]["ok"] == 600


class Peer:
    """A peer of a connection, in memory: feeds bytes, reads replies."""

    def __init__(self, core: Any, **limits: int) -> None:
        defaults = {
            "max_message_bytes": 1 << 20,
            "max_depth": 16,
            "max_in_flight": 64,
            "max_output_bytes": 1 << 20,
        }
        self.core = core
        self.connection = core.connection(**{**defaults, **limits})
        self.unpacker = msgpack.Unpacker()
        self.others: list[Any] = []

    def send(self, data: bytes, step: int | None = None) -> None:
        while data:
            room = self.connection.get_buffer(len(data))
            n = min(len(room), len(data), step or len(data))
            room[:n] = data[:n]
            self.others += self.connection.received(n)
            data = data[n:]

    def replies(self) -> list[Any]:
        data = self.connection.take_output()
        if data is not None:
            self.unpacker.feed(data)
            self.connection.output_sent()
        return list(self.unpacker)

    def wait_replies(self, n: int) -> list[Any]:
        found = self.replies()
        while len(found) < n:
            readable, _, _ = select.select([self.core.event_fd], [], [], 0.005)
            _ = self.core.wake() if readable else self.core.expire()
            found += self.replies()
        return found


def request(msgid: int, method: str, params: list[Any]) -> bytes:
    return msgpack.packb([0, msgid, method, params])


@settings(max_examples=30, deadline=None)
@given(step=st.integers(1, 200), n=st.integers(1, 30), inline=st.booleans())
def test_pipelined_requests_are_answered_whatever_the_pieces(step: int, n: int, inline: bool) -> None:
    core = _core.ServingCore()
    core.publish(core.load("m", "1", _IMAGE[0], inline_limit_us=10_000 if inline else 0, max_latency_ms=5000))
    peer = Peer(core)
    rows = np.random.default_rng(n).normal(size=(n, F)).astype(np.float32)
    stream = b""
    for i in range(n):
        stream += request(i, "predict_vectors", ["m", rows[i].tobytes(), 1])
        if i == n // 2:
            stream += request(1000, "health", [])
    peer.send(stream, step)
    replies = peer.wait_replies(n)
    assert [(m, method) for m, method, _ in peer.others] == [(1000, "health")]
    want = _core.TreeEnsemble(_IMAGE[0]).predict(rows)[:, 0].astype(np.float32)
    assert sorted(r[1] for r in replies) == list(range(n))
    for _, msgid, error, result in replies:
        assert error is None
        assert np.frombuffer(result["scores"], np.float32)[0] == want[msgid]
    assert peer.connection.in_flight == 1
    assert peer.connection.reply(1000, msgpack.packb({"ok": True}))
    assert peer.replies() == [[1, 1000, None, {"ok": True}]]
    core.close()


def test_a_result_above_the_output_limit_is_answered_resource_exhausted(core: Any) -> None:
    peer = Peer(core, max_output_bytes=1 << 16)
    peer.send(request(1, "stats", []) + request(2, "stats", []) + request(3, "stats", []))
    large = msgpack.packb(b"x" * (1 << 16))
    assert not peer.connection.reply(1, large)
    assert peer.connection.in_flight == 2
    assert peer.connection.reply(2, msgpack.packb("ok"))
    assert not peer.connection.reply(3, large)
    first, second, third = peer.replies()
    message = "the result does not fit the connection's output buffer"
    # Alone in the buffer it would not fit either; behind another reply it may do so later.
    assert first == [1, 1, {"code": "RESOURCE_EXHAUSTED", "message": message, "retryable": False}, None]
    assert second == [1, 2, None, "ok"]
    assert third == [1, 3, {"code": "RESOURCE_EXHAUSTED", "message": message, "retryable": True}, None]
    assert peer.connection.in_flight == 0
    assert not peer.connection.reply(1, msgpack.packb("again"))


def test_a_result_without_room_even_for_its_error_ends_the_connection(core: Any) -> None:
    peer = Peer(core, max_output_bytes=1 << 16)
    peer.send(request(1, "stats", []) + request(2, "stats", []))
    assert peer.connection.reply(1, msgpack.packb(b"x" * ((1 << 16) - 16)))
    assert not peer.connection.closed
    assert not peer.connection.reply(2, msgpack.packb(b"x" * 100))
    assert peer.connection.closed
    assert [reply[1] for reply in peer.replies()] == [1]


_IMAGE: list[bytes] = []


@pytest.fixture(scope="module", autouse=True)
def _keep_image(image: bytes) -> None:
    _IMAGE[:] = [image]


def test_a_cancelled_request_is_answered_cancelled(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000)
    core.publish(served)
    served._hold(True)
    peer = Peer(core)
    peer.send(request(7, "predict_vectors", ["m", bytes(4 * F), 1]))
    assert peer.connection.in_flight == 1
    peer.send(msgpack.packb([2, "cancel", [7]]))
    (reply,) = peer.wait_replies(1)
    assert reply[1] == 7 and reply[2]["code"] == "CANCELLED"
    served._hold(False)
    conserved(served.stats())


def test_a_peer_that_leaves_takes_its_requests_with_it(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000)
    core.publish(served)
    served._hold(True)
    peer = Peer(core)
    for i in range(5):
        peer.send(request(i, "predict_vectors", ["m", bytes(4 * F), 1]))
    peer.connection.drop()
    stats = served.stats()
    assert stats["requests"]["cancelled"] == 5 and stats["requests"]["in_flight"] == 0
    served._hold(False)
    assert core.call(True, vectors("m", np.zeros((1, F))))[1] == "1"
    conserved(served.stats())


def test_too_many_in_flight_are_refused_with_a_hint(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000)
    core.publish(served)
    served._hold(True)
    peer = Peer(core, max_in_flight=3)
    for i in range(5):
        peer.send(request(i, "predict_vectors", ["m", bytes(4 * F), 1]))
    refused = peer.replies()
    assert [r[1] for r in refused] == [3, 4]
    assert all(r[2]["code"] == "RESOURCE_EXHAUSTED" and r[2]["retryable"] for r in refused)
    served._hold(False)
    assert sorted(r[1] for r in peer.wait_replies(3)) == [0, 1, 2]


def test_a_full_lane_refuses_and_recovers(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000, max_requests=4)
    core.publish(served)
    served._hold(True)
    peer = Peer(core)
    for i in range(8):
        peer.send(request(i, "predict_vectors", ["m", bytes(4 * F), 1]))
    refused = peer.replies()
    assert len(refused) == 5 and all(r[2]["code"] == "RESOURCE_EXHAUSTED" for r in refused)
    assert all(r[2]["retry_after_ms"] >= 1 for r in refused)
    newcomer = Peer(core)  # a quarter of the room is kept for connections that have nothing in the lane
    for i in range(2):
        newcomer.send(request(i, "predict_vectors", ["m", bytes(4 * F), 1]))
    assert [r[1] for r in newcomer.replies()] == [1]
    served._hold(False)
    assert all(r[2] is None for r in [*peer.wait_replies(3), *newcomer.wait_replies(1)])
    conserved(served.stats())


def test_draining_refuses_new_calls(core: Any, image: bytes) -> None:
    core.publish(core.load("m", "1", image))
    core.drain()
    assert core.call(True, vectors("m", np.zeros((1, F))))[0] == "UNAVAILABLE"


# The plan: entities -> cached rows -> program.


def make_plan(cache: Any, *, error_on_missing: bool = False) -> dict[str, Any]:
    outputs = [
        ("amount", col("users:amount")),
        ("visits", col("users:visits")),
        ("ratio", col("users:amount") / col("request:base")),
        ("hour", now().hour()),
    ]
    schema = {"users:amount": "float64", "users:visits": "int64", "request:base": "float64"}
    return {
        "entities": [("user", "int64"), ("shop", "string")],
        "views": [{"name": "users", "cache": cache, "fields": STORED, "key_columns": [0, 1]}],
        "request_source": "request",
        "inputs": [("base", "float64")],
        "program": compile_program(outputs, schema),
        "key_seed": SEED,
        "error_on_missing": error_on_missing,
    }


class Loader:
    """Serves misses from a dict of (user, shop) -> (amount, visits); counts the rows it was asked for."""

    def __init__(self, core: Any, table: dict[tuple[int, str], tuple[float, int]], fail: str = "") -> None:
        self.core, self.fail = core, fail
        self.schema = _core.RowSchema(STORED)
        self.asked: list[tuple[int, int, int]] = []
        self.by_key = {}
        for (user, shop), row in table.items():
            keys, _ = _core.keys128([[user], [shop]], SEED)
            self.by_key[tuple(keys[0].tolist())] = row
        self.stop = False
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while not self.stop:
            misses = self.core.wait_misses(0.01)
            if misses is None:
                continue
            if self.fail:
                self.core.fail_misses(misses, "UNAVAILABLE", self.fail)
                continue
            self.core.finish_misses(misses, [self.rows(*view) for view in misses.views], 1)

    def rows(self, view: str, keys: np.ndarray, now_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert view == "users"
        found = [self.by_key.get(tuple(key)) for key in keys.tolist()]
        self.asked += [(*key, t) for key, t in zip(keys.tolist(), now_us.tolist())]
        status = np.array([0 if row else 2 for row in found], np.uint8)
        amount = np.array([row[0] if row else 0.0 for row in found])
        visits = np.array([row[1] if row else 0 for row in found], np.int64)
        valid = status == 0
        words = self.schema.encode([(amount, valid), (visits, valid)], status)
        hour = now_us // 3_600_000_000 * 3_600_000_000
        never = np.full(len(keys), np.iinfo(np.int64).min)
        meta = np.stack([hour, hour + 3_600_000_000, np.where(valid, hour, never), hour], axis=1)
        return words, meta

    def close(self) -> None:
        self.stop = True
        self.thread.join()


TABLE = {(1, "a"): (3.0, 5), (2, "b"): (8.0, 1), (7, "c"): (-1.5, 0)}
HOUR = 3_600_000_000


def expected(image: bytes, users: list[Any], shops: list[Any], base: list[float], now_us: int) -> np.ndarray:
    rows = np.full((len(users), F), np.nan, np.float32)
    for i, (user, shop) in enumerate(zip(users, shops)):
        found = TABLE.get((user, shop))
        if found:
            rows[i, :3] = found[0], found[1], np.float32(found[0] / base[i])
        rows[i, 3] = now_us // HOUR % 24
    return _core.TreeEnsemble(image).predict(rows)[:, 0]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_gathered_rows_equal_the_table(data: st.DataObject) -> None:
    core = _core.ServingCore()
    cache = _core.FeatureCache(data.draw(st.sampled_from([1, 100])), _core.RowSchema(STORED).row_words)
    served = core.load("m", "1", _IMAGE[0], make_plan(cache), allow_replay=True, max_latency_ms=20_000)
    core.publish(served)
    loader = Loader(core, TABLE)
    try:
        for _ in range(data.draw(st.integers(1, 4))):
            n = data.draw(st.sampled_from([1, 2, 5, 64, 70, 130]))
            choose = st.sampled_from([*TABLE, (1, "zz"), (None, "a"), (9, None)])
            pairs = data.draw(st.lists(choose, min_size=n, max_size=n))
            users, shops = [p[0] for p in pairs], [p[1] for p in pairs]
            base = [1.0 + i for i in range(n)]
            now_us = data.draw(st.integers(0, 10)) * HOUR + 5
            options = {"now": now_us, "no_cache": data.draw(st.booleans())}
            got = core.call(
                False, msgpack.packb(["m", {"user": users, "shop": shops}, {"base": base}, options])
            )
            assert isinstance(got[0], np.ndarray), got
            np.testing.assert_array_equal(got[0], expected(_IMAGE[0], users, shops, base, now_us))
            want_status = [0 if p in TABLE else 2 for p in pairs]
            assert (got[3] is None and not any(want_status)) or got[3].tolist() == want_status
        conserved(served.stats())
        assert len(served.drain()[0]) == served.stats()["rows"]["ok"]
    finally:
        loader.close()
        core.close()


def test_misses_are_merged_loaded_once_and_cached(core: Any, image: bytes) -> None:
    cache = _core.FeatureCache(100, _core.RowSchema(STORED).row_words)
    core.publish(core.load("m", "1", image, make_plan(cache), allow_replay=True, max_latency_ms=20_000))
    peer = Peer(core)
    for i in range(6):
        peer.send(request(i, "predict", ["m", {"user": 1, "shop": "a"}, {"base": 1.0}, {"now": HOUR}]))
    loader = Loader(core, TABLE)
    try:
        assert all(r[2] is None for r in peer.wait_replies(6))
        assert len(loader.asked) == 1
        peer.send(request(9, "predict", ["m", {"user": 1, "shop": "a"}, {"base": 1.0}, {"now": HOUR + 1}]))
        assert peer.wait_replies(1)[0][2] is None
        assert len(loader.asked) == 1
        peer.send(request(9, "predict", ["m", {"user": 1, "shop": "a"}, {"base": 1.0}, {"now": 2 * HOUR}]))
        assert peer.wait_replies(1)[0][2] is None
        assert len(loader.asked) == 2
    finally:
        loader.close()


def test_a_store_that_failed_is_unavailable_never_nan(core: Any, image: bytes) -> None:
    cache = _core.FeatureCache(100, _core.RowSchema(STORED).row_words)
    core.publish(core.load("m", "1", image, make_plan(cache), max_latency_ms=20_000))
    loader = Loader(core, TABLE, fail="the disk is gone")
    try:
        got = core.call(False, msgpack.packb(["m", {"user": 1, "shop": "a"}, {"base": 1.0}]))
    finally:
        loader.close()
    assert got[:2] == ("UNAVAILABLE", "the disk is gone")


def test_a_loader_that_hangs_is_answered_at_the_deadline(core: Any, image: bytes) -> None:
    cache = _core.FeatureCache(100, _core.RowSchema(STORED).row_words)
    served = core.load("m", "1", image, make_plan(cache), max_latency_ms=20)
    core.publish(served)
    got = core.call(False, msgpack.packb(["m", {"user": 1, "shop": "a"}, {"base": 1.0}]))
    assert got[0] == "DEADLINE_EXCEEDED"
    misses = core.wait_misses(0.0)
    assert misses is None or misses.views == []
    conserved(served.stats())


@pytest.mark.parametrize(
    ("entities", "inputs", "words"),
    [
        ({"user": 1}, {"base": 1.0}, "entities.shop is missing; expected string"),
        (
            {"user": 1, "shop": "a", "x": 1},
            {"base": 1.0},
            "entities.x is unknown; expected columns: user, shop",
        ),
        ({"user": 1, "shop": "a"}, {}, "inputs.base is missing"),
        ({"user": 1.5, "shop": "a"}, {"base": 1.0}, "entities.user is 1.5 (float); expected int64"),
        ({"user": "1", "shop": "a"}, {"base": 1.0}, 'entities.user is "1" (string); expected int64'),
        ({"user": [1, 2], "shop": ["a", 3]}, {"base": [1.0, 1.0]}, "entities.shop[1] is 3"),
        ({"user": 1, "shop": "a"}, {"base": "x"}, "inputs.base"),
        ({"user": [1, 2], "shop": ["a"]}, {"base": [1.0, 1.0]}, "rows"),
    ],
)
def test_unknown_or_wrong_columns_are_named(
    core: Any, image: bytes, entities: dict[str, Any], inputs: dict[str, Any], words: str
) -> None:
    cache = _core.FeatureCache(100, _core.RowSchema(STORED).row_words)
    core.publish(core.load("m", "1", image, make_plan(cache)))
    code, message, _ = core.call(False, msgpack.packb(["m", entities, inputs]))
    assert code == "INVALID_ARGUMENT" and words in message


def test_on_missing_error_refuses_an_unknown_entity(core: Any, image: bytes) -> None:
    cache = _core.FeatureCache(100, _core.RowSchema(STORED).row_words)
    core.publish(core.load("m", "1", image, make_plan(cache, error_on_missing=True), max_latency_ms=20_000))
    loader = Loader(core, TABLE)
    try:
        code, message, _ = core.call(False, msgpack.packb(["m", {"user": 1, "shop": "zz"}, {"base": 1.0}]))
    finally:
        loader.close()
    assert code == "NOT_FOUND" and "row 0" in message


def test_a_new_version_takes_over_between_two_calls(core: Any, image: bytes) -> None:
    first = core.load("m", "1", image)
    assert core.publish(first) is None
    assert core.call(True, vectors("m", np.zeros((1, F))))[1] == "1"
    assert core.publish(core.load("m", "2", image)) is first
    assert core.call(True, vectors("m", np.zeros((1, F))))[1] == "2"
    core.publish(first)
    assert core.call(True, vectors("m", np.zeros((1, F))))[1] == "1"


def test_no_reply_says_ok_after_the_deadline(core: Any, image: bytes) -> None:
    served = core.load("m", "1", image, max_latency_ms=60_000)
    core.publish(served)
    peer = Peer(core)
    served._hold(True)
    peer.send(request(1, "predict_vectors", ["m", bytes(4 * F), 1, {"deadline_ms": 40}]))
    # Nothing answers it in time: the run ends late, and the reply says so.
    until = time.monotonic_ns() + 41_000_000
    while time.monotonic_ns() < until:
        pass
    served._hold(False)
    (reply,) = peer.wait_replies(1)
    assert reply[2]["code"] == "DEADLINE_EXCEEDED"
    conserved(served.stats())


@pytest.mark.parametrize(
    "change",
    [{"program": b"junk"}, {"key_seed": b"short"}, {"views": []}, {"inputs": [("base", "string")]}],
)
def test_a_plan_that_cannot_be_served_is_refused_when_loaded(
    core: Any, image: bytes, change: dict[str, Any]
) -> None:
    cache = _core.FeatureCache(100, _core.RowSchema(STORED).row_words)
    with pytest.raises(ValueError):
        core.load("m", "1", image, {**make_plan(cache), **change})
