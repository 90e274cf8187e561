"""Stored rows against a brute-force oracle, and what their validity intervals promise."""

from __future__ import annotations

import math
import struct
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import penstock as d
from penstock import _core
from penstock.errors import DefinitionError, InvalidArgumentError
from penstock.features.compute import EXPIRED, FUTURE, NOT_FOUND, PRESENT, ViewComputer
from penstock.features.expressions import col, now, percentile_rank
from penstock.features.index import entity_keys
from penstock.features.program import Distribution
from penstock.features.sources import UNKNOWN_TIME, SourceColumn, SourceTable

SEED = bytes(range(16))
SECOND = 1_000_000
INT_MIN, INT_MAX = -(2**63), 2**63 - 1
USER = d.Entity("user", ["user"])
SOURCE = d.ParquetSource("events.parquet", "t", created="k")
DTYPES = {"user": "int64", "t": "timestamp", "k": "timestamp", "x": "float64", "h": "float32",
          "i": "int64", "b": "bool", "s": "string"}  # fmt: skip
TEXTS = ["red", "green", "blue"]


def column(dtype, cells):
    kind = np.float64 if dtype in ("float32", "float64") else np.int64
    valid = np.array([c is not None for c in cells], bool)
    values = np.array([0 if c is None else c for c in cells], kind)
    return SourceColumn(dtype, values, None if valid.all() else valid, TEXTS if dtype == "string" else None)


def table(events, created=True):
    columns = {name: column(dtype, [e.get(name) for e in events]) for name, dtype in DTYPES.items()}
    event_time = columns["t"].values
    known = np.array([UNKNOWN_TIME if e.get("k") is None else e["k"] for e in events], np.int64)
    return SourceTable(columns, len(events), event_time, known if created else event_time)


def view(features, ttl=None, entities=(USER,)):
    return d.FeatureView("v", entities=list(entities), source=SOURCE, features=features, ttl=ttl)


def computer(events, features, ttl=None, **more):
    return ViewComputer(view(features, ttl), table(events), SEED, **more)


def at(made, users, times, known_by=None):
    keys, nulls = _core.keys128([list(users)], SEED)
    known = None if known_by is None else np.array(known_by, np.int64)
    return made.rows_at(keys, np.array(times, np.int64), nulls=nulls, known_by=known)


def cells(rows, made):
    return {
        name: [v if ok else None for v, ok in zip(values.tolist(), valid.tolist())]
        for (name, _), (values, valid) in zip(made.schema, rows.columns)
    }


def bits(value):
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("<d", value)
    return None if value is None else int(value)


# The oracle: one row, by the words of the definition.

KINDS = {"count": d.count, "sum": d.sum, "mean": d.mean, "min": d.min, "max": d.max}


def order_key(value):
    return (value, math.copysign(1.0, value)) if isinstance(value, float) else value


def oracle_aggregate(kind, values):
    if kind == "count":
        return len(values)
    if kind in ("sum", "mean"):
        if not values:
            return (0.0 if kind == "mean" else 0) if kind == "sum" else None
        total = 0.0 if kind == "mean" or isinstance(values[0], float) else 0
        for value in values:
            total = total + value
        if kind == "mean":
            return total / len(values)
        return (total + 2**63) % 2**64 - 2**63 if isinstance(total, int) else total
    if not values:
        return None
    if any(isinstance(v, float) and math.isnan(v) for v in values):
        return math.nan
    return (min if kind == "min" else max)(values, key=order_key)


def oracle(events, user, t, known_by, ttl_us, aggregates):
    own = [e for e in events if e["user"] is not None and e["user"] == user]
    own.sort(key=lambda e: (e["t"], UNKNOWN_TIME if e["k"] is None else e["k"]))
    if known_by is not None:
        seen = [e for e in own if e["k"] is not None and e["k"] <= known_by]
    else:
        seen = own
    seen = [e for e in seen if e["t"] <= t]
    if not own or not seen:
        return (FUTURE if own else NOT_FOUND), {}, INT_MIN
    last = seen[-1]
    if ttl_us and last["t"] < t - ttl_us:
        return EXPIRED, {}, last["t"]
    row = {f"last_{c}": last[c] for c in "xis"}
    for name, (kind, of, window, every) in aggregates.items():
        edge = t if every is None else t // every * every
        inside = [e for e in seen if edge - window < e["t"] <= edge]
        values = inside if of is None else [e[of] for e in inside if e[of] is not None]
        row[name] = oracle_aggregate(kind, values)
        if kind == "sum" and of == "x":
            row[name] = float(row[name])
    return PRESENT, row, last["t"]


TIMES = st.builds(lambda half, off: half * SECOND // 2 + off, st.integers(-4, 12), st.integers(-1, 1))
REALS = st.sampled_from([0.1, 0.2, 0.3, 1e16, -1e16, -0.0, 0.0, 7.5, math.nan, math.inf])
EVENTS = st.lists(
    st.fixed_dictionaries(
        {
            "user": st.sampled_from([1, 2, 3, 2**53 + 1, None]),
            "t": TIMES,
            "k": st.none() | TIMES,
            "x": st.none() | REALS,
            "i": st.none() | st.sampled_from([0, 1, -5, 2**53 + 1, 2**63 - 1]),
            "s": st.none() | st.integers(0, 2),
        }
    ),
    max_size=14,
)
AGGREGATES = st.tuples(
    st.sampled_from(list(KINDS)),
    st.sampled_from(["x", "i"]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([None, 1, 2]),
    st.booleans(),
)
ASKED = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 2**53 + 1, 2**53, 9, None]), TIMES), min_size=1, max_size=8
)


def build(events, chosen, ttl_s):
    features = {f"last_{c}": col(c) for c in "xis"}
    aggregates = {}
    for n, (kind, of, window, every, whole) in enumerate(chosen):
        of = None if kind == "count" and whole else of
        text = {"window": f"{window}s", "every": None if every is None else f"{every}s"}
        features[f"a{n}"] = KINDS[kind](*([] if of is None else [col(of)]), **text)
        aggregates[f"a{n}"] = (kind, of, window * SECOND, None if every is None else every * SECOND)
    ttl = None if ttl_s is None else timedelta(seconds=ttl_s)
    return computer(events, features, ttl), aggregates, 0 if ttl_s is None else ttl_s * SECOND


def check_rows(made, rows, asked, known_by, events, ttl_us, aggregates):
    found = cells(rows, made)
    for n, (user, t) in enumerate(asked):
        by = None if known_by is None else known_by[n]
        status, row, newest = oracle(events, user, t, by, ttl_us, aggregates)
        assert (rows.status[n], rows.meta[n, 2]) == (status, newest)
        for name, _ in made.schema:
            assert bits(found[name][n]) == bits(row.get(name)), (name, user, t)


@settings(max_examples=120, deadline=None)
@given(EVENTS, st.lists(AGGREGATES, max_size=3), st.sampled_from([None, 1, 2]), ASKED, st.booleans())
def test_rows_are_those_of_the_brute_force_oracle_a12(events, chosen, ttl_s, asked, cut):
    made, aggregates, ttl_us = build(events, chosen, ttl_s)
    known_by = [t + SECOND for _, t in asked] if cut else None
    rows = at(made, [u for u, _ in asked], [t for _, t in asked], known_by)
    check_rows(made, rows, asked, known_by, events, ttl_us, aggregates)


@settings(max_examples=80, deadline=None)
@given(EVENTS, st.lists(AGGREGATES, max_size=3), st.sampled_from([None, 1, 2]), ASKED, st.data())
def test_a_row_keeps_its_bits_throughout_its_interval(events, chosen, ttl_s, asked, data):
    made, _, _ = build(events, chosen, ttl_s)
    rows = at(made, [u for u, _ in asked], [t for _, t in asked])
    words = rows.words()
    for n, (user, t) in enumerate(asked):
        since, until = int(rows.meta[n, 0]), int(rows.meta[n, 1])
        assert since <= t < until
        low, high = max(since, t - 20 * SECOND), min(until - 1, t + 20 * SECOND)
        times = [low, high, *data.draw(st.lists(st.integers(low, high), max_size=4))]
        again = at(made, [user] * len(times), times)
        assert (again.words() == words[n]).all()
        assert (again.meta[:, 2] == rows.meta[n, 2]).all()


TICKED = AGGREGATES.filter(lambda aggregate: aggregate[3] is not None)


@settings(max_examples=120, deadline=None)
@given(EVENTS, st.lists(TICKED, min_size=1, max_size=3), ASKED, st.data())
def test_windows_that_move_at_ticks_equal_the_others_and_hold_between_ticks(events, chosen, asked, data):
    whole, _, _ = build(events, chosen, None)
    features = {n: f for n, f in whole.view.features.items() if n.startswith("a")}
    made = computer(events, features)
    users, times = [u for u, _ in asked], [t for _, t in asked]
    rows, others = at(made, users, times), at(whole, users, times)
    assert (rows.status == others.status).all()
    found, want = cells(rows, made), cells(others, whole)
    assert all(list(map(bits, found[n])) == list(map(bits, want[n])) for n in features)
    for n, (user, t) in enumerate(asked):
        since, until = int(rows.meta[n, 0]), int(rows.meta[n, 1])
        assert since <= t < until and since <= int(others.meta[n, 0]) and until >= int(others.meta[n, 1])
        low, high = max(since, t - 20 * SECOND), min(until - 1, t + 20 * SECOND)
        drawn = [low, high, *data.draw(st.lists(st.integers(low, high), max_size=4))]
        again = at(made, [user] * len(drawn), drawn)
        assert (again.words() == rows.words()[n]).all()
        assert (again.meta == rows.meta[n]).all()


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.lists(AGGREGATES, max_size=3), st.sampled_from([None, 1, 2]), ASKED, st.data())
def test_batch_split_and_order_change_no_bit(events, chosen, ttl_s, asked, data):
    made, _, _ = build(events, chosen, ttl_s)
    rows = at(made, [u for u, _ in asked], [t for _, t in asked])
    order = data.draw(st.permutations(range(len(asked))))
    cut = data.draw(st.integers(0, len(asked)))
    for part in (order[:cut], order[cut:]):
        again = at(made, [asked[n][0] for n in part], [asked[n][1] for n in part])
        assert (again.words() == rows.words()[part]).all()
        assert (again.meta == rows.meta[part]).all()
        for (a, _), (b, _) in zip(again.columns, rows.columns):
            assert a.tobytes() == b[part].tobytes()


@settings(max_examples=80, deadline=None)
@given(EVENTS, st.lists(AGGREGATES, max_size=3), st.sampled_from([None, 1, 2]), TIMES, TIMES)
def test_every_key_whose_row_differs_is_among_the_changed(events, chosen, ttl_s, one, other):
    start, end = sorted((one, other))
    made, _, _ = build(events, chosen, ttl_s)
    changed = {tuple(k) for k in made.changed_keys(start, end).tolist()}
    before = made.rows_at(made.keys, np.full(len(made.keys), start))
    after = made.rows_at(made.keys, np.full(len(made.keys), end))
    differ = (before.words() != after.words()).any(axis=1)
    assert {tuple(k) for k in made.keys[differ].tolist()} <= changed
    assert changed <= {tuple(k) for k in made.keys.tolist()}


@settings(max_examples=40, deadline=None)
@given(EVENTS, st.lists(AGGREGATES, max_size=2), ASKED, EVENTS)
def test_later_events_change_nothing_b11(events, chosen, asked, extra):
    latest = max(t for _, t in asked)
    later = [e | {"t": latest + 1 + abs(e["t"])} for e in extra]
    users, times = [u for u, _ in asked], [t for _, t in asked]
    alone, _, _ = build(events, chosen, 2)
    more, _, _ = build(later + events, chosen, 2)
    a, b = at(alone, users, times), at(more, users, times)
    assert (a.words() == b.words()).all() and (a.meta[:, 2] == b.meta[:, 2]).all()


def event(t, user=1, k=None, **values):
    return {"user": user, "t": t, "k": t if k is None else k, **values}


def interval(made, t):
    return at(made, [1], [t]).meta[0, :2].tolist()


def test_the_interval_is_exact():
    events = [event(10 * SECOND, x=1.0), event(12 * SECOND, x=2.0)]
    last = computer(events, {"x": col("x")})
    assert interval(last, 0) == [INT_MIN, 10 * SECOND]
    assert interval(last, 11 * SECOND) == [10 * SECOND, 12 * SECOND]
    assert interval(last, 99 * SECOND) == [12 * SECOND, INT_MAX]
    ttl = computer(events, {"x": col("x")}, timedelta(seconds=3))
    assert interval(ttl, 13 * SECOND) == [12 * SECOND, 15 * SECOND + 1]
    assert interval(ttl, 16 * SECOND) == [15 * SECOND + 1, INT_MAX]
    window = computer(events, {"n": d.count(window="3s")})
    assert interval(window, 12 * SECOND) == [12 * SECOND, 13 * SECOND]
    assert interval(window, 14 * SECOND) == [13 * SECOND, 15 * SECOND]
    assert interval(window, 15 * SECOND) == [15 * SECOND, INT_MAX]
    ticks = computer([event(10 * SECOND + 1)], {"n": d.count(window="3s", every="2s")})
    assert interval(ticks, 11 * SECOND) == [10 * SECOND + 1, 12 * SECOND]
    assert interval(ticks, 12 * SECOND) == [12 * SECOND, 14 * SECOND]
    assert interval(ticks, 15 * SECOND) == [14 * SECOND, INT_MAX]
    # Events between two ticks end no interval, and none of them is the newest one used.
    busy = [event(t * SECOND) for t in (1, 11, 12, 13, 14, 21)]
    calm = computer(busy, {"n": d.count(window="8s", every="10s"), "m": d.count(window="3s", every="5s")})
    assert interval(calm, 1 * SECOND) == [1 * SECOND, 5 * SECOND]
    for t in (10, 11, 12, 14):
        row = at(calm, [1], [t * SECOND])
        assert row.meta[0].tolist() == [10 * SECOND, 15 * SECOND, 1 * SECOND, 1 * SECOND]
        assert [int(values[0]) for values, _ in row.columns] == [0, 0]
    assert at(calm, [1], [19 * SECOND]).meta[0].tolist() == [
        15 * SECOND,
        20 * SECOND,
        14 * SECOND,
        14 * SECOND,
    ]
    unknown = at(last, [5, None], [0, 0])
    assert unknown.meta[:, :2].tolist() == [[INT_MIN, INT_MAX]] * 2
    assert unknown.status.tolist() == [NOT_FOUND, NOT_FOUND]


def test_window_edges_are_open_below_and_closed_above():
    made = computer([event(10 * SECOND)], {"n": d.count(window="2s")})
    times = [10 * SECOND, 12 * SECOND - 1, 12 * SECOND]
    assert cells(at(made, [1] * 3, times), made)["n"] == [1, 1, 0]


def test_an_empty_window_of_a_known_key_is_zero_or_null():
    features = {
        "n": d.count(window="1s"), "s": d.sum(col("x"), window="1s"), "m": d.mean(col("x"), window="1s"),
        "lo": d.min(col("x"), window="1s"), "hi": d.max(col("i"), window="1s"),
    }  # fmt: skip
    made = computer([event(0, x=1.0, i=1), event(9 * SECOND, x=None, i=None)], features)
    for t in (5 * SECOND, 9 * SECOND):
        row = {name: found[0] for name, found in cells(at(made, [1], [t]), made).items()}
        assert row == {"n": int(t == 9 * SECOND), "s": 0.0, "m": None, "lo": None, "hi": None}


def test_dtypes_of_aggregates():
    features = {
        "count": d.count(col("s"), window="1s"), "sum_x": d.sum(col("x"), window="1s"),
        "sum_h": d.sum(col("h"), window="1s"), "sum_i": d.sum(col("i"), window="1s"),
        "sum_b": d.sum(col("b"), window="1s"), "sum_d": d.sum(col("k") - col("t"), window="1s"),
        "mean_i": d.mean(col("i"), window="1s"), "min_h": d.min(col("h"), window="1s"),
        "max_t": d.max(col("t"), window="1s"), "max_b": d.max(col("b"), window="1s"),
    }  # fmt: skip
    made = computer([event(0, x=1.0, h=0.5, i=2**53 + 1, b=1, k=7, s=2)] * 2, features)
    assert dict(made.schema) == {
        "count": "int64", "sum_x": "float64", "sum_h": "float64", "sum_i": "int64", "sum_b": "int64",
        "sum_d": "duration", "mean_i": "float64", "min_h": "float32", "max_t": "timestamp", "max_b": "bool",
    }  # fmt: skip
    row = {name: found[0] for name, found in cells(at(made, [1], [0]), made).items()}
    assert row["count"] == 2 and row["sum_i"] == 2**54 + 2 and row["sum_b"] == 2 and row["sum_d"] == 14
    assert row["min_h"] == 0.5 and row["max_b"] == 1


@pytest.mark.parametrize(
    "feature, message",
    [
        (d.sum(col("s"), window="1s"), "feature 'f': sum is not defined on string"),
        (d.mean(col("t"), window="1s"), "feature 'f': mean is not defined on timestamp"),
        (d.min(col("s"), window="1s"), "feature 'f': min is not defined on string"),
        (col("nope") + 1, "view 'v': column 'nope' is not in the schema"),
        (percentile_rank(col("x")), "no fitted distribution"),
    ],
)
def test_a_feature_that_does_not_fit_the_source_is_an_error(feature, message):
    with pytest.raises(DefinitionError, match=message):
        computer([event(0)], {"f": feature})


def test_a_join_key_that_is_missing_or_real_is_an_error():
    for key, message in (("nope", "join key 'nope' is not in the source"), ("x", "join key 'x' has dtype")):
        wrong = view({"f": d.count(window="1s")}, entities=[d.Entity("e", [key])])
        with pytest.raises(InvalidArgumentError, match=message):
            ViewComputer(wrong, table([event(0, x=1.0)]), SEED)


def test_arguments_of_unequal_length_are_an_error():
    made = computer([event(0)], {"n": d.count(window="1s")})
    with pytest.raises(InvalidArgumentError, match=r"keys \(1, 2\), now_us \(2,\)"):
        made.rows_at(made.keys, np.zeros(2, np.int64))
    with pytest.raises(InvalidArgumentError, match="is before start"):
        made.changed_keys(2, 1)


def test_request_time_features_leave_hidden_columns_last():
    made = computer([event(5, x=1.0, k=9)], {"age": now() - col("t"), "x": col("x")})
    assert made.schema == [("x", "float64"), ("__column_t", "timestamp")]
    assert cells(at(made, [1], [5]), made) == {"x": [1.0], "__column_t": [5]}


def test_strings_are_codes_of_the_source_dictionary():
    made = computer([event(0, s=2)], {"colour": col("s")})
    assert made.dictionaries == {"colour": TEXTS}
    assert cells(at(made, [1], [0]), made) == {"colour": [2]}


def test_percentile_rank_uses_the_distribution_of_its_argument():
    fitted = {col("x").fingerprint(): Distribution.fit([1.0, 2.0, 2.0, 3.0])}
    made = computer([event(0, x=2.0)], {"r": percentile_rank(col("x"))}, distributions=fitted)
    assert cells(at(made, [1], [0]), made) == {"r": [0.5]}


def test_words_say_not_found_for_events_that_are_all_later():
    made = computer([event(10, x=1.0)], {"x": col("x")})
    rows = at(made, [1, 2], [5, 5])
    assert rows.status.tolist() == [FUTURE, NOT_FOUND]
    assert (rows.words()[:, 0] & 0xFF).tolist() == [NOT_FOUND, NOT_FOUND]


def test_changed_keys_leaves_out_what_did_not_change():
    events = [event(10 * SECOND, user=1), event(20 * SECOND, user=2), event(21 * SECOND, user=3)]
    made = computer(events, {"n": d.count(window="5s")}, timedelta(seconds=100))
    changed = made.changed_keys(14 * SECOND, 20 * SECOND)
    assert changed[:, 0].tolist() == [1, 2]  # one left the window, one came
    assert made.changed_keys(30 * SECOND, 99 * SECOND).tolist() == []
    assert made.changed_keys(110 * SECOND, 110 * SECOND + 1)[:, 0].tolist() == [1]  # its ttl passed


def test_an_empty_source_has_no_keys():
    made = computer([], {"x": col("x"), "n": d.sum(col("x"), window="1s")}, timedelta(seconds=1))
    assert made.keys.shape == (0, 2) and made.changed_keys(0, 9).shape == (0, 2)
    rows = at(made, [1, 2], [0, 1])
    assert rows.status.tolist() == [NOT_FOUND] * 2 and not any(valid.any() for _, valid in rows.columns)
    assert at(made, [], []).words().shape == (0, made.row_schema.row_words)


def test_composite_and_string_keys_do_not_cross():
    pair = d.Entity("pair", ["i", "s"])
    events = [event(0, i=1, s=0, x=1.0), event(0, i=1, s=1, x=2.0), event(0, i=None, s=1, x=3.0)]
    made = ViewComputer(view({"x": col("x")}, entities=[pair]), table(events), SEED)
    assert made.join_dtypes == ("int64", "string") and len(made.keys) == 2
    keys, nulls = _core.keys128([[1, 1, 1], ["green", "red", "blue"]], SEED)
    assert cells(made.rows_at(keys, np.zeros(3, np.int64), nulls=nulls), made)["x"] == [2.0, 1.0, None]


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)])
def test_minus_zero_is_below_zero_in_either_order(zeros):
    features = {"lo": d.min(col("x"), window="1s"), "hi": d.max(col("x"), window="1s")}
    made = computer([event(n, x=x) for n, x in enumerate(zeros)], features)
    row = {name: found[0] for name, found in cells(at(made, [1], [1]), made).items()}
    assert math.copysign(1.0, row["lo"]) == -1.0 and math.copysign(1.0, row["hi"]) == 1.0


def test_events_of_unknown_created_stay_out_of_a_cut_off_window():
    events = [event(0, x=1.0), event(1, x=2.0) | {"k": None}, event(2, x=4.0, k=9), event(3, x=8.0)]
    features = {
        "n": d.count(window="1s"),
        "s": d.sum(col("x"), window="1s"),
        "i": d.count(col("x"), window="1s"),
    }
    made = computer(events, features)
    assert cells(at(made, [1], [3], [3]), made) == {"n": [2], "s": [9.0], "i": [2]}
    assert cells(at(made, [1], [3], [9]), made) == {"n": [3], "s": [13.0], "i": [3]}
    assert cells(at(made, [1], [3]), made) == {"n": [4], "s": [15.0], "i": [4]}


def test_the_value_of_a_null_is_zero():
    features = {"x": col("x"), "i": col("i"), "m": d.mean(col("x"), window="1s"), "n": d.count(window="1s")}
    made = computer([event(0, x=3.0, i=None), event(9, user=2, x=5.0, i=7)], features, timedelta(seconds=1))
    rows = at(made, [1, 1, 2, 3, None], [0, 2 * SECOND, 0, 0, 0])
    assert rows.status.tolist() == [PRESENT, EXPIRED, FUTURE, NOT_FOUND, NOT_FOUND]
    for values, valid in rows.columns:
        assert values[~valid].tolist() == [0] * int((~valid).sum()) and not valid[1:].any()


def test_null_keys_are_zero_words():
    text = SourceColumn("string", np.array([0, 1, 0]), np.array([True, True, False]), ["a", "b"])
    number = SourceColumn("int64", np.array([5, 0, 7]), np.array([True, False, True]))
    for columns, expected in (([text], [False, False, True]), ([number], [False, True, False]),
                              ([number, text], [False, True, True])):  # fmt: skip
        keys, nulls = entity_keys(columns, 3, SEED)
        assert nulls.tolist() == expected and not keys[nulls].any() and keys[~nulls].any(axis=1).all()
