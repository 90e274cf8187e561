"""Rows read ahead of their end, with the clocks passed in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from penstock import _core
from penstock.serving import refresher as module
from penstock.serving.refresher import Refresher

WORDS = 2
HIT, MISS, EXPIRED = range(3)


class Clock:
    now = 1_000_000
    mono = 0

    def now_us(self) -> int:
        return self.now

    def mono_ns(self) -> int:
        return self.mono


class World:
    """A cache whose rows hold for 1000 us and say for when they were loaded."""

    def __init__(self, **settings: Any) -> None:
        self.cache = _core.FeatureCache(1500, WORDS, refresh_ahead=0.2, **settings)
        self.clock = Clock()
        self.loads: list[tuple[str, list[int], list[int]]] = []
        self.stamp = 1
        self.refresher = Refresher({"users": self.cache}, self.load, self.clock, 5)  # type: ignore[arg-type]

    def load(self, view: str, keys: np.ndarray, now_us: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        self.loads.append((view, keys[:, 0].tolist(), now_us.tolist()))
        start = now_us // 1000 * 1000
        rows = np.stack([np.zeros(len(keys), np.uint64), now_us.astype(np.uint64)], axis=1)
        return rows, np.stack([start, start + 1000, start, start], axis=1), self.stamp

    def put(self, k: int) -> None:
        now = np.array([self.clock.now], np.int64)
        rows, meta, stamp = self.load("users", np.array([[k, k]], np.uint64), now)
        self.cache.put_many(np.array([[k, k]], np.uint64), rows, meta, stamp, self.clock.mono)
        self.loads.clear()

    def get(self, k: int) -> tuple[int, int]:
        out, status = np.zeros((1, WORDS), np.uint64), np.zeros(1, np.uint8)
        self.cache.get_many(np.array([[k, k]], np.uint64), self.clock.now, self.clock.mono, out, status)
        return int(status[0]), int(out[0, 1])


def test_a_row_that_is_read_near_its_end_is_there_when_the_next_begins() -> None:
    world = World()
    world.put(1)
    world.put(2)
    world.clock.now += 700
    world.get(1)
    world.refresher.run()
    assert world.loads == []
    world.clock.now += 150
    assert world.get(1) == (HIT, 1_000_000)
    world.refresher.run()
    assert world.loads == [("users", [1], [1_001_000])]
    assert world.get(1) == (HIT, 1_000_000)  # the row that holds now serves to its end
    assert 0 < world.refresher.wait_s(1.0) <= 150e-6
    world.clock.now = 1_001_000
    world.refresher.run()
    assert world.get(1) == (HIT, 1_001_000)
    assert world.get(2)[0] == EXPIRED  # nobody read it
    assert len(world.loads) == 1
    assert world.refresher.stats() == {"loaded": 1, "dropped": 0, "held": 0}
    assert world.refresher.wait_s(1.0) == 1.0


def test_what_was_written_after_the_load_wins() -> None:
    world = World()
    world.put(1)
    world.clock.now += 900
    world.get(1)
    world.refresher.run()
    world.stamp = 2
    world.clock.now = 1_001_000
    world.put(1)
    world.clock.now += 1
    world.refresher.run()
    assert world.get(1) == (HIT, 1_001_000)
    assert world.cache.stats()["superseded"] == 1


def test_a_row_whose_memory_ttl_ends_lives_on() -> None:
    world = World(ttl_ns=100)
    world.put(1)
    world.clock.mono = 85
    world.get(1)
    world.refresher.run()
    assert world.loads == [("users", [1], [1_000_000])]
    world.clock.mono = 150
    assert world.get(1) == (HIT, 1_000_000)
    world.clock.mono = 185
    assert world.get(1)[0] == EXPIRED


def test_ends_that_are_long_past_are_left_to_a_read() -> None:
    world = World()
    world.put(1)
    world.clock.now += 900
    world.get(1)
    world.clock.now += 5_000_000  # that read was a replay
    world.refresher.run()
    assert world.loads == [] and world.refresher.stats()["dropped"] == 1


def test_the_rows_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_HELD", 3)
    world = World()
    for k in range(10):
        world.put(k)
    world.clock.now += 900
    for k in range(10):
        world.get(k)
    world.refresher.run()
    assert world.refresher.stats() == {"loaded": 3, "dropped": 7, "held": 3}
    world.clock.now += 100
    world.refresher.run()
    assert [world.get(k)[0] for k in range(10)] == [HIT] * 3 + [EXPIRED] * 7
