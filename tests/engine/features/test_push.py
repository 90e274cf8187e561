"""Pushes: what was acknowledged is served and durable, whatever fails; a refused one changes nothing."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from push_repo import (
    HOUR,
    MINUTE,
    SCHEMA,
    SHOPS,
    USERS,
    VERSIONED,
    agree,
    columns,
    make_push_repo,
    online,
    some_events,
    write_batch,
)

from penstock import ParquetSource, PushSource
from penstock.clock import ManualClock
from penstock.errors import (
    DefinitionError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    StoreError,
)
from penstock.features.online import OnlineStore
from penstock.features.store import FeatureStore

moments = st.one_of(st.integers(0, 24).map(lambda n: n * 30 * MINUTE), st.integers(0, 12 * HOUR))
event = st.tuples(
    moments,
    st.integers(0, 3),
    st.sampled_from(["a", "b"]),
    st.one_of(st.sampled_from([0.1, -0.0, 1e300]), st.none(), st.floats(-9, 9)),
    st.sampled_from(["Rome", "Oslo", "Ulm", None]),
)
versioned = st.tuples(event, st.integers(0, 5), st.booleans(), st.one_of(st.none(), moments)).map(
    lambda made: (*made[0], *made[1:])
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.lists(event, min_size=1, max_size=6)),
            st.tuples(st.just("to"), moments),
            st.tuples(st.just("ask"), moments),
            st.tuples(st.just("open"), st.none()),
            st.tuples(st.just("compact"), st.none()),
        ),
        max_size=10,
    ),
    st.lists(event, max_size=6),
    st.integers(12 * HOUR, 13 * HOUR),  # what arrives then is known later than any row of the file
)
def test_online_is_the_historical_join_of_everything_pushed(
    tmp_path_factory: pytest.TempPathFactory, steps: Any, batch: Any, clock_us: int
) -> None:
    folder = tmp_path_factory.mktemp("push")
    repo = make_push_repo(folder / "r", batch=batch)
    whole = list(batch)
    clock = ManualClock(us=clock_us)
    store = FeatureStore(repo, clock=clock)
    try:
        for step, given_ in [*steps, ("ask", 11 * HOUR), ("open", None), ("ask", 12 * HOUR)]:
            if step == "push":
                assert store.push("events", columns(given_)) == len(given_)
                whole += given_
            elif step == "to":
                store.materialize(-HOUR, given_)
            elif step == "compact":
                store._pushes.compact("events")
            elif step == "open":
                store.close()
                store = FeatureStore(repo, clock=clock)
            else:
                agree(store, given_)
        # The same as if all had been in the file, in that order.
        other = make_push_repo(folder / "o", batch=whole)
        with FeatureStore(other, clock=clock) as plain:
            for now in (clock_us, 12 * HOUR):
                assert online(store, now, USERS, SHOPS) == online(plain, now, USERS, SHOPS)
    finally:
        store.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(versioned, min_size=1, max_size=20), st.randoms(use_true_random=False), st.integers(1, 20))
def test_late_repeated_and_corrected_events_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, random: Any, split: int
) -> None:
    """Versions with distinct known-at times give one answer in every order of arrival."""
    folder = tmp_path_factory.mktemp("versions")
    rows = [(*row[:7], i * MINUTE) for i, row in enumerate(rows)]  # event i became known at minute i
    rows = [(i * 7 * MINUTE, *row[1:]) for i, row in enumerate(rows)]  # and has a time of its own
    newest: dict[Any, Any] = {}
    for row in rows:  # the slow meaning: the last known version of (key, id), unless deleted
        for view in ("users", "pairs"):
            key = row[1] if view == "users" else (row[1], row[2])
            newest[view, key, row[5]] = row
    answers = []
    for shuffle in (False, True):
        order = [*rows, *rows[: len(rows) // 2]]  # some are repeated
        if shuffle:
            random.shuffle(order)
        with FeatureStore(make_push_repo(folder / str(shuffle), versioned=True)) as store:
            for at in range(0, len(order), split):
                store.push("events", columns(order[at : at + split], VERSIONED))
            agree(store, 12 * HOUR)
            answers.append(online(store, 12 * HOUR, USERS, SHOPS))
            got = store.get_online_features(
                ["users:n", "pairs:seen"], {"user_id": USERS, "shop": SHOPS}, now=12 * HOUR
            ).to_dict()
            for user, shop, seen in zip(USERS, SHOPS, got["seen"]):
                alive = [
                    r for (v, k, _), r in newest.items() if (v, k) == ("pairs", (user, shop)) and not r[6]
                ]
                assert (seen or 0) == len(alive)
    assert answers[0] == answers[1]


def test_a_push_is_seen_before_it_is_durable_and_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = make_push_repo(tmp_path / "r")
    with FeatureStore(repo) as store:
        store.push("events", columns([(HOUR, 1, "a", 1.0, "Rome")]))
        store.materialize_incremental(2 * HOUR)  # its rows are what the next push outdates
        change, held, reached = OnlineStore.change, threading.Event(), threading.Event()

        def slow(self: OnlineStore, work: Any) -> Any:
            reached.set()
            assert held.wait(60)
            return change(self, work)

        monkeypatch.setattr(OnlineStore, "change", slow)
        done: list[int] = []
        thread = threading.Thread(
            target=lambda: done.append(store.push("events", columns([(2 * HOUR, 1, "a", 5.0, "Oslo")])))
        )
        thread.start()
        assert reached.wait(60)
        got = store.get_online_features(
            ["users:city", "pairs:last"], {"user_id": 1, "shop": "a"}, now=2 * HOUR
        )
        assert got.to_dict()["city"] == ["Oslo"]
        assert got.to_dict()["last"] == [5.0]
        assert not done  # not acknowledged yet
        held.set()
        thread.join(60)
        assert done == [1]
        monkeypatch.undo()
        agree(store, 2 * HOUR)
        header = store._online.header(store._live.view("users").number)
        assert header is not None
        assert header.sequence == 2
    with FeatureStore(repo) as store:
        _, _, found = store._online.get_many(
            store._live.view("pairs").number, store._live.view("pairs").tag,
            store.computer("pairs").keys, store._live.view("pairs").row_words, 2,
        )  # fmt: skip
        assert found.all()  # the push had written the row itself
        agree(store, 2 * HOUR)


def test_a_full_disk_takes_the_events_out_of_the_reads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r")) as store:
        store.push("events", columns([(HOUR, 1, "a", 1.0, "Rome")]))
        told: list[Any] = []
        store.on_push(told.append)

        def full(self: OnlineStore, work: Any) -> Any:
            raise StoreError("online store cannot be written: No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(OnlineStore, "change", full)
            with pytest.raises(StoreError, match="No space left"):
                store.push("events", columns([(2 * HOUR, 1, "a", 9.0, "Oslo")]))
        got = store.get_online_features(["pairs:last"], {"user_id": 1, "shop": "a"}, now=3 * HOUR)
        assert got.to_dict()["last"] == [1.0]
        assert sorted(told[-1]) == ["pairs", "users"]  # the caches are told of the rows as they were
        assert store.push("events", columns([(2 * HOUR, 1, "a", 3.0, "Oslo")])) == 1
        got = store.get_online_features(["pairs:last"], {"user_id": 1, "shop": "a"}, now=3 * HOUR)
        assert got.to_dict()["last"] == [3.0]
        assert store._log.stats("events")["head"] == 2


def test_concurrent_pushes_share_transactions_and_lose_nothing(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r")
    threads, each = 6, 12
    with FeatureStore(repo) as store:
        store.push("events", columns([(0, 99, "a", 1.0, "Rome")]))
        store.materialize_incremental(HOUR)
        commits = [0]
        change = store._online.change

        def counting(work: Any) -> Any:
            commits[0] += 1
            return change(work)

        store._online.change = counting  # type: ignore[method-assign]
        faults: list[BaseException] = []
        stop = threading.Event()

        def pusher(user: int) -> None:
            try:
                for i in range(each):
                    store.push("events", columns([(i * MINUTE, user, "a", float(i), "Oslo")]))
                    got = store.get_online_features(
                        ["pairs:seen", "pairs:last"], {"user_id": user, "shop": "a"}, now=HOUR
                    ).to_dict()
                    assert (got["seen"], got["last"]) == ([i + 1], [float(i)])  # what it has pushed itself
            except BaseException as error:
                faults.append(error)

        def reader() -> None:
            try:
                while not stop.is_set():
                    got = store.get_online_features(
                        ["pairs:seen", "pairs:last"], {"user_id": USERS, "shop": ["a"] * 6}, now=HOUR
                    ).to_dict()
                    for seen, last in zip(got["seen"], got["last"]):
                        assert last is None if not seen else last == seen - 1  # one row, not two halves
            except BaseException as error:
                faults.append(error)

        running = [threading.Thread(target=pusher, args=(user,)) for user in range(threads)]
        watching = threading.Thread(target=reader)
        for thread in [*running, watching]:
            thread.start()
        for thread in running:
            thread.join()
        stop.set()
        watching.join()
        assert not faults
        assert commits[0] <= threads * each
    with FeatureStore(repo) as store:
        got = store.get_online_features(["pairs:seen"], {"user_id": USERS, "shop": ["a"] * 6}, now=HOUR)
        assert got.to_dict()["seen"] == [each] * threads


def test_too_many_pushes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r", config="push: {queue: 2}\n")) as store:
        store.push("events", columns([(0, 1, "a", 1.0, "Rome")]))
        change, held, reached = OnlineStore.change, threading.Event(), threading.Event()

        def slow(self: OnlineStore, work: Any) -> Any:
            reached.set()
            assert held.wait(60)
            return change(self, work)

        monkeypatch.setattr(OnlineStore, "change", slow)
        entries = [store._pushes.begin("events", columns([(1, 1, "a", 1.0, "Rome")]))]
        assert reached.wait(60)
        entries += [store._pushes.begin("events", columns([(i, 1, "a", 1.0, "Rome")])) for i in (2, 3)]
        with pytest.raises(ResourceExhaustedError, match="2 pushes wait") as refused:
            store.push("events", columns([(4, 1, "a", 7.0, "Rome")]))
        assert refused.value.retry_after_ms
        held.set()
        assert [store._pushes.wait(entry) for entry in entries] == [1, 1, 1]
        got = store.get_online_features(["pairs:last", "pairs:seen"], {"user_id": 1, "shop": "a"}, now=HOUR)
        assert got.to_dict()["seen"] == [4]
        assert got.to_dict()["last"] == [1.0]


GOOD = columns([(HOUR, 1, "a", 1.0, "Rome"), (HOUR, 2, "b", 2.0, None)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": [1, None]}, "column 'user_id' is null in row 1; expected int64"),
        ({"at": [None, HOUR]}, "column 'at' is null in row 0; expected timestamp"),
        ({"shop": None}, "column 'shop' has 1 rows; column 'at' has 2"),
        ({"user_id": [1.5, 2.0]}, "column 'user_id' has type double; expected int64"),
        ({"user_id": [1, 2**63]}, "column 'user_id'"),
        ({"user_id": [True, False]}, "column 'user_id' has type bool; expected int64"),
        ({"user_id": ["1", "2"]}, "column 'user_id' has type string; expected int64"),
        ({"shop": [1, 2]}, "column 'shop' has type int64; expected string"),
        ({"x": ["1", "2"]}, "column 'x' has type string; expected a number"),
        ({"x": [2**53 + 1, 0]}, "column 'x' has the integer 9007199254740993"),
        ({"at": ["soon", "later"]}, "column 'at'"),
        ({"at": [1.5, 2.5]}, "column 'at' has type double; expected a time"),
        ({"at": [-(2**63), 0]}, "column 'at' has -9223372036854775808"),
        ({"city": [b"x", b"y"]}, "column 'city' has type binary; expected string"),
        ({"cty": ["x", "y"]}, "column 'cty' is unknown; did you mean 'city'?"),
        ({"x": [1.0]}, "column 'x' has 1 rows; column 'at' has 2"),
        ({"x": [1.0, "a"]}, "column 'x'"),
        ({3: [1, 2]}, "column name is 3; expected a text"),
    ],
)
def test_a_wrong_push_names_what_is_wrong_and_changes_nothing(
    tmp_path: Path, change: Any, message: str
) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r")) as store:
        store.push("events", GOOD)
        before = online(store, 2 * HOUR, USERS, SHOPS)
        registry, stamp = store._registry.version, store.stamp()
        with pytest.raises(InvalidArgumentError, match="push to 'events'") as refused:
            store.push("events", {**GOOD, **change})
        assert message in str(refused.value)
        assert online(store, 2 * HOUR, USERS, SHOPS) == before
        assert (store._registry.version, store.stamp()) == (registry, stamp)


def test_other_wrong_input(tmp_path: Path) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r")) as store:
        with pytest.raises(NotFoundError, match="'evnts' is unknown; the push sources are events"):
            store.push("evnts", GOOD)
        without = {name: values for name, values in GOOD.items() if name != "x"}
        for rows, message in (
            (without, "column 'x' is missing; expected float64"),
            ([], "rows is an empty list"),
            ([1], r"rows\[0\] is a int; expected a dict"),
            ([{"at": 1}, {"x": 2}], r"rows\[1\] has the columns \['x'\]"),
            (7, "rows is a int; expected a dict of columns"),
            (pa.table([pa.array([1]), pa.array([1])], ["at", "at"]), "column 'at' is given twice"),
            (pd.DataFrame([[1, 2]], columns=["at", "at"]), "column 'at' is given twice"),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                store.push("events", rows)
        assert store._log.head("events") == 0
        assert store.push("events", {name: [] for name in SCHEMA}) == 0
    with pytest.raises(FailedPreconditionError, match="closed"):
        store.push("events", GOOD)


def test_every_form_of_rows_gives_the_same_events(tmp_path: Path) -> None:
    table = pa.table(
        {
            "at": pa.array([HOUR, HOUR], pa.timestamp("us", "UTC")),
            "user_id": pa.array([1, 2], pa.int32()),
            "shop": pa.array(["a", "b"]).dictionary_encode(),
            "x": pa.array([1.0, 2.0], pa.float32()),
            "city": pa.array(["Rome", None]),
        }
    )
    dicts = [{name: values[i] for name, values in GOOD.items()} for i in range(2)]
    texts = {**GOOD, "at": ["1970-01-01T01:00:00Z", "1970-01-01T03:00:00+02:00"]}
    times = {**GOOD, "at": [datetime(1970, 1, 1, 1, tzinfo=UTC)] * 2}
    arrays = {**GOOD, "user_id": np.array([1, 2]), "x": np.array([1, 2], np.float32)}
    answers = []
    for i, rows in enumerate(
        (
            GOOD,
            dicts,
            table,
            table.to_pandas(),
            pl.from_arrow(table),
            texts,
            times,
            arrays,
            table.to_batches()[0],
        )
    ):
        with FeatureStore(make_push_repo(tmp_path / str(i))) as store:
            assert store.push("events", rows) == 2
            answers.append(online(store, HOUR, USERS, SHOPS))
    assert all(answer == answers[0] for answer in answers)


def test_a_late_event_behind_the_cursor_is_online_at_once(tmp_path: Path) -> None:
    """B16; also where another process pushed it, which knows nothing of the view's rows."""
    repo = make_push_repo(tmp_path / "r")
    with FeatureStore(repo) as store:
        store.push("events", columns([(5 * HOUR, 1, "a", 1.0, "Rome")]))
        store.materialize_incremental(6 * HOUR)
        store.push("events", columns([(4 * HOUR, 2, "a", 2.0, "Oslo")]))
        agree(store, 6 * HOUR)
        number = store._live.view("users").number
        late = store.computer("users").keys
        live = store._live.view("users")
        assert store._online.get_many(number, live.tag, late, live.row_words, 2)[2].all()
        # A header that is behind the log: no row counts, and one incremental run writes what it lacks.
        header = store._online.header(number)
        assert header is not None
        store._online.delete_many(number, late[1:])
        store._online.put_header(number, type(header)(header.tag, header.row_words, header.cursor_us, 1))
        assert not store._online.get_many(number, live.tag, late, live.row_words, 2)[2].any()
        agree(store, 6 * HOUR)
        report = store.materialize_incremental(6 * HOUR, views=["users"])
        assert report.keys["users"].tolist() == late[1:].tolist()
        assert store._online.get_many(number, live.tag, late, live.row_words, 2)[2].all()


def test_two_stores_on_one_log(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r")
    with FeatureStore(repo) as one, FeatureStore(repo) as two:
        for i in range(6):
            store = (one, two)[i % 2]
            store.push("events", columns([(i * MINUTE, i, "a", float(i), f"city {i}")]))
            for reader in (one, two):
                got = reader.get_online_features(
                    ["users:city"], {"user_id": list(range(i + 2))}, now=HOUR
                ).to_dict()
                assert got["city"] == [f"city {n}" for n in range(i + 1)] + [None]
        assert one._log.stats("events")["batches"] == 6
        # Both at once: sequence numbers are given once.
        faults: list[BaseException] = []

        def pusher(store: FeatureStore, user: int) -> None:
            try:
                for i in range(8):
                    store.push("events", columns([(i * MINUTE, user, "b", float(i), "Rome")]))
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=pusher, args=at) for at in ((one, 50), (two, 51))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults
        for reader in (one, two):
            got = reader.get_online_features(
                ["pairs:seen"], {"user_id": [50, 51], "shop": ["b", "b"]}, now=HOUR
            )
            assert got.to_dict()["seen"] == [8, 8]


def test_apply_refresh_and_materialize_beside_pushes(tmp_path: Path) -> None:
    batch = some_events(40, users=4)
    repo = make_push_repo(tmp_path / "r", batch=batch)
    with FeatureStore(repo) as store:
        pushed, faults, done = [], [], threading.Event()

        def pusher() -> None:
            try:
                for row in some_events(60, users=4, seed=8):
                    store.push("events", columns([row]))
                    pushed.append(row)
            except BaseException as error:
                faults.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=pusher)
        thread.start()
        i = 0
        while not done.is_set() or i < 4:
            i += 1
            batch = batch + some_events(3, users=4, seed=100 + i)
            write_batch(repo, batch)
            (store.apply, store.refresh, lambda: store.materialize(0, 10 * HOUR))[i % 3]()
        thread.join()
        assert not faults
        store.refresh()
        store.materialize_incremental(10 * HOUR)
        agree(store, 10 * HOUR)
        header = store._online.header(store._live.view("users").number)
        assert header is not None
        assert header.sequence == 60
        found = online(store, 10 * HOUR, USERS, SHOPS)
    with FeatureStore(make_push_repo(tmp_path / "o", batch=batch + pushed)) as plain:
        assert online(plain, 10 * HOUR, USERS, SHOPS) == found


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"name": "a b"}, "name is 'a b'"),
        ({"schema": {}}, "schema is {}"),
        ({"schema": {"at": "time"}}, "column 'at' has dtype 'time'"),
        ({"timestamp": "when"}, "timestamp is 'when'; expected a column of dtype timestamp"),
        ({"created": "x"}, "created is 'x'; expected a column of dtype timestamp"),
        ({"event_id": "x"}, "event_id is 'x'; expected a column of dtype int64 or string"),
        ({"deleted": "x", "event_id": "user_id"}, "deleted is 'x'; expected a column of dtype bool"),
        ({"schema": {**SCHEMA, "gone": "bool"}, "deleted": "gone"}, "deleted is 'gone' without event_id"),
        ({"created": "at"}, "name a column twice"),
        ({"batch": "events.parquet"}, "expected a ParquetSource or None"),
        ({"batch": ParquetSource("e.parquet", timestamp="t")}, "batch has the timestamp 't'; expected 'at'"),
    ],
)
def test_a_wrong_push_source_is_refused(given_: Any, message: str) -> None:
    with pytest.raises(DefinitionError) as refused:
        PushSource(**{"name": "events", "schema": SCHEMA, "timestamp": "at", **given_})
    assert message in str(refused.value)


def test_a_schema_that_does_not_fit_the_files_or_the_views(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r", batch=some_events(3))
    write_batch(repo, [(1, 2, "a", "text", None)], {**SCHEMA, "x": "string"})
    with (
        FeatureStore(repo) as store,
        pytest.raises(InvalidArgumentError, match=r"'x' of 'events\.parquet' has dtype"),
    ):
        store.push("events", GOOD)
    text = (repo / "features.py").read_text()
    again = (
        'again = PushSource("events", {"at": "timestamp"}, "at")\n'
        'other = FeatureView("other", entities=[user], source=again, features={"n": count(window="1h")})\n'
    )
    (repo / "features.py").write_text(text + again)
    with pytest.raises(DefinitionError, match="another definition than the source of that name"):
        FeatureStore(repo)


def test_events_of_an_earlier_schema(tmp_path: Path) -> None:
    repo = make_push_repo(tmp_path / "r")
    with FeatureStore(repo) as store:
        store.push("events", GOOD)
        store._pushes.compact("events")
        store.push("events", GOOD)
    text = (repo / "features.py").read_text()
    grown = text.replace("{'at'", "{'extra': 'float64', 'at'").replace(
        '"last": col("x")', '"last": col("extra")'
    )
    (repo / "features.py").write_text(grown)
    with FeatureStore(repo) as store:
        got = store.get_online_features(["pairs:last", "pairs:seen"], {"user_id": 1, "shop": "a"}, now=HOUR)
        assert (got.to_dict()["last"], got.to_dict()["seen"]) == ([None], [2])
        store.push("events", {**GOOD, "extra": [4.0, 5.0]})
        got = store.get_online_features(["pairs:last"], {"user_id": 1, "shop": "a"}, now=HOUR)
        assert got.to_dict()["last"] == [4.0]
    (repo / "features.py").write_text(text.replace("'x': 'float64'", "'x': 'int64'"))
    with FeatureStore(repo) as store, pytest.raises(InvalidArgumentError, match="pushed events have double"):
        store.push("events", {**GOOD, "x": [1, 2]})


@pytest.mark.parametrize(
    "setting", ["push: 3", "push: {que: 1}", "push: {queue: 0}", "push: {queue: true}", "push: {queue: 1.5}"]
)
def test_wrong_settings(tmp_path: Path, setting: str) -> None:
    with pytest.raises(Exception, match=r"feature_store\.yaml:2: .*push"):
        FeatureStore(make_push_repo(tmp_path / "r", config=setting + "\n"))
