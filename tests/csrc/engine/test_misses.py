"""What the loader is asked for: each key once, whoever lacks it and whenever they asked."""

from __future__ import annotations

import select
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

SEED = bytes(range(16))
FIELDS = [("amount", "float64")]
HOUR = 3_600_000_000


@pytest.fixture(scope="module")
def image() -> bytes:
    x = np.random.default_rng(7).normal(size=(200, 1)).astype(np.float32)
    model = GradientBoostingRegressor(n_estimators=5, max_leaf_nodes=8, random_state=1).fit(x, x[:, 0])
    return trees.from_sklearn(model)


class World:
    """One model over one view. A row's amount is its key and the hour for which it was loaded."""

    def __init__(self, image: bytes, **cache: Any) -> None:
        self.core = _core.ServingCore(3, 77)
        self.schema = _core.RowSchema(FIELDS)
        self.cache = _core.FeatureCache(600, self.schema.row_words, **cache)
        plan = {
            "entities": [("user", "int64")],
            "views": [{"name": "users", "cache": self.cache, "fields": FIELDS, "key_columns": [0]}],
            "request_source": "",
            "inputs": [],
            "program": compile_program([("amount", col("users:amount"))], {"users:amount": "float64"}),
            "key_seed": SEED,
            "error_on_missing": False,
        }
        self.served = self.core.load("m", "1", image, plan, max_latency_ms=60_000, allow_replay=True)
        self.core.publish(self.served)
        self.peer = self.core.connection(1 << 20, 16, 1024, 1 << 20)
        self.unpacker = msgpack.Unpacker()
        self.asked: list[tuple[int, int]] = []  # (user, now), in the order of the loads
        self.msgid = 0

    def ask(self, users: list[int], now: int, **options: Any) -> None:
        self.msgid += 1
        params = ["m", {"user": users}, None, {"now": now, **options}]
        data = msgpack.packb([0, self.msgid, "predict", params])
        view = self.peer.get_buffer(len(data))
        view[: len(data)] = data
        self.peer.received(len(data))

    def take(self) -> Any:
        """The next batch of misses and its rows; None when nothing is missed."""
        misses = self.core.wait_misses(0.0)
        return None if misses is None else (misses, [self.rows(*view) for view in misses.views])

    def load(self) -> list[tuple[int, int]]:
        """Run the loader once; what it was asked for."""
        self.asked = []
        batch = self.take()
        if batch is not None:
            self.core.finish_misses(*batch, 1)
        return sorted(self.asked)

    def rows(self, view: str, keys: np.ndarray, now_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hour = now_us // HOUR
        self.asked += list(zip(keys[:, 0].tolist(), now_us.tolist()))
        amount = keys[:, 0].astype(np.float64) + 1000.0 * hour
        words = self.schema.encode([(amount, np.ones(len(keys), bool))], np.zeros(len(keys), np.uint8))
        return words, np.stack([hour * HOUR, (hour + 1) * HOUR, now_us, now_us], axis=1)

    def amounts(self, n: int) -> dict[int, list[float]]:
        """The model inputs of the requests answered since the last call, by their number; n are expected."""
        found: dict[int, Any] = {}
        while True:
            while (data := self.peer.take_output()) is not None:
                self.unpacker.feed(data)
                self.peer.output_sent()
            for _, msgid, error, result in self.unpacker:
                assert error is None, error
                found[msgid] = result["request_ids"]
            if len(found) >= n:
                break
            assert select.select([self.core.event_fd], [], [], 30)[0]
            self.core.wake()
        ids, _, rows, *_ = self.served.drain()
        by_id = dict(zip(ids.tolist(), rows[:, 0].tolist()))
        return {msgid: [by_id[i] for i in wanted] for msgid, wanted in found.items()}


@pytest.fixture
def world(image: bytes) -> Iterator[World]:
    made = World(image)
    yield made
    made.core.close()


def test_requests_at_different_times_share_the_load_of_a_key(world: World) -> None:
    for now in (5, 3, 9):
        world.ask([1, 2], now)
    world.ask([2, 3], 7)
    assert world.load() == [(1, 9), (2, 9), (3, 7)]
    assert world.amounts(4) == {1: [1, 2], 2: [1, 2], 3: [1, 2], 4: [2, 3]}
    assert world.load() == []


def test_a_row_that_does_not_hold_at_a_requests_time_is_loaded_for_it_alone(world: World) -> None:
    world.ask([1, 2], 5)
    world.ask([1], HOUR + 5)
    world.ask([1], 2 * HOUR + 5)
    assert world.load() == [(1, 2 * HOUR + 5), (2, 5)]
    assert world.amounts(1) == {3: [2001]}
    world.ask([1], 9 * HOUR)  # newer: those that wait are not put off again
    assert world.load() == [(1, 5), (1, HOUR + 5), (1, 9 * HOUR)]
    assert world.amounts(3) == {1: [1, 2], 2: [1001], 4: [9001]}
    assert world.load() == []


def test_a_key_missed_while_it_is_loaded_is_not_loaded_again(world: World) -> None:
    world.ask([1], 5)
    batch = world.take()
    world.ask([1, 2], 6)
    world.ask([1], 7, no_cache=True)
    world.core.finish_misses(*batch, 1)
    assert world.load() == [(1, 7), (2, 6)]  # what asks past the cache is loaded all the same
    assert world.amounts(3) == {1: [1], 2: [1, 2], 3: [1]}
    world.ask([1, 2], 8)
    assert world.amounts(1) == {4: [1, 2]}
    assert world.take() is None


def test_a_batch_that_needs_no_load_is_answered(world: World) -> None:
    world.ask([1], 5)
    batch = world.take()
    world.ask([1], 6)
    world.core.finish_misses(*batch, 1)
    assert world.load() == []
    assert world.amounts(2) == {1: [1], 2: [1]}


def test_rows_that_leave_the_cache_meanwhile_are_loaded_in_the_end(world: World) -> None:
    """However fast they leave: the fourth load is of all that is left, and passes the cache by."""
    keys = {}
    for user in range(1, 9):
        world.ask([user], 5)
        misses = world.core.wait_misses(0.0)
        ((_, found, _),) = misses.views
        keys[user] = found
        world.core.finish_misses(misses, [world.rows(*view) for view in misses.views], 1)
    world.amounts(8)
    stamp = 2

    def leave(*users: int) -> None:
        nonlocal stamp
        world.cache.discard_many(np.concatenate([keys[u] for u in users]), stamp)
        stamp += 1

    leave(1)
    world.ask(list(range(1, 9)), 6)
    loads = []
    for gone in (2, 3, 4):
        batch = world.take()
        leave(gone)
        world.asked, asked = [], world.asked
        loads.append(sorted(user for user, _ in asked))
        world.core.finish_misses(*batch, stamp)
    assert loads[1:] == [[2], [3]]
    batch = world.take()
    leave(5, 6, 7, 8)
    world.core.finish_misses(*batch, stamp)
    assert sorted(user for user, _ in world.asked) == [4, 5, 6, 7, 8]
    assert world.amounts(1) == {9: [1, 2, 3, 4, 5, 6, 7, 8]}


def test_a_look_into_the_cache_for_a_miss_counts_no_miss(world: World) -> None:
    world.ask([1], 5)
    batch = world.take()
    world.ask([1], 6)
    world.core.finish_misses(*batch, 1)
    world.load()
    world.amounts(2)
    stats = world.cache.stats()
    assert (stats["misses"], stats["puts"]) == (2, 1)


def test_no_cache_neither_reads_nor_fills_the_cache(world: World) -> None:
    world.ask([1], 5, no_cache=True)
    assert world.load() == [(1, 5)]
    world.amounts(1)
    assert world.cache.stats()["puts"] == 0
    world.ask([1], 5)
    world.ask([1], 5, no_cache=True)
    assert world.load() == [(1, 5)]  # one load serves both
    world.amounts(2)
    assert world.cache.stats()["puts"] == 1


def test_request_ids_of_two_workers_are_far_apart(image: bytes) -> None:
    firsts = []
    for worker in (0, 1, 31):
        core = _core.ServingCore(worker)
        core.publish(core.load("m", "1", image))
        firsts.append(int(core.call(True, msgpack.packb(["m", bytes(4), 1]))[2][0]))
        core.close()
    assert firsts[1] - firsts[0] > 1 << 56 and firsts[2] - firsts[1] > 29 << 57
    assert firsts[2] < 1 << 64
