"""Historical joins over sources that are not held in memory: the bits of the join that holds them."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

import penstock as d
from penstock.features import streamed
from penstock.features.expressions import col, now, percentile_rank
from penstock.features.repo import Repo
from penstock.features.spill import Spill
from penstock.features.store import FeatureStore
from penstock.features.store_settings import JoinSettings

T = datetime(2024, 3, 1, tzinfo=UTC)
T_US = int(T.timestamp()) * 1_000_000
SPAN_S = 40
US = pa.timestamp("us", "UTC")
TINY = 16 << 10
USER, SHOP, PAIR = d.Entity("user", ["u"]), d.Entity("shop", ["s"]), d.Entity("pair", ["s", "u"])
WORDS = ["b", "a", "", "dd", "c", "NA", "007", "é"]
SCHEMA = {"u": "int64", "s": "string", "w": "string", "x": "float64", "f": "float32", "i": "int64", "b": "bool",
          "t": "timestamp", "k": "timestamp", "id": "string", "gone": "bool"}  # fmt: skip


def log(rng: random.Random, n: int) -> pa.Table:
    """Events with ties, late and corrected rows, repeated ids, nulls everywhere but in times."""

    def cells(make: Any, kind: pa.DataType, nulls: float = 0.1) -> pa.Array:
        return pa.array([None if rng.random() < nulls else make() for _ in range(n)], kind)

    def at() -> int:
        return T_US + rng.randrange(SPAN_S) * 1_000_000

    return pa.table({
        "u": cells(lambda: rng.randrange(60) - 5, pa.int64(), 0.03),
        "s": cells(lambda: rng.choice(WORDS), pa.string(), 0.03),
        "w": cells(lambda: f"{rng.choice(WORDS)}{rng.randrange(30)}", pa.string()),
        "x": cells(lambda: rng.choice([rng.gauss(0, 1), 0.0, -0.0, float("nan"), 1e300]), pa.float64()),
        "f": cells(lambda: rng.gauss(0, 1), pa.float32()),
        "i": cells(lambda: rng.randrange(-(2**62), 2**62), pa.int64()),
        "b": cells(lambda: rng.random() < 0.5, pa.bool_()),
        "t": cells(at, US, 0.0),
        "k": cells(at, US),
        "id": cells(lambda: f"e{rng.randrange(n // 2)}", pa.string()),
        "gone": cells(lambda: rng.random() < 0.2, pa.bool_()),
    })  # fmt: skip


def views(source: Any) -> list[Any]:
    window = {"window": "9s"}
    user = d.FeatureView(
        "user", [USER], source,
        {"x": col("x"), "w": col("w"), "age": now() - col("t"), "some": col("w").isin(["a1", "b2"]),
         "rank": percentile_rank(col("f")), "n": d.count(**window), "mean": d.mean(col("x"), **window),
         "var": d.var(col("f"), **window), "known": d.sum(col("i") % 1000, as_known=True, **window),
         "top": d.top_k(col("w"), **window), "ids": d.distinct(col("w"), exact=2, window="30s"),
         "ewma": d.ewma(col("x"), half_life="2s", lag="1s", **window)},
        ttl=timedelta(seconds=12),
    )  # fmt: skip
    pair = d.FeatureView(
        "pair", [PAIR], source, {"b": col("b"), "first": d.first(col("w"), window="20s"), "u2": col("u")}
    )
    shop = d.FeatureView("shop", [SHOP], source, {"f": col("f"), "last": d.last(col("s"), window="15s")})
    every = d.FeatureView("every", [], source, {"total": d.sum(col("f"), window="5s"), "text": col("s")})
    return [user, pair, shop, every]


REFS = ["user:x", "user:w", "user:age", "user:some", "user:rank", "user:n", "user:mean", "user:var", "user:known",
        "user:top", "user:ids", "user:ewma", "pair:b", "pair:first", "pair:u2", "shop:f", "shop:last",
        "every:total", "every:text"]  # fmt: skip


class Stores:
    """Stores over one folder, each with a registry of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spill = folder / "spill"
        self.spill.mkdir()
        self.opened: list[FeatureStore] = []

    def open(self, found: list[Any], most: int | None = None, data: str | None = None) -> FeatureStore:
        settings = JoinSettings() if most is None else JoinSettings(most, str(self.spill))
        entities = {e.name: e for view in found for e in view.entities}
        folder = self.folder / (data or f"data-{len(self.opened)}")
        repo = Repo(self.folder, "p", folder, None, entities, {v.name: v for v in found}, join=settings)
        self.opened.append(FeatureStore(repo))
        return self.opened[-1]


@pytest.fixture
def stores(tmp_path):
    made = Stores(tmp_path)
    yield made
    for store in made.opened:
        store.close()


@pytest.fixture
def spills(monkeypatch):
    """(bytes written, groups read) of each join of a view."""
    found: list[list[int]] = []

    class Watched(Spill):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            found.append([0, 0])

        def groups(self) -> Any:
            for group in super().groups():
                found[-1][:] = self.spilled_bytes, found[-1][1] + 1
                yield group

    monkeypatch.setattr(streamed, "Spill", Watched)
    return found


def write(kind: str, folder: Path, table: pa.Table, rng: random.Random) -> Any:
    """A source of a kind with the rows of a table, in their order."""
    roles = {"timestamp": "t", "created": "k", "event_id": "id", "deleted": "gone"}
    if rng.random() < 0.4:
        roles = {"timestamp": "t", "created": rng.choice(["k", None])}
    cuts = sorted(rng.randrange(table.num_rows) for _ in range(2))
    parts = [table.slice(a, b - a) for a, b in zip([0, *cuts], [*cuts, table.num_rows])]
    if kind == "parquet":
        (folder / "log").mkdir()
        # Files of one source may differ in the type of numbers, the unit and zone of times, and row groups.
        parts[1] = parts[1].set_column(3, "x", parts[1]["x"].cast(pa.float32()).cast(pa.float64()))
        parts[2] = parts[2].set_column(4, "f", parts[2]["f"].cast(pa.float64()))
        parts[1] = parts[1].set_column(7, "t", parts[1]["t"].cast(pa.timestamp("ns", "America/New_York")))
        parts = [part.set_column(2, "w", part["w"].dictionary_encode()) for part in parts]
        for i, part in enumerate(parts):
            pq.write_table(
                part, folder / "log" / f"{i}.parquet", row_group_size=rng.choice([37, 500, 10_000])
            )
        return d.ParquetSource("log", **roles)
    if kind == "csv":
        (folder / "log").mkdir()
        for i, part in enumerate(parts):
            csv.write_csv(part, folder / "log" / f"{i}.csv", csv.WriteOptions(quoting_style="needed"))
        return d.CSVSource("log/*.csv", **roles, schema={"w": "string", "s": "string"})
    if kind == "arrow":
        (folder / "log").mkdir()
        for i, part in enumerate(parts):
            make = pa.ipc.new_file if i else pa.ipc.new_stream
            with make(str(folder / "log" / f"{i}.arrow"), part.schema) as writer:
                writer.write_table(part, max_chunksize=rng.choice([50, 5000]))
        return d.ArrowSource("log", **roles)
    if kind == "query":
        pq.write_table(table.append_column("n", pa.array(range(len(table)))), folder / "log.parquet")
        text = f"SELECT * EXCLUDE n FROM 'log.parquet' ORDER BY n LIMIT {len(table)}"
        return d.DuckDBSource(text, **roles)
    if kind == "table":
        return d.TableSource("log", table, **roles)
    pq.write_table(table.slice(0, table.num_rows // 2), folder / "log.parquet")
    batch = d.ParquetSource("log.parquet", "t", created=roles["created"])
    return d.PushSource("log", dict(SCHEMA), batch=batch, **roles)


def questions(rng: random.Random, n: int) -> pd.DataFrame:
    """Entity rows with repeated, unknown and null keys, and times on and around those of events."""
    return pd.DataFrame({
        "u": pd.array([rng.choice([None, rng.randrange(-10, 70)]) if rng.random() < 0.2 else rng.randrange(20)
                       for _ in range(n)], "Int64"),
        "s": [rng.choice([*WORDS, "unknown", None]) for _ in range(n)],
        "event_timestamp": pd.to_datetime(
            [None if rng.random() < 0.05 else T_US + rng.randrange(-3, SPAN_S + 9) * 1_000_000 + rng.randrange(3) - 1
             for _ in range(n)], unit="us", utc=True),
    })  # fmt: skip


def bits(table: pa.Table) -> dict[str, Any]:
    """Every cell, floats by their bits, codes beside their dictionary."""
    found: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns):
        array = column.combine_chunks()
        array = array.chunk(0) if isinstance(array, pa.ChunkedArray) and array.num_chunks else array
        texts = array.dictionary.to_pylist() if isinstance(array, pa.DictionaryArray) else None
        values = array.indices if texts is not None else array
        if pa.types.is_floating(values.type):
            values = values.view(pa.int64() if values.type == pa.float64() else pa.int32())
        found[name] = (str(array.type), values.to_pylist(), texts)
    return found


def note(told: list[tuple[str, int, int]], *given: Any) -> None:
    told.append(given)


@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow", "query", "table", "push"])
def test_a_join_in_parts_has_the_bits_of_one_that_holds_its_source(stores, spills, kind):
    if kind == "query":
        pytest.importorskip("duckdb")
    rng = random.Random(kind)
    table = log(rng, 1600)
    source = write(kind, stores.folder, table, rng)
    held, parted = stores.open(views(source)), stores.open(views(source), TINY)
    if kind == "push":
        whole = table.filter(pc.and_(*(table[name].is_valid() for name in ("u", "s"))))
        whole = whole.filter(pc.and_(*(whole[name].is_valid() for name in ("id", "gone"))))
        for store in (held, parted):
            for at in range(500, whole.num_rows, 350):
                store.push("log", whole.slice(at, 350))
            store.erase("shop", {"s": ["dd"]})
            store.close()
        held, parted = stores.open(views(source), data="data-0"), stores.open(views(source), TINY, "data-1")
    rounds: list[dict[str, Any]] = [{}, {"filter_by_created_timestamp": True}, {"known_by": True}]
    for more in rounds if kind in ("parquet", "push") else rng.sample(rounds, 1):
        asked = questions(rng, 500)
        if "known_by" in more:
            more = {"known_by": T_US + np.array([rng.randrange(SPAN_S) for _ in range(500)]) * 1_000_000}
        told: list[tuple[str, int, int]] = []
        joins = [
            store.get_historical_features(
                asked, REFS, with_status=True, with_age=True, progress=partial(note, told), **more
            ).to_arrow()
            for store in (held, parted)
        ]
        assert bits(joins[0]) == bits(joins[1])
        assert {name: done for name, done, _ in told} == dict.fromkeys(["user", "pair", "shop", "every"], 500)
        assert ("user", 0, 500) in told
        assert all(written > 0 for written, _ in spills[-4:]) and max(groups for _, groups in spills[-4:]) > 5
        assert not any(stores.spill.iterdir())
    end = T + timedelta(seconds=rng.randrange(10, SPAN_S))
    keys = [
        store.get_historical_features(None, REFS[:3], end_date=end).to_arrow() for store in (held, parted)
    ]
    assert bits(keys[0]) == bits(keys[1]) and keys[0].num_rows > 20
    texts = [store._registry.state.dictionaries for store in (held, parted)]
    assert texts[0] == texts[1]
    plans = [store.service_plan(REFS).fingerprint for store in (held, parted)]
    assert plans[0] == plans[1]
