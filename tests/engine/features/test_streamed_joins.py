"""Historical joins over sources that are not held in memory: the bits of the join that holds them."""

from __future__ import annotations

import os
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
from open_files import deleted_files
from pyarrow import csv

import penstock as d
from penstock.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from penstock.features import source_batches, streamed
from penstock.features.expressions import col, now, percentile_rank
from penstock.features.repo import Repo
from penstock.features.source_batches import csv_types
from penstock.features.spill import Spill
from penstock.features.store import FeatureStore
from penstock.features.store_settings import JoinSettings
from penstock.features.streamed import StreamedView

T = datetime(2024, 3, 1, tzinfo=UTC)
T_US = int(T.timestamp()) * 1_000_000
SPAN_S = 40
US = pa.timestamp("us", "UTC")
TINY = 16 << 10
USER, SHOP, PAIR = d.Entity("user", ["u"]), d.Entity("shop", ["s"]), d.Entity("pair", ["s", "u"])
WORDS = ["b", "a", "", "dd", "c", "NA", "007", "é"]
SCHEMA = {"u": "int64", "s": "string", "w": "string", "x": "float64", "f": "float32", "i": "int64",
          "b": "bool", "t": "timestamp", "k": "timestamp", "id": "string", "gone": "bool"}  # fmt: skip


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


REFS = ["user:x", "user:w", "user:age", "user:some", "user:rank", "user:n", "user:mean", "user:var",
        "user:known", "user:top", "user:ids", "user:ewma", "pair:b", "pair:first", "pair:u2", "shop:f",
        "shop:last", "every:total", "every:text"]  # fmt: skip


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
    times = [T_US + rng.randrange(-3, SPAN_S + 9) * 1_000_000 + rng.randrange(3) - 1 for _ in range(n)]
    return pd.DataFrame({
        "u": pd.array([rng.choice([None, rng.randrange(-10, 70)]) if rng.random() < 0.2 else rng.randrange(20)
                       for _ in range(n)], "Int64"),
        "s": [rng.choice([*WORDS, "unknown", None]) for _ in range(n)],
        "event_timestamp": pd.to_datetime(
            [None if rng.random() < 0.05 else time for time in times], unit="us", utc=True),
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


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 11))])
@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow", "query", "table", "push"])
def test_a_join_in_parts_has_the_bits_of_one_that_holds_its_source(stores, spills, monkeypatch, kind, seed):
    monkeypatch.setattr(source_batches, "_CSV_BLOCK", 5000)
    if kind == "query":
        pytest.importorskip("duckdb")
    rng = random.Random(f"{kind} {seed}")
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


def small(stores: Stores, n: int = 3000, **more: Any) -> Any:
    """A view of one float over a Parquet file of n events that a tiny join cannot hold."""
    rng = np.random.default_rng(5)
    times = pa.array(T_US + rng.integers(0, SPAN_S, n) * 1_000_000).cast(US)
    table = pa.table({"u": rng.integers(0, 50, n), "t": times, "x": rng.normal(size=n), **more})
    pq.write_table(table, stores.folder / "small.parquet")
    source = d.ParquetSource("small.parquet", "t")
    return d.FeatureView("user", [USER], source, {"x": col("x"), "n": d.count(window="5s")})


def ask(n: int = 100) -> pa.Table:
    times = pa.array(T_US + np.arange(n) % SPAN_S * 1_000_000).cast(US)
    return pa.table({"u": np.arange(n) % 60, "event_timestamp": times})


def test_spilled_rows_are_gone_after_a_join_an_error_and_an_interrupt(stores, spills, monkeypatch):
    store = stores.open([small(stores)], TINY)
    seen: list[list[str]] = []

    def told(view: str, done: int, total: int) -> None:
        if done:
            seen.append(deleted_files(stores.spill))

    store.get_historical_features(ask(), ["user:x"], progress=told).to_arrow()
    assert spills[-1][0] > 20_000 and all(len(files) == 1 for files in seen)
    assert deleted_files(stores.spill) == [] and not any(stores.spill.iterdir())
    for error in (RuntimeError("told"), KeyboardInterrupt()):

        def fail(view: str, done: int, total: int, error: BaseException = error) -> None:
            if done:
                assert len(deleted_files(stores.spill)) == 1
                raise error

        job = store.get_historical_features(ask(), ["user:x"], progress=fail)
        with pytest.raises(type(error)) as caught:
            job.to_arrow()
        del caught
        assert deleted_files(stores.spill) == [] and not any(stores.spill.iterdir())
    stores.spill.rmdir()
    with pytest.raises(UnavailableError, match=f"join.spill_dir '{stores.spill}' cannot take the rows"):
        store.get_historical_features(ask(), ["user:x"]).to_arrow()


def test_only_rows_of_keys_that_are_asked_for_are_kept(stores, spills):
    view = small(stores, 40_000)
    held, parted = stores.open([view]), stores.open([view], 128 << 10)
    one = pa.table({"u": [7, None, 1000], "event_timestamp": pa.array([T_US + SPAN_S * 10**6] * 3).cast(US)})
    joins = [s.get_historical_features(one, ["user:x", "user:n"]).to_arrow() for s in (held, parted)]
    assert bits(joins[0]) == bits(joins[1]) and joins[0]["n"].to_pylist()[1:] == [None, None]
    assert isinstance(parted._live.for_join("user"), StreamedView)
    assert spills == [[0, 1]]  # what is left fits
    none = one.slice(0, 0)
    joins = [s.get_historical_features(none, ["user:x"], with_age=True).to_arrow() for s in (held, parted)]
    assert bits(joins[0]) == bits(joins[1]) and joins[1].num_rows == 0


def test_one_key_with_more_events_than_the_bound(stores, spills):
    view = small(stores)
    source = stores.folder / "small.parquet"
    table = pq.read_table(source)
    pq.write_table(table.set_column(0, "u", pa.array([3] * table.num_rows)), source)
    held, parted = stores.open([view]), stores.open([view], TINY)
    joins = [s.get_historical_features(ask(), ["user:x", "user:n"]).to_arrow() for s in (held, parted)]
    assert bits(joins[0]) == bits(joins[1]) and spills[-1][0] > TINY


def test_a_view_that_is_in_memory_is_used_as_it_is(stores, spills):
    store = stores.open([small(stores)], TINY)
    store.computer("user")
    store.get_historical_features(ask(), ["user:x"]).to_arrow()
    assert spills == []
    fits = stores.open([small(stores)], 1 << 30)
    fits.get_historical_features(ask(), ["user:x"]).to_arrow()
    assert spills == [] and "user" in fits._live._live


BAD = {
    "null times, declared": lambda t: t.set_column(1, "t", pa.array(
        [None if i in (2900, 2950) else v for i, v in enumerate(t["t"].to_pylist())], US)),
    "a key of another type": lambda t: t.set_column(0, "u", t["u"].cast(pa.float64())),
    "no such column": lambda t: t.drop_columns(["x"]),
    "out of range": lambda t: t.set_column(0, "u", pa.array([2**63 if i == 2999 else 1 for i in range(3000)],
                                                            pa.uint64())),
    "a time out of range": lambda t: t.set_column(1, "t", pa.array([2**61 if i == 2999 else 1 for i in
                                                                    range(3000)]).cast(pa.timestamp("ms"))),
    "no time": lambda t: t.set_column(1, "t", pa.array(["2024-01-01T00:00:00Z"] * 2999 + ["soon"])),
    "mixed zones": lambda t: t.set_column(1, "t", pa.array(["2024-01-01T00:00:00Z"] * 2999 + ["2024-01-02"])),
    "a text": lambda t: t.set_column(2, "x", t["x"].cast(pa.string())),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_errors_are_those_of_a_join_that_holds_its_source(stores, what):
    view = small(stores)
    table = BAD[what](pq.read_table(stores.folder / "small.parquet"))
    pq.write_table(table, stores.folder / "small.parquet")
    declared = {"t": "timestamp"} if what in ("null times, declared", "mixed zones") else {}
    source = d.ParquetSource("small.parquet", "t", schema={**declared, "x": "float64"} if declared else None)
    features = {"x": col("x") + 1.0}
    view = d.FeatureView("user", [USER], source, features)
    asked, found = ask(3), []
    for store in (stores.open([view]), stores.open([view], TINY)):
        with pytest.raises(Exception) as caught:
            store.get_historical_features(asked, ["user:x"]).to_arrow()
        found.append((type(caught.value), str(caught.value)))
    assert found[0] == found[1] and issubclass(found[0][0], InvalidArgumentError)


def test_a_type_that_apply_did_not_record_is_refused(stores):
    view = small(stores)
    for most in (None, TINY):
        store = stores.open([view], most)
        store.apply()
        store.close()
    file = stores.folder / "small.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(2, "x", table["x"].cast(pa.float32())), file)
    found = []
    for data, most in (("data-0", None), ("data-1", TINY)):
        with pytest.raises(FailedPreconditionError) as caught:
            stores.open([view], most, data).get_historical_features(ask(), ["user:x"])
        found.append(str(caught.value))
    assert found[0] == found[1] and "column 'x' is float32; expected float64" in found[0]


def test_files_that_do_not_go_together_are_refused_with_the_same_words(stores):
    view = small(stores)
    table = pq.read_table(stores.folder / "small.parquet")
    (stores.folder / "log").mkdir()
    pq.write_table(table, stores.folder / "log" / "0.parquet")
    big = table.set_column(2, "x", pa.array([2**53 + 1] * table.num_rows))
    for other in (big, table.set_column(2, "x", table["u"].cast(pa.string()))):
        pq.write_table(other, stores.folder / "log" / "1.parquet")
        view = d.FeatureView("user", [USER], d.ParquetSource("log", "t"), {"x": col("x")})
        found = []
        for store in (stores.open([view]), stores.open([view], TINY)):
            with pytest.raises(InvalidArgumentError, match="differ in schema") as caught:
                store.get_historical_features(ask(), ["user:x"]).to_arrow()
            found.append(str(caught.value))
        assert found[0] == found[1]


def test_a_source_that_changes_while_it_is_read_is_read_again(stores, monkeypatch):
    view = small(stores)
    store = stores.open([view], TINY)
    file = stores.folder / "small.parquet"
    job = store.get_historical_features(ask(), ["user:x"], progress=lambda *_: change())
    changes = iter(range(1000))
    times = 3

    def change() -> None:
        at = next(changes)
        if at < times:
            os.utime(file, ns=(at, at))

    after = job.to_arrow()
    assert bits(after) == bits(stores.open([view]).get_historical_features(ask(), ["user:x"]).to_arrow())
    times, changes = 1000, iter(range(10_000, 20_000))
    with pytest.raises(UnavailableError, match="changes while it is read"):
        store.get_historical_features(
            ask(), ["user:x"], progress=lambda *_: os.utime(file, ns=(next(changes),) * 2)
        ).to_arrow()


def test_codes_that_others_gave_meanwhile_are_kept(stores):
    view = small(stores, w=[f"w{i % 40}" for i in range(3000)])
    view = d.FeatureView("user", [USER], view.source, {"w": col("w")})
    store = stores.open([view], TINY)
    raced: list[bool] = []

    def other(*_: Any) -> None:
        if not raced:
            raced.append(store._registry.extend_dictionaries("small.parquet", {"w": ["w7", "new"]}))

    got = store.get_historical_features(ask(), ["user:w"], progress=other).to_arrow()["w"].combine_chunks()
    assert raced == [True] and got.dictionary.to_pylist()[:3] == ["w7", "new", "w0"]
    held = stores.open([view]).get_historical_features(ask(), ["user:w"]).to_arrow()["w"]
    assert got.to_pylist() == held.to_pylist()


def test_apply_passes_over_a_source_that_is_too_large(stores):
    rng = random.Random(9)
    source = write("parquet", stores.folder, log(rng, 1500), rng)
    held, parted = stores.open(views(source)), stores.open(views(source), TINY)
    services = [d.FeatureService("all", REFS)]
    for store in (held, parted):
        store.services = {s.name: s for s in services}
        store.apply()
    states = [store._registry.state for store in (held, parted)]
    assert states[0].dictionaries == states[1].dictionaries
    assert [fit.sha256 for fit in states[0].fits.values()] == [fit.sha256 for fit in states[1].fits.values()]
    assert states[0].applied == states[1].applied
    assert set(held._live._live) == {"user", "pair", "shop", "every"} and parted._live._live == {}
    held.materialize(T, T + timedelta(seconds=30))
    parted.materialize(T, T + timedelta(seconds=30))  # reads them after all
    end = T + timedelta(seconds=30)
    asked = {"u": [1, 2, 3], "s": ["a", "b", "c"]}
    got = [s.get_online_features(REFS, asked, now=end).to_dict() for s in (held, parted)]
    assert repr(got[0]) == repr(got[1])
    rows = parted._online.headers()
    again = stores.open(views(source), TINY, "data-1")
    again.apply()
    assert again._live._live == {} and again._online.headers() == rows  # what was written stays


def test_csv_files_that_blocks_cannot_tell_are_read_whole(stores):
    rows = "\n".join(f"{i % 9},2024-03-01T00:00:{i % 40:02d}Z,{i}" for i in range(3000))
    (stores.folder / "x.csv").write_bytes(
        f"u,t,x,z\n{rows.replace(chr(10), ',1' + chr(10))},".encode() + b"\xff\n"
    )
    view = d.FeatureView("user", [USER], d.CSVSource("x.csv", "t"), {"x": col("x")})
    held, parted = stores.open([view]), stores.open([view], TINY)
    joins = [s.get_historical_features(ask(), ["user:x"]).to_arrow() for s in (held, parted)]
    assert bits(joins[0]) == bits(joins[1]) and joins[1]["x"].null_count < 100
    assert csv_types(view.source, stores.folder / "x.csv") is None


def test_bars_on_standard_error(stores, capsys):
    store = stores.open([small(stores)], TINY)
    got = store.get_historical_features(ask(), ["user:x"], progress=True).to_arrow()
    shown = capsys.readouterr()
    assert "user" in shown.err and "100%" in shown.err and shown.out == ""
    assert bits(got) == bits(store.get_historical_features(ask(), ["user:x"], progress=False).to_arrow())
