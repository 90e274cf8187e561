"""Stored rows of native event tables against the slow oracle: windows, versions of events, appends."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import window_oracle as oracle
from window_cases import (
    LETTERS,
    SEED,
    SOURCE,
    USER,
    Case,
    ask,
    bits,
    cells,
    check_case,
    same,
    table,
)
from window_oracle import SECOND, UNKNOWN, Rule

import penstock as d
from penstock import _core
from penstock.errors import DefinitionError, InvalidArgumentError
from penstock.features.aggregates import parse_window, tile_us
from penstock.features.compute import PRESENT, ViewComputer
from penstock.features.expressions import col
from penstock.features.sources import SourceColumn, SourceTable


def seeds(n: int, at: int = 0) -> range:
    return range(at, at + n)


def run_oracle(seed_range: range, questions: int = 10) -> None:
    for seed in seed_range:
        rng = random.Random(seed)
        check_case(Case(rng, rng.choice([3, 12, 40, 300]), versions=seed % 3 == 0), questions)


def test_rows_are_those_of_the_oracle() -> None:
    run_oracle(seeds(220))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_rows_are_those_of_the_oracle_long() -> None:
    run_oracle(seeds(6000, 10_000))


def finds(fault: Rule, limit: int) -> int | None:
    """The first seed whose case tells the faulty rule from the computer."""
    for seed in seeds(limit):
        rng = random.Random(seed)
        case = Case(rng, rng.choice([3, 12, 40, 300]), versions=seed % 3 == 0)
        made = case.computer()
        users, times = case.users(10), case.moments(10)
        cuts = None
        if rng.random() < 0.4:
            cuts = [t + rng.choice([-SECOND, 0, 0, 1, SECOND, 10**15]) for t in times]
        rows = ask(made, users, times, cuts)
        for n, (user, now) in enumerate(zip(users, times)):
            status, _, values = case.expected(user, now, None if cuts is None else cuts[n], fault)
            if rows.status[n] != status or cells(made, rows, n) != values:
                return seed
    return None


@pytest.mark.parametrize("fault", oracle.FAULTS)
def test_p7_each_fault_at_a_boundary_is_caught_by_the_generated_cases(fault: str) -> None:
    assert finds(oracle.FAULTS[fault], 220) is not None


def test_p7_the_rule_itself_is_not_caught() -> None:
    assert finds(Rule(), 60) is None


def draw(seed: int, versions: bool | None = None) -> Case:
    rng = random.Random(seed)
    return Case(rng, rng.choice([3, 12, 40, 300]), versions=seed % 3 == 0 if versions is None else versions)


def asked(case: Case, n: int) -> tuple[list[Any], list[int], list[int] | None]:
    times = case.moments(n)
    cuts = [t + case.rng.choice([-SECOND, 0, 1, SECOND]) for t in times] if case.rng.random() < 0.3 else None
    return case.users(n), times, cuts


def run_replay(seed_range: range) -> None:
    """P2: what has been appended in order of arrival equals the whole computed anew, at each step."""
    for seed in seed_range:
        case = draw(seed)
        cut = case.rng.randint(0, len(case.events))
        made = case.computer(case.events[:cut])
        while True:
            question = asked(case, 8)
            if cut and case.rng.random() < 0.5:
                ask(made, [1], [case.events[cut - 1]["t"]])  # so that there are tiles to keep up to date
            assert same(ask(made, *question), ask(case.computer(case.events[:cut]), *question)), seed
            whole = case.computer(case.events[:cut])
            assert {*map(tuple, made.keys.tolist())} >= {*map(tuple, whole.keys.tolist())}
            if cut == len(case.events):
                break
            size = case.rng.choice([1, 1, 2, 7, 50])
            batch = case.events[cut : cut + size]
            touched = made.append(table(batch, LETTERS[::-1], case.versions))
            expected = {e["user"] % 2**64 for e in batch if e["user"] is not None}
            assert sorted(touched[:, 0].tolist()) == sorted(expected) and not touched[:, 1].any()
            cut += len(batch)


def test_p2_a_replay_by_append_equals_the_whole_at_each_step() -> None:
    run_replay(seeds(60))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_p2_a_replay_by_append_equals_the_whole_at_each_step_long() -> None:
    run_replay(seeds(3000, 50_000))


def run_tiles(seed_range: range) -> None:
    """P5: stored tiles or none, appended or not: the same bits."""
    for seed in seed_range:
        case = draw(seed)
        case.events += [case.event() for _ in range(150)]
        if seed % 2:  # appends that lie behind all that is there
            case.events.sort(key=lambda e: (e["t"], UNKNOWN if e["k"] is None else e["k"]))
        question = asked(case, 12)
        bulk = ask(case.computer(), *question)
        assert same(bulk, ask(case.computer(store_tiles=False), *question)), seed
        cut = case.rng.randint(0, len(case.events))
        appended = case.computer(case.events[:cut])
        ask(appended, *question)
        for at in range(cut, len(case.events), 40):
            appended.append(table(case.events[at : at + 40], versions=case.versions))
        assert same(bulk, ask(appended, *question)), seed


def test_p5_tiles_change_no_bit() -> None:
    run_tiles(seeds(80))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_p5_tiles_change_no_bit_long() -> None:
    run_tiles(seeds(4000, 90_000))


def test_p4_later_events_change_nothing() -> None:
    for seed in seeds(60):
        case = draw(seed, versions=False)
        users, times, cuts = asked(case, 8)
        before = ask(case.computer(), users, times, cuts)
        latest = max([*times, *(e["t"] for e in case.events)])
        extra = [e | {"t": latest + 1 + abs(e["t"])} for e in (case.event() for _ in range(20))]
        after = ask(case.computer(extra + case.events), users, times, cuts)
        for (a, valid), (b, other) in zip(before.columns, after.columns):
            assert a.tobytes() == b.tobytes() and valid.tobytes() == other.tobytes()
        assert (before.meta[:, 2:] == after.meta[:, 2:]).all()
        assert ((before.status == PRESENT) == (after.status == PRESENT)).all()


def test_p4_a_batch_split_in_any_way_gives_the_same_rows() -> None:
    for seed in seeds(40):
        case = draw(seed)
        users, times, cuts = asked(case, 70)
        made = case.computer()
        whole = ask(made, users, times, cuts)
        for n in case.rng.sample(range(70), 12):
            one = ask(made, [users[n]], [times[n]], None if cuts is None else [cuts[n]])
            assert one.status[0] == whole.status[n] and (one.meta[0] == whole.meta[n]).all()
            assert cells(made, one, 0) == cells(made, whole, n)


def test_p4_a_shift_of_all_times_shifts_nothing_else() -> None:
    shift = 7 * 86_400 * SECOND * 5  # a multiple of every tile and tick
    for seed in seeds(60):
        case = draw(seed)
        users, times, cuts = asked(case, 8)
        before = ask(case.computer(), users, times, cuts)
        moved = [
            e | {"t": e["t"] + shift, "k": None if e["k"] is None else e["k"] + shift} for e in case.events
        ]
        cuts = None if cuts is None else [c + shift for c in cuts]
        after = ask(case.computer(moved), users, [t + shift for t in times], cuts)
        for (a, valid), (b, other) in zip(before.columns, after.columns):
            assert a.tobytes() == b.tobytes() and valid.tobytes() == other.tobytes()
        assert (before.status == after.status).all()
        ends = (before.meta == UNKNOWN) | (before.meta == 2**63 - 1)
        assert (np.where(ends, before.meta, before.meta + shift) == after.meta).all()


def run_intervals(seed_range: range) -> None:
    for seed in seed_range:
        case = draw(seed)
        made = case.computer()
        if case.rng.random() < 0.5 and case.events:
            made = case.computer(case.events[:-1])
            made.append(table(case.events[-1:], versions=case.versions))
        users, times, _ = asked(case, 8)
        rows = ask(made, users, times)
        words = rows.words()
        for n, (user, now) in enumerate(zip(users, times)):
            since, until = int(rows.meta[n, 0]), int(rows.meta[n, 1])
            low, high = max(since, now - 3000 * SECOND), min(until - 1, now + 3000 * SECOND)
            assert low <= now <= high
            probes = [low, high, *(case.rng.randint(low, high) for _ in range(6))]
            probes += [t for t in case.moments(6) if low <= t <= high]
            again = ask(made, [user] * len(probes), probes)
            assert (again.words() == words[n]).all(), seed
            assert (again.meta[:, 2:] == rows.meta[n, 2:]).all(), seed


def test_a_row_keeps_its_bits_throughout_its_interval() -> None:
    run_intervals(seeds(120))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_row_keeps_its_bits_throughout_its_interval_long() -> None:
    run_intervals(seeds(6000, 200_000))


def test_intervals_end_only_where_something_may_change() -> None:
    for seed in seeds(60):
        case = draw(seed)
        made = case.computer()
        own = [e for e in case.events if e["user"] == 1]
        # Per event: its time, known-at and expiry, and for each window its entry, its exit and its known-at.
        most = len(own) * (3 + 3 * len(case.specs)) + 2
        now, steps = -(2**62), 0
        while now < 2**62:
            now = int(ask(made, [1], [now]).meta[0, 1])
            steps += 1
        assert steps <= most, (seed, steps, most)


def test_changed_keys_are_all_there() -> None:
    for seed in seeds(100):
        case = draw(seed)
        made = case.computer()
        made.append(table([case.event() for _ in range(case.rng.randint(0, 3))], versions=case.versions))
        keys = made.keys
        start, end = sorted(case.moments(2))
        before = made.rows_at(keys, np.full(len(keys), start))
        after = made.rows_at(keys, np.full(len(keys), end))
        differ = (before.words() != after.words()).any(axis=1)
        changed = {*map(tuple, made.changed_keys(start, end).tolist())}
        assert {*map(tuple, keys[differ].tolist())} <= changed <= {*map(tuple, keys.tolist())}


def test_exp2_of_the_oracle_is_two_to_the_power() -> None:
    for x in [0.0, -0.25, -0.5, -0.75, -1.0, -3.3, -1021.7, -1074.0, -1080.0, -5000.0]:
        assert math.isclose(oracle.exp2(x), 2.0**x, rel_tol=1e-15, abs_tol=5e-324)


def event(t: int, user: int = 1, **more: Any) -> dict[str, Any]:
    plain = {"user": user, "t": t, "k": t, "x": None, "h": None, "i": None, "s": None, "id": None,
             "deleted": False}  # fmt: skip
    return plain | more


def one_row(events: list[dict[str, Any]], features: dict[str, Any], now: int, **more: Any) -> dict[str, Any]:
    view = d.FeatureView("v", [USER], SOURCE, features, **more)
    made = ViewComputer(view, table(events, versions=True), SEED)
    found = {}
    for (name, dtype), (values, valid) in zip(made.schema, ask(made, [1], [now]).columns):
        value = made.dictionaries[name][values[0]] if dtype == "string" else values[0].item()
        found[name] = value if valid[0] else None
    return found


def test_each_aggregate_of_known_numbers() -> None:
    x = [1.0, 2.0, 2.0, 5.0]
    events = [event(n * SECOND, x=v, s="dab"[min(n, 2)]) for n, v in enumerate(x)]
    window = {"window": "10s"}
    got = one_row(events, {
        "var": d.var(col("x"), **window), "pop": d.var(col("x"), ddof=0, **window),
        "std": d.std(col("x"), **window),
        "first": d.first(col("x"), **window), "last": d.last(col("s"), **window),
        "n": d.distinct(col("x"), **window), "top": d.top_k(col("x"), **window),
        "second": d.top_k(col("x"), rank=2, **window), "fourth": d.top_k(col("x"), rank=4, **window),
        "text": d.top_k(col("s"), rank=2, **window),
        "ewma": d.ewma(col("x"), half_life="1s", **window),
    }, 4 * SECOND)  # fmt: skip
    weights = [1 / 8, 1 / 4, 1 / 2, 1.0]
    assert math.isclose(got["var"], 3.0) and math.isclose(got["pop"], 2.25)
    assert got["std"] == math.sqrt(got["var"])
    assert (got["first"], got["last"], got["n"]) == (1.0, "b", 3)
    assert (got["top"], got["second"], got["fourth"], got["text"]) == (2.0, 1.0, None, "a")
    assert math.isclose(got["ewma"], sum(w * v for w, v in zip(weights, x)) / sum(weights), rel_tol=1e-15)


def test_a_variance_of_large_numbers_is_no_difference_of_squares() -> None:
    events = [event(n * SECOND, x=1e9 + v) for n, v in enumerate([0.0, 1.0, 2.0])]
    assert one_row(events, {"v": d.var(col("x"), window="300s")}, 5 * SECOND) == {"v": 1.0}


@pytest.mark.parametrize("n", [1024, 1025, 20_000, 200_000])
def test_distinct_is_exact_up_to_its_bound_and_near_above(n: int) -> None:
    t = np.zeros(n, np.int64)
    columns = {"user": SourceColumn("int64", np.ones(n, np.int64), None),
               "t": SourceColumn("timestamp", t, None),
               "i": SourceColumn("int64", np.arange(n), None)}  # fmt: skip
    view = d.FeatureView("v", [USER], SOURCE, {"n": d.distinct(col("i"), window="1s")})
    made = ViewComputer(view, SourceTable(columns, n, t, t), SEED)
    found = ask(made, [1], [0]).columns[0][0][0]
    if n <= 1024:
        assert found == n
    else:
        assert found == oracle.hll({oracle.hash_of(i) for i in range(n)})
        assert abs(found - n) < 0.05 * n


def test_a_correction_replaces_and_a_deletion_removes_an_event() -> None:
    events = [event(0, id=7, x=1.0), event(0, id=7, x=2.0, k=5), event(SECOND, id=8, x=4.0),
              event(SECOND, id=8, k=9 * SECOND, deleted=True)]  # fmt: skip
    features = {"x": col("x"), "sum": d.sum(col("x"), window="9s"), "n": d.count(window="9s")}
    made = ViewComputer(d.FeatureView("v", [USER], SOURCE, features), table(events, versions=True), SEED)
    rows = ask(made, [1] * 4, [SECOND] * 4, [0, 5, 2 * SECOND, 9 * SECOND])
    assert [cells(made, rows, n) for n in range(4)] == [
        [bits(1.0), bits(1.0), 1], [bits(2.0), bits(2.0), 1], [bits(4.0), bits(6.0), 2],
        [bits(2.0), bits(2.0), 1],
    ]  # fmt: skip
    # Repeated, late and older versions change nothing now.
    before = ask(made, [1], [SECOND])
    made.append(table([events[1], events[3], event(0, id=7, k=3, x=9.0)], versions=True))
    assert same(before, ask(made, [1], [SECOND])) and made.n_events == 4
    assert cells(made, ask(made, [1], [SECOND], [4]), 0)[0] == bits(9.0)


def test_append_grows_dictionaries_and_erase_forgets() -> None:
    features = {"s": col("s"), "top": d.top_k(col("s"), window="9s"), "n": d.distinct(col("s"), window="9s")}
    made = ViewComputer(d.FeatureView("v", [USER], SOURCE, features), table([event(0, s="b")], ["b"]), SEED)
    old = made.dictionaries["s"]
    made.append(table([event(1, s="z"), event(2, s="a")], ["z", "a", "b"]))
    assert old == ["b"] and made.dictionaries["s"] == made.dictionaries["top"] == ["b", "z", "a"]
    assert cells(made, ask(made, [1], [2]), 0) == ["a", "a", 3]
    assert made.erase(made.keys) == 1 and made.n_events == 0
    assert ask(made, [1], [2]).status[0] == 2
    made.append(table([event(5, s="b")]))
    assert cells(made, ask(made, [1], [5]), 0) == ["b", "b", 1]


def test_an_append_that_does_not_fit_changes_nothing() -> None:
    features = {"x": col("x"), "s": col("s"), "n": d.count(window="9s")}
    view = d.FeatureView("v", [USER], SOURCE, features)
    made = ViewComputer(view, table([event(0, x=1.0, s="a")]), SEED)
    wrong = table([event(1, x=2.0, s="a")], ["new", "a"])
    wrong.columns["x"] = SourceColumn("int64", np.ones(1, np.int64), None)
    with pytest.raises(InvalidArgumentError, match="appended column 'x' is int64; expected float64"):
        made.append(wrong)
    with pytest.raises(InvalidArgumentError, match="appended rows have event ids"):
        made.append(table([event(1, x=2.0, s="a")], versions=True))
    wrong = table([event(1, x=2.0, s="a")], ["new", "a"])
    wrong.columns["x"] = SourceColumn("float64", np.ones(2), None)
    with pytest.raises(ValueError, match=r"column \d is not a contiguous array of its type and 1 rows"):
        made.append(wrong)
    assert made.n_events == 1 and made.dictionaries["s"] == LETTERS
    assert cells(made, ask(made, [1], [5]), 0) == [bits(1.0), "a", 1]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: d.sum(col("x"), window="1w"), "window is '1w'; expected a length such as"),
        (lambda: d.sum(col("x"), window="1s", closed="open"), "closed is 'open'; expected one of right"),
        (lambda: d.sum(col("x"), window="1s", lag="0s"), "sum: lag is '0s'; expected a length"),
        (lambda: d.sum(col("x"), window="1s", as_known=1), "as_known is 1; expected True or False"),
        (lambda: d.var(col("x"), window="1s", ddof=-1), "var: ddof is -1; expected a whole number from 0"),
        (lambda: d.std(col("x"), window="1s", ddof=1.0), "std: ddof is 1.0; expected a whole number"),
        (lambda: d.distinct(col("x"), window="1s", exact=0), "distinct: exact is 0; expected"),
        (lambda: d.top_k(col("x"), window="1s", rank=0), "top_k: rank is 0; expected"),
        (lambda: d.ewma(col("x"), window="1s", half_life="1"), "ewma: half_life is '1'; expected a length"),
        (lambda: d.first(1, window="1s"), "first: value is 1; expected an expression"),
        (lambda: d.last(d.now() - col("t"), window="1s"), "last: an aggregated expression cannot read"),
        (lambda: d.FeatureView("v", [USER], SOURCE, {"x": col("x")}, as_known="no"), "as_known is 'no'"),
    ],
)
def test_a_bad_argument_is_named(make: Any, message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        make()


def test_every_option_is_in_the_fingerprint() -> None:
    x = col("x")
    made = [
        d.sum(x, window="1s"), d.sum(x, window="2s"), d.sum(x, window="1s", closed="left"),
        d.sum(x, window="1s", lag="1s"), d.sum(x, window="1s", every="1s"),
        d.sum(x, window="1s", as_known=True),
        d.var(x, window="1s"), d.var(x, window="1s", ddof=0), d.std(x, window="1s"), d.first(x, window="1s"),
        d.distinct(x, window="1s"), d.distinct(x, window="1s", exact=9), d.top_k(x, window="1s"),
        d.top_k(x, window="1s", rank=2), d.ewma(x, window="1s", half_life="1s"),
        d.ewma(x, window="1s", half_life="2s"),
    ]  # fmt: skip
    assert len({aggregate.fingerprint() for aggregate in made}) == len(made)
    views = [d.FeatureView("v", [USER], SOURCE, {"x": x}, as_known=known) for known in (False, True)]
    assert views[0].fingerprint() != views[1].fingerprint()


def test_tiles_are_the_standard_widths() -> None:
    for text, tile in (("255s", 0), ("256s", 1), ("1279s", 1), ("1280s", 5), ("1d", 300), ("30d", 3600)):
        assert tile_us(parse_window(text)) == tile * SECOND == oracle.tile_of(parse_window(text))


def many_values(n: int, values: np.ndarray[Any, Any], seconds_: int) -> SourceTable:
    t = np.arange(n) * seconds_ * SECOND // n
    columns = {"user": SourceColumn("int64", np.ones(n, np.int64), None),
               "t": SourceColumn("timestamp", t, None), "i": SourceColumn("int64", values, None)}  # fmt: skip
    return SourceTable(columns, n, t, t)


@pytest.mark.parametrize("width", [60, 4])  # seconds: tiles of few values, and of more than a node lists
def test_sets_of_many_values_are_the_same_with_tiles_and_appends(width: int) -> None:
    n = 24_000
    rng = np.random.default_rng(width)
    values = np.where(rng.random(n) < 0.3, rng.integers(0, 9, n), np.arange(n) * 7)
    w = {"window": "300s"}
    features = {
        "few": d.distinct(col("i"), exact=10, **w), "some": d.distinct(col("i"), **w),
        "all": d.distinct(col("i"), exact=65_536, **w), "top": d.top_k(col("i"), **w),
        "ninth": d.top_k(col("i"), rank=9, **w), "tenth": d.top_k(col("i"), rank=10, **w),
    }  # fmt: skip
    view = d.FeatureView("v", [USER], SOURCE, features)
    whole = many_values(n, values, width)
    plain, tiled = ViewComputer(view, whole, SEED, store_tiles=False), ViewComputer(view, whole, SEED)
    rows = np.arange(n)
    parts = [
        SourceTable({k: c.take(p) for k, c in whole.columns.items()}, len(p), whole.event_time[p],
                    whole.event_time[p]) for p in np.array_split(rows, [n // 2, n // 2 + 1, n - 3000])
    ]  # fmt: skip
    appended = ViewComputer(view, parts[0], SEED)
    times = [int(t) for t in rng.integers(0, (width + 310) * SECOND, 12)]
    ask(appended, [1] * 12, times)
    for part in parts[1:]:
        appended.append(part)
    expected = ask(plain, [1] * 12, times)
    assert same(expected, ask(tiled, [1] * 12, times)) and same(expected, ask(appended, [1] * 12, times))
    end = ask(tiled, [1], [(width + 1) * SECOND])
    few, some, exact = (int(end.columns[at][0][0]) for at in range(3))
    assert exact == len(np.unique(values)) and few == some
    assert few == oracle.hll({oracle.hash_of(int(v)) for v in np.unique(values)})


@pytest.mark.parametrize("kind", ["narrow", "wide", "text"])
def test_large_sources_and_batches_are_shared_out_without_a_trace(kind: str) -> None:
    n, m = 150_000, 30_000
    rng = np.random.default_rng(5)
    numbers = rng.integers(0, 3000, n)
    t, known = rng.integers(0, 2000, n) * SECOND, rng.integers(0, 9, n)
    texts = [f"key {i}" for i in range(3000)]
    if kind == "text":
        user = SourceColumn("string", numbers, None, texts)
    else:
        user = SourceColumn("int64", numbers if kind == "narrow" else numbers * 2**40 - 2**50, None)
    x = rng.random(n).astype(np.float32)
    columns = {
        "user": user,
        "x": SourceColumn("float32", x, None),
        "i": SourceColumn("int64", np.arange(n), None),
    }
    features = {
        "i": col("i"),
        "x": col("x"),
        "n": d.count(window="100s"),
        "s": d.sum(col("x"), window="300s"),
    }
    made = ViewComputer(
        d.FeatureView("v", [USER], SOURCE, features), SourceTable(columns, n, t, t + known), SEED
    )
    asked_for, now = rng.integers(0, 3100, m), rng.integers(-5, 2100, m) * SECOND
    values = asked_for * (2**40 if kind == "wide" else 1) - (2**50 if kind == "wide" else 0)
    given: list[Any] = [f"key {i}" for i in asked_for] if kind == "text" else values.tolist()
    keys, _ = _core.keys128([given], SEED)
    rows = made.rows_at(keys, now)
    order = np.lexsort((known, t, numbers))
    at = np.searchsorted(numbers[order] * 10**10 + t[order], asked_for * 10**10 + now, "right") - 1
    newest = np.where(at < 0, 0, order[at])
    there = (at >= 0) & (numbers[newest] == asked_for)
    assert (rows.columns[0][1] == there).all() and (rows.columns[0][0][there] == newest[there]).all()
    assert (rows.columns[1][0][there] == x[newest[there]].astype(np.float64)).all()
    for n_at in range(0, m, 5000):  # a few rows, each by itself
        one = made.rows_at(keys[n_at : n_at + 1], now[n_at : n_at + 1])
        assert (one.meta[0] == rows.meta[n_at]).all() and one.status[0] == rows.status[n_at]
        for (a, valid), (b, others) in zip(one.columns, rows.columns):
            assert a[0].tobytes() == b[n_at].tobytes() and valid[0] == others[n_at]
