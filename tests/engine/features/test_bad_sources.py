"""Bad input of sources: a fault names source, column, found and expected, and nothing changes."""

from __future__ import annotations

import json
import os
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv, feather
from store_repo import HOUR, bits, make_repo, some_rows

from penstock.errors import DefinitionError, FailedPreconditionError, InvalidArgumentError
from penstock.features.source_definitions import (
    ArrowSource,
    CSVSource,
    DuckDBSource,
    ParquetSource,
    Source,
    TableSource,
)
from penstock.features.source_reading import rows_digest, source_stamp
from penstock.features.sources import UNKNOWN_TIME, SourceTable, read_source
from penstock.features.store import FeatureStore

NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)
BIG = 2**53 + 1
KINDS = ("parquet", "csv", "arrow", "duckdb", "arrow table", "pandas", "polars")


def frame(**columns: Any) -> pa.Table:
    base = {
        "user": pa.array([1, 2, BIG], pa.int64()),
        "t": pa.array([NOON, NOON - timedelta(seconds=1), NOON], pa.timestamp("us", "UTC")),
        "x": pa.array([0.5, None, 2.0]),
        "city": pa.array(["Rome", None, "Oslo"]),
        "id": pa.array([7, 8, 9], pa.int64()),
        "gone": pa.array([False, None, True]),
    }
    return pa.table({**base, **columns})


def source_of(kind: str, folder: Path, table: pa.Table, **options: Any) -> Source:
    """The table as a source of that kind; what a CSV cannot say stays out of it."""
    options = {"timestamp": "t", **options}
    if kind == "parquet":
        pq.write_table(table, folder / "s.parquet")
        return ParquetSource("s.parquet", **options)
    if kind == "csv":
        csv.write_csv(table, folder / "s.csv")
        return CSVSource("s.csv", **options)
    if kind == "arrow":
        feather.write_feather(table, folder / "s.arrow", compression="uncompressed")
        return ArrowSource("s.arrow", **options)
    if kind == "duckdb":
        pq.write_table(table, folder / "d.parquet")
        return DuckDBSource("SELECT * FROM 'd.parquet'", name="s", **options)
    if kind == "pandas":
        return TableSource("s", table.to_pandas(types_mapper=pd.ArrowDtype), **options)
    return TableSource("s", pl.from_arrow(table) if kind == "polars" else table, **options)


def cells(table: SourceTable, name: str) -> list[Any]:
    column = table.columns[name]
    valid = [True] * table.n_rows if column.valid is None else column.valid.tolist()
    texts = column.dictionary
    return [
        None if not ok else value if texts is None else texts[value]
        for value, ok in zip(column.values.tolist(), valid)
    ]


SCHEMA = {"user": "int64", "t": "timestamp", "x": "float64", "city": "string", "gone": "bool"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_table(tmp_path: Path, kind: str) -> None:
    table = read_source(
        source_of(kind, tmp_path, frame(), schema=SCHEMA, event_id="id", deleted="gone"), tmp_path
    )
    us = int(NOON.timestamp()) * 1_000_000
    assert cells(table, "user") == [1, 2, BIG]  # exact above 2**53
    assert cells(table, "x") == [0.5, None, 2.0]
    assert cells(table, "city") == ["Rome", None, "Oslo"]
    assert table.event_time.tolist() == [us, us - 1_000_000, us]  # unsorted as they are
    assert table.event_id is not None and table.event_id.values.tolist() == [7, 8, 9]
    assert table.deleted is not None and table.deleted.tolist() == [False, False, True]
    assert table.found == {**SCHEMA, "id": "int64"}
    plain = read_source(source_of(kind, tmp_path, frame()), tmp_path)
    assert (plain.event_id, plain.deleted) == (None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_without_rows_has_all_its_columns(tmp_path: Path, kind: str) -> None:
    empty = frame().schema.empty_table()
    source = source_of(kind, tmp_path, empty, schema={**SCHEMA, "id": "int64"}, event_id="id", deleted="gone")
    table = read_source(source, tmp_path)
    assert table.n_rows == 0
    assert table.schema == {**SCHEMA, "id": "int64"}
    assert table.deleted is not None and len(table.deleted) == 0


def tables() -> st.SearchStrategy[pa.Table]:
    """Tables of a few rows with every dtype, nulls, NaN, extremes and equal or unsorted times."""
    times = st.integers(-(10**15), 10**15)
    columns = {
        "user": (st.integers(-(2**63), 2**63 - 1) | st.none(), pa.int64()),
        "t": (times, pa.timestamp("us", "UTC")),
        "seen": (times | st.none(), pa.timestamp("us", "America/New_York")),
        "x": (st.floats() | st.none(), pa.float64()),
        "small": (st.floats(width=32) | st.none(), pa.float32()),
        "city": (st.text(st.characters(codec="utf-8"), max_size=4) | st.none(), pa.string()),
        "gone": (st.booleans() | st.none(), pa.bool_()),
    }
    rows = st.lists(st.tuples(*(values for values, _ in columns.values())), max_size=8)
    return rows.map(
        lambda found: pa.table(
            {
                name: pa.array([row[i] for row in found], kind)
                for i, (name, (_, kind)) in enumerate(columns.items())
            }
        )
    )


@settings(max_examples=30, deadline=None)
@given(tables())
def test_any_table_has_the_same_bits_in_every_kind(table: pa.Table) -> None:
    """Values by Arrow's own conversion, nulls as nulls, a null `created` as unknown, a null flag as false."""
    with tempfile.TemporaryDirectory() as name:
        for kind in ("parquet", "arrow", "duckdb", "arrow table", "polars"):
            source = source_of(kind, Path(name), table, created="seen", event_id="user", deleted="gone")
            read = read_source(source, Path(name))
            assert read.n_rows == table.num_rows and read.dropped == 0
            for column in ("user", "x", "small", "city"):
                expected = table[column].to_pylist()
                found = cells(read, column)
                if column in ("x", "small"):
                    expected, found = (
                        [None if v is None else np.float64(v).tobytes() for v in given]
                        for given in (expected, found)
                    )
                assert found == expected, (kind, column)
            assert read.event_time.tolist() == table["t"].cast(pa.int64()).to_pylist()
            known = table["seen"].cast(pa.int64()).to_pylist()
            assert read.known_at.tolist() == [UNKNOWN_TIME if v is None else v for v in known]
            assert read.deleted is not None
            assert read.deleted.tolist() == [bool(v) for v in table["gone"].to_pylist()]


def faults() -> list[Any]:
    mixed = pa.array(["2024-03-01T12:00:00", None, "2024-03-01T12:00:00Z"])
    late = pa.array([NOON, None, NOON], pa.timestamp("us", "UTC"))
    return [
        ("a missing column", frame(), {"y": "int64"}, "has no column 'y' of dtype int64; expected one of"),
        ("a wrong type", frame(), {"x": "int64"}, "column 'x' is float64; expected int64 as declared"),
        ("a text", frame(), {"city": "bool"}, "column 'city' is string; expected bool as declared"),
        ("a null time", frame(t=late), SCHEMA, "column 't' is null in 1 of 3 rows, first in row 1; expected"),
        ("mixed zones", frame(t=mixed), {"x": "float64"}, "'t' has times with a zone and without one, '2024"),
        ("a time that is none", frame(t=pa.array([1, 2, 3])), SCHEMA, "'t' is int64; expected timestamp"),
    ]  # fmt: skip


FAULTS = faults()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("table", "schema", "message"), [fault[1:] for fault in faults()], ids=[f[0] for f in faults()]
)
def test_a_fault_against_the_declared_schema(
    tmp_path: Path, kind: str, table: pa.Table, schema: Any, message: str
) -> None:
    source = source_of(kind, tmp_path, table, schema=schema)
    with pytest.raises(InvalidArgumentError) as caught:
        read_source(source, tmp_path, columns=["user"])
    assert f"source '{source.name}'" in str(caught.value)
    assert message in str(caught.value)


def test_without_a_schema_null_and_mixed_times_keep_their_meaning(tmp_path: Path) -> None:
    mixed = pa.array(["2024-03-01T12:00:00", None, "2024-03-01T14:00:00+02:00"])
    table = read_source(source_of("parquet", tmp_path, frame(t=mixed)), tmp_path)
    us = int(NOON.timestamp()) * 1_000_000
    assert (table.event_time.tolist(), table.dropped) == ([us, us], 1)


@pytest.mark.parametrize("zone", ["America/New_York", None])
def test_files_whose_times_have_different_zones(tmp_path: Path, zone: str | None) -> None:
    pq.write_table(frame(), tmp_path / "a.parquet")
    times = pa.array([NOON.replace(tzinfo=None)] * 3, pa.timestamp("ms"))
    if zone is not None:
        times = pa.array([NOON] * 3, pa.timestamp("ms", zone))
    pq.write_table(frame(t=times), tmp_path / "b.parquet")
    table = read_source(ParquetSource("*.parquet", "t"), tmp_path)
    assert len(set(table.event_time.tolist())) == 2 and table.n_rows == 6
    strict = ParquetSource("*.parquet", "t", schema={"x": "float64"})
    if zone is None:
        with pytest.raises(InvalidArgumentError, match="'t' has times with a zone in some files and without"):
            read_source(strict, tmp_path)
    else:
        assert read_source(strict, tmp_path).event_time.tolist() == table.event_time.tolist()


def test_an_integer_that_no_float_holds_beside_floats_in_another_file(tmp_path: Path) -> None:
    pq.write_table(frame(), tmp_path / "a.parquet")
    pq.write_table(frame(user=pa.array([0.5, 1.5, 2.5])), tmp_path / "b.parquet")
    with pytest.raises(InvalidArgumentError, match="schema: Integer value 9007199254740993 not in"):
        read_source(ParquetSource("*.parquet", "t"), tmp_path)
    pq.write_table(frame(user=pa.array([1, 2, 3])), tmp_path / "a.parquet")
    read = read_source(ParquetSource("*.parquet", "t"), tmp_path)
    assert cells(read, "user") == [1.0, 2.0, 3.0, 0.5, 1.5, 2.5]


def twice(kind: str, folder: Path) -> Source:
    """A source with two columns named 'x'."""
    names = ["user", "t", "x", "x"]
    table = pa.table([pa.array([1]), pa.array([NOON]), pa.array([1.0]), pa.array([2.0])], names=names)
    if kind == "duckdb":
        return DuckDBSource("SELECT 1 AS user, TIMESTAMP '2024-03-01' AS t, 1 AS x, 2 AS x", "t")
    if kind == "pandas":
        values = np.array([[1, 2, 3, 4]])
        return TableSource("s", pd.DataFrame(values, columns=names), "t")
    return source_of(kind, folder, table)


@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow", "duckdb", "arrow table", "pandas"])
def test_two_columns_of_one_name(tmp_path: Path, kind: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"source '.*' has two columns named 'x'; expected distinct"
    ):
        read_source(twice(kind, tmp_path), tmp_path, columns=["user", "x"])


@pytest.mark.parametrize(
    ("column", "found", "message"),
    [
        ("event_id", pa.array([0.5, 1.0, 2.0]), "column 'id' is float64; expected int64 or string"),
        ("deleted", pa.array([0, 1, 0]), "column 'gone' is int64; expected bool"),
    ],
)
def test_columns_that_tell_versions_of_events(tmp_path: Path, column: str, found: Any, message: str) -> None:
    table = frame(**{"id" if column == "event_id" else "gone": found})
    with pytest.raises(InvalidArgumentError, match=message):
        read_source(source_of("parquet", tmp_path, table, event_id="id", deleted="gone"), tmp_path)
    missing = source_of("parquet", tmp_path, frame().drop_columns(["gone"]), event_id="id", deleted="gone")
    with pytest.raises(InvalidArgumentError, match="has no column 'gone'; expected one of user, t"):
        read_source(missing, tmp_path, columns=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"event_id": "t"}, "event_id is 't'; expected another column"),
        ({"event_id": ""}, "event_id is ''; expected another column"),
        ({"event_id": "id", "deleted": "id"}, "deleted is 'id'; expected another column"),
        ({"deleted": "gone"}, "deleted is 'gone' without event_id"),
        ({"schema": {}}, "schema is {}; expected a map of column to dtype"),
        ({"schema": {"x": "double"}}, "schema has 'x': 'double'; expected one of float32, float64"),
        ({"schema": {"t": "string"}}, "schema has 't': 'string'; expected 'timestamp' by its use"),
        (
            {"event_id": "i", "deleted": "d", "schema": {"d": "int64"}},
            "'d': 'int64'; expected 'bool'",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "duckdb", "pandas"])
def test_options_that_cannot_be_right(tmp_path: Path, kind: str, options: Any, message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        source_of(kind, tmp_path, frame(), **options)


def test_versions_of_events_are_part_of_the_description_and_a_schema_is_not() -> None:
    plain = ParquetSource("a", "t")
    assert plain.describe() == ["ParquetSource", "a", "t", None]
    assert ParquetSource("a", "t", schema={"x": "bool"}).describe() == plain.describe()
    assert ParquetSource("a", "t", event_id="i").describe() != plain.describe()
    assert hash(ParquetSource("a", "t", schema={"x": "bool"})) == hash(
        ParquetSource("a", "t", schema={}.fromkeys(["y"], "bool"))
    )
    assert plain.key != CSVSource("a", "t").key


@pytest.mark.parametrize("table", [7, {"a": [1]}, pd.DataFrame({"a": [object()]})])
def test_a_table_that_is_none(tmp_path: Path, table: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"source 'mine' (is a|cannot be read as)"):
        read_source(TableSource("mine", table, "t"), tmp_path)
    with pytest.raises(DefinitionError, match="name is ''; expected a text"):
        TableSource("", table, "t")


def test_the_stamp_of_a_table_is_that_of_its_rows(tmp_path: Path) -> None:
    one, same = (TableSource("s", frame(), "t") for _ in range(2))
    assert source_stamp(one, tmp_path) == source_stamp(same, tmp_path)
    for other in (
        TableSource("s", frame(x=pa.array([0.5, None, 2.5])), "t"),
        TableSource("s", frame().slice(1), "t"),
        TableSource("s", frame(), "t", created="u"),
    ):
        assert source_stamp(other, tmp_path) != source_stamp(one, tmp_path)
    assert rows_digest(frame()) != rows_digest(frame(x=pa.array([0.5, 0.0, 2.0])))  # null is no zero


def in_memory_repo(tmp_path: Path, kind: str) -> Path:
    repo = make_repo(tmp_path / "r", some_rows())
    read = {
        "pandas": "import pandas as pd\ntable = pd.read_parquet(FILE, dtype_backend='pyarrow')\n",
        "polars": "import polars as pl\ntable = pl.read_parquet(FILE)\n",
        "arrow": "import pyarrow.parquet as pq\ntable = pq.read_table(FILE)\n",
    }[kind].replace("FILE", repr(str(repo / "events.parquet")))
    text = (repo / "features.py").read_text()
    text = text.replace('ParquetSource("events.parquet", timestamp', 'TableSource("events", table, timestamp')
    (repo / "features.py").write_text(read + text.replace("ParquetSource", "TableSource"))
    return repo


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow"])
def test_a_table_in_memory_gives_the_bits_of_its_file(tmp_path: Path, kind: str) -> None:
    asked: Any = (
        ["users:spend", "users:city", "pairs:top", "users:rank"],
        {"user_id": [1, 2], "shop": ["a", "b"]},
    )
    plain = make_repo(tmp_path / "plain", some_rows())
    with FeatureStore(plain) as one, FeatureStore(in_memory_repo(tmp_path, kind)) as two:
        a, b = (store.get_online_features(*asked, now=5 * HOUR).to_arrow() for store in (one, two))
        assert [bits(a[name]) for name in a.column_names] == [bits(b[name]) for name in b.column_names]
        assert two.materialize_incremental(5 * HOUR).rows == one.materialize_incremental(5 * HOUR).rows
        assert not two.refresh()
    with FeatureStore(tmp_path / "r") as again:  # equal rows in a new process: what was written still counts
        assert again.cursor("users") == 5 * HOUR


# Drift of a source's schema

DRIFT = (FailedPreconditionError, InvalidArgumentError)


def rewrite(repo: Path, change: Any) -> None:
    file = repo / "events.parquet"
    pq.write_table(change(pq.read_table(file)), file)
    os.utime(file, ns=(file.stat().st_mtime_ns + 1000,) * 2)


def retyped(name: str, kind: pa.DataType) -> Any:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, table[name].cast(kind, safe=False))

    return change


def state_of(store: FeatureStore) -> Any:
    asked = store.get_online_features(
        ["users:spend", "users:city"], {"user_id": [1, 2, 3]}, now=5 * HOUR
    ).to_arrow()
    return [bits(asked[name]) for name in asked.column_names], store._registry.version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (retyped("x", pa.int64()), "column 'x' is int64; expected float64, as it was when apply ran"),
        (retyped("x", pa.float32()), "column 'x' is float32; expected float64"),
        (lambda t: t.drop_columns(["x"]), "source 'events.parquet' has no column 'x'; expected one of at"),
        (lambda t: t.drop_columns(["at"]), "source 'events.parquet' has no column 'at'"),
        (lambda t: t.append_column("x", t["x"]), "has two columns named 'x'"),
        (retyped("at", pa.int64()), "column 'at' is int64; expected timestamp"),
        (retyped("user_id", pa.string()), "column 'user_id' is string; expected int64"),
    ],
)
def test_drift_of_a_used_column_is_an_error_at_read(tmp_path: Path, change: Any, message: str) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    with FeatureStore(repo) as store:
        store.apply()
        before = state_of(store)
        rewrite(repo, change)
        for _ in range(2):
            with pytest.raises(DRIFT) as caught:
                store.refresh()
            assert message in str(caught.value)
        assert state_of(store) == before
    with (
        FeatureStore(repo) as store,
        pytest.raises((FailedPreconditionError, InvalidArgumentError)) as caught,
    ):
        store.get_online_features(["users:spend"], {"user_id": [1]}, now=HOUR)
    assert message in str(caught.value)


def test_apply_accepts_another_type_and_records_it(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    with FeatureStore(repo) as store:
        store.apply()
    rewrite(repo, retyped("x", pa.int64()))
    with FeatureStore(repo) as store:
        assert store.plan().sources == {"ParquetSource events.parquet": {"x": "float64 to int64"}}
        store.apply()
        assert not store.plan()
        assert store.get_online_features(["users:spend"], {"user_id": [1]}, now=HOUR).plan.output_dtypes == (
            "int64",
        )


def test_columns_that_nobody_reads_may_come_and_go(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    with FeatureStore(repo) as store:
        store.apply()
        rewrite(repo, lambda t: t.append_column("new", pa.array([["a"]] * t.num_rows)))
        assert store.refresh()
        key = "ParquetSource events.parquet"
        assert store.plan().sources == {key: {"new": "added <list<element: string>>"}}
        store.apply()
        rewrite(repo, lambda t: t.drop_columns(["new"]))
        assert store.refresh()
        assert store.plan().sources == {key: {"new": "removed <list<element: string>>"}}


def test_without_an_apply_nothing_is_recorded(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    with FeatureStore(repo) as store:
        state_of(store)
    rewrite(repo, retyped("x", pa.int64()))
    with FeatureStore(repo) as store:
        state_of(store)
        assert store.plan().sources == {}


def test_a_declared_schema_is_checked_by_apply_and_by_every_read(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    text = (repo / "features.py").read_text()
    declared = text.replace('timestamp="at")', 'timestamp="at", schema={"x": "float64", "city": "string"})')
    (repo / "features.py").write_text(declared)
    with FeatureStore(repo) as store:
        before = state_of(store)
        rewrite(repo, retyped("x", pa.float32()))
        for call in (store.refresh, store.apply, store.reread):
            with pytest.raises(InvalidArgumentError, match="column 'x' is float32; expected float64 as"):
                call()
        assert state_of(store) == before
        assert [(b.kind, b.name) for b in store.plan().breaks] == [("source", "events.parquet")]
    (repo / "features.py").write_text(declared.replace('"x": "float64"', '"x": "float32"'))
    with FeatureStore(repo) as store:
        assert not store.plan().breaks
        store.apply()


def test_a_csv_that_loses_its_rows_keeps_the_recorded_types(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    text = (repo / "features.py").read_text().replace("ParquetSource", "CSVSource")
    (repo / "features.py").write_text(text.replace("events.parquet", "events.csv"))
    csv.write_csv(pq.read_table(repo / "events.parquet"), repo / "events.csv")
    asked: Any = (["users:n", "users:city", "pairs:top"], {"user_id": [1], "shop": ["a"]})
    with FeatureStore(repo) as store:
        store.apply()
        assert store.get_online_features(*asked, now=5 * HOUR).to_dict()["n"] != [None]
        header = (repo / "events.csv").read_text().splitlines()[0]
        (repo / "events.csv").write_text(header + "\n")
        assert store.refresh()
        assert store.get_online_features(*asked, now=5 * HOUR).statuses() == {
            "n": [2],
            "city": [2],
            "top": [2],
        }
    with FeatureStore(repo) as store:
        assert store.get_online_features(*asked, now=5 * HOUR).statuses()["n"] == [2]


def test_versions_that_are_all_null_are_none(tmp_path: Path) -> None:
    table = frame(id=pa.nulls(3), gone=pa.nulls(3))
    read = read_source(source_of("csv", tmp_path, table, event_id="id", deleted="gone"), tmp_path)
    assert read.event_id is not None and read.deleted is not None
    assert (read.event_id.dtype, cells(read, "id")) == ("int64", [None, None, None])
    assert read.deleted.tolist() == [False, False, False]


def test_apply_refuses_a_request_time_feature_that_fits_no_column(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    text = (repo / "features.py").read_text()
    (repo / "features.py").write_text(
        text.replace('(now() - col("at")).hours()', '(now() - col("city")).hours()')
    )
    with FeatureStore(repo) as store:
        version = store._registry.version
        with pytest.raises(DefinitionError, match="view 'users': "):
            store.apply()
        assert store._registry.state.applied is None
        assert store._registry.state.fits == {} and store._registry.version <= version + 1  # codes alone


def test_a_csv_keeps_the_zeros_of_a_declared_text(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("user,t,x\n007,2024-01-01,1\n08,2024-01-02,2\n")
    loose = read_source(CSVSource("s.csv", "t"), tmp_path)
    assert cells(loose, "user") == [7, 8]
    source = CSVSource("s.csv", "t", schema={"user": "string", "x": "float32"})
    table = read_source(source, tmp_path)
    assert (cells(table, "user"), cells(table, "x")) == (["007", "08"], [1.0, 2.0])
    assert table.schema["x"] == "float32"
    (tmp_path / "s.csv").write_text(f"user,t,x\n1,2024-01-01,{BIG}\n")
    with pytest.raises(InvalidArgumentError, match="column 'x' has a value that is no float32"):
        read_source(source, tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 20, -1, -9])
def test_a_truncated_parquet_file(tmp_path: Path, cut: int) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    with FeatureStore(repo) as store:
        store.apply()
        before = state_of(store)
        whole = (repo / "events.parquet").read_bytes()
        (repo / "events.parquet").write_bytes(whole[:cut])
        for call in (store.refresh, store.apply):
            with pytest.raises(InvalidArgumentError, match=r"events\.parquet' cannot be read as Parquet"):
                call()
        assert [b.kind for b in store.plan().breaks] == ["source"]
        (repo / "events.parquet").unlink()
        with pytest.raises(InvalidArgumentError, match="expected an existing file"):
            store.refresh()
        assert state_of(store) == before


def test_null_keys_match_nothing_in_any_kind(tmp_path: Path) -> None:
    for kind in KINDS:
        table = frame(user=pa.array([None, 2, None], pa.int64()))
        read = read_source(source_of(kind, tmp_path, table, schema={"user": "int64"}), tmp_path)
        assert cells(read, "user") == [None, 2, None]


def test_the_plan_as_json_is_whole(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    with FeatureStore(repo) as store:
        found = json.loads(json.dumps(store.plan().to_dict()))
    assert set(found) == {"views", "services", "view_parts", "service_features", "sources", "breaks"}
