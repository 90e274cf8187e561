"""Native coding of pushes: the same outcome as the slow path, to which it leaves all that is not plain."""

from __future__ import annotations

import datetime
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from push_repo import HOUR, columns, make_push_repo

from penstock.clock import ManualClock
from penstock.errors import InvalidArgumentError
from penstock.features.compute import NOT_FOUND
from penstock.features.push_coding import PushCoding
from penstock.features.push_rows import read_rows
from penstock.features.store import FeatureStore

_REPO = """
from penstock import *
user = Entity("user", join_keys=["user_id"])
pair = Entity("pair", join_keys=["user_id", "shop"])
alone = Entity("alone", join_keys=["shop"])
events = PushSource("events", {"at": "timestamp", "user_id": "int64", "shop": "string", "x": "float64",
                               "y": "float32", "n": "int64", "ok": "bool", "took": "duration",
                               "seen": "timestamp", "city": "string", "id": "string", "gone": "bool"},
                    timestamp="at", created="seen", event_id="id", deleted="gone")
users = FeatureView("users", [user], events, {
    "x": col("x"), "y": col("y"), "n": col("n"), "ok": col("ok"), "took": col("took").seconds(),
    "city": col("city"), "sum": sum(col("x") * col("n"), window="3h"), "seen": max(col("y"), window="2h"),
    "cities": distinct(col("city"), window="9h")})
pairs = FeatureView("pairs", [pair], events, {
    "count": count(window="5h"), "last": last(col("city"), window="9h")})
shops = FeatureView("shops", [alone], events, {"top": top_k(col("n"), window="9h")})
world = FeatureView("world", [], events, {"all": count(col("x"), window="9h")})
"""
_VIEWS = ("users", "pairs", "shops", "world")
_CITIES = ["Rome", "Oslo", "Zürich", ""]


def repo_of(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "feature_store.yaml").write_text("project: p\n")
    (folder / "features.py").write_text(_REPO)
    return folder


def or_null(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), values)


_row = st.fixed_dictionaries({
    "at": st.integers(0, 9 * HOUR), "user_id": st.integers(-2, 2), "shop": st.sampled_from("ab"),
    "x": or_null(st.one_of(st.floats(width=64), st.integers(-9, 9))), "y": or_null(st.floats(width=64)),
    "n": or_null(st.integers(-(2**63), 2**63 - 1)), "ok": or_null(st.booleans()),
    "took": or_null(st.integers(-(2**40), 2**40)), "seen": or_null(st.integers(0, 9 * HOUR)),
    "city": or_null(st.sampled_from(_CITIES)), "id": st.sampled_from("pqrst"), "gone": st.booleans(),
})  # fmt: skip
_pushes = st.lists(st.lists(_row, min_size=1, max_size=70), min_size=1, max_size=3)


def state(store: FeatureStore) -> Any:
    """All that pushes have led to: the rows of all keys at some times, and the log."""
    rows = []
    for name in _VIEWS:
        computer = store.computer(name)
        keys, joins = computer.entities()
        # A key of which all is deleted is known as such only until the log is read again.
        here = computer.rows_at(keys, np.full(len(keys), 12 * HOUR)).status != NOT_FOUND
        order = np.lexsort(keys.T)
        order = order[here[order]]
        for now in (2 * HOUR, 5 * HOUR, 12 * HOUR):
            found = computer.rows_at(keys[order], np.full(len(order), now))
            rows.append((found.words().tolist(), found.meta.tolist(), keys[order].tolist()))
        texts = [
            c.values[order].tolist() if c.dictionary is None else [c.dictionary[v] for v in c.values[order]]
            for c in joins
        ]
        rows.append((texts, computer.dictionaries))
    logged, head = store._log.read("events")
    return rows, head, [(part.sequence, part.arrival_us.to_pylist(), part.table) for part in logged]


@settings(max_examples=15, deadline=None)
@given(_pushes, st.booleans())
def test_the_outcome_is_that_of_the_slow_path(
    tmp_path_factory: pytest.TempPathFactory, pushes: Any, as_tuples: bool
) -> None:
    folder = tmp_path_factory.mktemp("coding")
    states, coded = [], 0
    code = PushCoding.code
    with FeatureStore(repo_of(folder / "r"), clock=ManualClock(us=20 * HOUR)) as store:
        first = {"at": 0, "user_id": 0, "shop": "a", "x": 0.0, "y": 0.0, "n": 0, "ok": True, "took": 0,
                 "seen": 0, "id": "p", "gone": False}  # fmt: skip
        store.push("events", [first | {"city": city} for city in _CITIES])  # the texts are known then
    for fast in (True, False):
        shutil.copytree(folder / "r", folder / str(fast))  # with the seed of the keys
        with FeatureStore(folder / str(fast), clock=ManualClock(us=20 * HOUR)) as store:
            with pytest.MonkeyPatch.context() as patch:
                taken: list[bool] = []

                def counting(self: PushCoding, rows: Any, fast: bool = fast, taken: Any = taken) -> Any:
                    found = code(self, rows) if fast else None
                    taken.append(found is not None)
                    return found

                patch.setattr(PushCoding, "code", counting)
                for rows in pushes:
                    given_ = {name: [row[name] for row in rows] for name in rows[0]}
                    whole = {n: tuple(v) for n, v in given_.items()} if as_tuples and fast else given_
                    assert store.push("events", whole) == len(rows)
                coded += sum(taken)
            states.append(state(store))
        with FeatureStore(folder / str(fast), clock=ManualClock(us=20 * HOUR)) as store:
            states.append(state(store))  # as it was read from the log
    assert coded == len(pushes)  # none of them was left to the slow path
    for other in states[1:]:
        assert repr(other[0]) == repr(states[0][0])
        assert other[1] == states[0][1]
        for (seq, arrival, table), (seq0, arrival0, table0) in zip(other[2], states[0][2], strict=True):
            assert (seq, arrival, table.schema) == (seq0, arrival0, table0.schema)
            for name in table.column_names:
                assert repr(table[name].to_pylist()) == repr(table0[name].to_pylist())


def _coding(store: FeatureStore) -> PushCoding:
    return store._pushes._coding("events")


def test_what_it_leaves_to_the_slow_path(tmp_path: Path) -> None:
    good: dict[str, Any] = {"at": [HOUR], "user_id": [1], "shop": ["a"], "x": [1.0], "y": [1.5], "n": [3],
                            "ok": [True], "took": [5], "seen": [HOUR], "city": ["Rome"], "id": ["p"],
                            "gone": [False]}  # fmt: skip
    with FeatureStore(repo_of(tmp_path / "r")) as store:
        assert _coding(store).code(good) is None  # the city is new
        assert store.push("events", good) == 1
        coding = _coding(store)
        assert coding.code(good) is not None
        assert coding.code({name: value[0] for name, value in good.items()}).n == 1  # type: ignore[union-attr]
        assert coding.code({k: v for k, v in good.items() if k != "gone"}) is not None
        refused: list[Any] = [
            [good], pa.table(good), None, {}, {n: [] for n in good},
            {k: v for k, v in good.items() if k != "x"},
            good | {"more": [1]}, good | {1: [1]}, good | {"\udc80": [1]},
        ]  # fmt: skip
        wrong = {
            "at": [None, 1.5, "1970-01-01", True, 2**63, -(2**63), 2**63 - 1, datetime.datetime(2020, 1, 1)],
            "user_id": [None, 1.0, "1", True, 2**63], "shop": [None, 1, b"a", "\udc80"],
            "x": ["1", True, 2**53 + 1, np.float64(1)], "y": ["1", 2**24 + 1], "n": [1.0, "1", False, 2**64],
            "ok": [1, "x"], "took": [1.5, datetime.timedelta(1)], "seen": [2**63 - 1], "city": ["Bonn", 1],
            "id": [None, 7], "gone": [None, 0],
        }  # fmt: skip
        refused += [good | {name: [value]} for name, values in wrong.items() for value in values]
        refused += [good | {"x": [1.0, 2.0]}, good | {"x": np.array([1.0])}]
        for rows in refused:
            assert coding.code(rows) is None, rows
        assert coding.code(good | {"x": [math.nan], "n": [None], "city": [None]}) is not None
        assert store.push("events", good | {"city": ["Bonn"]}) == 1
        assert _coding(store).code(good | {"city": ["Bonn"]}) is not None


def test_whatever_is_coded_is_taken_by_the_slow_path_with_the_same_table(tmp_path: Path) -> None:
    given_ = {"at": [1, 2], "user_id": [1, -(2**63)], "shop": ["a", "\0é"], "x": [1 << 53, math.inf],
              "y": [0.1, 1e300], "n": [None, -1], "ok": [None, False], "took": [0, None],
              "seen": [None, 5], "city": [None, None], "id": ["", "p"]}  # fmt: skip
    with FeatureStore(repo_of(tmp_path / "r")) as store:
        coding = _coding(store)
        rows = coding.code(given_)
        assert rows is not None
        slow = read_rows(coding.source, given_, {"user_id", "shop"})
        schema = slow.schema
        fast = pa.ipc.read_record_batch(pa.py_buffer(coding.message(rows)), schema)
        assert pa.Table.from_batches([fast]).equals(slow)
        assert rows.bytes >= slow.nbytes


def test_values_that_only_python_makes_are_left_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "feature_store.yaml").write_text("project: p\n")
    (folder / "features.py").write_text(
        "from penstock import *\nuser = Entity('user', join_keys=['user_id'])\n"
        "schema = {'at': 'timestamp', 'user_id': 'int64', 'city': 'string'}\n"
        "events = PushSource('events', schema, timestamp='at')\n"
        "users = FeatureView('users', [user], events, {'rome': col('city').isin(['Rome'])})\n"
    )
    rows = {"at": [1], "user_id": [1], "city": ["Rome"]}
    with FeatureStore(folder) as store:
        assert _coding(store).code(rows) is None
        store.push("events", rows)
        assert store.get_online_features(["users:rome"], {"user_id": 1}).to_dict()["rome"] == [True]


def test_errors_are_those_of_the_slow_path_and_change_nothing(tmp_path: Path) -> None:
    with FeatureStore(make_push_repo(tmp_path / "r")) as store:
        good = columns([(HOUR, 1, "a", 1.0, "Rome")])
        store.push("events", good)
        before = store._log.stats("events")
        name = next(iter(good))
        for rows, message in (
            ({}, "is missing"),
            (good | {name: ["x", "y"]}, "has 2 rows|rows; column"),
            (good | {"nothing": [1]}, "'nothing' is unknown"),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                store.push("events", rows)
        assert store._log.stats("events") == before


def test_a_new_reading_gets_a_new_coding(tmp_path: Path) -> None:
    with FeatureStore(repo_of(tmp_path / "r")) as store:
        old = _coding(store)
        assert _coding(store) is old
        store._live.reread_source("events")
        new = _coding(store)
        assert new is not old
        assert new.views[0] is store._live.view(new.views[0].computer.view.name)
