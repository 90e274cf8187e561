"""Pushes that a view refuses, that are lost, or that are not this process's to make: they leave no trace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from push_repo import (
    HOUR,
    SCHEMA,
    USERS,
    agree,
    columns,
    make_push_repo,
    some_events,
)

from penstock.data_lock import DataDirLock
from penstock.errors import (
    FailedPreconditionError,
    StoreError,
)
from penstock.features import materialize
from penstock.features.online import OnlineStore
from penstock.features.store import FeatureStore
from penstock.features.streams import MemoryStream

GOOD = columns([(HOUR, 1, "a", 1.0, "Rome"), (HOUR, 2, "b", 2.0, None)])


REFUSING = """
from penstock import Entity, FeatureView, PushSource, col, count
from penstock.features.expressions import udf

@udf(returns="float64")
def checked(x):
    if (x > 10).any():
        raise ValueError("too much")
    return x

user = Entity("user", join_keys=["user_id"])
events = PushSource("events", {schema}, timestamp="at")
first = FeatureView("first", entities=[user], source=events, features={{"n": count(window="1h")}})
second = FeatureView("second", entities=[user], source=events, features={{"x": checked(col("x"))}})
"""


def test_a_push_that_one_view_refuses_is_in_none(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r")
    (repo / "features.py").write_text(REFUSING.format(schema=repr(SCHEMA)))
    with FeatureStore(repo) as store:
        reader = store.online_reader(["first:n"])
        store.push("events", columns([(HOUR, 1, "a", 1.0, None)]))
        assert reader.read({"user_id": [1]}, now=HOUR).tolist() == [[1]]
        with pytest.raises(ValueError, match="too much"):
            store.push("events", columns([(HOUR, 1, "a", 11.0, None)]))
        assert reader.read({"user_id": [1]}, now=HOUR).tolist() == [[1]]
        found = store.get_online_features(["first:n", "second:x"], {"user_id": [1]}, now=HOUR).to_dict()
        assert (found["n"], found["x"]) == ([1], [1.0])
        store.push("events", columns([(HOUR, 1, "a", 2.0, None)]))
        assert reader.read({"user_id": [1]}, now=HOUR).tolist() == [[2]]


def test_events_that_were_lost_while_rows_are_written_are_not_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(materialize, "_CHUNK", 2)
    with FeatureStore(make_push_repo(tmp_path / "r")) as store:
        store.push("events", columns([(HOUR, user, "a", 1.0, "Rome") for user in USERS]))
        change, failed = OnlineStore.change, []

        def fail(self: OnlineStore, work: Any) -> Any:
            raise StoreError("the disk is full")

        def lose(view: str, done: int, of: int) -> None:
            if not failed:
                failed.append(view)
                monkeypatch.setattr(OnlineStore, "change", fail)
                with pytest.raises(StoreError, match="full"):
                    store.push("events", columns([(HOUR, user, "a", 9.0, "Ulm") for user in USERS]))
                monkeypatch.setattr(OnlineStore, "change", change)

        store.materialize(0, 2 * HOUR - 1, views=["users"], progress=lose)
        assert failed
        rows = {"user_id": USERS}
        found = store.get_online_features(["users:n", "users:spend"], rows, now=2 * HOUR - 1).to_dict()
        assert (found["n"], found["spend"]) == ([1] * 6, [1.0] * 6)


def test_rows_that_another_process_erased_are_not_written_again(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r")
    with FeatureStore(repo) as one, FeatureStore(repo) as two:
        one.push("events", columns([(HOUR, user, "a", 1.0, "Rome") for user in USERS]))
        agree(one, HOUR)
        agree(two, HOUR)
        two.erase("users", {"user_id": [3]})
        report = one.materialize(0, HOUR, views=["users"])
        assert report.rows == {"users": 5}
        number = one._live.view("users").number
        assert sum(len(keys) for keys, _ in one._online.scan(number)) == 5


def test_a_store_beside_a_server_reads_and_does_not_push(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r", batch=some_events(3))
    with FeatureStore(repo) as store:
        assert store.push("events", GOOD) == 2
        lock = DataDirLock(store.data_dir)
        lock.announce(["tcp://127.0.0.1:7064"])
        for write in (
            lambda: store.push("events", GOOD),
            lambda: store.erase("users", {"user_id": [1]}),
            lambda: store.ingest("events", MemoryStream(1)),
        ):
            with pytest.raises(FailedPreconditionError, match=r"served at tcp://127\.0\.0\.1:7064"):
                write()
        lock.announce([])
        with pytest.raises(FailedPreconditionError, match=f"in process {os.getpid()}"):
            store.push("events", GOOD)
        with FeatureStore(repo, holds_data_dir=True) as server:  # as the holder itself does
            assert server.push("events", GOOD) == 2
        lock.release()
        assert store.push("events", GOOD) == 2
