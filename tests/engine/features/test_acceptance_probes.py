"""The acceptance cases of the historical join that probing other feature stores has added: B1 to B11.

Each is a way in which some engine loses, multiplies, mixes up or rounds rows today.
"""

from __future__ import annotations

from datetime import date
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from acceptance import DAY, HOUR, US, UTC_US, T, World, ask

import penstock as d
from penstock.errors import FeatureNameCollisionError
from penstock.features.expressions import col, now

FULL = pytest.mark.parametrize("full", [False, True])


def test_b01_ttl_edges_future_rows_and_unknown_keys_keep_their_rows(world: World) -> None:
    data = {"u": [1, 2, 3, 4], "t": [T - DAY, T - DAY - US, T, T + HOUR], "v": [1, 2, 3, 4]}
    store = world.open(world.view("v", data, ["v"], ttl=DAY))
    got = store.get_historical_features(ask([1, 2, 3, 4, 5, 1]), ["v:v"], with_status=True).to_arrow()
    assert got["u"].to_pylist() == [1, 2, 3, 4, 5, 1]
    assert got["v"].to_pylist() == [1, None, 3, None, None, 1]
    assert got["v__status"].to_pylist() == [
        "PRESENT", "EXPIRED", "PRESENT", "FUTURE", "NOT_FOUND", "PRESENT"]  # fmt: skip


@FULL
def test_b02_one_user_and_three_items_at_one_time(world: World, full: bool) -> None:
    items = d.Entity("item", ["i"])
    store = world.open(
        world.view("user", {"u": [1, 2], "t": [T] * 2, "v": [7, 8]}, ["v"]),
        world.view("item", {"i": ["a", "b", "c"], "t": [T] * 3, "w": [1, 2, 3]}, ["w"], entities=[items]),
    )
    asked = ask([1, 1, 1, 2], i=["c", "a", "b", "a"])
    got = store.get_historical_features(asked, ["user:v", "item:w"], full).to_arrow()
    v, w = ("user__v", "item__w") if full else ("v", "w")
    assert got[v].to_pylist() == [7, 7, 7, 8] and got[w].to_pylist() == [3, 1, 2, 1]


def test_b03_identical_entity_rows_with_different_labels(world: World) -> None:
    store = world.open(world.view("v", {"u": [1], "t": [T], "v": [7]}, ["v"]))
    got = store.get_historical_features(ask([1, 1, 1], label=["x", "y", "z"]), ["v:v"]).to_arrow()
    assert got["label"].to_pylist() == ["x", "y", "z"] and got["v"].to_pylist() == [7] * 3


def test_b04_the_input_order_is_kept_and_the_index_fresh(world: World) -> None:
    data = {"u": [1] * 4, "t": [T + n * HOUR for n in range(4)], "v": [0, 1, 2, 3]}
    store = world.open(world.view("v", data, ["v"]))
    at = [T + n * HOUR for n in (3, 2, 1, 0)]
    frame = pd.DataFrame({"u": [1] * 4, "event_timestamp": at}, index=[7, 5, 3, 1])
    got = store.get_historical_features(frame, ["v:v"]).to_df()
    assert got["v"].tolist() == [3, 2, 1, 0] and got["event_timestamp"].tolist() == at
    assert got.index.tolist() == [0, 1, 2, 3]


def test_b05_composite_keys_do_not_run_together(world: World) -> None:
    numbers, texts = d.Entity("n", ["a", "b"]), d.Entity("s", ["c", "e"])
    store = world.open(
        world.view("n", {"a": [1, 12], "b": [23, 3], "t": [T] * 2, "v": [1, 2]}, ["v"], entities=[numbers]),
        world.view("s", {"c": ["a", "ab"], "e": ["bc", "c"], "t": [T] * 2, "w": [1, 2]}, ["w"],
                   entities=[texts]),
    )  # fmt: skip
    asked = pa.table(
        {"t": [T] * 3, "a": [12, 1, 123], "b": [3, 23, 3], "c": ["ab", "a", "abc"], "e": ["c", "bc", ""]}
    )
    got = store.get_historical_features(asked, ["n:v", "s:w"]).to_arrow()
    assert got["v"].to_pylist() == [2, 1, None] and got["w"].to_pylist() == [2, 1, None]


@pytest.mark.parametrize("created", [None, "c"])
def test_b06_full_ties_give_one_row_and_always_the_same(world: World, created: str | None) -> None:
    rng = np.random.default_rng(3)
    order = rng.permutation(50)
    data = {"u": [1] * 50, "t": [T] * 50, "c": [T] * 50, "v": order.tolist()}
    view = world.view("v", data, ["v"], created=created)
    store = world.open(view)
    for _ in range(100):
        got = store.get_historical_features(ask([1, 1]), ["v:v"]).to_arrow()
        assert got["v"].to_pylist() == [int(order[-1])] * 2  # the last row of the source
    again = world.open(view)
    assert again.get_historical_features(ask([1]), ["v:v"]).to_arrow()["v"].to_pylist() == [int(order[-1])]


def test_b07_null_keys_rows_without_a_time_and_no_rows(world: World) -> None:
    data = {"u": [None, 1], "t": [T, T], "v": [5, 6]}
    store = world.open(world.view("v", data, {"v": col("v"), "age": (now() - col("t")).hours()}))
    frame = pd.DataFrame({"u": [None, 1, 1], "event_timestamp": pd.to_datetime([T, None, T])})
    got = store.get_historical_features(frame, ["v:v", "v:age"], with_status=True).to_arrow()
    assert got["v"].to_pylist() == [None, None, 6] and got["age"].to_pylist() == [None, None, 0.0]
    assert got["v__status"].to_pylist() == ["NOT_FOUND", "NOT_FOUND", "PRESENT"]
    for empty in (frame.iloc[:0], ask([1]).slice(0, 0)):
        none = store.get_historical_features(empty, ["v:v", "v:age"], with_status=True)
        assert none.to_arrow().num_rows == 0 and none.to_arrow().column_names == got.column_names
        assert none.to_df().columns.tolist() == got.column_names


def test_b08_times_of_any_form_give_one_answer(world: World) -> None:
    data = {"u": [1, 1, 1], "t": [T - 12 * HOUR, T, T + US], "v": [1, 2, 3]}
    store = world.open(world.view("v", data, ["v"]))
    york = ZoneInfo("America/New_York")
    at = [T - US, T, T + US]
    forms: list[Any] = [
        pa.array(at, UTC_US),
        pa.array([t.replace(tzinfo=None) for t in at], pa.timestamp("us")),
        pa.array([t.astimezone(york) for t in at], pa.timestamp("ns", "America/New_York")),
        [t.isoformat() for t in at],
        [t.astimezone(york).isoformat() for t in at],
        [t.replace(tzinfo=None).isoformat(" ") for t in at],
    ]
    for form in forms:
        got = store.get_historical_features(ask([1] * 3, event_timestamp=form), ["v:v"]).to_arrow()
        assert got["v"].to_pylist() == [1, 2, 3]
        assert got["event_timestamp"].to_pylist() == at
    days = store.get_historical_features(
        ask([1, 1], event_timestamp=[date(2024, 3, 1), date(2024, 3, 2)]), ["v:v"]
    ).to_arrow()
    assert days["v"].to_pylist() == [1, 3]


def test_b09_a_feature_with_the_name_of_an_entity_column(world: World) -> None:
    store = world.open(world.view("v", {"u": [1], "t": [T], "label": [7]}, ["label"]))
    with pytest.raises(
        FeatureNameCollisionError, match="'v:label' would be named 'label', which is a column already"
    ):
        store.get_historical_features(ask([1], label=["x"]), ["v:label"]).to_arrow()
    got = store.get_historical_features(ask([1], label=["x"]), ["v:label"], True).to_arrow()
    assert got["label"].to_pylist() == ["x"] and got["v__label"].to_pylist() == [7]
    with pytest.raises(FeatureNameCollisionError, match="it is listed twice"):
        store.get_historical_features(ask([1]), ["v:label", "v:label"], True)


def test_b10_large_integers_beside_a_missing_row_are_exact(world: World) -> None:
    data = {"u": [1, 2], "t": [T, T], "v": [2**53 + 1, -(2**63) + 1]}
    store = world.open(world.view("v", data, ["v"]))
    job = store.get_historical_features(ask([1, 2, 3]), ["v:v"])
    assert job.to_arrow()["v"].to_pylist() == [2**53 + 1, -(2**63) + 1, None]
    assert job.to_arrow().schema.field("v").type == pa.int64()
    frame = job.to_df()
    assert str(frame["v"].dtype) == "Int64" and frame["v"].tolist() == [2**53 + 1, -(2**63) + 1, pd.NA]


@pytest.mark.parametrize("seed", range(5))
def test_b11_neither_future_rows_nor_the_order_of_arrival_change_an_answer(world: World, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 80
    minutes = rng.permutation(n)  # no ties: of rows that tie in all, the order of arrival decides
    rows = {"u": rng.integers(0, 5, n), "t": T - np.array([int(m) for m in minutes]) * (HOUR / 60),
            "v": rng.normal(size=n)}  # fmt: skip
    table = pa.table({"u": rows["u"], "t": pa.array(list(rows["t"]), UTC_US), "v": rows["v"]})
    later = pa.table(
        {"u": [0, 1, 9], "t": pa.array([T + US, T + HOUR, T + US], UTC_US), "v": [1.0, 2.0, 3.0]}
    )
    asked = ask(rng.integers(0, 7, 40).tolist(), [T - int(m) * (HOUR / 60) for m in rng.integers(0, n, 40)])
    features = {"v": col("v"), "n": d.count(window="30m"), "mean": d.mean(col("v"), window="1h")}
    answers = []
    for name, made in (
        ("plain", table),
        ("future", pa.concat_tables([table, later])),
        ("shuffled", table.take(pa.array(rng.permutation(n)))),
    ):
        view = world.view(name, made, features, ttl=HOUR)
        refs = [f"{name}:{feature}" for feature in features]
        got = world.open(view).get_historical_features(asked, refs, with_status=True).to_arrow()
        answers.append(got)
    for other in answers[1:]:
        for name in ("v", "n", "mean", "v__status"):
            mine, theirs = answers[0][name].to_pylist(), other[name].to_pylist()
            future = name == "v__status"
            for i, (a, b) in enumerate(zip(mine, theirs)):
                # A key that the table lacks may have future rows now: there is still no value.
                assert a == b or (future and asked["u"][i].as_py() not in rows["u"]), (name, i)
