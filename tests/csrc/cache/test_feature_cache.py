"""The feature cache against a dict, with the clocks passed in."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock import _core

HIT, MISS, EXPIRED, BUSY = range(4)
STORED, REPLACED, SUPERSEDED = range(3)
WORDS = 3
FOREVER = 2**62


def key_of(*numbers: int) -> np.ndarray:
    return np.array([[n, n * 7] for n in numbers], np.uint64)


def put(
    cache, k: int, value: int, *, stamp: int = 1, mono: int = 0, valid=(0, FOREVER), owner: int = 0
) -> int:
    rows = np.full((1, WORDS), value, np.uint64)
    meta = np.array([[*valid, value, k]], np.int64)
    return int(cache.put_many(key_of(k), rows, meta, stamp, mono, owner)[0])


def get(cache, *ks: int, now: int = 0, mono: int = 0):
    out = np.full((len(ks), WORDS), 999, np.uint64)
    status = np.full(len(ks), 9, np.uint8)
    meta = np.full((len(ks), 4), 999, np.int64)
    versions = np.full(len(ks), 999, np.uint64)
    hits = cache.get_many(key_of(*ks), now, mono, out, status, meta, versions)
    assert hits == (status == HIT).sum()
    assert (out[status != HIT] == 999).all() and (meta[status != HIT] == 999).all()
    assert ((versions != 0) == (status == HIT)).all()
    return status, out, meta, versions


@dataclass
class Entry:
    value: int
    stamp: int
    valid: tuple[int, int]
    expires: int


class CacheMachine(RuleBasedStateMachine):
    """Capacity one bucket, keys 0..keys-1: with keys <= 15 nothing may be evicted."""

    keys = 15
    ttl = 10

    def __init__(self) -> None:
        super().__init__()
        self.cache = _core.FeatureCache(15, WORDS, self.ttl)
        self.oracle: dict[int, Entry] = {}
        self.gone = 0  # greatest stamp certainly discarded
        self.now = self.mono = self.value = 0

    @rule(us=st.integers(-3, 5), ns=st.integers(0, 4))
    def advance(self, us: int, ns: int) -> None:
        self.now += us
        self.mono += ns

    @rule(k=st.integers(0, 39), stamp=st.integers(0, 12), start=st.integers(-4, 4), length=st.integers(0, 8))
    def put(self, k: int, stamp: int, start: int, length: int) -> None:
        k %= self.keys
        self.value += 1
        valid = (self.now + start, self.now + start + length)
        old = self.oracle.get(k)
        result = put(self.cache, k, self.value, stamp=stamp, mono=self.mono, valid=valid)
        if self.keys <= 15:
            if old is not None:
                assert result == (SUPERSEDED if old.stamp > stamp else REPLACED)
            else:
                assert result == (SUPERSEDED if self.gone > stamp else STORED)
        elif old is not None and old.stamp > stamp:
            assert result == SUPERSEDED
        if result != SUPERSEDED:
            self.oracle[k] = Entry(self.value, stamp, valid, self.mono + self.ttl)

    @rule(k=st.integers(0, 39), stamp=st.integers(0, 12))
    def discard(self, k: int, stamp: int) -> None:
        k %= self.keys
        old = self.oracle.get(k)
        removed = self.cache.discard_many(key_of(k), stamp)
        if self.keys <= 15:
            assert removed == (old is not None and old.stamp <= stamp)
        if old is None or old.stamp <= stamp:
            self.gone = max(self.gone, stamp, old.stamp if old else 0)
            self.oracle.pop(k, None)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.gone = max([self.gone, *(e.stamp for e in self.oracle.values())])
        self.oracle.clear()

    @invariant()
    def reads_agree(self) -> None:
        status, out, meta, _ = get(self.cache, *range(self.keys), now=self.now, mono=self.mono)
        for k in range(self.keys):
            entry = self.oracle.get(k)
            if entry is None:
                assert status[k] == MISS
                continue
            alive = self.mono < entry.expires and entry.valid[0] <= self.now < entry.valid[1]
            assert status[k] == (HIT if alive else EXPIRED) or (self.keys > 15 and status[k] == MISS)
            if status[k] == HIT:
                assert (out[k] == entry.value).all()
                assert meta[k].tolist() == [*entry.valid, entry.value, k]


class OverfullMachine(CacheMachine):
    keys = 40


TestCache = CacheMachine.TestCase
TestOverfull = OverfullMachine.TestCase
TestCache.settings = TestOverfull.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_ttl_ends_at_the_exact_nanosecond() -> None:
    cache = _core.FeatureCache(15, WORDS, 100)
    put(cache, 1, 5, mono=50)
    assert get(cache, 1, mono=149)[0] == [HIT]
    assert get(cache, 1, mono=150)[0] == [EXPIRED]


def test_validity_is_half_open() -> None:
    cache = _core.FeatureCache(15, WORDS)
    put(cache, 1, 5, valid=(10, 20))
    assert [int(get(cache, 1, now=t)[0][0]) for t in (9, 10, 19, 20)] == [EXPIRED, HIT, HIT, EXPIRED]


def test_evicted_stamp_is_remembered() -> None:
    cache = _core.FeatureCache(15, WORDS)
    for k in range(16):
        assert put(cache, k, k, stamp=9) == STORED
    status = get(cache, *range(16))[0]
    assert cache.stats()["evictions"] == 1
    victim = int(np.flatnonzero(status == MISS)[0])
    assert put(cache, victim, 77, stamp=8) == SUPERSEDED
    assert get(cache, victim)[0] == [MISS]
    assert put(cache, victim, 78, stamp=9) == STORED


def test_clock_spares_rows_that_were_read() -> None:
    cache = _core.FeatureCache(15, WORDS)
    for k in range(15):
        put(cache, k, k)
    get(cache, *(k for k in range(15) if k != 11))
    put(cache, 100, 1)
    assert get(cache, 11)[0] == [MISS]


def test_expired_way_goes_before_clock() -> None:
    cache = _core.FeatureCache(15, WORDS, 100)
    for k in range(15):
        put(cache, k, k, mono=0 if k == 6 else 50)
    put(cache, 100, 1, mono=100)
    status = get(cache, *range(15), mono=100)[0]
    assert np.flatnonzero(status != HIT).tolist() == [6]
    assert cache.stats()["evictions"] == 0


def test_slot_version_never_recurs_for_a_key() -> None:
    cache = _core.FeatureCache(15, WORDS)
    seen = set()
    for i in range(200):
        put(cache, 1, i, stamp=i)
        version = int(get(cache, 1)[3][0])
        assert version not in seen and version == int(get(cache, 1)[3][0])
        seen.add(version)
        if i % 3 == 0:
            cache.discard_many(key_of(1), i)
        put(cache, 2 + i % 40, i, stamp=i)


@pytest.mark.parametrize("words", [0, 1, WORDS])
@pytest.mark.parametrize("resident", [True, False])
def test_takeover_empties_the_half_written_slot(words: int, resident: bool) -> None:
    cache = _core.FeatureCache(15, WORDS)
    put(cache, 2, 22, stamp=4)
    if resident:
        put(cache, 1, 11, stamp=5)
    row, meta = np.full(WORDS, 12, np.uint64), np.array([0, FOREVER, 0, 0], np.int64)
    cache._abandon_put(key_of(1)[0], row, meta, 7, 0, 3, words)
    status, out, _, _ = get(cache, 1, 2)
    assert status.tolist() == [BUSY if resident else MISS, HIT] and (out[1] == 22).all()
    assert cache.reclaim_owner(4, 1) == 0
    assert cache.reclaim_owner(3, 1) == 1
    assert cache.reclaim_owner(3, 1) == 0
    assert get(cache, 1, 2)[0].tolist() == [MISS, HIT]
    assert cache.stats()["lock_takeovers"] == 1 and cache.stats()["size"] == 1
    assert put(cache, 1, 13, stamp=4) == SUPERSEDED
    assert put(cache, 1, 14, stamp=7) == STORED
    assert (get(cache, 1)[1] == 14).all()


def test_batch_across_many_buckets() -> None:
    cache = _core.FeatureCache(4000, WORDS)
    for k in range(1000):
        put(cache, k, k)
    status, out, _, _ = get(cache, *range(1100))
    assert (status[:1000] == HIT).all() and (status[1000:] == MISS).all()
    assert (out[:1000, 0] == np.arange(1000)).all()
    stats = cache.stats()
    assert (stats["hits"], stats["misses"], stats["puts"], stats["size"]) == (1000, 100, 1000, 1000)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ((0, 1), "capacity is 0"),
        ((2**41, 1), "capacity is 2199023255552"),
        ((1, 0), "row_words is 0"),
        ((1, 2049), "2049"),
    ],
)
def test_bad_config(config: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.FeatureCache(*config)


GOOD = {
    "keys": key_of(1, 2),
    "out": np.zeros((2, WORDS), np.uint64),
    "status": np.zeros(2, np.uint8),
    "meta": np.zeros((2, 4), np.int64),
    "slot_versions": np.zeros(2, np.uint64),
}


@pytest.mark.parametrize("name", sorted(GOOD))
@pytest.mark.parametrize("fault", ["dtype", "shape", "order"])
def test_get_many_names_the_bad_array(name: str, fault: str) -> None:
    good = GOOD[name]
    bad = {
        "dtype": good.astype(np.float32),
        "shape": np.zeros((1, *good.shape), good.dtype),
        "order": np.zeros((*good.shape[:-1], 2 * good.shape[-1]), good.dtype)[..., ::2],
    }[fault]
    with pytest.raises(ValueError, match=f"^{name} is .*; expected a C-contiguous {good.dtype} array"):
        _core.FeatureCache(15, WORDS).get_many(now_us=0, mono_ns=0, **{**GOOD, name: bad})


@pytest.mark.parametrize("name", ["keys", "rows", "meta"])
def test_put_many_names_the_bad_array(name: str) -> None:
    cache = _core.FeatureCache(15, WORDS)
    good = {"keys": GOOD["keys"], "rows": GOOD["out"], "meta": GOOD["meta"]}
    with pytest.raises(ValueError, match=f"^{name} is "):
        cache.put_many(**{**good, name: good[name].astype(np.int16)}, stamp=1, mono_ns=0)
    assert cache.stats()["size"] == 0


def test_read_only_output_is_refused() -> None:
    out = np.zeros((2, WORDS), np.uint64)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out is .*writable"):
        _core.FeatureCache(15, WORDS).get_many(now_us=0, mono_ns=0, **{**GOOD, "out": out})
