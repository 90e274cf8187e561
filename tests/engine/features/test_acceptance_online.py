"""The acceptance cases of the online store: A16 to A20 and B12 to B16, over every online store."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from acceptance import DAY, HOUR, US, UTC_US, T, World, assert_online_is_offline

import penstock as d
from penstock.features.expressions import col, now
from penstock.features.store import FeatureStore

NAMES = {0: "PRESENT", 1: "NULL", 2: "NOT_FOUND", 3: "EXPIRED"}


def read(
    store: FeatureStore, refs: Any, rows: Any, at: Any = T, **more: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and status names by feature."""
    found = store.get_online_features(refs, rows, now=at, **more)
    statuses = {name: [NAMES[s] for s in column] for name, column in found.statuses().items()}
    return found.to_dict(), statuses


@pytest.mark.parametrize("full", [False, True])
def test_a16_a_write_of_an_older_event_changes_nothing(world: World, online: str, full: bool) -> None:
    name = "v__v" if full else "v"
    rows = {"u": [1, 2], "t": [T - HOUR, T - HOUR], "v": [10, 20]}
    store = world.open(world.view("v", rows, ["v"]), online=online)
    store.materialize(T - DAY, T)
    for u, t, v, expected in (
        (1, T - 2 * HOUR, 9, [10, 20]),  # older
        (1, T - HOUR - US, 8, [10, 20]),
        (1, T - HOUR + US, 11, [11, 20]),  # newer
        (2, T + US, 21, [11, 20]),  # not before T
    ):
        rows = {"u": [*rows["u"], u], "t": [*rows["t"], t], "v": [*rows["v"], v]}
        world.table("v", rows)
        assert store.refresh()
        for _ in range(2):
            assert read(store, ["v:v"], {"u": [1, 2]}, full_feature_names=full)[0][name] == expected
            store.materialize_incremental(T)
    assert read(store, ["v:v"], {"u": [2]}, T + US, full_feature_names=full)[0][name] == [21]


def test_a17_the_latest_row_of_a_batch_counts_wherever_it_is(world: World, online: str) -> None:
    rows = [(1, T - HOUR, 1), (1, T - 2 * HOUR, 2), (1, T - 3 * HOUR, 3), (2, T, 4)]
    for i, order in enumerate(permutations(rows)):
        users, times, values = zip(*order)
        view = world.view(f"v{i}", {"u": users, "t": times, "v": values}, ["v"])
        store = world.open(view, online=online)
        store.materialize(T - DAY, T)
        assert read(store, [f"v{i}:v"], {"u": [1, 2]})[0]["v"] == [1, 4]
        store.close()


def test_a18_views_of_one_source_are_apart(world: World, online: str) -> None:
    rows = {"u": [1, 2], "t": [T - 2 * HOUR, T], "v": [1, 2], "w": ["a", None]}
    first = world.view("v", rows, {"x": col("v")}, ttl=HOUR)
    second = d.FeatureView("w", first.entities, first.source, {"x": col("w"), "n": d.count(window="3h")})
    store = world.open(first, second, online=online)
    for _ in range(2):
        values, statuses = read(store, ["v:x", "w:x", "w:n"], {"u": [1, 2]}, full_feature_names=True)
        assert (values["v__x"], values["w__x"], values["w__n"]) == ([None, 2], ["a", None], [1, 1])
        assert statuses["v__x"] == ["EXPIRED", "PRESENT"] and statuses["w__x"] == ["PRESENT", "NULL"]
        report = store.materialize(T - DAY, T)
        assert report.rows == {"v": 2, "w": 2}
    store.materialize_incremental(T + HOUR, views=["v"])
    assert store.cursor("v") != store.cursor("w")


@pytest.mark.parametrize("full", [False, True])
def test_a19_materialised_features_equal_the_historical_join(world: World, online: str, full: bool) -> None:
    rng = np.random.default_rng(11)
    n = 400
    at = [T - int(m) * (HOUR / 60) for m in rng.integers(0, 3000, n)]
    table = pa.table(
        {
            "u": pa.array(
                [[int(rng.integers(0, 30)), None][rng.random() < 0.03] for _ in range(n)], pa.int64()
            ),
            "s": [["a", "ä", ""][i] for i in rng.integers(0, 3, n)],
            "t": pa.array(at, UTC_US),
            "c": pa.array([t + int(rng.integers(0, 90)) * (HOUR / 60) for t in at], UTC_US),
            "x": pa.array([[float(rng.normal()), None][rng.random() < 0.1] for _ in range(n)], pa.float64()),
        }
    )
    pair = d.Entity("pair", ["u", "s"])
    store = world.open(
        world.view("v", table, {"x": col("x"), "n": d.count(window="6h"), "age": (now() - col("t")).hours(),
                                "mean": d.mean(col("x"), window="1d")}, ttl=10 * HOUR, created="c"),
        world.view("p", table, {"word": col("s"), "top": d.max(col("x"), window="1d")}, entities=[pair],
                   created="c"),
        world.view("all", table, {"total": d.sum(col("x"), window="2h")}, entities=[]),
        online=online,
    )  # fmt: skip
    entities = pa.table({"u": pa.array([*range(32), None], pa.int64()), "s": ["a", "ä", ""] * 11})
    refs = ["v:x", "v:n", "v:mean", "v:age", "p:word", "p:top", "all:total"]
    assert store.get_online_features(refs, entities, now=T, full_feature_names=full).to_arrow().num_rows == 33
    statuses = set()
    for end in (T - 40 * HOUR, T - 20 * HOUR, T - HOUR, T):
        assert_online_is_offline(store, refs, entities, end)
        store.materialize_incremental(end)
        for moment in (end - HOUR, end, end + US, end + 7 * HOUR):
            served = assert_online_is_offline(store, refs, entities, moment)
            statuses |= set(served["v__x__status"].to_pylist())
    assert statuses == {"PRESENT", "NULL", "NOT_FOUND", "EXPIRED"}


def test_a20_keys_of_any_text_and_number_are_apart(world: World, online: str) -> None:
    texts = ["", "a", "ä", "a\u0308", "日本", "😀", "a\0", "a\0b", " ", "0", "x" * 3000, "None"]
    numbers = [0, 1, -1, 2**63 - 1, -(2**63) + 1, 2**32, 256]
    word, number = d.Entity("word", ["s"]), d.Entity("number", ["i"])
    both = d.Entity("both", ["s", "i"])
    pairs = [(s, i) for s in texts[:5] for i in numbers[:5]]
    store = world.open(
        world.view("w", {"s": texts, "t": [T] * len(texts), "v": list(range(len(texts)))}, {"w": col("v")},
                   entities=[word]),
        world.view("n", {"i": numbers, "t": [T] * len(numbers), "v": list(range(len(numbers)))},
                   {"n": col("v")}, entities=[number]),
        world.view("b", {"s": [p[0] for p in pairs], "i": [p[1] for p in pairs], "t": [T] * len(pairs),
                         "v": list(range(len(pairs)))}, {"b": col("v")}, entities=[both]),
        online=online,
    )  # fmt: skip
    for _ in range(2):
        assert read(store, ["w:w"], {"s": [*texts, "none", "A"]})[0]["w"] == [*range(len(texts)), None, None]
        assert read(store, ["n:n"], {"i": [*numbers, 2]})[0]["n"] == [*range(len(numbers)), None]
        s, i = ([*part] for part in zip(*pairs, ("a", 99)))
        assert read(store, ["b:b"], {"s": s, "i": i})[0]["b"] == [*range(len(pairs)), None]
        store.materialize(T - DAY, T)


def test_b12_online_equals_offline_after_a_correction_of_one_time(world: World, online: str) -> None:
    rows: dict[str, list[Any]] = {"u": [1, 2], "t": [T - HOUR] * 2, "c": [T - HOUR] * 2, "v": [1.0, 2.0]}
    features = {"v": col("v"), "total": d.sum(col("v"), window="1d")}
    store = world.open(world.view("v", rows, features, created="c"), online=online)
    store.materialize(T - DAY, T)
    assert read(store, ["v:v"], {"u": [1]})[0]["v"] == [1.0]
    fixed = {
        "u": [*rows["u"], 1],
        "t": [*rows["t"], T - HOUR],
        "c": [*rows["c"], T - US],
        "v": [*rows["v"], 111.0],
    }
    world.table("v", fixed)
    store.refresh()
    entities = pa.table({"u": [1, 2, 3]})
    for _ in range(2):
        served = assert_online_is_offline(store, ["v:v", "v:total"], entities, T)
        assert served["v__v"].to_pylist() == [111.0, 2.0, None]
        store.materialize_incremental(T)


def test_b13_an_older_row_after_a_newer_one_changes_nothing(world: World, online: str) -> None:
    rows: dict[str, list[Any]] = {"u": [1], "t": [T - HOUR], "v": [10]}
    store = world.open(world.view("v", rows, {"v": col("v"), "n": d.count(window="1d")}), online=online)
    store.materialize_incremental(T)
    world.table("v", {"u": [1, 1], "t": [T - HOUR, T - 2 * HOUR], "v": [10, 5]})
    store.refresh()
    for _ in range(2):
        values, _ = read(store, ["v:v", "v:n"], {"u": [1]})
        assert values["v"] == [10] and values["n"] == [2]  # the newer stays, the window counts both
        store.materialize_incremental(T)


def test_b14_the_ttl_ends_to_the_microsecond(world: World, online: str) -> None:
    rows = {"u": [1], "t": [T], "v": [7]}
    store = world.open(world.view("v", rows, ["v"], ttl=DAY), online=online)
    for _ in range(2):
        for at, value, status in (
            (T - US, None, "NOT_FOUND"),
            (T, 7, "PRESENT"),
            (T + DAY, 7, "PRESENT"),
            (T + DAY + US, None, "EXPIRED"),
        ):
            values, statuses = read(store, ["v:v"], {"u": [1]}, at)
            assert (values["v"], statuses["v"]) == ([value], [status])
        store.materialize(T, T + DAY)


def test_b15_never_written_null_nan_and_expired_are_told_apart(world: World, online: str) -> None:
    rows = {"u": [1, 2, 3], "t": [T, T, T - DAY - US], "v": pa.array([None, float("nan"), 1.0], pa.float64())}
    store = world.open(world.view("v", rows, ["v"], ttl=DAY), online=online)
    for _ in range(2):
        values, statuses = read(store, ["v:v"], {"u": [1, 2, 3, 4, None]})
        assert statuses["v"] == ["NULL", "PRESENT", "EXPIRED", "NOT_FOUND", "NOT_FOUND"]
        assert values["v"][0] is None and np.isnan(values["v"][1]) and values["v"][2:] == [None] * 3
        store.materialize(T - 2 * DAY, T)


def test_b16_a_row_behind_the_cursor_reaches_online_within_one_run(world: World, online: str) -> None:
    rows: dict[str, list[Any]] = {"u": [1, 2], "t": [T - 5 * HOUR, T - HOUR], "v": [1, 2]}
    features = {"v": col("v"), "n": d.count(window="1d")}
    store = world.open(world.view("v", rows, features), online=online)
    store.materialize_incremental(T)
    late = {"u": [1, 2, 1, 3], "t": [T - 5 * HOUR, T - HOUR, T - 2 * HOUR, T - 3 * HOUR], "v": [1, 2, 11, 3]}
    world.table("v", late)  # both new rows are older than the cursor
    store.refresh()
    store.materialize_incremental(T + US)
    values, statuses = read(store, ["v:v", "v:n"], {"u": [1, 2, 3]}, T + US)
    assert values["v"] == [11, 2, 3] and values["n"] == [2, 1, 1]
    assert statuses["v"] == ["PRESENT"] * 3
    assert_online_is_offline(store, ["v:v", "v:n"], pa.table({"u": [1, 2, 3]}), T + US)
