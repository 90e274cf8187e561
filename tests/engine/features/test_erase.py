"""Erasing: the entity is gone from every place that the receipt names, and no other is touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from acceptance import T, World, ask
from hypothesis import given, settings
from hypothesis import strategies as st
from push_repo import FEATURES, HOUR, MINUTE, columns, make_push_repo, online, some_events, write_batch
from redis_server import BINARY, RedisServer
from store_repo import assert_online_is_offline, make_repo

import penstock as d
from penstock.clock import ManualClock
from penstock.errors import InvalidArgumentError, NotFoundError, StoreError
from penstock.features.expressions import col
from penstock.features.online import OnlineStore
from penstock.features.store import FeatureStore

USERS, SHOPS = list(range(6)), ["a", "b"] * 3


def all_rows(store: FeatureStore) -> list[dict[str, Any]]:
    return [row for part in store._log.read("events")[0] for row in part.table.to_pylist()]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["users", "pairs"]), st.lists(st.integers(0, 5), min_size=1))
def test_it_is_as_if_the_entity_had_never_been(
    tmp_path_factory: pytest.TempPathFactory, seed: int, view: str, erased: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("erase")
    batch, pushed = some_events(20, users=6, seed=seed), some_events(30, users=6, seed=seed + 1)
    repo = make_push_repo(folder / "r", batch=batch)
    clock = ManualClock(us=11 * HOUR)

    def gone(row: Any) -> bool:
        return row[1] in erased and (view == "users" or row[2] == "a")

    with FeatureStore(repo, clock=clock) as store:
        for at in range(0, 20, 5):
            store.push("events", columns(pushed[at : at + 5]))
        store._pushes.compact("events")
        store.materialize(0, 11 * HOUR)
        for at in range(20, 30, 5):
            store.push("events", columns(pushed[at : at + 5]))
        before = {name: set(map(tuple, store.computer(name).keys.tolist())) for name in ("users", "pairs")}
        keys: dict[str, list[Any]] = {"user_id": erased}
        if view == "pairs":
            keys["shop"] = ["a"] * len(erased)
        receipt = store.erase(view, keys)
        removed = receipt["removed"]
        assert removed["log_rows"] == sum(map(gone, pushed[20:]))
        assert removed["segment_rows"] == sum(map(gone, pushed[:20]))
        assert removed["file_rows_hidden"] == sum(map(gone, batch))
        after = {name: set(map(tuple, store.computer(name).keys.tolist())) for name in ("users", "pairs")}
        assert removed["online_rows"] == sum(len(before[name] - after[name]) for name in before)
        left = [row for row in pushed if not gone(row)]
        assert [(r["user_id"], r["shop"], r["x"]) for r in all_rows(store)] == [tuple(r[1:4]) for r in left]
        assert_online_is_offline(store, 11 * HOUR, USERS, SHOPS, FEATURES)
        found = online(store, 11 * HOUR, USERS, SHOPS)
        for name in (
            "users",
            "pairs",
        ):  # what the store itself holds is of those left, and all of it
            live = store._live.view(name)
            stored = [tuple(key) for keys, _ in store._online.scan(live.number) for key in keys.tolist()]
            assert set(stored) == after[name]
            sequence = store._log.head("events")
            there = store._online.get_many(
                live.number, live.tag, live.computer.keys, live.row_words, sequence
            )[2]
            assert there.all()
    plain = make_push_repo(folder / "o", batch=[row for row in batch if not gone(row)])
    with FeatureStore(plain, clock=clock) as other:
        if left:
            other.push("events", columns(left))
        assert online(other, 11 * HOUR, USERS, SHOPS) == found
    with FeatureStore(repo, clock=clock) as store:  # after a restart, and when the file is written again
        assert online(store, 11 * HOUR, USERS, SHOPS) == found
        write_batch(repo, batch)
        os.utime(repo / "events.parquet", ns=(1, 1))
        store.refresh()
        assert online(store, 11 * HOUR, USERS, SHOPS) == found
        # Who comes back counts from then on.
        clock.us = 12 * HOUR
        row = (11 * HOUR + 1, erased[0], "a", 4.0, "Rome")
        store.push("events", columns([row]))
        got = store.get_online_features(
            ["pairs:seen", "pairs:last"], {"user_id": erased[0], "shop": "a"}, now=12 * HOUR
        )
        assert (got.to_dict()["seen"], got.to_dict()["last"]) == ([1], [4.0])
        assert_online_is_offline(store, 12 * HOUR, USERS, SHOPS, FEATURES)


def test_no_byte_of_the_key_is_left_in_the_log(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r")
    with FeatureStore(repo) as store:
        secret = "a shop with a telling name"
        store.push("events", columns([(1, 1, secret, 1.0, "Rome"), (2, 1, "b", 1.0, "Rome")]))
        store._pushes.compact("events")
        store.push("events", columns([(3, 2, secret, 2.0, "Rome")]))
        receipt = store.erase("pairs", {"user_id": [1, 2], "shop": [secret, secret]})
        assert receipt["keys"] == 2
        for file in (store.data_dir / "events").rglob("*"):
            assert file.is_dir() or secret.encode() not in file.read_bytes()
        with store._online.transaction() as txn:
            assert not [value for _, value in txn.cursor() if secret.encode() in bytes(value)]
        assert [row["shop"] for row in all_rows(store)] == ["b"]
        again = store.erase("pairs", {"user_id": [1, 2], "shop": [secret, secret]})
        assert set(again["removed"].values()) == {0}
        assert len(receipt["digest"]) == 64
        assert receipt["digest"] != again["digest"]


@pytest.mark.parametrize("first", ["a", "b"])
def test_rows_whose_key_is_null_are_nobodys(tmp_path: Path, first: str) -> None:
    world = World(tmp_path)
    data = {"u": [1, 1, 2, None], "s": [first, None, "a", "b"], "t": [T] * 4, "x": [1.0, 2.0, 3.0, 4.0]}
    features = {"x": col("x"), "n": d.count(window="1h")}
    users = world.view("users", data, features)
    shops = d.FeatureView("shops", [d.Entity("shop", ["s"])], users.source, features)
    with world.open(users, shops) as store:
        store.erase("shops", {"s": [first]})
        got = store.get_historical_features(ask([1, 2], s=["a", "b"]), ["users:x", "users:n"]).to_arrow()
        assert got["x"].to_pylist() == [2.0, None if first == "a" else 3.0]  # the row without a shop stays
        store.erase("users", {"u": [0]})  # what stands in a null integer's place
        got = store.get_historical_features(ask([1], s=["b"]), ["shops:x"]).to_arrow()
        assert got["x"].to_pylist() == [None if first == "b" else 4.0]


def test_entities_of_a_file_source(tmp_path: Path) -> None:
    rows = [(HOUR, 1, "a", 1.0, "Rome"), (HOUR, 2, "a", 2.0, "Oslo"), (2 * HOUR, 1, "b", 3.0, None)]
    repo = make_repo(tmp_path / "r", rows)
    clock = ManualClock(us=3 * HOUR)
    with FeatureStore(repo, clock=clock) as store:
        store.materialize_incremental(3 * HOUR)
        receipt = store.erase("users", {"user_id": 1})
        assert receipt["removed"]["file_rows_hidden"] == 2
        assert receipt["removed"]["online_rows"] == 3  # the user's, and two of its pairs
        assert_online_is_offline(store, 3 * HOUR, [1, 2], ["a", "a"])
    with FeatureStore(repo, clock=clock) as store:
        got = store.get_online_features(["users:n", "pairs:last"], {"user_id": [1, 2], "shop": ["a", "a"]},
                                        now=3 * HOUR)  # fmt: skip
        assert got.to_dict()["last"] == [None, 2.0]
        assert got.status[0].tolist() == [2, 2]
        assert store.materialize_incremental(3 * HOUR).rows == {"users": 1, "pairs": 1}
        assert_online_is_offline(store, 3 * HOUR, [1, 2], ["a", "a"])


@pytest.mark.skipif(BINARY is None, reason="no redis-server")
def test_rows_in_redis_go_too(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    try:
        config = f"online_store: {{type: redis, url: {server.url}, timeout_ms: 20000}}\n"
        with FeatureStore(make_push_repo(tmp_path / "r", config=config)) as store:
            store.push("events", columns([(HOUR, user, "a", 1.0, "Rome") for user in range(4)]))
            store.materialize_incremental(2 * HOUR)
            assert store.erase("users", {"user_id": [1, 3, 77]})["removed"]["online_rows"] == 4
            live = store._live.view("users")
            kept = np.concatenate([keys for keys, _ in store._online.scan(live.number)])
            assert sorted(kept[:, 0].tolist()) == [0, 2]
            assert_online_is_offline(store, 2 * HOUR, USERS, SHOPS, FEATURES)
    finally:
        server.stop()


def test_what_is_wrong_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r")) as store:
        store.push("events", columns([(HOUR, user, "a", 1.0, "Rome") for user in range(3)]))
        store._pushes.compact("events")
        before, stamp = online(store, 2 * HOUR, USERS, SHOPS), store.stamp()
        for view, keys, error, message in (
            ("usrs", {"user_id": 1}, NotFoundError, "view 'usrs' is unknown"),
            (3, {"user_id": 1}, InvalidArgumentError, "view is 3"),
            ("users", {"user": 1}, InvalidArgumentError, "no join key 'user_id'"),
            ("users", {"user_id": 1, "x": 2}, InvalidArgumentError, "column 'x' is no join key"),
            ("users", {"user_id": [1, None]}, InvalidArgumentError, "'user_id' is null in row 1"),
            ("users", {"user_id": "1"}, InvalidArgumentError, "has type string; expected int64"),
            ("users", [], InvalidArgumentError, "is empty"),
        ):
            with pytest.raises(error, match=message):
                store.erase(view, keys)  # type: ignore[arg-type]
        assert (online(store, 2 * HOUR, USERS, SHOPS), store.stamp()) == (before, stamp)

        def full(self: OnlineStore, work: Any) -> Any:
            raise StoreError("online store cannot be written: No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(OnlineStore, "change", full)
            with pytest.raises(StoreError, match="No space left"):
                store.erase("users", {"user_id": 1})
        assert online(store, 2 * HOUR, USERS, SHOPS) == before
        assert len(list((store.data_dir / "events/events").glob("*.parquet"))) == 1
        assert store.erase("users", {"user_id": 1})["removed"]["segment_rows"] == 1


def test_another_reader_of_the_log_forgets_too(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r")
    with FeatureStore(repo) as one, FeatureStore(repo) as two:
        one.push("events", columns([(HOUR, user, "a", 1.0, "Rome") for user in range(3)]))
        for store in (one, two):
            assert_online_is_offline(store, 2 * HOUR, USERS, SHOPS, FEATURES)
        one.erase("users", {"user_id": 1})
        names = {"user_id": [0, 1, 2], "shop": ["a"] * 3}
        got = two.get_online_features(["pairs:seen", "users:city"], names, now=2 * HOUR).to_dict()
        assert (got["seen"], got["city"]) == ([1, None, 1], ["Rome", None, "Rome"])
        two.push("events", columns([(HOUR + MINUTE, 2, "a", 5.0, "Rome")]))
        for store in (one, two):
            got = store.get_online_features(
                ["pairs:seen"], {"user_id": [0, 1, 2], "shop": ["a"] * 3}, now=2 * HOUR
            )
            assert got.to_dict()["seen"] == [1, None, 2]
    table = pq.read_table  # segments stay readable with plain Parquet tools
    with FeatureStore(repo) as store:
        store._pushes.compact("events")
        file = next((store.data_dir / "events/events").glob("*.parquet"))
        assert isinstance(table(file), pa.Table)


@pytest.mark.parametrize("keys", [{}, [{}], [{}, {}]])
def test_a_view_without_join_keys_names_nobody(tmp_path: Path, keys: Any) -> None:
    repo = make_push_repo(tmp_path / "r")
    view = 'FeatureView("all", entities=[], source=events, features={"m": count(window="1d")})'
    with (repo / "features.py").open("a") as file:
        file.write(f"everyone = {view}\n")
    with FeatureStore(repo) as store:
        store.push("events", columns([(HOUR, 1, "a", 1.0, "Rome")]))
        with pytest.raises(InvalidArgumentError, match="'all' has no join keys, so it names no entity"):
            store.erase("all", keys)
        found = store.get_online_features(["all:m", "users:n"], {"user_id": [1]}, now=HOUR).to_dict()
        assert (found["m"], found["n"]) == ([1], [1])
