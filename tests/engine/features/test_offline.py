"""The historical join: the acceptance cases of feature stores, by name, and its errors."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import penstock as d
from penstock.errors import FeatureNameCollisionError, InvalidArgumentError
from penstock.features.compute import ViewComputer
from penstock.features.expressions import col, now
from penstock.features.offline import entity_table, historical_join, snapshot_entities, to_frame
from penstock.features.plan import compile_plan
from penstock.features.sources import read_source

SEED = bytes(range(16))
T = datetime(2024, 3, 1, 12, tzinfo=UTC)
HOUR, US = timedelta(hours=1), timedelta(microseconds=1)
UTC_US = pa.timestamp("us", "UTC")
REQUEST = d.RequestSource("tx", {"amount": "float32", "country": "string", "seen": "timestamp"})


class Repo:
    """Views over tables in memory, written to Parquet and read back as a store would."""

    def __init__(self, folder):
        self.folder, self.views, self.computers = folder, {}, {}

    def add(self, name, keys, data, features, ttl=None, created=None):
        table = data if isinstance(data, pa.Table) else pa.table(data)
        pq.write_table(table, self.folder / f"{name}.parquet")
        source = d.ParquetSource(f"{name}.parquet", "t", created=created)
        features = {f: col(f) for f in features} if isinstance(features, list) else features
        view = d.FeatureView(name, entities=[d.Entity("e", keys)], source=source, features=features, ttl=ttl)
        self.views[name] = view
        self.computers[name] = ViewComputer(view, read_source(source, self.folder), SEED)
        return self

    def plan(self, refs, request=None, full=False):
        return compile_plan("s", refs, self.views, self.computers, request, full_feature_names=full)

    def join(self, entity_df, refs, request=None, full=False, **more):
        plan = self.plan(refs, request, full)
        return historical_join(entity_table(entity_df), plan, self.computers, SEED, **more)


@pytest.fixture
def repo(tmp_path):
    return Repo(tmp_path)


def ask(users, times=None, **more):
    return pa.table({"u": users, "event_timestamp": [T] * len(users) if times is None else times, **more})


def test_a7_of_equal_times_the_newer_created_wins_and_a_newer_time_beats_a_newer_created(repo):
    data = {"u": [1, 1, 2, 2, 3, 3], "t": [T, T, T - HOUR, T, T, T],
            "c": [T + HOUR, T, T + HOUR, T, None, T - HOUR], "v": [10, 11, 20, 21, 30, 31]}  # fmt: skip
    repo.add("v", ["u"], data, ["v"], created="c")
    assert repo.join(ask([1, 2, 3]), ["v:v"])["v"].to_pylist() == [10, 21, 31]


def test_a13_created_cutoff(repo):
    data = {"u": [1, 1, 2, 3, 4], "t": [T - 2 * HOUR, T - HOUR, T - HOUR, T - HOUR, T - HOUR],
            "c": pa.array([T - 2 * HOUR, T + US, T + US, None, T], UTC_US), "v": [1, 2, 3, 4, 5]}  # fmt: skip
    repo.add("v", ["u"], data, ["v"], created="c")
    entities = ask([1, 2, 3, 4, 5])
    assert repo.join(entities, ["v:v"])["v"].to_pylist() == [2, 3, 4, 5, None]
    cut = repo.join(entities, ["v:v"], filter_by_created_timestamp=True, with_status=True)
    assert cut["v"].to_pylist() == [1, None, None, 5, None]
    assert cut["v__status"].to_pylist() == ["PRESENT", "FUTURE", "FUTURE", "PRESENT", "NOT_FOUND"]


def test_b1_ttl_edges_future_and_unknown_keys_keep_their_rows(repo):
    ttl = timedelta(days=1)
    data = {"u": [1, 2, 3, 4], "t": [T - ttl, T - ttl - US, T, T + HOUR], "v": [1, 2, 3, 4]}
    repo.add("v", ["u"], data, ["v"], ttl=ttl)
    got = repo.join(ask([1, 2, 3, 4, 5, 1]), ["v:v"], with_status=True)
    assert got["v"].to_pylist() == [1, None, 3, None, None, 1]
    assert got["v__status"].to_pylist() == [
        "PRESENT", "EXPIRED", "PRESENT", "FUTURE", "NOT_FOUND", "PRESENT"]  # fmt: skip


def test_b2_one_user_with_three_items_over_two_views(repo):
    repo.add("user", ["u"], {"u": [1], "t": [T], "v": [7]}, ["v"])
    repo.add("item", ["i"], {"i": ["a", "b", "c"], "t": [T] * 3, "w": [0.1, 0.2, 0.3]}, ["w"])
    got = repo.join(ask([1, 1, 1], i=["c", "a", "b"]), ["user:v", "item:w"])
    assert got["v"].to_pylist() == [7, 7, 7] and got["w"].to_pylist() == [0.3, 0.1, 0.2]


def test_b3_identical_entity_rows_are_kept(repo):
    repo.add("v", ["u"], {"u": [1], "t": [T], "v": [7]}, ["v"])
    got = repo.join(ask([1, 1, 1], label=["x", "y", "z"]), ["v:v"])
    assert got.column_names == ["u", "event_timestamp", "label", "v"]
    assert got["label"].to_pylist() == ["x", "y", "z"] and got["v"].to_pylist() == [7] * 3


def test_b4_input_order_is_kept_and_the_index_is_fresh(repo):
    data = {"u": [1] * 4, "t": [T + n * HOUR for n in range(4)], "v": [0, 1, 2, 3]}
    repo.add("v", ["u"], data, ["v"])
    times = [T + n * HOUR for n in (3, 2, 1, 0)]
    frame = pd.DataFrame({"u": [1] * 4, "event_timestamp": times}, index=[7, 5, 3, 1])
    got = to_frame(repo.join(frame, ["v:v"]))
    assert got["v"].tolist() == [3, 2, 1, 0] and got.index.tolist() == [0, 1, 2, 3]
    assert got["event_timestamp"].tolist() == times


def test_b5_composite_keys_do_not_run_together(repo):
    repo.add("n", ["a", "b"], {"a": [1, 12], "b": [23, 3], "t": [T] * 2, "v": [1, 2]}, ["v"])
    repo.add("s", ["c", "e"], {"c": ["a", "ab"], "e": ["bc", "c"], "t": [T] * 2, "w": [1, 2]}, ["w"])
    entities = pa.table(
        {"t": [T] * 3, "a": [12, 1, 123], "b": [3, 23, 3], "c": ["ab", "a", "abc"], "e": ["c", "bc", ""]}
    )
    got = repo.join(entities, ["n:v", "s:w"])
    assert got["v"].to_pylist() == [2, 1, None] and got["w"].to_pylist() == [2, 1, None]


@pytest.mark.parametrize("created", [None, "c"])
def test_b6_of_full_ties_the_last_source_row_wins(repo, created):
    data = {"u": [1] * 50, "t": [T] * 50, "c": [T] * 50, "v": list(range(50))}
    repo.add("v", ["u"], data, ["v"], created=created)
    for _ in range(20):
        assert repo.join(ask([1]), ["v:v"])["v"].to_pylist() == [49]


def test_b7_null_keys_match_nothing_and_a_row_without_a_time_gets_nulls(repo):
    repo.add("v", ["u"], {"u": [None, 1], "t": [T, T], "v": [5, 6]}, {"v": col("v"), "age": now() - col("t")})
    refs = ["v:v", "v:age"]
    frame = pd.DataFrame({"u": [None, 1, 1], "event_timestamp": pd.to_datetime([T, None, T])})
    got = repo.join(frame, refs, with_status=True)
    assert got["v"].to_pylist() == [None, None, 6]
    assert got["age"].to_pylist() == [None, None, timedelta(0)]
    assert got["v__status"].to_pylist() == ["NOT_FOUND", "NOT_FOUND", "PRESENT"]
    empty = repo.join(frame.iloc[:0], refs, with_status=True)
    assert empty.num_rows == 0 and empty.column_names == got.column_names
    assert to_frame(empty).columns.tolist() == got.column_names
    nothing = repo.join(ask(pa.nulls(1)), refs)
    assert nothing["v"].to_pylist() == [None]


def test_b8_times_of_any_zone_and_type_give_one_answer(repo):
    data = {"u": [1, 1, 1], "t": [T - 13 * HOUR, T, T + US], "v": [1, 2, 3]}
    repo.add("v", ["u"], data, ["v"])
    new_york = pa.array([T], pa.timestamp("ns", "America/New_York"))
    texts = (["2024-03-01T12:00:00Z"], ["2024-03-01 07:00:00-05:00"], ["2024-03-01 12:00:00"])
    for times in ([T], [T.replace(tzinfo=None)], new_york, *texts):
        got = repo.join(ask([1], times), ["v:v"])
        assert got["v"].to_pylist() == [2]
        assert got["event_timestamp"].to_pylist() == [T] and got["event_timestamp"].type == UTC_US
    assert repo.join(ask([1], [date(2024, 3, 1)]), ["v:v"])["v"].to_pylist() == [1]


def test_b9_a_feature_named_as_an_entity_column_is_an_error(repo):
    repo.add("v", ["u"], {"u": [1], "t": [T], "v": [5]}, ["v"])
    with pytest.raises(
        FeatureNameCollisionError, match="'v:v' would be named 'v', which is a column already"
    ):
        repo.join(ask([1], v=[0]), ["v:v"])
    with pytest.raises(FeatureNameCollisionError, match="'v__status'"):
        repo.join(ask([1], v__status=[0]), ["v:v"], with_status=True)
    got = repo.join(ask([1], v=[0]), ["v:v"], full=True)
    assert got["v"].to_pylist() == [0] and got["v__v"].to_pylist() == [5]


def test_b10_large_integers_stay_exact_beside_a_missing_row(repo):
    big = 2**53 + 1
    data = {
        "u": [1, big],
        "t": [T] * 2,
        "v": [big, -(2**63)],
        "b": [True, False],
        "f": pa.array([0.1, 2], pa.float32()),
    }
    repo.add("v", ["u"], data, ["v", "b", "f"])
    got = repo.join(ask([1, big, big - 1]), ["v:v", "v:b", "v:f"])
    assert got["v"].to_pylist() == [big, -(2**63), None] and got["v"].type == pa.int64()
    frame = to_frame(got)
    assert frame["v"].dtype == pd.Int64Dtype() and frame["v"][0] == big
    assert frame["b"].dtype == pd.BooleanDtype() and frame["b"].isna().tolist() == [False, False, True]
    assert frame["f"].dtype == np.float32 and np.isnan(frame["f"][2])
    assert frame["u"].dtype == np.int64 and frame["u"].tolist() == [1, big, big - 1]


def test_columns_follow_views_in_first_mention_order(repo):
    repo.add("a", ["u"], {"u": [1], "t": [T], "x": [1], "y": [2]}, ["x", "y"])
    repo.add("b", ["u"], {"u": [1], "t": [T], "z": [3]}, ["z"])
    got = repo.join(ask([1]), ["a:y", "b:z", "a:x"])
    assert got.column_names == ["u", "event_timestamp", "y", "x", "z"]
    assert [got[n].to_pylist() for n in "yxz"] == [[2], [1], [3]]


def test_dtypes_are_kept(repo):
    data = pa.table(
        {
            "u": [1],
            "t": [T],
            "f": pa.array([0.1], pa.float32()),
            "g": [0.1],
            "i": pa.array([3], pa.int16()),
            "b": [True],
            "s": ["red"],
            "d": pa.array([5], pa.duration("ms")),
        }
    )
    repo.add("v", ["u"], data, ["f", "g", "i", "b", "s", "d", "t"])
    got = repo.join(ask([1, 2]), [f"v:{name}" for name in "fgibsdt"])
    assert [str(got[n].type) for n in "fgibdt"] == [
        "float", "double", "int64", "bool", "duration[us]", "timestamp[us, tz=UTC]"]  # fmt: skip
    assert got["s"].to_pylist() == ["red", None] and pa.types.is_dictionary(got["s"].type)
    assert got["t"].to_pylist() == [T, None] and got["d"].to_pylist() == [timedelta(milliseconds=5), None]
    frame = to_frame(got)
    assert frame["s"].cat.categories.tolist() == ["red"] and str(frame["t"].dtype) == "datetime64[us, UTC]"


def test_a_null_cell_of_a_present_row_says_null(repo):
    repo.add("v", ["u"], {"u": [1], "t": [T], "x": pa.array([None], pa.int64()), "y": [1]}, ["x", "y"])
    got = repo.join(ask([1]), ["v:x", "v:y"], with_status=True)
    assert got["x__status"].to_pylist() == ["NULL"] and got["y__status"].to_pylist() == ["PRESENT"]


def test_windows_are_those_of_each_row(repo):
    data = {"u": [1, 1, 1], "t": [T - 2 * HOUR, T - HOUR, T], "x": [1.0, 2.0, 4.0]}
    repo.add("v", ["u"], data, {"n": d.count(window="2h"), "s": d.sum(col("x"), window="1d"),
                                "h": d.sum(col("x"), window="1d", every="1h")})  # fmt: skip
    got = repo.join(ask([1] * 3, [T, T + HOUR, T - US]), ["v:n", "v:s", "v:h"])
    assert got["n"].to_pylist() == [2, 1, 2]
    assert got["s"].to_pylist() == [7.0, 7.0, 3.0] and got["h"].to_pylist() == [7.0, 7.0, 3.0]


def test_request_inputs_are_read_from_the_entity_table(repo):
    repo.add("v", ["u"], {"u": [1], "t": [T], "x": [1]}, ["x"])
    refs = ["tx:amount", "v:x", "tx:country"]
    entities = ask([1, 1], amount=[3, None], country=["de", "fr"])
    got = repo.join(entities, refs, REQUEST)
    assert got.column_names == ["u", "event_timestamp", "amount", "country", "x"]
    full = repo.join(entities, refs, REQUEST, full=True, with_status=True)
    assert full["tx__amount"].to_pylist() == [3.0, None] and full["tx__amount"].type == pa.float32()
    assert full["tx__country"].to_pylist() == ["de", "fr"]
    assert full["tx__amount__status"].to_pylist() == ["PRESENT", "NULL"]
    assert full.column_names[4] == "v__x"
    with pytest.raises(InvalidArgumentError, match="no request input 'amount'; its columns are u, event"):
        repo.join(ask([1], country=["de"]), refs, REQUEST)
    with pytest.raises(
        InvalidArgumentError, match="request input 'amount' has type string; expected float32"
    ):
        repo.join(ask([1], amount=["3"], country=["de"]), refs, REQUEST)


def test_pandas_polars_and_arrow_frames_give_the_same(repo):
    repo.add("v", ["u"], {"u": ["a", "b"], "t": [T, T], "x": [1, 2]}, ["x"])
    arrow = ask(["b", "a", "zz"])
    frames = [arrow, arrow.to_pandas(), pl.from_arrow(arrow), arrow.to_batches()[0]]
    for frame in frames:
        assert repo.join(frame, ["v:x"])["x"].to_pylist() == [2, 1, None]


def test_the_only_time_column_is_the_time(repo):
    repo.add("v", ["u"], {"u": [1], "t": [T], "x": [1]}, ["x"])
    assert repo.join(pa.table({"u": [1], "when": [T]}), ["v:x"])["x"].to_pylist() == [1]
    with pytest.raises(InvalidArgumentError, match="no time column; expected a column 'event_timestamp'"):
        repo.join(pa.table({"u": [1]}), ["v:x"])
    with pytest.raises(InvalidArgumentError, match="the time columns when, then; expected"):
        repo.join(pa.table({"u": [1], "when": [T], "then": [T]}), ["v:x"])


def test_integer_keys_that_pandas_made_floats_still_match(repo):
    repo.add("v", ["u"], {"u": [1], "t": [T], "x": [1]}, ["x"])
    assert repo.join(ask([1.0, None]), ["v:x"])["x"].to_pylist() == [1, None]
    with pytest.raises(InvalidArgumentError, match="join key 'u' has type double"):
        repo.join(ask([1.5]), ["v:x"])


def test_a_missing_join_key_is_an_error_that_lists_the_columns(repo):
    repo.add("v", ["u"], {"u": [1], "t": [T], "x": [1]}, ["x"])
    with pytest.raises(InvalidArgumentError, match="no join key 'u'; its columns are user, event_timestamp"):
        repo.join(pa.table({"user": [1], "event_timestamp": [T]}), ["v:x"])


def test_a_string_key_against_an_integer_key_is_an_error(repo):
    repo.add("v", ["u"], {"u": [1], "t": [T], "x": [1]}, ["x"])
    repo.add("w", ["s"], {"s": ["1"], "t": [T], "y": [1]}, ["y"])
    with pytest.raises(
        InvalidArgumentError, match="join key 'u' has type string; the view's source has int64"
    ):
        repo.join(ask(["1"]), ["v:x"])
    with pytest.raises(
        InvalidArgumentError, match="join key 's' has type int64; the view's source has string"
    ):
        repo.join(ask([1], s=[1]), ["w:y"])


def test_an_entity_frame_of_another_kind_or_with_two_equal_names_is_an_error():
    with pytest.raises(InvalidArgumentError, match="entity_df is a list; expected"):
        entity_table([{"u": 1}])
    with pytest.raises(InvalidArgumentError, match="two columns named 'u'"):
        entity_table(pa.table([pa.array([1]), pa.array([2])], names=["u", "u"]))
    with pytest.raises(InvalidArgumentError, match="cannot be read as an Arrow table"):
        entity_table(pd.DataFrame({"u": [1, "a", object()]}))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(-50, 50), st.none() | st.integers(0, 9)), max_size=30),
    st.lists(
        st.tuples(st.none() | st.integers(1, 5), st.none() | st.integers(-60, 60)), min_size=1, max_size=12
    ),
    st.data(),
)
def test_n_rows_in_n_rows_out_each_as_if_it_were_alone(tmp_path_factory, events, asked, data):
    users, hours, values = zip(*events) if events else ((), (), ())
    table = pa.table({"u": pa.array(users, pa.int64()), "t": pa.array([T + h * HOUR for h in hours], UTC_US),
                      "x": pa.array(values, pa.int64())})  # fmt: skip
    features = {"x": col("x"), "n": d.count(window="7h"), "age": (now() - col("t")).hours()}
    repo = Repo(tmp_path_factory.mktemp("repo")).add("v", ["u"], table, features, ttl=timedelta(days=1))
    times = [h if h is None else T + h * HOUR for _, h in asked]
    entities = ask(
        pa.array([u for u, _ in asked], pa.int64()), pa.array(times, UTC_US), row=range(len(asked))
    )
    refs = ["v:x", "v:n", "v:age"]
    got = repo.join(entities, refs, with_status=True).to_pylist()
    assert [row["row"] for row in got] == list(range(len(asked)))
    at = data.draw(st.integers(0, len(asked) - 1))
    assert repo.join(entities.slice(at, 1), refs, with_status=True).to_pylist() == [got[at]]
    order = data.draw(st.permutations(range(len(asked))))
    assert repo.join(entities.take(order), refs, with_status=True).to_pylist() == [got[n] for n in order]


def test_with_age_gives_the_microseconds_since_the_event_behind_a_cell(repo):
    data = {"u": [1, 2, 3], "t": [T - HOUR, T - US, T + US], "v": [1.0, None, 3.0]}
    features = {"v": col("v"), "n": d.count(window="1d"), "since": now() - col("t")}
    repo.add("v", ["u"], data, features, ttl=timedelta(days=9))
    refs = ["v:v", "v:n", "v:since"]
    got = repo.join(ask([1, 2, 3, 4, None]), refs, with_age=True, with_status=True)
    assert got.column_names[2:5] == ["v", "v__status", "v__age"]
    assert got.schema.field("v__age").type == pa.int64()
    assert got["v__age"].to_pylist() == [3_600_000_000, None, None, None, None]
    assert got["n__age"].to_pylist() == got["since__age"].to_pylist() == [3_600_000_000, 1, None, None, None]
    with pytest.raises(FeatureNameCollisionError, match="v__age"):
        repo.join(ask([1], v__age=[0]), ["v:v"], with_age=True)


def test_request_inputs_have_no_age(repo):
    repo.add("v", ["u"], {"u": [1], "t": [T], "v": [7]}, ["v"])
    entities = ask([1], amount=pa.array([0.5], pa.float32()))
    got = repo.join(entities, ["v:v", "tx:amount"], REQUEST, full=True, with_age=True)
    assert got.column_names == ["u", "event_timestamp", "amount", "v__v", "v__v__age", "tx__amount"]


def test_progress_is_told_of_each_view_and_changes_nothing(repo, monkeypatch):
    monkeypatch.setattr("penstock.features.offline._PROGRESS_ROWS", 2)
    repo.add("a", ["u"], {"u": [1, 2, 3], "t": [T] * 3, "v": [1, 2, 3]}, ["v"])
    repo.add("b", ["u"], {"u": [3, 4], "t": [T] * 2, "w": [3.5, 4.5]}, ["w"])
    calls = []
    entities = ask([5, 4, 3, 2, 1])
    got = repo.join(entities, ["a:v", "b:w"], progress=lambda *call: calls.append(call))
    assert calls == [(view, done, 5) for view in "ab" for done in (2, 4, 5)]
    assert got.equals(repo.join(entities, ["a:v", "b:w"]))
    calls.clear()
    repo.join(entities.slice(0, 0), ["a:v"], progress=lambda *call: calls.append(call))
    assert calls == [("a", 0, 0)]


def snapshot(repo, refs, end, start=None, request=None):
    plan = repo.plan(refs, request)
    us = [None if t is None else round(t.timestamp() * 1e6) for t in (start, end)]
    return snapshot_entities(plan, repo.computers, us[0], us[1])


def test_a9_a_snapshot_has_every_key_once_at_the_end_date(repo):
    data = {"u": [3, 1, 1, 2, None], "t": [T - HOUR, T - 2 * HOUR, T, T + US, T], "v": [3, 1, 11, 2, 0]}
    repo.add("a", ["u"], data, ["v"])
    repo.add("b", ["u"], {"u": [9, 3], "t": [T, T], "w": [9.5, 3.5]}, ["w"])
    table = snapshot(repo, ["a:v", "b:w"], T)
    assert table["u"].to_pylist() == [1, 3, 9] and table["event_timestamp"].to_pylist() == [T] * 3
    got = repo.join(table, ["a:v", "b:w"])
    assert got["v"].to_pylist() == [11, 3, None] and got["w"].to_pylist() == [None, 3.5, 9.5]
    assert snapshot(repo, ["a:v"], T, start=T)["u"].to_pylist() == [1]
    assert snapshot(repo, ["a:v"], T - 3 * HOUR)["u"].to_pylist() == []
    with pytest.raises(InvalidArgumentError, match=r"start_date is .* after end_date"):
        snapshot(repo, ["a:v"], T, start=T + US)


def test_a_snapshot_reaches_back_to_the_longest_ttl(repo):
    data = {"u": [1, 2, 3], "t": [T - 3 * HOUR, T - HOUR - US, T - HOUR], "v": [1, 2, 3]}
    repo.add("short", ["u"], data, ["v"], ttl=HOUR)
    repo.add("long", ["u"], data | {"w": data["v"]}, ["w"], ttl=2 * HOUR)
    assert snapshot(repo, ["short:v"], T)["u"].to_pylist() == [3]
    assert snapshot(repo, ["short:v", "long:w"], T)["u"].to_pylist() == [2, 3]


def test_a_snapshot_of_composite_and_text_keys_and_of_appended_ones(repo):
    data = {"s": ["b", "a", "b"], "i": [1, 1, 2], "t": [T] * 3, "v": [1, 2, 3]}
    repo.add("v", ["s", "i"], data, ["v"])
    more = pa.table({"s": ["c", "b", None], "i": [1, 2, 1], "t": pa.array([T] * 3, UTC_US), "v": [4, 5, 6]})
    pq.write_table(more, repo.folder / "more.parquet")
    table = read_source(d.ParquetSource("more.parquet", "t"), repo.folder)
    assert len(repo.computers["v"].append(table)) == 2
    table = snapshot(repo, ["v:v"], T)
    assert table.select(["s", "i"]).to_pylist() == [
        {"s": "a", "i": 1}, {"s": "b", "i": 1}, {"s": "b", "i": 2}, {"s": "c", "i": 1}]  # fmt: skip
    assert repo.join(table, ["v:v"])["v"].to_pylist() == [2, 1, 5, 4]


def test_a_snapshot_that_keys_alone_cannot_answer_is_an_error(repo):
    repo.add("u", ["u"], {"u": [1], "t": [T], "v": [1]}, ["v"])
    repo.add("i", ["i"], {"i": [1], "t": [T], "w": [1]}, ["w"])
    with pytest.raises(InvalidArgumentError, match="view 'u' has the join keys u, of u, i"):
        snapshot(repo, ["u:v", "i:w"], T)
    with pytest.raises(InvalidArgumentError, match="read the request inputs amount"):
        snapshot(repo, ["u:v", "tx:amount"], T, request=REQUEST)
