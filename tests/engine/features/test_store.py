"""The feature store: online equals offline to the bit, whatever was materialised, changed or asked."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_repo import (
    HOUR,
    MINUTE,
    assert_online_is_offline,
    make_repo,
    some_rows,
    write_events,
)

from penstock.clock import ManualClock
from penstock.errors import (
    FeatureNameCollisionError,
    InvalidArgumentError,
    NotFoundError,
)
from penstock.features.store import FeatureStore

moments = st.one_of(
    st.integers(0, 24).map(lambda n: n * 30 * MINUTE),
    st.builds(lambda n, d: n * 30 * MINUTE + d, st.integers(0, 24), st.sampled_from([-1, 1])),
    st.integers(0, 12 * HOUR),
)
events = st.lists(
    st.tuples(
        moments,
        st.one_of(st.integers(0, 3), st.none()),
        st.sampled_from(["a", "b"]),
        st.one_of(st.sampled_from([0.1, -0.0, 1e300, 7.0]), st.none(), st.floats(-9, 9)),
        st.sampled_from(["Rome", "Oslo", None]),
    ),
    min_size=1,
    max_size=40,
).filter(lambda rows: any(row[3] is not None for row in rows))


@settings(max_examples=30, deadline=None)
@given(
    events,
    st.lists(st.one_of(st.tuples(st.just("to"), moments), st.tuples(st.just("ask"), moments)), max_size=8),
    st.lists(st.tuples(st.one_of(st.integers(0, 4), st.none()), st.sampled_from(["a", "b", "z", None]))),
)
def test_online_equals_historical_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, steps: Any, asked: Any
) -> None:
    asked = asked or [(0, "a")]
    users, shops = [a[0] for a in asked], [a[1] for a in asked]
    with FeatureStore(make_repo(tmp_path_factory.mktemp("repo") / "r", rows)) as store:
        cursor = -(2**62)
        for step, moment in [*steps, ("ask", 12 * HOUR)]:
            if step == "ask":
                assert_online_is_offline(store, moment, users, shops)
                continue
            if moment < cursor:
                store.materialize(-HOUR, moment)
            else:
                store.materialize_incremental(moment)
            cursor = moment
            assert store.cursor("users") == moment
            assert_online_is_offline(store, moment, users, shops)


@settings(max_examples=15, deadline=None)
@given(events, events, moments, moments, st.booleans())
def test_a_source_that_changed_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, first: Any, second: Any, end: int, now: int, again: bool
) -> None:
    repo = make_repo(tmp_path_factory.mktemp("repo") / "r", first)
    users, shops = [0, 1, 2, 3, 4, None], ["a", "b", "a", "b", "a", "b"]
    with FeatureStore(repo) as store:
        store.materialize_incremental(end)
        assert not store.refresh()
        write_events(repo, second)
        assert store.refresh()
        assert store.cursor("users") is None
        assert_online_is_offline(store, now, users, shops)
        if again:
            store.materialize_incremental(end)
            assert_online_is_offline(store, now, users, shops)
        with FeatureStore(repo) as other:
            assert_online_is_offline(other, now, users, shops)


def _count_computed(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    computed = [0]
    for view in store.views:
        computer = store.computer(view)
        original = computer.rows_at

        def rows_at(keys: Any, *args: Any, original: Any = original, **more: Any) -> Any:
            computed[0] += len(keys)
            return original(keys, *args, **more)

        monkeypatch.setattr(computer, "rows_at", rows_at)
    return computed


def test_materialised_rows_are_read_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FeatureStore(make_repo(tmp_path / "r", some_rows())) as store:
        report = store.materialize(0, 5 * HOUR)
        assert report.rows["users"] == len(report.keys["users"]) == 20
        assert report.stamp == store.stamp()
        store.materialize_incremental(5 * HOUR)
        computed = _count_computed(store, monkeypatch)
        keys = store.computer("users").keys
        rows, meta = store.load_rows("users", keys, np.full(len(keys), 5 * HOUR))
        assert computed == [0]
        expected = store.computer("users").rows_at(keys, np.full(len(keys), 5 * HOUR))
        assert (rows == expected.words()).all()
        assert (meta == expected.meta).all()
        computed[0] = 0
        store.load_rows("users", keys, np.full(len(keys), HOUR))  # before the rows hold
        assert computed == [20]


def test_an_incremental_run_leaves_every_row_valid_and_writes_no_others(tmp_path: Path) -> None:
    with FeatureStore(make_repo(tmp_path / "r", some_rows(users=200))) as store:
        store.materialize_incremental(5 * HOUR)
        computer = store.computer("users")
        end = 5 * HOUR + 7 * MINUTE
        before = computer.rows_at(computer.keys, np.full(len(computer.keys), 5 * HOUR))
        report = store.materialize_incremental(end)
        after = computer.rows_at(computer.keys, np.full(len(computer.keys), end))
        written = {tuple(key) for key in report.keys["users"].tolist()}
        differ = (before.words() != after.words()).any(axis=1) | (before.meta[:, 1] <= end)
        needed = {tuple(key) for key in computer.keys[differ].tolist()}
        assert needed <= written
        assert 0 < len(written) < len(computer.keys)
        number = store._live.view("users").number
        for _, meta in store._online.scan(number):
            assert ((meta[:, 0] <= end) & (end < meta[:, 1])).all()


def test_an_incremental_run_writes_rows_that_ran_out_and_changed_rows_that_are_lost(tmp_path: Path) -> None:
    rows = [(HOUR, 1, "a", 1.0, None), (HOUR, 2, "a", 1.0, None), (3 * HOUR + 1, 3, "a", 1.0, None)]
    with FeatureStore(make_repo(tmp_path / "r", rows)) as store:
        store.materialize_incremental(3 * HOUR, views=["pairs"])
        number = store._live.view("pairs").number
        assert len(store.materialize_incremental(3 * HOUR, views=["pairs"]).keys["pairs"]) == 0
        keys, meta = next(store._online.scan(number))
        short = meta[:1].copy()
        short[:, 1] = 3 * HOUR + 1  # an interval may be shorter than the truth
        words = store.computer("pairs").rows_at(keys[:1], np.array([3 * HOUR])).words()
        store._online.put_many(number, keys[:1], words, short)
        changed = store.computer("pairs").changed_keys(3 * HOUR, 3 * HOUR + 1)
        store._online.delete_many(number, changed)
        report = store.materialize_incremental(3 * HOUR + 1, views=["pairs"])
        wanted = {tuple(key) for key in [*keys[:1].tolist(), *changed.tolist()]}
        assert {tuple(key) for key in report.keys["pairs"].tolist()} == wanted
        assert len(changed) == 1


def test_keys_that_left_the_source_leave_the_store(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    with FeatureStore(repo) as store:
        store.materialize_incremental(9 * HOUR)
        write_events(repo, [row for row in some_rows() if row[1] != 7])
        assert store.refresh()
        store.materialize_incremental(9 * HOUR)
        left = {int(lo) for keys, _ in store._online.scan(store._live.view("users").number) for lo, _ in keys}
        assert left == set(range(20)) - {7}
        assert store.get_online_features(["users:n"], {"user_id": 7}, now=9 * HOUR).statuses() == {"n": [2]}


def test_only_the_named_views_are_materialised(tmp_path: Path) -> None:
    with FeatureStore(make_repo(tmp_path / "r", some_rows())) as store:
        seen: list[tuple[str, int, int]] = []
        report = store.materialize_incremental(HOUR, views=["pairs"], progress=lambda *a: seen.append(a))
        assert list(report.rows) == ["pairs"]
        assert seen == [("pairs", report.rows["pairs"], report.rows["pairs"])]
        assert (store.cursor("users"), store.cursor("pairs")) == (None, HOUR)
        with pytest.raises(NotFoundError, match="view 'shops' is unknown; the views are pairs, users"):
            store.materialize_incremental(HOUR, views=["shops"])
        with pytest.raises(InvalidArgumentError, match="views is 'pairs'; expected a list"):
            store.materialize_incremental(HOUR, views="pairs")


def test_materialise_backwards(tmp_path: Path) -> None:
    with FeatureStore(make_repo(tmp_path / "r", some_rows())) as store:
        store.materialize_incremental(5 * HOUR)
        with pytest.raises(InvalidArgumentError, match=r"materialised up to 1970-01-01T05:00:00\+00:00"):
            store.materialize_incremental(4 * HOUR)
        with pytest.raises(InvalidArgumentError, match="after end"):
            store.materialize(5 * HOUR, 4 * HOUR)
        store.materialize(0, 4 * HOUR)
        assert store.cursor("users") == 4 * HOUR


@pytest.mark.parametrize(
    "time",
    [
        5 * HOUR,
        datetime(1970, 1, 1, 5),
        datetime(1970, 1, 1, 5, tzinfo=UTC),
        datetime(1970, 1, 1, 7, tzinfo=timezone(timedelta(hours=2))),
        "1970-01-01T05:00:00Z",
        "1970-01-01T05:00",
        "1970-01-01T00:00:00-05:00",
        pd.Timestamp("1970-01-01T05:00"),
    ],
)
def test_times_in_every_form(tmp_path: Path, time: Any) -> None:
    with FeatureStore(make_repo(tmp_path / "r", some_rows(20))) as store:
        store.materialize_incremental(time)
        assert store.cursor("users") == 5 * HOUR
        assert store.get_online_features(["users:n"], {"user_id": 1}, now=time).now_us == 5 * HOUR


@pytest.mark.parametrize("time", ["yesterday", 1.5, True, None, 2**63, -(2**63), pd.NaT, "2013-13-01"])
def test_a_time_that_is_none(tmp_path: Path, time: Any) -> None:
    with FeatureStore(make_repo(tmp_path / "r", some_rows(20))) as store:
        with pytest.raises(InvalidArgumentError, match=r"^end is "):
            store.materialize_incremental(time)
        if time is not None:
            with pytest.raises(InvalidArgumentError, match=r"^now is "):
                store.get_online_features(["users:n"], {"user_id": 1}, now=time)


def test_now_is_the_clocks_by_default(tmp_path: Path) -> None:
    clock = ManualClock(us=2 * HOUR)
    with FeatureStore(make_repo(tmp_path / "r", some_rows()), clock=clock) as store:
        assert store.get_online_features(["users:n"], {"user_id": 1}).now_us == 2 * HOUR


ROWS = [(HOUR, 1, "a", 2.0, "Rome"), (2 * HOUR, 2, "a", 3.5, None), (9 * HOUR, 3, "b", 1.0, "Oslo")]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[FeatureStore]:
    with FeatureStore(make_repo(tmp_path / "r", ROWS)) as store:
        yield store


def test_results_and_statuses(small: FeatureStore) -> None:
    refs = ["users:city", "users:n", "users:age", "users:rank"]
    now = 4 * HOUR + 1
    got = small.get_online_features(refs, {"user_id": [2, 1, 3, 99, None]}, now=now)
    assert got.to_dict() == {
        "user_id": [2, 1, 3, 99, None],
        "city": [None] * 5,
        "n": [0, None, None, None, None],
        "age": [pytest.approx(2 + 1 / HOUR), None, None, None, None],
        "rank": [2.5 / 3, None, None, None, None],
    }
    assert got.statuses() == {
        "city": [1, 3, 2, 2, 2], "n": [0, 3, 2, 2, 2], "age": [0, 3, 2, 2, 2], "rank": [0, 3, 2, 2, 2]
    }  # fmt: skip
    assert got.event_time[:, 0].tolist() == [2 * HOUR, HOUR, -(2**63), -(2**63), -(2**63)]
    on_time = small.get_online_features(refs, {"user_id": 1}, now=4 * HOUR)  # ttl: 3 h, both ends count
    assert on_time.to_dict()["city"] == ["Rome"]


def test_to_numpy_fills_the_callers_array(small: FeatureStore) -> None:
    got = small.get_online_features(["users:rank", "users:city"], {"user_id": [1, 99]}, now=HOUR)
    out = np.zeros((2, 2), np.float32)
    assert got.to_numpy(out) is out
    code = small.computer("users").dictionaries["city"].index("Rome")
    assert out[0].tolist() == [0.5, code]
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(got.to_numpy(), out)
    for wrong in (np.zeros((2, 3), np.float32), np.zeros((2, 2))):
        with pytest.raises(InvalidArgumentError, match=r"out is .*; expected float32\[2, 2\]"):
            got.to_numpy(wrong)


def test_entity_rows_in_every_form(small: FeatureStore) -> None:
    frame = pd.DataFrame({"user_id": [1, 2]})
    polars = pytest.importorskip("polars")
    forms = [
        [{"user_id": 1}, {"user_id": 2}],
        {"user_id": [1, 2]},
        {"user_id": np.array([1, 2])},
        frame,
        pa.Table.from_pandas(frame),
        polars.from_pandas(frame),
        pd.DataFrame({"user_id": [1.0, 2.0]}),
    ]
    for form in forms:
        assert small.get_online_features(["users:n"], form, now=2 * HOUR).to_dict()["n"] == [0, 1]


def test_a_service_with_request_inputs(small: FeatureStore) -> None:
    rows = [{"user_id": 1, "shop": "a", "value": 12}, {"user_id": 2, "shop": "b", "value": None}]
    got = small.get_online_features("model", rows, now=HOUR)
    assert list(got.to_dict()) == ["user_id", "shop", "n", "top", "value", "age"]
    assert got.to_dict()["value"] == [12.0, None]
    assert got.statuses()["value"] == [0, 1]
    assert got.plan.fingerprint == small.service_plan(small.services["model"]).fingerprint
    frame = pd.DataFrame({**pd.DataFrame(rows), "event_timestamp": pd.to_datetime([HOUR] * 2, unit="us")})
    joined = small.get_historical_features(frame, "model").to_df()
    assert joined["top"].tolist()[0] == 2.0
    listed = small.get_online_features(["cart:clicks", "users:n"], {"user_id": 1, "clicks": 3}, now=HOUR)
    assert listed.to_dict() == {"user_id": [1], "clicks": [3], "n": [1]}


def test_full_feature_names(small: FeatureStore) -> None:
    got = small.get_online_features(["users:n"], {"user_id": 1}, now=HOUR, full_feature_names=True)
    assert list(got.to_dict()) == ["user_id", "users__n"]
    assert small.service_plan(["users:n"]) is small.service_plan(["users:n"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"user": [1]}, "column 'user' is neither join key nor request input; expected user_id"),
        ({}, "entity_rows has no join key 'user_id'; its columns are none"),
        ({"user_id": ["x"]}, "join key 'user_id' has type string; expected int64"),
        ({"user_id": [1.0]}, "join key 'user_id' has type double; expected int64"),
        ({"user_id": [True]}, "join key 'user_id' has type bool; expected int64"),
        ({"user_id": [2**63]}, "column 'user_id'"),
        ({"user_id": [1, "x"]}, "column 'user_id'"),
        ({"user_id": [1], 3: [4]}, "column name is 3; expected a text"),
        ({"user_id": [[1]]}, "join key 'user_id' has type list"),
        ([], "entity_rows is empty"),
        ([7], r"entity_rows\[0\] is a int; expected a dict"),
        ([{"user_id": 1}, {"shop": 1}], r"entity_rows\[1\] has the columns \['shop'\]"),
        (7, "is a int; expected"),
        (pd.DataFrame({"user_id": [1.5]}), "join key 'user_id'"),
    ],
)
def test_wrong_entity_rows(small: FeatureStore, rows: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        small.get_online_features(["users:n"], rows, now=HOUR)


def test_columns_of_different_lengths(small: FeatureStore) -> None:
    with pytest.raises(InvalidArgumentError, match="column 'shop' has 1 rows; column 'user_id' has 2"):
        small.get_online_features(["pairs:seen"], {"user_id": [1, 2], "shop": ["a"]}, now=HOUR)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "has no request input 'value'"),
        ({"value": ["x"]}, "request input 'value' has type string; expected float64"),
        ({"value": [True]}, "request input 'value' has type bool; expected float64"),
    ],
)
def test_wrong_request_inputs(small: FeatureStore, inputs: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        small.get_online_features("model", {"user_id": [1], "shop": ["a"], **inputs}, now=HOUR)


def test_unknown_service_view_and_feature(small: FeatureStore) -> None:
    with pytest.raises(NotFoundError, match="service 'modle' is unknown; the services are model"):
        small.service_plan("modle")
    with pytest.raises(NotFoundError, match="no such view 'user'; did you mean 'users'"):
        small.service_plan(["user:n"])
    with pytest.raises(NotFoundError, match="no such feature 'm'"):
        small.get_online_features(["users:m"], {"user_id": 1})
    with pytest.raises(NotFoundError, match="view 'x' is unknown"):
        small.computer("x")
    with pytest.raises(InvalidArgumentError, match="features is 7"):
        small.service_plan(7)  # type: ignore[arg-type]
    with pytest.raises(FeatureNameCollisionError):
        small.service_plan(["users:n", "users:n"])


def test_a_feature_named_like_a_join_key(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", ROWS)
    (repo / "more.py").write_text(
        "from penstock import *\n"
        "shop = FeatureView('shops', [Entity('s', ['shop'])], ParquetSource('events.parquet', 'at'),\n"
        "                   {'user_id': col('user_id')})\n"
    )
    with FeatureStore(repo) as store:
        refs = ["users:n", "shops:user_id"]
        with pytest.raises(FeatureNameCollisionError, match="which is a join key"):
            store.get_online_features(refs, {"user_id": 1, "shop": "a"}, now=HOUR)
        got = store.get_online_features(refs, {"user_id": 1, "shop": "a"}, now=HOUR, full_feature_names=True)
        assert got.to_dict()["shops__user_id"] == [1]


def test_a_historical_job_runs_once_and_late(small: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"user_id": [1, 5], "event_timestamp": pd.to_datetime([HOUR] * 2, unit="us")})
    job = small.get_historical_features(frame, ["users:n"], full_feature_names=True)
    computed = _count_computed(small, monkeypatch)
    assert job.to_df()["users__n"].tolist() == [1, pd.NA]
    assert job.to_arrow() is job.to_arrow()
    assert computed == [2]


def test_a_snapshot_has_every_key_at_the_end_date(tmp_path: Path) -> None:
    end = datetime(1970, 1, 1, 5, tzinfo=UTC)
    clock = ManualClock(us=5 * HOUR)
    with FeatureStore(make_repo(tmp_path / "r", some_rows()), clock=clock) as store:
        refs = ["users:" + next(iter(store.views["users"].features))]
        calls: list[Any] = []
        job = store.get_historical_features(
            features=refs, end_date=end, with_age=True, progress=lambda *call: calls.append(call)
        )
        table = job.to_arrow()
        assert table.num_rows == len(set(table["user_id"].to_pylist())) > 10
        assert set(table["event_timestamp"].to_pylist()) == {end} and table.column_names[-1].endswith("__age")
        assert calls == [("users", table.num_rows, table.num_rows)]
        entities = table.select(["user_id", "event_timestamp"])
        assert store.get_historical_features(entities, refs, with_age=True).to_arrow().equals(table)
        assert store.get_historical_features(features=refs, with_age=True).to_arrow().equals(table)
        frame = job.to_polars()
        assert frame["user_id"].to_list() == table["user_id"].to_pylist()
        late = store.get_historical_features(
            features=refs, start_date=end - timedelta(minutes=9), end_date=end
        )
        assert 0 < late.to_arrow().num_rows < table.num_rows
        with pytest.raises(InvalidArgumentError, match="start_date and end_date are of a snapshot"):
            store.get_historical_features(entities, refs, end_date=end)
        with pytest.raises(InvalidArgumentError, match="after end_date"):
            store.get_historical_features(features=refs, start_date=5 * HOUR + 1, end_date=end)
        with pytest.raises(InvalidArgumentError, match="features is empty"):
            store.get_historical_features(entities)
