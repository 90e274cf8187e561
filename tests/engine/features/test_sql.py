"""SQL sources and SQL entity tables: what DuckDB runs and may not, and when a state counts as changed."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_repo import HOUR, bits, make_repo, some_rows, write_events

from penstock.errors import (
    DefinitionError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
)
from penstock.features import sql
from penstock.features.source_definitions import DuckDBSource, ParquetSource
from penstock.features.source_reading import source_stamp
from penstock.features.sources import read_source
from penstock.features.store import FeatureStore


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    table = pa.table(
        {
            "user_id": pa.array([1, 2**53 + 1, 3], pa.int64()),
            "at": pa.array([3, 1, 2], pa.timestamp("us", "UTC")),
            "name": ["a", None, "it's"],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "deep" / "b.parquet")
    (tmp_path / "c.csv").write_text("user_id,at\n9,1970-01-01T00:00:01Z\n")
    return tmp_path


def rows(query: str, base: Path) -> list[Any]:
    found: list[Any] = sql.query_table(query, base, "it").to_pylist()
    return found


def test_a_query_gives_the_rows_of_the_files_that_it_reads(base: Path) -> None:
    plain = read_source(ParquetSource("a.parquet", "at"), base)
    read = read_source(DuckDBSource("SELECT * FROM 'a.parquet'", "at"), base)
    assert read.schema == plain.schema
    assert read.columns["user_id"].values.tolist() == [1, 2**53 + 1, 3]
    assert read.event_time.tolist() == [3, 1, 2]
    assert read.dictionaries == plain.dictionaries
    assert [(c.valid is None) for c in read.columns.values()] == [
        (c.valid is None) for c in plain.columns.values()
    ]


@pytest.mark.parametrize(
    ("query", "files", "ids"),
    [
        ("SELECT user_id FROM 'a.parquet' WHERE name = 'it''s'", ["a.parquet"], [3]),
        ('SELECT user_id FROM "deep/b.parquet"', ["deep/b.parquet"], [1]),
        ("FROM 'deep/*.parquet' SELECT user_id;", ["deep/b.parquet"], [1]),
        (
            "SELECT user_id FROM read_parquet(['a.parquet', 'deep/b.parquet']) ORDER BY user_id LIMIT 2",
            ["a.parquet", "deep/b.parquet"],
            [1, 1],
        ),
        (
            "WITH \"x.y\" AS (SELECT 'é' AS e, * FROM 'c.csv') SELECT user_id FROM \"x.y\" -- 'a.parquet'",
            ["c.csv"],
            [9],
        ),
        (
            "SELECT a.user_id FROM 'a.parquet' a WHERE a.user_id IN (SELECT user_id FROM 'deep/b.parquet')",
            ["a.parquet", "deep/b.parquet"],
            [1],
        ),
        ("SELECT i AS user_id FROM range(2) t(i)", [], [0, 1]),
    ],
)
def test_paths_count_from_the_folder_wherever_the_process_runs(
    base: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch, query: str, files: Any, ids: Any
) -> None:
    other = tmp_path_factory.mktemp("other")
    for name in ("a.parquet", "c.csv"):
        (other / name).write_text("another file of that name")
    monkeypatch.chdir(other)
    assert [row["user_id"] for row in rows(query, base)] == ids
    assert sql.query_files(query, base, "it") == [base / name for name in files]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "it: the query is no statement; expected one SELECT"),
        ("SELECT 1; SELECT 2", "the query is SELECT, SELECT; expected one"),
        ("COPY (SELECT 1) TO 'out.csv'", "the query is COPY"),
        ("CREATE TABLE t (a int)", "the query is CREATE"),
        ("ATTACH 'x.duckdb' AS x", "the query is ATTACH"),
        ("INSTALL httpfs", "the query is LOAD"),
        ("SET threads = 1", "the query is SET"),
        ("WITH a AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM a", "has INSERT in it"),
        ("SELEC 1", r"DuckDB refuses the query: Parser Error: syntax error at or near \"SELEC\""),
        ("SELECT nope FROM 'a.parquet'", 'Binder Error: Referenced column "nope" not found'),
        ("SELECT * FROM 'none.parquet'", "No files found that match the pattern"),
        ("SELECT * FROM read_parquet('a' || '.parquet')", "computes a path of read_parquet"),
        ("SELECT * FROM read_csv(E'c.csv')", "expected a relative path as a plain text"),
        ("SELECT * FROM 'https://example.org/a.parquet'", "expected a file"),
        ("SELECT * FROM query('SELECT 1')", "the query calls query"),
        ("SELECT * FROM secret", "Table with name secret does not exist"),
        (7, "query is a int; expected a SELECT as text"),
    ],
)
def test_what_is_no_select_is_refused_and_leaves_no_trace(base: Path, query: Any, message: str) -> None:
    secret = pa.table({"a": [1]})  # a variable of the caller is no table
    before = sorted(base.rglob("*"))
    with pytest.raises(InvalidArgumentError, match=message):
        rows(query, base)
    assert sorted(base.rglob("*")) == before
    assert secret.num_rows == 1


def test_only_the_wanted_columns_come_back(base: Path) -> None:
    made, schema = sql.read_query("SELECT * FROM 'a.parquet'", base, "it", ["at", "nope"])
    assert (made.column_names, schema.names) == (["at"], ["user_id", "at", "name"])
    assert sql.read_query("SELECT * FROM 'a.parquet' WHERE false", base, "it", ["at"])[0].num_rows == 0
    assert sql.query_schema("SELECT * FROM 'a.parquet'", base, "it").names == ["user_id", "at", "name"]


def test_a_sum_of_integers_needs_a_cast(base: Path) -> None:
    query = "SELECT sum(user_id) AS s, a.at FROM 'a.parquet' a GROUP BY ALL"
    with pytest.raises(InvalidArgumentError, match=r"column 's' has type decimal128.*store it as float64"):
        read_source(DuckDBSource(query, "at"), base, columns=["s"])
    cast = DuckDBSource(query.replace("sum(user_id)", "sum(user_id)::BIGINT"), "at")
    assert sorted(read_source(cast, base).columns["s"].values.tolist()) == [1, 3, 2**53 + 1]


def test_the_stamp_follows_the_files_or_else_the_rows(base: Path) -> None:
    fixed = DuckDBSource("SELECT * FROM 'deep/*.parquet'", "at")
    first = source_stamp(fixed, base)
    assert source_stamp(fixed, base) == first
    pq.write_table(pq.read_table(base / "a.parquet"), base / "deep" / "c.parquet")
    assert source_stamp(fixed, base) != first
    assert source_stamp(DuckDBSource("SELECT 1 AS at", "at"), base) != source_stamp(
        DuckDBSource("SELECT 2 AS at", "at"), base
    )
    # `current_date` makes it no matter of files: the rows themselves are digested.
    loose = DuckDBSource("SELECT *, current_date > DATE '2000-01-01' AS late FROM 'a.parquet'", "at")
    first = source_stamp(loose, base)
    os.utime(base / "a.parquet", ns=(1, 1))
    assert source_stamp(loose, base) == first
    pq.write_table(pq.read_table(base / "a.parquet").slice(1), base / "a.parquet")
    assert source_stamp(loose, base) != first


def test_a_source_that_never_gives_the_same_rows_is_refused(tmp_path: Path) -> None:
    repo = sql_repo(tmp_path, "SELECT *, random() AS r FROM 'events.parquet'")
    with FeatureStore(repo) as store, pytest.raises(UnavailableError, match="changes while it is read"):
        store.get_online_features(["users:n"], {"user_id": [1]}, now=HOUR)


def sql_repo(path: Path, query: str) -> Path:
    repo = make_repo(path / "r", some_rows())
    text = (repo / "features.py").read_text()
    source = f'DuckDBSource({query!r}, timestamp="at", name="events")'
    text = text.replace('ParquetSource("events.parquet", timestamp="at")', source)
    (repo / "features.py").write_text(text.replace("ParquetSource", "DuckDBSource"))
    return repo


FEATURES = ["users:n", "users:spend", "users:city", "pairs:top"]
ENTITIES = (
    "SELECT i // 5 AS user_id, 'a' AS shop, make_timestamp(i * 180000000) AS event_timestamp, i AS label "
    "FROM range(100) t(i) ORDER BY i"
)


def test_a_sql_source_gives_the_same_bits_as_its_file(tmp_path: Path) -> None:
    plain = make_repo(tmp_path / "plain", some_rows())
    by_sql = sql_repo(tmp_path, "SELECT * FROM 'events.parquet'")
    entities = pa.table({"user_id": [1, 2, 3], "shop": ["a", "b", "a"]})
    with FeatureStore(plain) as one, FeatureStore(by_sql) as two:
        for now in (HOUR, 5 * HOUR, 11 * HOUR):
            a, b = (
                store.get_online_features(FEATURES, entities, now=now).to_arrow(with_status=True)
                for store in (one, two)
            )
            assert [bits(a[name]) for name in a.column_names] == [bits(b[name]) for name in b.column_names]
        before = two.materialize_incremental(5 * HOUR).rows
        assert before == one.materialize_incremental(5 * HOUR).rows
        assert not two.refresh()
        write_events(by_sql, some_rows(seed=4))
        assert two.refresh()
        assert two.cursor("users") is None  # rows of the old state do not count


def test_a_query_that_breaks_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    repo = sql_repo(tmp_path, "SELECT * FROM 'events.parquet'")
    with FeatureStore(repo) as store:
        got = store.get_online_features(FEATURES, {"user_id": [1], "shop": ["a"]}, now=5 * HOUR).to_dict()
        (repo / "events.parquet").unlink()
        with pytest.raises(InvalidArgumentError, match="No files found"):
            store.refresh()
        (repo / "events.parquet").write_bytes(b"PAR1 cut")
        with pytest.raises(InvalidArgumentError, match="source 'events': DuckDB refuses the query"):
            store.refresh()
        again = store.get_online_features(FEATURES, {"user_id": [1], "shop": ["a"]}, now=5 * HOUR).to_dict()
        assert got == again


def test_entities_by_sql_are_the_entities_of_their_table(tmp_path: Path) -> None:
    repo = make_repo(tmp_path / "r", some_rows())
    table = sql.query_table(ENTITIES, repo, "entity_df")
    assert table.num_rows == 100
    with FeatureStore(repo) as store:
        by_table = store.get_historical_features(table, FEATURES, with_status=True).to_arrow()
        by_sql = store.get_historical_features(ENTITIES, FEATURES, with_status=True).to_arrow()
        assert by_sql.equals(by_table)
        assert by_sql["label"].to_pylist() == list(range(100))
        pq.write_table(table, repo / "ask.parquet")
        by_file = store.get_historical_features("FROM 'ask.parquet'", FEATURES, with_status=True).to_arrow()
        assert by_file.equals(by_table)
        for wrong, message in (
            ("SELECT 1 AS user_id", "no time column"),
            ("DROP TABLE x", "entity_df: the query is DROP"),
            ("SELECT 1 AS a, 2 AS a", "entity_df has two columns named 'a'"),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                store.get_historical_features(wrong, FEATURES).to_arrow()


def test_without_duckdb_the_error_says_what_to_install(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(FailedPreconditionError, match=r"it needs the package duckdb.*penstock\[duckdb\]"):
        rows("SELECT 1", base)


def test_definitions_of_sql_sources() -> None:
    one = DuckDBSource("SELECT 1", "t")
    assert one.name.startswith("query-") and one.name == DuckDBSource("SELECT 1", "t").name
    assert one.describe() != DuckDBSource("SELECT 2", "t").describe()
    assert DuckDBSource("SELECT 1", "t", name="mine").describe() == one.describe()
    with pytest.raises(DefinitionError, match="query is '  '; expected a SELECT"):
        DuckDBSource("  ", "t")


def test_times_with_a_zone_are_utc(base: Path) -> None:
    query = "SELECT TIMESTAMPTZ '2024-03-01 12:00:00+02' AS at, 1 AS user_id"
    noon = int(datetime(2024, 3, 1, 10, tzinfo=UTC).timestamp()) * 1_000_000
    assert read_source(DuckDBSource(query, "at"), base).event_time.tolist() == [noon]
