"""The prepared reader: the bits of `get_online_features`, whatever is pushed, erased, changed or asked."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from push_repo import FEATURES, HOUR, columns, make_push_repo, some_events, write_batch
from store_repo import HOUR as STORE_HOUR
from store_repo import make_repo, some_rows

from penstock import _core
from penstock.clock import ManualClock
from penstock.errors import InvalidArgumentError, NotFoundError, StoreError
from penstock.features.online import OnlineStore
from penstock.features.store import FeatureStore

moments = st.integers(0, 24).map(lambda n: n * 30 * 60_000_000 + n % 3 - 1)


def same(store: FeatureStore, reader: Any, features: Any, rows: Any, now: int) -> None:
    expected = store.get_online_features(features, rows, now=now).to_numpy()
    found = reader.read(rows, now=now)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert found.view(np.uint32).tolist() == expected.view(np.uint32).tolist()


class Elsewhere:
    """The store of the data folder as if it were on another machine: its rows are asked for."""

    def __init__(self, store: OnlineStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ask", "ask", "push", "to", "erase", "refresh", "apply"]), moments,
            st.lists(st.integers(0, 5), min_size=1, max_size=5),
        ),
        max_size=14,
    ),
    st.integers(0, 99),
    st.booleans(),
)  # fmt: skip
def test_it_gives_the_bits_of_the_slow_path(
    tmp_path_factory: pytest.TempPathFactory, steps: Any, seed: int, elsewhere: bool
) -> None:
    folder = tmp_path_factory.mktemp("reader")
    batch = some_events(30, users=5, seed=seed)
    clock = ManualClock(us=5 * HOUR, ns=1)
    with FeatureStore(make_push_repo(folder / "r", batch=batch), clock=clock) as store:
        if elsewhere:
            store._online = Elsewhere(store._local)  # type: ignore[assignment]
        readers = [store.online_reader(FEATURES), store.online_reader(["users:city", "users:n"])]
        for i, (step, now, users) in enumerate(steps):
            clock.us = now
            if step == "push":
                store.push(
                    "events", columns(some_events(len(users), users=6, seed=seed + i, until=12 * HOUR))
                )
            elif step == "to":
                store.materialize(-HOUR, now)
            elif step == "erase":
                store.erase("users", {"user_id": users[:1]})
            elif step == "refresh":
                batch = batch + some_events(2, users=5, seed=seed + 50 + i)
                write_batch(folder / "r", batch)
                store.refresh()
            elif step == "apply":
                store.apply()
            keys: list[Any] = [*users, None]
            shops = [("a", "b", "c")[user % 3] for user in users] + ["a"]
            same(store, readers[0], FEATURES, {"user_id": keys, "shop": shops}, now)
            same(store, readers[1], ["users:city", "users:n"], {"user_id": keys}, now)


def test_request_inputs_windows_and_ranks(tmp_path: Path) -> None:
    features = [
        "users:rank",
        "users:late",
        "cart:clicks",
        "users:age",
        "cart:value",
        "users:tick",
        "pairs:top",
    ]
    with FeatureStore(make_repo(tmp_path / "r", some_rows(600))) as store:
        reader, service = store.online_reader(features), store.online_reader("model")
        rng = np.random.default_rng(1)
        for _ in range(30):
            n = int(rng.integers(1, 150))  # more than a block of 64 too
            rows = {
                "user_id": rng.integers(0, 25, n).tolist(),
                "shop": rng.choice(["a", "b", "z"], n).tolist(),
                "value": [None if v < 0.1 else v for v in rng.random(n).tolist()],
                "clicks": rng.integers(0, 9, n).tolist(),
            }
            now = int(rng.integers(0, 12 * STORE_HOUR))
            same(store, reader, features, rows, now)
            del rows["clicks"]
            same(store, service, "model", rows, now)
        assert reader.names == ("rank", "late", "clicks", "age", "value", "tick", "top")


def test_every_form_of_rows_and_out(tmp_path: Path) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r", batch=some_events(50))) as store:
        reader = store.online_reader(["users:n", "pairs:last"])
        rows = {"user_id": [1, 2, 3], "shop": ["a", "b", "a"]}
        expected = reader.read(rows, now=5 * HOUR)
        dicts = [{"user_id": u, "shop": s} for u, s in zip(*rows.values())]
        arrays = {"user_id": np.array([1, 2, 3]), "shop": np.array(["a", "b", "a"])}
        for form in (dicts, arrays, pd.DataFrame(rows), pa.table(rows)):
            assert reader.read(form, now="1970-01-01T05:00").tolist() == expected.tolist()
        assert (
            reader.read({"user_id": np.int64(1), "shop": "a"}, now=5 * HOUR).tolist() == expected[:1].tolist()
        )
        out = np.zeros((3, 2), np.float32)
        assert reader.read(rows, out, now=5 * HOUR) is out
        assert out.tolist() == expected.tolist()
        assert reader.read(rows).shape == (3, 2)  # by the clock


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r", batch=some_events(50))) as store:
        reader = store.online_reader(["users:n", "pairs:last", "cart:value"])
        good: dict[str, Any] = {"user_id": [1], "shop": ["a"], "value": [1.0]}
        frozen = np.zeros((1, 3), np.float32)
        frozen.flags.writeable = False
        for change, out, message in (
            ({"user_id": ["1"]}, None, r"entities\.user_id"),
            ({"user_id": [1.5]}, None, r"entities\.user_id"),
            ({"user_id": [2**63]}, None, r"entities\.user_id"),
            ({"user_id": [1, 2]}, None, "rows"),
            ({"shop": [3]}, None, r"entities\.shop"),
            ({"value": ["x"]}, None, r"inputs\.value"),
            ({"more": [1]}, None, r"entities\.more is unknown"),
            ({"user_id": [object()]}, None, "a object is no value"),
            ({"user_id": [2**70]}, None, "cannot be read"),
            ({}, np.zeros((2, 3), np.float32), "out is float32"),
            ({}, np.zeros((1, 3)), "out is float64"),
            ({}, np.zeros((1, 6), np.float32)[:, ::2], "out is float32"),
            ({}, frozen, "writable"),
            ({}, [[0.0]], "out is list"),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                reader.read({**good, **change}, out)
            assert reader.read(good).shape == (1, 3)  # nothing else is disturbed
        with pytest.raises(InvalidArgumentError, match=r"entities\.shop is missing"):
            reader.read({"user_id": [1], "value": [1.0]})
        with pytest.raises(InvalidArgumentError):
            reader.read([], now=0)
        with pytest.raises(InvalidArgumentError, match="now is 'soon'"):
            reader.read(good, now="soon")
        with pytest.raises(NotFoundError, match="no such feature"):
            store.online_reader(["users:m"])


def test_a_store_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r", batch=some_events(50))) as store:
        computing = store.online_reader(["users:n"])
        store._online = Elsewhere(store._local)  # type: ignore[assignment]
        reader = store.online_reader(["users:n"])
        before = reader.read({"user_id": [1]}, now=5 * HOUR)

        def fail(self: OnlineStore, *args: Any) -> Any:
            raise StoreError("online store cannot be read")

        monkeypatch.setattr(OnlineStore, "get_many", fail)
        with pytest.raises(StoreError, match="cannot be read"):
            reader.read({"user_id": [1, 9]}, now=5 * HOUR)
        assert (reader.read({"user_id": [1]}, now=5 * HOUR) == before).all()  # that row it has
        assert computing.read({"user_id": [1, 9]}, now=5 * HOUR)[0] == before[0]  # needs no store


def test_many_rows_at_once_are_computed_as_one_by_one(tmp_path: Path) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r", batch=some_events(400, users=150))) as store:
        whole, one = store.online_reader(FEATURES), store.online_reader(FEATURES)
        users = [*range(150), None, 3, 3]
        rows = {"user_id": users, "shop": [("a", "b", "c")[i % 3] for i in range(len(users))]}
        for now in (HOUR, 5 * HOUR, 20 * HOUR):
            found = whole.read(rows, now=now)
            store._reader_caches._caches.clear()
            one._prepared = None
            asked = [dict(zip(rows, row)) for row in zip(*rows.values())]
            single = [one.read(row, now=now)[0] for row in asked]
            assert found.view(np.uint32).tolist() == np.array(single).view(np.uint32).tolist()
            whole._prepared = None


def test_tables_of_other_views_are_refused(tmp_path: Path) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r", batch=some_events(9))) as store:
        reader = store.online_reader(["users:n"])
        prepared = reader._prepared
        assert prepared is not None
        plan = {
            "entities": [("user_id", "int64")], "inputs": [], "request_source": "", "error_on_missing": False,
            "key_seed": store.key_seed, "program": prepared.plan.program,
            "views": [
                {"name": "users", "rows_of": "users", "cache": prepared.caches[0], "key_columns": [0],
                 "fields": store.computer("users").schema}
            ],
        }  # fmt: skip
        _core.FeatureReader(plan, [store.computer("users").events])
        with pytest.raises(ValueError, match="tables has 2 event tables; the plan has 1 views"):
            _core.FeatureReader(plan, [store.computer("users").events] * 2)
        with pytest.raises(ValueError, match="the event table of view 'users' has other features"):
            _core.FeatureReader(plan, [store.computer("pairs").events])


def test_a_push_is_read_at_once_on_every_thread(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r")
    with FeatureStore(repo) as store, FeatureStore(repo) as other:
        reader = store.online_reader(["pairs:seen", "pairs:last"])
        foreign = other.online_reader(["pairs:seen"])
        faults: list[BaseException] = []
        done = threading.Event()

        def pusher(user: int) -> None:
            try:
                out = np.zeros((1, 2), np.float32)
                for i in range(15):
                    store.push("events", columns([(i, user, "a", float(i), None)]))
                    reader.read({"user_id": user, "shop": "a"}, out, now=HOUR)
                    assert out[0].tolist() == [i + 1, i]
            except BaseException as error:
                faults.append(error)

        def watcher() -> None:
            try:
                last = np.zeros(4)
                while not done.is_set():
                    found = reader.read({"user_id": [0, 1, 2, 3], "shop": ["a"] * 4}, now=HOUR)
                    seen = np.nan_to_num(found[:, 0])
                    assert (seen >= last).all()  # never back
                    assert ((found[:, 1] == seen - 1) | (seen == 0)).all()  # whole rows
                    last = seen
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=pusher, args=(user,)) for user in range(4)]
        watching = [threading.Thread(target=watcher) for _ in range(2)]
        for thread in [*threads, *watching]:
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        for thread in watching:
            thread.join()
        assert not faults
        foreign._looked_ns = 0  # another store of the log looks now
        assert foreign.read({"user_id": [0, 3], "shop": ["a", "a"]}, now=HOUR).tolist() == [[15.0], [15.0]]


def test_a_thread_that_prepares_late_does_not_take_the_cache_of_the_new_reading(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r", batch=some_events(5))
    with FeatureStore(repo) as store:
        old, _ = store._live.view("users"), store._live.view("pairs")
        write_batch(repo, some_events(6))
        assert store.refresh()
        reader = store.online_reader(["users:n"])
        before = reader.read({"user_id": [1]}, now=11 * HOUR)
        store._reader_caches.of(old)  # as a thread does that took its views before the refresh
        store.push("events", columns([(11 * HOUR, 1, "a", 1.0, "Rome")]))
        assert np.nan_to_num(before).tolist() == [[0]]
        assert reader.read({"user_id": [1]}, now=11 * HOUR).tolist() == [[1]]
