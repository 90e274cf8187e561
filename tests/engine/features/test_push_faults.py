"""Pushes that a view refuses, that are lost, or that are not this process's to make: they leave no trace."""

from __future__ import annotations

import os
import threading
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

from penstock.clock import ManualClock
from penstock.data_lock import DataDirLock
from penstock.errors import (
    FailedPreconditionError,
    InternalError,
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


def test_who_cannot_be_told_of_a_push_is_told_again_and_the_caller_learns_of_it(tmp_path: Path) -> None:
    def spent(store: FeatureStore, told: Any) -> list[Any]:
        """What `told` would put in a cache: the rows of view users as values."""
        keys, rows, _ = told["users"]
        spend = store.computer("users").row_schema.decode(rows)[1][0]
        return [keys[:, 0].tolist(), spend.tolist()]

    with FeatureStore(make_push_repo(tmp_path / "r"), clock=ManualClock(us=HOUR)) as store:
        broken, again, got = True, threading.Event(), []

        def told(touched: Any) -> None:
            if broken:
                raise RuntimeError("the cache is broken")
            got.append(
                {view: (keys.copy(), rows.copy(), meta) for view, (keys, rows, meta) in touched.items()}
            )
            again.set()

        store.on_push(told)
        for x in (1.0, 2.0):
            with pytest.raises(
                InternalError, match=r"are durable.*the cache is broken; do not push them again"
            ):
                store.push("events", columns([(HOUR, 1, "a", x, "Rome")]))
        assert store._log.head("events") == 2
        assert store._pushes.untold >= 2
        assert store.get_online_features(["users:n"], {"user_id": [1]}, now=HOUR).to_dict()["n"] == [2]
        broken = False
        assert again.wait(60)  # with no further push
        assert spent(store, got[0]) == [[1], [3.0]]
        store.push("events", columns([(HOUR, 2, "a", 5.0, "Rome")]))
        assert spent(store, got[-1]) == [[2], [5.0]]
        broken = True
        with pytest.raises(InternalError):
            store.push("events", columns([(HOUR, 2, "a", 1.0, "Rome")]))
        broken = False
        store.push("events", columns([(HOUR, 3, "a", 4.0, "Rome")]))  # takes the untold ones along, or not
        keys = {key: x for each in got for key, x in zip(*spent(store, each))}
        assert keys == {1: 3.0, 2: 6.0, 3: 4.0}


def test_lost_events_stay_to_be_told_of_until_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r")) as store:
        lost: list[Any] = []
        broken = True

        def tell(touched: Any) -> None:
            if broken:
                raise RuntimeError("the cache is broken")
            lost.append(touched)

        store.on_push(lambda touched: None, tell)
        with monkeypatch.context() as full:

            def fail(self: OnlineStore, work: Any) -> Any:
                raise StoreError("the disk is full")

            full.setattr(OnlineStore, "change", fail)
            with pytest.raises(RuntimeError, match="broken"):
                store.push("events", columns([(HOUR, 1, "a", 9.0, "Ulm")]))
        with pytest.raises(RuntimeError, match="broken"):
            store.push("events", columns([(HOUR, 2, "a", 1.0, "Rome")]))
        assert not lost
        broken = False
        store.push("events", columns([(HOUR, 2, "a", 1.0, "Rome")]))
        assert [found["users"][0][:, 0].tolist() for found in lost] == [[1]]
        got = store.get_online_features(["users:n"], {"user_id": [1, 2]}, now=HOUR).to_dict()["n"]
        assert got == [None, 1]


def test_a_stream_goes_on_when_its_events_could_not_be_told_of(tmp_path: Path) -> None:
    stream = MemoryStream(1)
    for i in range(3):
        stream.send({name: value[0] for name, value in columns([(HOUR, i, "a", 1.0, None)]).items()})
    with FeatureStore(make_push_repo(tmp_path / "r")) as store:
        failing = [True, False, True]

        def told(touched: Any) -> None:
            if failing and failing.pop(0):
                raise RuntimeError("the cache is broken")

        store.on_push(told)
        pause = threading.Event()
        with store.ingest("events", stream, most=1, idle_s=0.001).start() as loop:
            for _ in range(6000):
                if store._log.offsets("events").get(0) == 3 or loop.error is not None:
                    break
                pause.wait(0.01)
        assert len(store.computer("users").keys) == 3
        assert store.computer("users").n_events == 3  # none twice


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
            lambda: store.materialize(0, HOUR),
            lambda: store.materialize_incremental(HOUR),
        ):
            with pytest.raises(FailedPreconditionError, match=r"served at tcp://127\.0\.0\.1:7064"):
                write()
        lock.announce([])
        with pytest.raises(FailedPreconditionError, match=f"in process {os.getpid()}"):
            store.push("events", GOOD)
        with FeatureStore(repo, holds_data_dir=True) as server:  # as the holder itself does
            assert server.push("events", GOOD) == 2
            server.materialize_incremental(HOUR)
        lock.release()
        assert store.push("events", GOOD) == 2
