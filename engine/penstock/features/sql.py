"""SELECTs that DuckDB runs over the files of a repository: SQL sources and SQL entity tables.

Each call has a database of its own in memory, without extensions, and nothing but one SELECT is run. A path
that the query names as a plain text counts from `base`, wherever the process runs. DuckDB is loaded when it
is first needed. Any thread may call.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import FailedPreconditionError, InvalidArgumentError

if TYPE_CHECKING:
    import pyarrow as pa

_READERS = frozenset(
    {"read_parquet", "parquet_scan", "read_csv", "read_csv_auto", "read_json", "read_json_auto",
     "read_ndjson", "read_ndjson_auto", "read_json_objects", "read_text", "read_blob", "glob"}
)  # fmt: skip
_PURE = frozenset({"range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree"})
# What gives another answer without a change of any file; names in lower case.
_VOLATILE = frozenset(
    {"random", "setseed", "uuid", "uuidv4", "uuidv7", "gen_random_uuid", "now", "today", "current_date",
     "current_time", "current_timestamp", "current_localtime", "current_localtimestamp", "localtime",
     "localtimestamp", "get_current_time", "get_current_timestamp", "transaction_timestamp", "age", "nextval",
     "txid_current", "current_query_id", "current_connection_id", "current_transaction_id"}
)  # fmt: skip
_SETTINGS = (
    "SET autoload_known_extensions = false",
    "SET autoinstall_known_extensions = false",
    "SET python_enable_replacements = false",  # the caller's variables are no tables
    "SET temp_directory = ''",
    "SET TimeZone = 'UTC'",
)
_BATCH_ROWS = 1 << 17


@dataclass(frozen=True)
class Analysis:
    """What a query reads.

    Attributes:
        text: the query with its paths made absolute.
        paths: those paths, globs among them.
        fixed: whether equal files mean equal rows.
    """

    text: str
    paths: tuple[str, ...]
    fixed: bool


def query_table(query: str, base: Path, what: str) -> pa.Table:
    """All rows of a query. Arguments and errors as `read_query`."""
    return read_query(query, base, what, None)[0]


def read_query(
    query: str, base: Path, what: str, columns: Sequence[str] | None, most_bytes: int | None = None
) -> tuple[pa.Table, pa.Schema]:
    """Run a query.

    Args:
        query: one SELECT or WITH ... SELECT.
        base: folder from which relative paths count.
        what: names the query in errors.
        columns: those to keep; a name that the query does not give is left out. All if None.
        most_bytes: the memory that the rows may take.

    Returns:
        The rows, and the schema of all columns that the query gives.

    Raises:
        InvalidArgumentError: it is something else, or DuckDB refuses it, in DuckDB's words.
        FailedPreconditionError: DuckDB is not installed.
        SourceTooLarge: the rows take more than `most_bytes`.
    """
    import pyarrow as pa

    from penstock.features.source_reading import SourceTooLarge

    with query_reader(query, base, what) as reader:
        kept, batches, read = _kept(reader.schema, columns), [], 0
        for batch in reader:
            batches.append(batch.select(kept))
            if most_bytes is not None:
                read += batches[-1].nbytes
                if read > most_bytes:
                    raise SourceTooLarge
        schema = pa.schema([reader.schema.field(i) for i in kept])
        return pa.Table.from_batches(batches, schema), reader.schema


def query_batches(
    query: str, base: Path, what: str, columns: Sequence[str], rows: int
) -> Iterator[pa.RecordBatch]:
    """The rows of a query in batches of about `rows`. Arguments and errors as `read_query`."""
    with query_reader(query, base, what, rows) as reader:
        kept = _kept(reader.schema, columns)
        for batch in reader:
            yield batch.select(kept)


@contextmanager
def query_reader(query: str, base: Path, what: str, rows: int = _BATCH_ROWS) -> Iterator[Any]:
    """An Arrow reader of a query's rows. Arguments and errors as `read_query`."""
    with _session(what) as connection:
        yield connection.sql(analyse(query, base, what, connection).text).to_arrow_reader(rows)


def _kept(schema: pa.Schema, columns: Sequence[str] | None) -> list[int]:
    return [i for i, name in enumerate(schema.names) if columns is None or name in columns]


def query_schema(query: str, base: Path, what: str) -> pa.Schema:
    """The columns of a query's rows, of which none is read. Raises as `read_query`."""
    import pyarrow as pa

    with _session(what) as connection:
        relation = connection.sql(analyse(query, base, what, connection).text)
        schema = relation.limit(0).to_arrow_table().schema
        # The limit makes repeated names distinct; they must stay what they are.
        return pa.schema([f.with_name(name) for f, name in zip(schema, relation.columns)])


def query_files(query: str, base: Path, what: str) -> list[Path] | None:
    """The files that a query reads, sorted; None where they, or its rows, are not a matter of files alone.

    Raises as `read_query`.
    """
    with _session(what) as connection:
        found = analyse(query, base, what, connection)
    if not found.fixed:
        return None
    files: set[Path] = set()
    for text in found.paths:
        path = Path(text)
        if path.is_dir():
            files.update(p for p in path.rglob("*") if p.is_file())
        elif path.is_file():
            files.add(path)
        else:
            files.update(p for p in map(Path, glob.glob(text, recursive=True)) if p.is_file())  # noqa: PTH207
    return sorted(files)


@contextmanager
def _session(what: str) -> Iterator[Any]:
    try:
        import duckdb
    except ImportError:
        raise FailedPreconditionError(
            f"{what} needs the package duckdb; expected it to be installed: pip install 'penstock[duckdb]'"
        ) from None
    connection = duckdb.connect(":memory:")
    try:
        for setting in _SETTINGS:
            connection.execute(setting)
        yield connection
    except duckdb.Error as error:
        raise InvalidArgumentError(f"{what}: DuckDB refuses the query: {error}") from error
    finally:
        connection.close()


def analyse(query: str, base: Path, what: str, connection: Any) -> Analysis:
    """Check that a query only reads, and find its files.

    Args:
        connection: a DuckDB connection, for its parser alone.

    Raises:
        InvalidArgumentError: no text, several statements, another statement than SELECT, or a path that is
            relative and not written as a plain quoted text.
        duckdb.Error: the query is no SQL.
    """
    import duckdb

    if not isinstance(query, str):
        raise InvalidArgumentError(f"{what}: query is a {type(query).__name__}; expected a SELECT as text")
    statements = connection.extract_statements(query)
    kinds = [statement.type.name for statement in statements]
    if kinds != [duckdb.StatementType.SELECT.name]:
        found = ", ".join(kinds) or "no statement"
        raise InvalidArgumentError(f"{what}: the query is {found}; expected one SELECT or WITH ... SELECT")
    tree = json.loads(connection.execute("SELECT json_serialize_sql(?)", [query]).fetchall()[0][0])
    if tree.get("error"):
        raise InvalidArgumentError(
            f"{what}: the query is no plain SELECT: {tree.get('error_message')}; expected one that only reads"
        )
    walk = _Walk(what)
    walk.visit(tree["statements"])
    named = [(at, text) for at, text in walk.paths if text not in walk.ctes]
    data = query.encode()
    made: list[str] = []
    for at, text in sorted(named, reverse=True):
        if "://" in text:
            raise InvalidArgumentError(f"{what}: the query reads '{text}'; expected a file")
        full = str(base / text)
        made.append(full)
        if full == text:
            continue
        for quote in (b"'", b'"'):
            old = quote + text.encode().replace(quote, quote * 2) + quote
            if data[at : at + len(old)] == old:
                new = quote + full.encode().replace(quote, quote * 2) + quote
                data = data[:at] + new + data[at + len(old) :]
                break
        else:
            raise InvalidArgumentError(
                f"{what}: the query reads '{text}'; expected a relative path as a plain text in single quotes"
            )
    return Analysis(data.decode(), tuple(sorted(set(made))), walk.fixed)


class _Walk:
    """Visits DuckDB's own tree of a query: every table, table function and function in it.

    Attributes:
        paths: (position in bytes, text) of each name that can be a file.
        ctes: names that the query itself defines.
        fixed: no table or function was seen whose rows are not a matter of those files alone.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.paths: list[tuple[int, str]] = []
        self.ctes: set[str] = set()
        self.fixed = True

    def visit(self, node: Any) -> None:
        if isinstance(node, list):
            for value in node:
                self.visit(value)
            return
        if not isinstance(node, dict):
            return
        kind = node.get("type")
        if isinstance(kind, str) and kind.startswith(("INSERT", "UPDATE", "DELETE", "MERGE", "COPY")):
            raise InvalidArgumentError(
                f"{self.what}: the query has {kind.split('_')[0]} in it; expected one that only reads"
            )
        if kind == "BASE_TABLE" and not node.get("schema_name") and not node.get("catalog_name"):
            if any(mark in node["table_name"] for mark in "./*"):
                self.paths.append((node["query_location"], node["table_name"]))
        elif kind == "TABLE_FUNCTION":
            self._table_function(node["function"])
        elif kind == "FUNCTION" and str(node.get("function_name")).lower() in _VOLATILE:
            self.fixed = False
        elif kind == "COLUMN_REF" and str(node.get("column_names", [""])[-1]).lower() in _VOLATILE:
            self.fixed = False  # current_date and its like need no parentheses
        if node.get("sample"):
            self.fixed = False
        for entry in (node.get("cte_map") or {}).get("map", []):
            self.ctes.add(entry["key"])
        for value in node.values():
            self.visit(value)

    def _table_function(self, function: dict[str, Any]) -> None:
        name = str(function["function_name"]).lower()
        if name in _PURE:
            return
        arguments = [entry["expression"] for entry in function["arguments"]]
        first = arguments[0] if arguments else {}
        parts = [first]
        if str(first.get("function_name")).lower() in ("list_value", "array"):
            parts = [entry["expression"] for entry in first["arguments"]]
        texts = [
            (part["query_location"], part["literal"]["text"])
            for part in parts
            if part.get("type") == "VALUE_CONSTANT" and part["literal"]["kind"] == "STRING"
        ]
        if name in _READERS:
            if len(texts) < len(parts):
                raise InvalidArgumentError(
                    f"{self.what}: the query computes a path of {name}; expected plain texts in single quotes"
                )
            self.paths += texts
        elif name in ("query", "query_table"):
            raise InvalidArgumentError(f"{self.what}: the query calls {name}; expected plain SQL")
        else:
            self.fixed = False
