"""The acceptance cases of the historical join, A1 to A15, on Parquet files.

They re-create what Feast's own integration tests check, by their numbers in the acceptance list, and expect
the
policy of SQL left joins: every entity row stays, in order.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from acceptance import DAY, HOUR, US, USER, UTC_US, T, World, as_of, ask, equal
from hypothesis import given, settings
from hypothesis import strategies as st

import penstock as d
from penstock.errors import (
    DefinitionError,
    FailedPreconditionError,
    FeatureNameCollisionError,
    InvalidArgumentError,
    NotFoundError,
)
from penstock.features.expressions import col, now
from penstock.features.store import FeatureStore

CUSTOMER, DRIVER = d.Entity("customer", ["customer_id"]), d.Entity("driver", ["driver_id"])
PLACE = d.Entity("location", ["location_id"])
FULL = pytest.mark.parametrize("full", [False, True])


def _random_rows(rng: np.random.Generator, n: int, **columns: Any) -> list[dict[str, Any]]:
    rows = []
    for _ in range(n):
        t = T - timedelta(hours=int(rng.integers(-20, 200)), minutes=int(rng.integers(0, 60)))
        row = {"t": t, "c": t + timedelta(hours=int(rng.integers(0, 5)))}
        rows.append({**row, **{name: make(rng) for name, make in columns.items()}})
    return rows


def _columns(rows: list[dict[str, Any]]) -> pa.Table:
    kinds = {"t": UTC_US, "c": UTC_US, "driver_id": pa.int64(), "location_id": pa.int64()}
    return pa.table({name: pa.array([row[name] for row in rows], kinds.get(name)) for name in rows[0]})


@FULL
@pytest.mark.parametrize("frame", ["pandas", "arrow", "polars"])
def test_a01_main_join_over_six_views(world: World, full: bool, frame: str) -> None:
    rng = np.random.default_rng(5)
    customers = ["ä", "b", "c"]
    rows = {
        "profile": _random_rows(rng, 30, customer_id=lambda r: customers[r.integers(3)],
                                balance=lambda r: r.normal(), trips=lambda r: int(r.integers(99))),
        "driver_stats": _random_rows(rng, 40, driver_id=lambda r: int(r.integers(4)),
                                     conv_rate=lambda r: [None, r.random()][r.integers(2)]),
        "orders": _random_rows(rng, 60, customer_id=lambda r: customers[r.integers(3)],
                               driver_id=lambda r: int(r.integers(4)), success=lambda r: bool(r.integers(2))),
        "market": _random_rows(rng, 9, rate=lambda r: r.random()),
        "mapped": _random_rows(rng, 20, driver_id=lambda r: int(r.integers(4)),
                               name=lambda r: "xyz"[r.integers(3)]),
        "weather": _random_rows(rng, 30, location_id=lambda r: int(r.integers(3)),
                                degrees=lambda r: r.normal()),
    }  # fmt: skip
    ttls = {"profile": 3 * DAY, "driver_stats": DAY, "orders": 5 * DAY}
    renamed = _columns(rows["mapped"]).rename_columns(["event_time", "known", "driver", "label"])
    weather = world.view("weather", _columns(rows["weather"]), ["degrees"], entities=[PLACE], created="c")
    store = world.open(
        world.view("profile", _columns(rows["profile"]), ["balance", "trips"], entities=[CUSTOMER],
                   ttl=ttls["profile"], created="c"),
        world.view("driver_stats", _columns(rows["driver_stats"]),
                   {"conv_rate": col("conv_rate"), "doubled": col("conv_rate") * 2,
                    "age": (now() - col("t")).hours()},
                   entities=[DRIVER], ttl=ttls["driver_stats"], created="c"),
        world.view("orders", _columns(rows["orders"]), ["success"], entities=[CUSTOMER, DRIVER],
                   ttl=ttls["orders"], created="c"),
        world.view("market", _columns(rows["market"]), ["rate"], entities=[], created="c"),
        world.view("mapped", renamed, ["name"], entities=[DRIVER], created="c", field_mapping={
            "event_time": "t", "known": "c", "driver": "driver_id", "label": "name"}),
        weather,
        weather.with_name("origin").with_join_key_map({"location_id": "origin_id"}),
        weather.with_name("destination").with_join_key_map({"location_id": "destination_id"}),
    )  # fmt: skip
    n = 60
    asked = pa.table(
        {
            "order_id": list(range(n)),
            "customer_id": [[*customers, "nobody", None][rng.integers(5)] for _ in range(n)],
            "driver_id": pa.array([[0, 1, 2, 3, 9, None][rng.integers(6)] for _ in range(n)], pa.int64()),
            "origin_id": rng.integers(0, 4, n),
            "destination_id": rng.integers(0, 4, n),
            "event_timestamp": [T - timedelta(hours=int(rng.integers(-9, 150))) for _ in range(n)],
        }
    )  # fmt: skip
    refs = ["profile:balance", "driver_stats:conv_rate", "profile:trips", "orders:success", "market:rate",
            "mapped:name", "driver_stats:doubled", "driver_stats:age"]  # fmt: skip
    refs += ["origin:degrees", "destination:degrees"] if full else ["origin:degrees"]
    given: Any = {"pandas": asked.to_pandas, "arrow": lambda: asked, "polars": lambda: pl.from_arrow(asked)}[
        frame
    ]()
    job = store.get_historical_features(given, refs, full, with_status=True)
    got = job.to_arrow()
    order = [
        ref
        for view in dict.fromkeys(r.split(":")[0] for r in refs)
        for ref in refs
        if ref.startswith(view + ":")
    ]
    names = {ref: ref.replace(":", "__") if full else ref.split(":")[1] for ref in refs}
    plain = [name for name in got.column_names if not name.endswith("__status")]
    assert plain == asked.column_names + [names[ref] for ref in order]
    assert got["order_id"].to_pylist() == list(range(n)) and job.to_df().index.tolist() == list(range(n))
    key_columns = {"profile": ["customer_id"], "driver_stats": ["driver_id"], "market": [],
                   "orders": ["customer_id", "driver_id"], "mapped": ["driver_id"]}  # fmt: skip
    seen = set()
    for i, entity in enumerate(asked.to_pylist()):
        for ref in refs:
            owner, feature = ref.split(":")
            if owner in ("origin", "destination"):
                view, key = "weather", {"location_id": entity[f"{owner}_id"]}
            else:
                view, key = owner, {name: entity[name] for name in key_columns[owner]}
            base = {"doubled": "conv_rate", "age": "t"}.get(feature, feature)
            value, status = as_of(rows[view], key, entity["event_timestamp"], base, ttl=ttls.get(view))
            if value is not None and feature == "doubled":
                value = value * 2
            if value is not None and feature == "age":
                value = (entity["event_timestamp"] - value) / HOUR
            assert equal(got[names[ref]][i].as_py(), value), (i, ref)
            assert got[names[ref] + "__status"][i].as_py() == status, (i, ref)
            seen.add((view, status))
    assert len(seen) > 15


@FULL
def test_a02_a_feature_that_the_view_lacks(world: World, full: bool) -> None:
    store = world.open(world.view("profile", {"u": [1], "t": [T], "balance": [1.0]}, ["balance"]))
    with pytest.raises(LookupError, match="no such feature 'balanse'; did you mean 'balance'"):
        store.get_historical_features(ask([1]), ["profile:balance", "profile:balanse"], full)
    with pytest.raises(NotFoundError, match="no such view 'profiles'; did you mean 'profile'"):
        store.get_historical_features(ask([1]), ["profiles:balance"], full)


@FULL
def test_a03_missing_request_data(world: World, full: bool) -> None:
    request = d.RequestSource("order", {"amount": "float64"})
    store = world.open(
        world.view("profile", {"u": [1], "t": [T], "balance": [1.0]}, ["balance"]),
        request,
        d.FeatureService("model", ["profile:balance", "order:amount"], request=request),
    )
    for features in ("model", ["profile:balance", "order:amount"]):
        with pytest.raises(InvalidArgumentError, match="entity_df has no request input 'amount'"):
            store.get_historical_features(ask([1]), features, full).to_arrow()
        got = store.get_historical_features(ask([1], amount=[2.5]), features, full).to_arrow()
        assert got["amount"].to_pylist() == [2.5]


@FULL
def test_a04_entity_rows_from_sql(world: World, full: bool) -> None:
    pytest.importorskip("duckdb")
    store = world.open(world.view("profile", {"u": [1, 2], "t": [T, T], "balance": [1.0, 2.0]}, ["balance"]))
    world.table("orders", ask([2, 1, 3, 2], [T, T, T, T - US], label=["a", "b", "c", "d"]))
    query = "SELECT u, event_timestamp, label FROM 'orders.parquet' WHERE label <> 'b' ORDER BY label"
    got = store.get_historical_features(query, ["profile:balance"], full).to_arrow()
    name = "profile__balance" if full else "balance"
    assert got.column_names == ["u", "event_timestamp", "label", name]
    assert got["label"].to_pylist() == ["a", "c", "d"] and got[name].to_pylist() == [2.0, None, None]


@FULL
def test_a05_a_join_is_persisted_and_read_again(world: World, full: bool) -> None:
    data = {
        "u": [1, 2],
        "t": [T, T],
        "n": [2**53 + 1, 5],
        "s": ["ä", None],
        "b": [None, True],
        "at": [T, None],
    }
    store = world.open(world.view("profile", data, ["n", "s", "b", "at"]))
    refs = [f"profile:{name}" for name in ("n", "s", "b", "at")]
    job = store.get_historical_features(ask([2, 1, 9]), refs, full, with_status=True)
    path = job.persist(world.folder / "sets" / "train.parquet")
    again = pq.read_table(path)
    assert again.equals(job.to_arrow())
    with pytest.raises(FailedPreconditionError, match="is there already"):
        job.persist(path)
    other = store.get_historical_features(ask([1]), refs, full)
    assert pq.read_table(other.persist(path, overwrite=True)).num_rows == 1
    joined = store.get_historical_features(
        again.select(["u", "event_timestamp"]), refs, full, with_status=True
    ).to_arrow()  # a persisted set joins again, to the same
    assert joined.equals(again)


@FULL
def test_a06_without_a_ttl_a_value_never_expires(world: World, full: bool) -> None:
    old = datetime(1971, 1, 1, tzinfo=UTC)
    data = {"u": [1], "t": [old], "v": [7]}
    store = world.open(world.view("v", data, ["v"]), world.view("short", data, ["v"], ttl=DAY))
    name = "v__v" if full else "v"
    for view, expected in (("v", 7), ("short", None)):
        got = store.get_historical_features(ask([1]), [f"{view}:v"], full).to_arrow()
        assert got[name if view == "v" or not full else "short__v"].to_pylist() == [expected]
    with pytest.raises(DefinitionError, match="ttl is 0:00:00; expected more than zero, or None"):
        world.view("zero", data, ["v"], ttl=timedelta(0))


@FULL
def test_a07_backfills_newer_created_wins_at_one_time_and_newer_time_beats_created(
    world: World, full: bool
) -> None:
    data = {"u": [1, 1, 2, 2, 3, 3], "t": [T, T, T - HOUR, T, T, T],
            "c": [T + HOUR, T, T + DAY, T, None, T - HOUR], "v": [10, 11, 20, 21, 30, 31]}  # fmt: skip
    store = world.open(world.view("v", data, ["v"], created="c"))
    got = store.get_historical_features(ask([1, 2, 3]), ["v:v"], full).to_arrow()
    assert got["v__v" if full else "v"].to_pylist() == [10, 21, 31]


@FULL
def test_a08_the_join_key_is_a_mapped_field(world: World, full: bool) -> None:
    data = {"id": [1, 2], "when": [T, T], "value": [1.5, 2.5], "u": ["not", "this"]}
    mapping = {"id": "u", "when": "t", "value": "v"}
    store = world.open(world.view("v", data, ["v"], field_mapping=mapping))
    name = "v__v" if full else "v"
    got = store.get_historical_features(ask([2, 1, 3]), ["v:v"], full).to_arrow()
    assert got[name].to_pylist() == [2.5, 1.5, None]
    store.apply()
    store.materialize(T - HOUR, T)
    served = store.get_online_features(["v:v"], {"u": [2, 1, 3]}, now=T, full_feature_names=full)
    assert served.to_dict()[name] == [2.5, 1.5, None]


@FULL
def test_a09_a_snapshot_needs_no_entity_rows(world: World, full: bool) -> None:
    pair = d.Entity("pair", ["u", "s"])
    data = {"u": [1, 1, 2, 3, 4, None], "v": [10, 11, 20, 30, 40, 50],
            "t": [T - 3 * HOUR, T - HOUR, T - DAY, T - DAY - US, T + US, T]}  # fmt: skip
    more = {"u": [1, 5], "w": ["a", "b"], "t": [T - 2 * HOUR, T - 2 * HOUR]}
    pairs = {"u": [1, 1], "s": ["x", "ä"], "t": [T, T], "p": [1, 2]}
    store = world.open(
        world.view("v", data, ["v"], ttl=DAY), world.view("w", more, ["w"], ttl=3 * HOUR),
        world.view("p", pairs, ["p"], entities=[pair]),
        world.view("g", {"t": [T - 9 * HOUR], "x": [0.5]}, ["x"], entities=[]),
    )  # fmt: skip
    v, w, p, x = ("v__v", "w__w", "p__p", "g__x") if full else ("v", "w", "p", "x")

    def snapshot(refs: list[str], **dates: Any) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = (
            store.get_historical_features(None, refs, full, **dates).to_arrow().to_pydict()
        )
        return found

    # Keys with an event in the longest ttl before the end, both ends included.
    assert snapshot(["v:v", "g:x"], end_date=T) == {
        "u": [1, 2], "event_timestamp": [T, T], v: [11, 20], x: [0.5, 0.5]}  # fmt: skip
    assert snapshot(["v:v", "w:w"], end_date=T)["u"] == [1, 2, 5]
    assert snapshot(["w:w"], end_date=T) == {"u": [1, 5], "event_timestamp": [T, T], w: ["a", "b"]}
    assert snapshot(["v:v"], start_date=T - 2 * HOUR, end_date=T + US)["u"] == [1, 4]
    assert snapshot(["v:v"], start_date=T - 9 * DAY, end_date=T) == {
        "u": [1, 2, 3], "event_timestamp": [T] * 3, v: [11, 20, None]}  # fmt: skip
    assert snapshot(["p:p"], end_date=T) == {
        "u": [1, 1],
        "s": ["x", "ä"],
        "event_timestamp": [T, T],
        p: [1, 2],
    }
    assert snapshot(["g:x"], end_date=T) == {"event_timestamp": [T], x: [0.5]}
    assert snapshot(["v:v"], end_date=T - 99 * DAY)["u"] == []
    for wrong, dates, message in (
        (["v:v", "p:p"], {"end_date": T}, "'v' has the join keys u, of u, s; expected an entity_df"),
        (["v:v"], {"start_date": T, "end_date": T - US}, "start_date is .* after end_date"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            snapshot(wrong, **dates)
    with pytest.raises(InvalidArgumentError, match="of a snapshot; expected them without entity_df"):
        store.get_historical_features(ask([1]), ["v:v"], end_date=T)


@FULL
def test_a10_a_computed_feature_alone_brings_no_inputs(world: World, full: bool) -> None:
    request = d.RequestSource("order", {"amount": "float64"})
    data = {"u": [1, 2], "t": [T - HOUR, T], "rate": [0.5, None], "since": [T - DAY, T]}
    view = world.view(
        "v", data, {"rate": col("rate"), "plus": col("rate") + 100, "age": (now() - col("since")).hours()}
    )
    store = world.open(view, request, d.FeatureService("only", ["v:age", "order:amount"], request=request))
    got = store.get_historical_features(ask([1, 2, 3]), ["v:plus", "v:age"], full).to_arrow()
    plus, age = ("v__plus", "v__age") if full else ("plus", "age")
    assert got.column_names == ["u", "event_timestamp", plus, age]
    assert got[plus].to_pylist() == [100.5, None, None] and got[age].to_pylist() == [24.0, 0.0, None]
    served = store.get_historical_features(ask([1], amount=[3.0]), "only", full).to_arrow()
    assert served["v__age" if full else "age"].to_pylist() == [24.0]


@FULL
def test_a11_created_cutoff_on_and_off(world: World, full: bool) -> None:
    data = {
        "u": [1, 1, 1],
        "t": [T - 3 * HOUR, T - 2 * HOUR, T - HOUR],
        "c": [T - 3 * HOUR, T, T + US],
        "v": [1, 2, 3],
    }
    store = world.open(world.view("v", data, ["v"], created="c"))
    name = "v__v" if full else "v"
    asked = ask([1, 1, 1], [T, T - US, T + US])
    for cut, expected in ((False, [3, 3, 3]), (True, [2, 1, 3])):
        got = store.get_historical_features(asked, ["v:v"], full, filter_by_created_timestamp=cut).to_arrow()
        assert got[name].to_pylist() == expected


times = st.integers(-30, 3).map(lambda h: T + h * HOUR) | st.sampled_from([T - DAY, T - DAY - US, T + US])
EVENTS = st.lists(
    st.fixed_dictionaries(
        {
            "u": st.none() | st.integers(0, 3),
            "s": st.sampled_from(["a", "", "ä", None]),
            "t": times,
            "c": st.none() | times,
            "v": st.none() | st.integers(-(2**62), 2**62),
        }
    ),
    min_size=1,
    max_size=30,
)
ASKED = st.lists(
    st.tuples(st.none() | st.integers(0, 4), st.sampled_from(["a", "", "ä", "z", None]), st.none() | times),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS, ASKED, st.sampled_from([None, HOUR, DAY]), st.booleans(), st.booleans(), st.booleans())
def test_a12_equals_the_brute_force_oracle(
    tmp_path_factory: pytest.TempPathFactory,
    events: Any, asked: Any, ttl: Any, composite: bool, cut: bool, full: bool,
) -> None:  # fmt: skip
    world = World(tmp_path_factory.mktemp("a12"))
    kinds = {"u": pa.int64(), "s": pa.string(), "t": UTC_US, "c": UTC_US, "v": pa.int64()}
    table = pa.table({name: pa.array([e[name] for e in events], kind) for name, kind in kinds.items()})
    entity = d.Entity("pair", ["u", "s"]) if composite else USER
    try:
        store = world.open(world.view("v", table, ["v"], entities=[entity], ttl=ttl, created="c"))
        users, texts, at = zip(*asked)
        rows = pa.table(
            {
                "u": pa.array(users, pa.int64()),
                "s": pa.array(texts, pa.string()),
                "event_timestamp": pa.array(at, UTC_US),
            }
        )
        got = store.get_historical_features(
            rows, ["v:v"], full, filter_by_created_timestamp=cut, with_status=True
        ).to_arrow()
        name = "v__v" if full else "v"
        assert got.select(rows.column_names).equals(rows)
        for i, (user, text, t) in enumerate(asked):
            key = {"u": user, "s": text} if composite else {"u": user}
            expected = as_of(events, key, t, "v", ttl=ttl, known_by=t if cut else None)
            assert (got[name][i].as_py(), got[name + "__status"][i].as_py()) == expected
    finally:
        world.close()


@FULL
def test_a13_created_cutoff_edges(world: World, full: bool) -> None:
    """A null created is never known, all-future rows keep the entity row, nothing comes from other keys."""
    data = {"u": [1, 1, 2, 3, 4], "t": [T - 2 * HOUR, T - HOUR, T - HOUR, T - HOUR, T - HOUR],
            "c": pa.array([T - 2 * HOUR, T + US, T + US, None, T], UTC_US), "v": [1, 2, 3, 4, 5]}  # fmt: skip
    store = world.open(world.view("v", data, ["v"], created="c"))
    got = store.get_historical_features(
        ask([1, 2, 3, 4, 5]), ["v:v"], full, filter_by_created_timestamp=True, with_status=True
    ).to_arrow()
    name = "v__v" if full else "v"
    assert got["u"].to_pylist() == [1, 2, 3, 4, 5]
    assert got[name].to_pylist() == [1, None, None, 5, None]
    assert got[name + "__status"].to_pylist() == ["PRESENT", "FUTURE", "FUTURE", "PRESENT", "NOT_FOUND"]


TYPES: dict[str, tuple[pa.DataType, list[Any]]] = {
    "int32": (pa.int32(), [-(2**31), 0, 2**31 - 1]),
    "int64": (pa.int64(), [-(2**63) + 1, 0, 2**63 - 1]),
    "float": (pa.float32(), [0.5, -0.0, float("inf")]),
    "double": (pa.float64(), [0.1, 5e-324, float("nan")]),
    "string": (pa.string(), ["", "ä😀", "x" * 5000]),
    "bool": (pa.bool_(), [True, False, True]),
    "datetime": (UTC_US, [T, datetime(1901, 1, 1, tzinfo=UTC), T + US]),
}


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("nulls", [False, True])
def test_a14_the_type_matrix_offline_and_online(world: World, kind: str, nulls: bool) -> None:
    arrow, values = TYPES[kind]
    cells = [None, *values[1:]] if nulls else values
    data = {"u": [1, 2, 3], "t": [T] * 3, "v": pa.array(cells, arrow)}
    store = world.open(world.view("v", data, ["v"]))
    expected = pa.array(cells, arrow).to_pylist()  # a float32 is what its column holds
    for _ in range(2):
        got = store.get_historical_features(ask([1, 2, 3]), ["v:v"]).to_arrow()["v"]
        served = store.get_online_features(["v:v"], {"u": [1, 2, 3]}, now=T).to_arrow()["v"]
        for column in (got, served):
            assert all(map(equal, column.to_pylist(), expected)), (column, expected)
        if kind in ("int32", "int64", "bool"):
            frame = store.get_historical_features(ask([1, 2, 3]), ["v:v"]).to_df()
            assert frame["v"].tolist() == [pd.NA, *cells[1:]] if nulls else cells
        store.materialize(T - HOUR, T)


@pytest.mark.parametrize("arrow", [pa.binary(), pa.list_(pa.int64()), pa.decimal128(9, 2)])
def test_a14_types_that_no_feature_can_have_are_named(world: World, arrow: pa.DataType) -> None:
    data = {"u": [1], "t": [T], "v": pa.nulls(1, arrow), "w": [1]}
    store = world.open(world.view("v", data, ["v"]), world.view("w", data, ["w"]))
    with pytest.raises(InvalidArgumentError, match="column 'v' has type"):
        store.get_historical_features(ask([1]), ["v:v"])
    assert store.get_historical_features(ask([1]), ["w:w"]).to_arrow()["w"].to_pylist() == [1]


def test_a15_sources_of_mixed_zones_give_one_answer(world: World) -> None:
    """Naive times are UTC; a zone of the column or of each text counts; files of one source may differ."""
    tokyo, fixed = ZoneInfo("Asia/Tokyo"), timezone(-timedelta(hours=5))
    at = [T - 13 * HOUR, T, T + US]
    forms = {
        "naive": pa.array([t.replace(tzinfo=None) for t in at], pa.timestamp("us")),
        "utc_ns": pa.array(at, pa.timestamp("ns", "UTC")),
        "tokyo": pa.array([t.astimezone(tokyo) for t in at], pa.timestamp("us", "Asia/Tokyo")),
        "texts": [t.astimezone(z).isoformat() for t, z in zip(at, (tokyo, fixed, UTC))],
    }
    views = [
        world.view(name, {"u": [1] * 3, "t": t, "v": [1, 2, 3]}, {f"v_{name}": col("v")}, ttl=DAY)
        for name, t in forms.items()
    ]
    (world.folder / "parts").mkdir()
    for i, name in enumerate(("naive", "tokyo", "utc_ns")):
        table = pa.table({"u": [1] * 3, "t": forms[name], "v": [1, 2, 3]})
        pq.write_table(table.slice(i, 1), world.folder / "parts" / f"{i}.parquet")
    parts = d.FeatureView(
        "parts", [USER], d.ParquetSource("parts", timestamp="t"), {"v_parts": col("v")}, ttl=DAY
    )
    store = world.open(*views, parts)
    refs = [f"{name}:v_{name}" for name in (*forms, "parts")]
    asked = [T - 13 * HOUR - US, T - US, T, T + US, T + DAY + US, T + DAY + 2 * US]
    got = store.get_historical_features(ask([1] * 6, asked), refs).to_arrow()
    for ref in refs:
        assert got[ref.split(":")[1]].to_pylist() == [None, 1, 2, 3, 3, None], ref


def test_a_repository_of_files_gives_the_same_join(tmp_path: Path) -> None:
    """The cases above define their views in place; one read from a folder is no different."""
    (tmp_path / "feature_store.yaml").write_text("project: p\n")
    (tmp_path / "features.py").write_text(
        "from penstock import Entity, FeatureView, ParquetSource, col\n"
        "source = ParquetSource('v.parquet', timestamp='t')\n"
        "v = FeatureView('v', [Entity('user', ['u'])], source, {'v': col('v')})\n"
    )
    pq.write_table(pa.table({"u": [1], "t": [T], "v": [7]}), tmp_path / "v.parquet")
    with FeatureStore(tmp_path) as store:
        got = store.get_historical_features(ask([1, 1], v=[0, 0]), ["v:v"], True).to_arrow()
        assert got["v__v"].to_pylist() == [7, 7]
        with pytest.raises(FeatureNameCollisionError):
            store.get_historical_features(ask([1], v=[0]), ["v:v"]).to_arrow()
