"""Caches that live in a file and are shared by processes; TTLs of unknown keys; reloads ahead of the end."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from penstock import _core

HIT, MISS, EXPIRED, BUSY = range(4)
WORDS = 3
FOREVER = 2**62
NOT_FOUND = 2


def key_of(k: int) -> np.ndarray:
    return np.array([[k, k * 7]], np.uint64)


def put(
    cache, k: int, value: int, *, stamp: int = 1, mono: int = 0, valid=(0, FOREVER), owner: int = 1
) -> int:
    meta = np.array([[*valid, value, k]], np.int64)
    return int(cache.put_many(key_of(k), np.full((1, WORDS), value, np.uint64), meta, stamp, mono, owner)[0])


def get(cache, k: int, *, now: int = 0, mono: int = 0) -> tuple[int, int]:
    out, status = np.zeros((1, WORDS), np.uint64), np.zeros(1, np.uint8)
    cache.get_many(key_of(k), now, mono, out, status)
    return int(status[0]), int(out[0, 0])


def opened(path: Path, **changes: int | float):
    settings = {"capacity": 60, "row_words": WORDS, "ttl_ns": 1000, "negative_ttl_ns": 10, "identity": 5}
    return _core.FeatureCache.open_shared(str(path), **{**settings, **changes})


def test_two_mappings_are_one_cache(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "arena"), opened(tmp_path / "arena")
    assert put(first, 1, 8) == 0
    assert get(second, 1) == (HIT, 8)
    assert second.discard_many(key_of(1), 2) == 1
    assert get(first, 1)[0] == MISS
    assert first.stats()["size"] == second.stats()["size"] == 0
    assert (tmp_path / "arena").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["arena"]


def test_a_survivor_in_another_process_takes_over(tmp_path: Path) -> None:
    cache = opened(tmp_path / "arena")
    put(cache, 1, 8)
    program = f"""
import numpy as np, os
from penstock import _core
cache = _core.FeatureCache.open_shared({str(tmp_path / "arena")!r}, 60, 3, 1000, 10, 0.0, 5)
cache._abandon_put(np.array([1, 7], np.uint64), np.full(3, 9, np.uint64), np.zeros(4, np.int64), 2, 0, 77, 2)
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == -9
    assert get(cache, 1)[0] == BUSY
    assert cache.reclaim_owner(77, 1) == 1
    assert get(cache, 1)[0] == MISS
    assert put(cache, 1, 10, stamp=1) == 2  # what the dead one was about to store was newer
    assert put(cache, 1, 10, stamp=2) == 0
    assert get(cache, 1) == (HIT, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": 6}, "it has identity 5, not 6"),
        ({"row_words": 4}, "rows of words 3, not 4"),
        ({"capacity": 600}, "buckets 4, not 40"),
        ({"ttl_ns": 7}, "a ttl in ns of 1000, not 7"),
        ({"negative_ttl_ns": 7}, "a negative ttl in ns of 10, not 7"),
    ],
)
def test_another_arena_is_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    first = opened(tmp_path / "arena")
    put(first, 1, 8)
    with pytest.raises(RuntimeError, match=message):
        opened(tmp_path / "arena", **changes)
    assert get(first, 1) == (HIT, 8)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 17, "another magic number"),
        (8, 2, "layout version 2, not 3"),
        (16, 0, "an impossible geometry"),
        (16, 5, "a size of"),
        (24, 5000, "an impossible geometry"),
    ],
)
def test_a_foreign_header_is_refused(tmp_path: Path, at: int, value: int, message: str) -> None:
    opened(tmp_path / "arena")
    with (tmp_path / "arena").open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("<Q", value))
    with pytest.raises(RuntimeError, match=f"arena '{tmp_path}/arena': it is no arena .*{message}"):
        opened(tmp_path / "arena")


@pytest.mark.parametrize(
    ("size", "message"), [(0, "less than a header"), (100, "less than"), (4096, "a file of")]
)
def test_a_file_cut_short_is_refused(tmp_path: Path, size: int, message: str) -> None:
    opened(tmp_path / "arena")
    os.truncate(tmp_path / "arena", size)
    with pytest.raises(RuntimeError, match=message):
        opened(tmp_path / "arena")


def test_attach_takes_any_geometry_but_no_other_file(tmp_path: Path) -> None:
    put(opened(tmp_path / "arena"), 1, 8)
    with (tmp_path / "arena").open("r+b") as file:
        assert get(_core.FeatureCache.attach(file.fileno()), 1) == (HIT, 8)
    (tmp_path / "text").write_text("hello" * 1000)
    with (tmp_path / "text").open("r+b") as file, pytest.raises(RuntimeError, match="another magic number"):
        _core.FeatureCache.attach(file.fileno())


def test_a_folder_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be made: No such file"):
        opened(tmp_path / "nowhere" / "arena")


def test_clear_with_a_stamp_refuses_what_was_read_before() -> None:
    cache = _core.FeatureCache(60, WORDS)
    put(cache, 1, 8, stamp=3)
    cache.clear(0, 100)
    assert get(cache, 1)[0] == MISS
    for k in range(50):  # also keys that were never there
        assert put(cache, k, 8, stamp=99) == 2
        assert put(cache, k, 8, stamp=100) == 0


def test_unknown_keys_have_a_ttl_of_their_own() -> None:
    cache = _core.FeatureCache(60, WORDS, 1000, 10)
    put(cache, 1, 256 + NOT_FOUND)  # only the low byte is the status
    put(cache, 2, 256)
    assert get(cache, 1, mono=9)[0] == get(cache, 2, mono=9)[0] == HIT
    assert get(cache, 1, mono=10)[0] == EXPIRED
    assert get(cache, 2, mono=999)[0] == HIT
    assert cache.stats()["negative_puts"] == 1


@pytest.mark.parametrize(("ttl", "negative", "end"), [(5, 10, 5), (0, 10, 10), (7, 0, 7)])
def test_the_shorter_ttl_ends_an_unknown_key(ttl: int, negative: int, end: int) -> None:
    cache = _core.FeatureCache(60, WORDS, ttl, negative)
    put(cache, 1, NOT_FOUND)
    assert [get(cache, 1, mono=mono)[0] for mono in (end - 1, end)] == [HIT, EXPIRED]


def taken(cache) -> list[tuple[int, int, bool]]:
    keys, at_us, hold = cache.take_refreshes(100)
    return [(int(k), int(at), bool(h)) for k, at, h in zip(keys[:, 0], at_us, hold)]


def test_a_row_near_the_end_of_its_ttl_is_offered_once() -> None:
    cache = _core.FeatureCache(60, WORDS, 1000, 0, 0.1)
    put(cache, 1, 8)
    put(cache, 2, 8)
    put(cache, 3, NOT_FOUND)
    get(cache, 1, now=50, mono=900)
    assert taken(cache) == []
    for _ in range(3):
        get(cache, 1, now=50, mono=901)
    get(cache, 3, now=50, mono=950)
    assert taken(cache) == [(1, 50, False)]
    put(cache, 1, 9, mono=901)
    get(cache, 1, mono=1000)
    assert taken(cache) == []
    get(cache, 1, now=60, mono=1850)  # the new row, near its own end
    assert taken(cache) == [(1, 60, False)]
    assert cache.stats()["refreshes_queued"] == 2


def test_a_row_near_the_end_of_its_validity_is_offered_for_that_time() -> None:
    cache = _core.FeatureCache(60, WORDS, 0, 0, 0.25)
    put(cache, 1, 8, valid=(1000, 2000))
    put(cache, 2, 8, valid=(-(2**63), 2**63 - 1))
    put(cache, 3, 8, valid=(0, 10**12))
    for now in (1000, 1750, 1751):
        get(cache, 1, now=now)
        get(cache, 2, now=now)
    assert taken(cache) == [(1, 2000, True)]
    get(cache, 3, now=10**12 - 60_000_001)  # however long a row holds: at most a minute ahead
    assert taken(cache) == []
    get(cache, 3, now=10**12 - 60_000_000 + 1)
    assert taken(cache) == [(3, 10**12, True)]


def test_offers_beyond_the_bound_are_dropped_and_counted() -> None:
    cache = _core.FeatureCache(15_000, WORDS, 1000, 0, 0.5)
    for k in range(2000):
        put(cache, k, 8)
    for k in range(2000):
        get(cache, k, mono=999)
    stats = cache.stats()
    assert stats["refreshes_queued"] == 1024
    assert stats["refreshes_dropped"] > 0
    assert sum(len(cache.take_refreshes(100)[0]) for _ in range(20)) == 1024


@pytest.mark.parametrize("value", [-0.1, 0.6, float("nan")])
def test_bad_refresh_ahead(value: float) -> None:
    with pytest.raises(ValueError, match=r"refresh_ahead is .*; expected 0 to 0\.5"):
        _core.FeatureCache(15, WORDS, 0, 0, value)
