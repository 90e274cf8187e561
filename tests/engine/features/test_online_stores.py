"""Online stores: one suite on LMDB and on a real Redis, and what Redis may do wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from push_repo import FEATURES, HOUR, MINUTE, columns, make_push_repo, online, some_events
from redis_server import BINARY, BadPeer, RedisServer
from store_repo import assert_online_is_offline

from penstock.clock import ManualClock
from penstock.errors import ConfigError, StoreError
from penstock.features.online import OnlineStore
from penstock.features.online_adapter import OnlineAdapter, ViewHeader, decode_rows, encode_rows
from penstock.features.redis_store import Breaker, RedisStore
from penstock.features.store import FeatureStore
from penstock.features.store_settings import OnlineStoreSettings

WORDS = 3
KINDS = ["lmdb", pytest.param("redis", marks=pytest.mark.skipif(BINARY is None, reason="no redis-server"))]
USERS, SHOPS = list(range(6)), ["a", "b"] * 3
needs_redis = pytest.mark.skipif(BINARY is None, reason="no redis-server")


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


_made = [0]


@pytest.fixture(scope="module", params=KINDS)
def make(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], OnlineAdapter]:
    """Makes empty stores."""

    def new() -> OnlineAdapter:
        _made[0] += 1
        identity = _made[0].to_bytes(16, "big")[::-1]
        if request.param == "lmdb":
            return OnlineStore(tmp_path_factory.mktemp("lmdb"), identity)
        server = request.getfixturevalue("redis_server")
        return RedisStore(OnlineStoreSettings("redis", server.url, timeout_ms=20_000), identity)

    return new


def keys_of(*numbers: int) -> np.ndarray:
    return np.array([(n, n * 7) for n in numbers], np.uint64).reshape(-1, 2)


def rows_of(n: int, salt: int) -> np.ndarray:
    return np.arange(n * WORDS, dtype=np.uint64).reshape(n, WORDS) * np.uint64(31) + np.uint64(salt)


times = st.one_of(st.integers(-3, 3), st.sampled_from([-(2**63), 2**63 - 1]))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "put", "delete", "drop"]),
            st.integers(1, 2),
            st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True),
            times, times, st.integers(0, 2), st.booleans(),
        ),
        max_size=12,
    )
)  # fmt: skip
def test_it_keeps_the_newest_row_of_each_key(make: Any, steps: Any) -> None:
    store = make()
    expected: dict[tuple[int, int], tuple[tuple[int, int, int], bytes, bytes]] = {}
    for i, (what, view, numbers, event, known, sequence, replace) in enumerate(steps):
        keys = keys_of(*numbers)
        if what == "delete":
            gone = sum(expected.pop((view, n), None) is not None for n in numbers)
            assert store.delete_many(view, keys) == gone
        elif what == "drop":
            store.delete_view(view)
            expected = {key: value for key, value in expected.items() if key[0] != view}
        else:
            rows = rows_of(len(numbers), i)
            meta = np.array([[i, -i, event, known]] * len(numbers), np.int64)
            store.put_many(
                view, keys, rows, meta, ViewHeader("t", WORDS, i, 1), sequence=sequence, replace=replace
            )
            for n, row, of_row in zip(numbers, rows, meta):
                order = (sequence, event, known)
                old = expected.get((view, n))
                if old is None or (old[0][:1] <= order[:1] if replace else old[0] <= order):
                    expected[view, n] = order, row.tobytes(), of_row.tobytes()
    for view in (1, 2):
        if store.header(view) is None:
            store.put_header(view, ViewHeader("t", WORDS, 0, 1))
        rows, meta, found = store.get_many(view, "t", keys_of(*range(6)), WORDS, 1)
        for n in range(6):
            want = expected.get((view, n))
            assert found[n] == (want is not None)
            if want is not None:
                assert (rows[n].tobytes(), meta[n].tobytes()) == want[1:]
        scanned = {
            (int(lo), meta.tobytes())
            for keys, metas in store.scan(view)
            for (lo, _), meta in zip(keys, metas)
        }
        assert scanned == {(n, want[2]) for (v, n), want in expected.items() if v == view}
    store.close()


def test_rows_count_only_under_their_tag_and_number(make: Any) -> None:
    store = make()
    assert store.header(1) is None
    assert store.headers() == {}
    keys, meta = keys_of(1, 2), np.zeros((2, 4), np.int64)
    store.put_many(1, keys, rows_of(2, 5), meta)
    assert not store.get_many(1, "t", keys, WORDS)[2].any()  # no header yet
    store.put_header(1, ViewHeader("t", WORDS, 9, 4))
    assert store.header(1) == ViewHeader("t", WORDS, 9, 4)
    assert store.headers() == {1: ViewHeader("t", WORDS, 9, 4)}
    for tag, sequence, there in (("t", 0, True), ("t", 4, True), ("t", 5, False), ("u", 0, False)):
        rows, _, found = store.get_many(1, tag, keys_of(2, 3, 1), WORDS, sequence)
        assert found.tolist() == ([True, False, True] if there else [False] * 3)
        assert (rows[2] == rows_of(2, 5)[0]).all() == there
    with pytest.raises(StoreError, match="bytes"):
        store.get_many(1, "t", keys, WORDS + 1)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.header(1)


def test_many_rows_in_parts(make: Any) -> None:
    store = make()
    keys = keys_of(*range(20_000))
    meta = np.zeros((len(keys), 4), np.int64)
    store.put_many(3, keys, rows_of(len(keys), 1), meta, ViewHeader("t", WORDS, 0))
    rows, _, found = store.get_many(3, "t", keys[::-1], WORDS)
    assert found.all()
    assert (rows == rows_of(len(keys), 1)[::-1]).all()
    assert len(np.unique(np.concatenate([keys for keys, _ in store.scan(3)]), axis=0)) == len(keys)
    store.delete_view(3)
    assert (list(store.scan(3)), store.header(3)) == ([], None)
    store.close()


@given(st.integers(0, 2**64 - 1), st.lists(times, min_size=4, max_size=4))
def test_the_bytes_of_a_row(sequence: int, meta: list[int]) -> None:
    rows, metas = rows_of(1, 3), np.array([meta], np.int64)
    value = encode_rows(rows, metas, sequence)
    found, found_meta = decode_rows([value.tobytes()], WORDS)
    assert (found == rows).all()
    assert (found_meta == metas).all()


def config(kind: str, request: pytest.FixtureRequest) -> str:
    if kind == "lmdb":
        return ""
    url = request.getfixturevalue("redis_server").url
    return f"online_store: {{type: redis, url: {url}, timeout_ms: 20000}}\n"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_feature_store_gives_the_historical_join(
    kind: str, seed: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rng = np.random.default_rng(seed)
    batch = some_events(40, users=6, seed=seed)
    repo = make_push_repo(tmp_path / "r", batch=batch, config=config(kind, request))
    clock = ManualClock(us=5 * HOUR)
    whole = list(batch)
    store = FeatureStore(repo, clock=clock)
    for i in range(25):
        what = rng.integers(0, 5)
        if what == 0:
            store.materialize(0, int(rng.integers(0, 12 * HOUR)))
        elif what == 1:
            store.close()
            store = FeatureStore(repo, clock=clock)
        elif what == 2:
            clock.us = int(rng.integers(0, 12 * HOUR))
        else:
            events = some_events(int(rng.integers(1, 4)), users=6, seed=100 * seed + i, until=12 * HOUR)
            store.push("events", columns(events))
            whole += events
        now = int(rng.integers(0, 12 * HOUR))
        assert_online_is_offline(store, now, USERS, SHOPS, FEATURES)
    store.materialize(0, 12 * HOUR)
    live = store._live.view("users")
    sequence = store._log.head("events")
    assert store._online.get_many(live.number, live.tag, live.computer.keys, live.row_words, sequence)[
        2
    ].all()
    found = online(store, 12 * HOUR, USERS, SHOPS)
    store.close()
    with FeatureStore(make_push_repo(tmp_path / "o", batch=whole)) as plain:
        assert online(plain, 12 * HOUR, USERS, SHOPS) == found


# What Redis may do wrong


def redis_store(url: str, **options: Any) -> RedisStore:
    return RedisStore(OnlineStoreSettings("redis", url, **{"timeout_ms": 200, **options}), b"i" * 16)


def put(store: RedisStore, salt: int = 1) -> None:
    meta = np.array([[0, 9, 1, 1]], np.int64)
    store.put_many(1, keys_of(1), rows_of(1, salt), meta, ViewHeader("t", WORDS, 0), replace=True)


@needs_redis
@pytest.mark.parametrize(
    ("value", "message"),
    [(b"", "has 0 bytes"), (b"x" * 20, "has 20 bytes"), (b"\0" * 68, "checksum"), (b"\xff" * 68, "checksum")],
)
def test_a_garbled_value_is_an_error_and_no_value(
    redis_server: RedisServer, value: bytes, message: str
) -> None:
    store = redis_store(redis_server.url, timeout_ms=20_000)
    put(store)
    name = store._names(1, keys_of(1))[0]
    store._client.set(name, value)
    with pytest.raises(StoreError, match=message):
        store.get_many(1, "t", keys_of(1), WORDS)
    assert not store.get_many(1, "t", keys_of(1), WORDS)[2].any()  # it does not stay
    store._client.set(name, value)
    if len(value) < 68:
        put(store)  # nor is it in the way
        assert store.get_many(1, "t", keys_of(1), WORDS)[2].all()
    store._client.delete(name)
    put(store)
    right = store._client.get(name)
    assert isinstance(right, bytes)
    for at in range(0, len(right), 7):  # any byte
        store._client.set(name, right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :])
        with pytest.raises(StoreError, match="checksum"):
            store.get_many(1, "t", keys_of(1), WORDS)
        store.breaker.succeeded()
    store._client.set(store._names(1, keys_of(2))[0], right)  # the row of another key
    with pytest.raises(StoreError, match="checksum"):
        store.get_many(1, "t", keys_of(2), WORDS)
    store._client.delete(name)
    store._client.rpush(name, b"a list")
    assert not store.get_many(1, "t", keys_of(1), WORDS)[2].any()  # no row: it is computed
    store._client.delete(name)
    for garbage in (b"{", b"[]", b'{"tag": 3, "row_words": 1, "cursor_us": 1}'):
        store._client.set(store._header_name(1), garbage)
        with pytest.raises(StoreError, match="header"):
            store.get_many(1, "t", keys_of(1), WORDS)
        store.breaker.succeeded()
    store._client.flushdb()
    store.close()


def _stall(peer: socket.socket) -> None:
    while peer.recv(1 << 16):
        pass


def _disconnect(peer: socket.socket) -> None:
    peer.recv(1 << 16)
    peer.sendall(b"*2\r\n$100\r\nhalf of an ans")
    peer.shutdown(socket.SHUT_RDWR)


def _garbage(peer: socket.socket) -> None:
    while peer.recv(1 << 16):
        peer.sendall(b"\x00\xffHTTP/1.1 400 Bad Request\r\n\r\n" * 3)


def _wrong_shape(peer: socket.socket) -> None:
    while data := peer.recv(1 << 16):
        peer.sendall(
            (b"+OK\r\n" if b"MGET" not in data else b"*1\r\n:7\r\n") * data.count(b"\r\n*") or b"+OK\r\n"
        )


def _huge(peer: socket.socket) -> None:
    while peer.recv(1 << 16):
        peer.sendall(b"*-7\r\n$99999999999\r\n")


@pytest.mark.parametrize("behave", [_stall, _disconnect, _garbage, _wrong_shape, _huge])
def test_a_bad_peer_is_unavailable_and_soon_left_alone(behave: Any) -> None:
    peer = BadPeer(behave)
    store = redis_store(peer.url, breaker_failures=3, breaker_open_ms=10_000_000)
    for _ in range(3):
        with pytest.raises(StoreError):
            store.get_many(1, "t", keys_of(1), WORDS)
    connections = peer.connections
    for call in (
        lambda: store.get_many(1, "t", keys_of(1), WORDS),
        lambda: put(store),
        lambda: store.header(1),
        lambda: store.headers(),
        lambda: list(store.scan(1)),
    ):
        with pytest.raises(StoreError, match="it has failed 3 times"):
            call()
    assert peer.connections == connections  # not even tried
    assert store.breaker.opened == 1
    store.close()
    peer.close()


def test_the_breaker_lets_one_call_try() -> None:
    breaker = Breaker(2, 10.0)
    assert breaker.allow(0.0)
    breaker.failed(0.0)
    assert breaker.allow(0.0)
    breaker.failed(1.0)
    assert [breaker.allow(t) for t in (1.0, 10.9)] == [False, False]
    assert [breaker.allow(11.0), breaker.allow(11.0)] == [True, False]  # half open: one probe
    breaker.failed(11.0)
    assert [breaker.allow(20.9), breaker.allow(21.0), breaker.allow(21.0)] == [False, True, False]
    breaker.succeeded()
    assert [breaker.allow(21.0), breaker.allow(21.0)] == [True, True]
    breaker.failed(22.0)  # it takes two again
    assert breaker.allow(22.0)
    assert breaker.opened == 1


@needs_redis
def test_a_redis_that_is_restarted(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    store = redis_store(server.url, timeout_ms=2000, breaker_failures=100)
    put(store)
    assert store.get_many(1, "t", keys_of(1), WORDS)[2].all()
    server.stop()
    with pytest.raises(StoreError):
        store.get_many(1, "t", keys_of(1), WORDS)
    server.start()
    try:
        found = store.get_many(1, "t", keys_of(1), WORDS)[2]
    except StoreError:  # a connection of the pool that had not seen the end
        found = store.get_many(1, "t", keys_of(1), WORDS)[2]
    assert not found.any()  # it came back empty
    put(store)
    assert store.get_many(1, "t", keys_of(1), WORDS)[2].all()
    store.close()
    server.stop()


@needs_redis
def test_rows_read_shortly_before_are_served_while_redis_fails(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    store = redis_store(server.url, timeout_ms=2000, stale_ms=10_000_000, stale_rows=3, breaker_failures=1000)
    put(store, 5)
    before = store.get_many(1, "t", keys_of(1, 2), WORDS)
    server.stop()
    after = store.get_many(1, "t", keys_of(1, 2), WORDS)
    for one, two in zip(before, after):
        assert (one == two).all()
    assert store.stale_reads == 1
    with pytest.raises(StoreError):  # never read
        store.get_many(1, "t", keys_of(3), WORDS)
    assert not store.get_many(1, "t", keys_of(1), WORDS, 1)[2].any()  # behind what was pushed since
    store._stale[store._names(1, keys_of(1))[0]] = (b"", None, -1e12)  # too old
    with pytest.raises(StoreError):
        store.get_many(1, "t", keys_of(1), WORDS)
    store.close()


@needs_redis
def test_a_row_from_before_a_push_does_not_pass_for_one_from_after_it(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    store = redis_store(server.url, timeout_ms=2000, stale_ms=10_000_000, breaker_failures=1000)
    put(store, 5)
    old = store.get_many(1, "t", keys_of(1), WORDS)
    for key in (1, 2):
        store.put_many(1, keys_of(key), rows_of(1, 6), old[1], ViewHeader("t", WORDS, 0, 6), sequence=6)
    assert store.get_many(1, "t", keys_of(2), WORDS, 6)[2].all()  # with it the newer header is read
    server.stop()
    assert store.get_many(1, "t", keys_of(2), WORDS, 6)[2].all()
    assert not store.get_many(1, "t", keys_of(1), WORDS, 6)[2].any()
    assert store.get_many(1, "t", keys_of(1, 2), WORDS, 6)[2].tolist() == [False, True]
    before = store.get_many(1, "t", keys_of(1), WORDS)
    assert before[2].all() and (before[0] == old[0]).all()
    store.close()


@needs_redis
def test_pushes_are_durable_and_right_while_redis_is_away(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    settings = f"online_store: {{type: redis, url: {server.url}, timeout_ms: 2000, breaker_failures: 1000}}\n"
    repo = make_push_repo(tmp_path / "r", config=settings)
    with FeatureStore(repo) as store:
        store.push("events", columns([(HOUR, 1, "a", 1.0, "Rome")]))
        store.materialize_incremental(2 * HOUR)
        server.stop()
        assert store.push("events", columns([(HOUR + MINUTE, 1, "a", 2.0, "Oslo")])) == 1
        with pytest.raises(StoreError):  # never NaN
            store.get_online_features(["pairs:last"], {"user_id": 1, "shop": "a"}, now=2 * HOUR)
        server.start()
        for _ in range(2):  # a dead connection may still be in the pool
            try:
                got = store.get_online_features(["pairs:last"], {"user_id": 1, "shop": "a"}, now=2 * HOUR)
            except StoreError:
                continue
        assert got.to_dict()["last"] == [2.0]
        assert store.materialize_incremental(2 * HOUR).rows == {"users": 1, "pairs": 1}
        assert_online_is_offline(store, 2 * HOUR, USERS, SHOPS, FEATURES)
    server.stop()


def test_readers_and_writers_share_the_pool(make: Any) -> None:
    store = make()
    keys, meta = keys_of(*range(50)), np.zeros((50, 4), np.int64)
    store.put_many(1, keys, np.full((50, WORDS), 0, np.uint64), meta, ViewHeader("t", WORDS, 0), sequence=0)
    faults: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            last = 0
            while not done.is_set():
                rows, _, found = store.get_many(1, "t", keys[:1], WORDS)
                assert found.all()
                assert len(set(rows[0].tolist())) == 1  # whole
                assert rows[0, 0] >= last  # never back
                last = int(rows[0, 0])
        except BaseException as error:
            faults.append(error)

    def write(first: int) -> None:
        try:
            for i in range(first, 60, 2):
                store.put_many(1, keys, np.full((50, WORDS), i, np.uint64), meta, sequence=i)
        except BaseException as error:
            faults.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    writers = [threading.Thread(target=write, args=(first,)) for first in (1, 2)]
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not faults
    assert set(store.get_many(1, "t", keys, WORDS)[0].ravel().tolist()) == {59}
    store.close()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("3", "online_store is 3; expected a mapping"),
        ("{type: redys}", "online_store.type is 'redys'; expected lmdb or redis"),
        ("{type: redis}", "online_store.url is no address"),
        ("{type: redis, url: 'http://x'}", "online_store.url is no address"),
        ("{type: redis, url: 'redis://:${PENSTOCK_NO_SUCH}@x'}", "PENSTOCK_NO_SUCH, which is not set"),
        ("{type: redis, url: 'redis://x', pool: 3}", 'did you mean "pool_size"?'),
        ("{type: redis, url: 'redis://x', pool_size: 0}", "online_store.pool_size is 0"),
        ("{type: redis, url: 'redis://x', stale_ms: -1}", "online_store.stale_ms is -1"),
        ("{url: 'redis://x'}", "online_store has url without type: redis"),
        ("{type: redis, url: 3}", "online_store.url is no text"),
    ],
)
def test_wrong_settings(tmp_path: Path, section: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        FeatureStore(make_push_repo(tmp_path / "r", config=f"online_store: {section}\n"))
    assert "feature_store.yaml:2: " in str(refused.value)
    assert message in str(refused.value)


def test_a_password_comes_from_the_environment_and_shows_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_REDIS_PASSWORD", "hunter2")
    text = "online_store: {type: redis, url: 'redis://:${SHOP_REDIS_PASSWORD}@127.0.0.1:1/0', stale_ms: 0}\n"
    with FeatureStore(make_push_repo(tmp_path / "r", config=text)) as store:
        assert "hunter2" in store._repo.online_store.url
        assert "hunter2" not in repr(store._repo.online_store)
        with pytest.raises(StoreError) as failed:
            store.materialize_incremental(HOUR)
        assert "hunter2" not in str(failed.value)
