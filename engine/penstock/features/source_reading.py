"""The Arrow table behind a source, before any column of it is converted, and the stamp of its state.

Files of one source may differ in the zone and unit of their times and in the type of their numbers, but no
value changes: an integer above 2**53 beside floats is an error. Pure functions of the files, the query or the
table; any thread may call.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from penstock.errors import InvalidArgumentError
from penstock.features import sql
from penstock.features.source_definitions import (
    ArrowSource,
    CSVSource,
    DuckDBSource,
    FileSource,
    Source,
    TableSource,
)

ARROW_TYPES = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(),
               "string": pa.string(), "timestamp": pa.timestamp("us", "UTC"),
               "duration": pa.duration("us")}  # fmt: skip
_SUFFIXES = {"ParquetSource": (".parquet", ".pq"), "CSVSource": (".csv",),
             "ArrowSource": (".arrow", ".feather", ".ipc")}  # fmt: skip
_CSV_TEXT = pa.string()
_FOOTERS_FROM = 16  # files of a source are looked into where they may be so many times larger in memory


class SourceTooLarge(Exception):
    """The columns of a source take more memory than the caller wants them to; it is read in batches then."""


def where_of(source: Source) -> str:
    """How messages name a source."""
    return f"source '{source.name}'"


def arrow_table(table: Any, what: str) -> pa.Table:
    """An Arrow table of a pandas frame, an Arrow table, or anything with `__arrow_c_stream__` (polars).

    Raises:
        InvalidArgumentError: another object, a column that Arrow cannot hold, or a repeated column name.
    """
    try:
        if isinstance(table, pa.Table):
            made = table
        elif type(table).__module__.split(".")[0] == "pandas":
            repeated(table.columns, what)
            made = pa.Table.from_pandas(table, preserve_index=False)
        elif hasattr(table, "__arrow_c_stream__"):
            made = pa.table(table)
        else:
            raise InvalidArgumentError(
                f"{what} is a {type(table).__name__}; expected a pandas, polars or Arrow table"
            )
    except (pa.ArrowException, ValueError, TypeError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"{what} cannot be read as an Arrow table: {error}") from error
    repeated(made.column_names, what)
    return made.replace_schema_metadata(None)


def repeated(names: Iterable[Any], what: str) -> None:
    """Refuse two columns of one name."""
    seen: set[Any] = set()
    for name in names:
        if name in seen:
            raise InvalidArgumentError(f"{what} has two columns named '{name}'; expected distinct names")
        seen.add(name)


def source_files(source: FileSource, base: Path) -> list[Path]:
    """Files of a source, sorted by path; a folder stands for all files below it with a known suffix."""
    path = base / source.path
    if path.is_file():
        return [path]
    if path.is_dir():
        suffixes = _SUFFIXES[type(source).__name__]
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
        wanted = f"a file *{suffixes[0]} in it"
    else:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())  # noqa: PTH207
        wanted = "an existing file, folder or glob"
    if not found:
        raise InvalidArgumentError(f"source path is '{source.path}' in {base}; expected {wanted}")
    return found


def source_stamp(source: Source, base: Path) -> str:
    """A digest that changes with the events.

    Of the names, sizes and modification times of files; of the rows where these are in memory, or a query
    gives them that is not a matter of files alone.
    """
    facts: Any
    if isinstance(source, FileSource):
        facts = _file_facts(source_files(source, base))
    elif isinstance(source, DuckDBSource):
        files = sql.query_files(source.query, base, where_of(source))
        facts = _query_digest(source, base) if files is None else _file_facts(files)
    elif isinstance(source, TableSource):
        facts = _table_digest(source)
    else:
        raise InvalidArgumentError(f"{where_of(source)} is a {type(source).__name__}, which cannot be read")
    return hashlib.sha256(repr((source.describe(), facts)).encode()).hexdigest()


def _file_facts(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    found = []
    for path in files:
        facts = path.stat()
        found.append((str(path), facts.st_size, facts.st_mtime_ns))
    return found


def rows_digest(table: pa.Table) -> str:
    """128 bits (hex) of a table's rows; equal tables may differ in it, different ones do.

    It guards against changes, not against people who want two tables to look alike.
    """
    return _batches_digest(table.schema, table.to_batches())


def _batches_digest(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> str:
    from penstock.features.digests import RowsDigest

    sink = RowsDigest()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.hexdigest()


def _query_digest(source: DuckDBSource, base: Path) -> str:
    with sql.query_reader(source.query, base, where_of(source)) as reader:
        return _batches_digest(reader.schema, reader)


def held_table(source: TableSource) -> pa.Table:
    """The source's table as Arrow, converted once."""
    made = source.__dict__.get("_arrow")
    if made is None:
        made = arrow_table(source.table, where_of(source))
        object.__setattr__(source, "_arrow", made)
    return made


def _table_digest(source: TableSource) -> str:
    made: str | None = source.__dict__.get("_digest")
    if made is None:
        made = rows_digest(held_table(source))
        object.__setattr__(source, "_digest", made)
    return made


def source_bytes(source: Source, base: Path, wanted: Sequence[str], most: int) -> int:
    """About the bytes that columns of a source take in memory: at most `most`, if the answer says so.

    Of Parquet by rows and width, of other files by their size. 0 for a query: only its rows tell.

    Raises:
        InvalidArgumentError: a missing or corrupt file.
    """
    if isinstance(source, TableSource):
        table = held_table(source)
        return sum(table[name].nbytes for name in set(wanted) if table.column_names.count(name) == 1)
    if not isinstance(source, FileSource):
        return 0
    files = source_files(source, base)
    on_disk = sum(path.stat().st_size for path in files)
    if type(source).__name__ != "ParquetSource" or on_disk * _FOOTERS_FROM <= most:
        return on_disk
    from pyarrow import parquet

    names = set(source.file_columns(wanted))
    total = 0
    for path in files:
        with reading(source, path), parquet.ParquetFile(path) as file:
            facts = file.metadata
            for name, kind in zip(file.schema_arrow.names, file.schema_arrow.types):
                if name in names:
                    total += facts.num_rows * (4 if pa.types.is_float32(kind) else 8)
            for group in range(facts.num_row_groups):
                for i in range(facts.num_columns):
                    column = facts.row_group(group).column(i)
                    if column.path_in_schema in names and column.physical_type == "BYTE_ARRAY":
                        total += column.total_uncompressed_size
    return total


def raw_table(
    source: Source, base: Path, wanted: Sequence[str] | None, most_bytes: int | None = None
) -> tuple[pa.Table, pa.Schema]:
    """Read a source.

    Args:
        wanted: the columns that matter; the table may have others. All if None.
        most_bytes: the memory that the table may take, by an estimate or as it is read.

    Returns:
        The table, and the schema of all columns that there are.

    Raises:
        InvalidArgumentError: a missing or corrupt file, files that do not go together, or a wrong query.
        SourceTooLarge: it takes more than `most_bytes`.
    """
    if most_bytes is not None and source_bytes(source, base, wanted or (), most_bytes) > most_bytes:
        raise SourceTooLarge
    if isinstance(source, TableSource):
        table = held_table(source)
        return table, table.schema
    if isinstance(source, DuckDBSource):
        return sql.read_query(source.query, base, where_of(source), wanted, most_bytes)
    assert isinstance(source, FileSource)
    tables, schemas = [], []
    read = 0
    for path in source_files(source, base):
        with reading(source, path):
            table, schema = _read_file(source, path, None if wanted is None else source.file_columns(wanted))
        if source.field_mapping:
            table, schema = renamed(source, table), renamed(source, schema.empty_table()).schema
        read += table.nbytes if most_bytes is not None else 0
        if most_bytes is not None and read > most_bytes:
            raise SourceTooLarge
        tables.append(table)
        schemas.append(schema)
    return joined(source, tables), joined(source, [schema.empty_table() for schema in schemas]).schema


def raw_schema(source: Source, base: Path) -> pa.Schema:
    """The schema of all columns; of Parquet, Arrow and queries no row is read. Raises as `raw_table`.

    A source of another kind has the schema that it declares.
    """
    if not isinstance(source, FileSource | DuckDBSource | TableSource):
        return pa.schema([(name, ARROW_TYPES[dtype]) for name, dtype in (source.schema or {}).items()])
    if isinstance(source, DuckDBSource):
        return sql.query_schema(source.query, base, where_of(source))
    if not isinstance(source, FileSource) or isinstance(source, CSVSource):
        return raw_table(source, base, [])[1]
    empty = []
    for path in source_files(source, base):
        with reading(source, path):
            empty.append(renamed(source, whole_schema(source, path).empty_table()))
    return joined(source, empty).schema


class reading:
    """Turns what Arrow and the system say of a file into one error that names it."""

    def __init__(self, source: FileSource, path: Path) -> None:
        self._source, self._path = source, path

    def __enter__(self) -> None: ...

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, pa.ArrowException | OSError):
            kind = type(self._source).__name__.removesuffix("Source")
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InvalidArgumentError(f"file '{self._path}' cannot be read as {kind}: {reason}") from error


def _read_file(source: FileSource, path: Path, wanted: Sequence[str] | None) -> tuple[pa.Table, pa.Schema]:
    if isinstance(source, CSVSource):
        table = _read_csv(source, path)
        return table, table.schema
    if isinstance(source, ArrowSource):
        with pa.OSFile(str(path)) as file:
            table = arrow_reader(file).read_all()
        return table, table.schema
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow.remove_metadata()
        # A file that lacks a column is read whole, so that the error can list what there is.
        whole = wanted is None or not set(wanted) <= set(schema.names)
        return file.read(columns=None if whole else wanted).replace_schema_metadata(None), schema


def _read_csv(source: CSVSource, path: Path) -> pa.Table:
    from pyarrow import csv

    return csv.read_csv(path, convert_options=csv_options(source, None))


def csv_options(types: CSVSource | dict[str, pa.DataType], columns: Sequence[str] | None) -> Any:
    """How cells become values: of columns of given types, or of those that a source declares as text."""
    from pyarrow import csv

    # Only an empty unquoted cell is null: "NA" and "null" are texts that people use. What is declared as text
    # is read as text, so that "007" keeps its zeros.
    if isinstance(types, CSVSource):
        texts = [name for name, dtype in (types.schema or {}).items() if dtype == "string"]
        types = dict.fromkeys(types.file_columns(texts), _CSV_TEXT)
    return csv.ConvertOptions(
        null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False, column_types=types,
        include_columns=columns,
    )  # fmt: skip


def whole_file(source: FileSource, path: Path) -> pa.Table:
    """All columns of a file, by the file's names."""
    return _read_file(source, path, None)[0]


def arrow_reader(file: Any) -> Any:
    """A reader of an Arrow IPC file or stream."""
    magic = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)


def whole_schema(source: FileSource, path: Path) -> pa.Schema:
    """The schema of a file, by the file's names; a CSV file is read for it."""
    if isinstance(source, CSVSource):
        return _read_csv(source, path).schema
    if isinstance(source, ArrowSource):
        with pa.OSFile(str(path)) as file:
            return arrow_reader(file).schema.remove_metadata()
    from pyarrow import parquet

    return parquet.read_schema(path).remove_metadata()


def renamed(source: FileSource, table: pa.Table) -> pa.Table:
    """The table with the names of `field_mapping`."""
    if not source.field_mapping:
        return table
    repeated(table.column_names, where_of(source))
    renames = source.renames(table.column_names)
    return table.select(list(renames)).rename_columns(list(renames.values()))


def joined(source: FileSource, tables: list[pa.Table]) -> pa.Table:
    """One table of all files."""
    for table in tables:
        repeated(table.column_names, where_of(source))
    try:
        return pa.concat_tables(_aligned(source, tables), promote_options="permissive")
    except pa.ArrowException as error:
        raise InvalidArgumentError(
            f"the files of source '{source.path}' differ in schema: {error}"
        ) from error


def _aligned(source: FileSource, tables: list[pa.Table]) -> list[pa.Table]:
    """Bring times of different zones to UTC, and integers beside floats to floats where these hold them."""
    kinds: dict[str, set[pa.DataType]] = {}
    for table in tables:
        for name, kind in zip(table.column_names, table.schema.types):
            kinds.setdefault(name, set()).add(kind)
    for name, found in kinds.items():
        zones = {kind.tz for kind in found if pa.types.is_timestamp(kind)}
        if len(zones) > 1:
            if None in zones and source.schema is not None:
                raise InvalidArgumentError(
                    f"{where_of(source)}: column '{name}' has times with a zone in some files and without "
                    "one in others; expected one or the other"
                )
            _cast(tables, name, pa.types.is_timestamp, lambda kind: pa.timestamp(kind.unit, "UTC"))
        if any(map(pa.types.is_floating, found)):
            _cast(tables, name, pa.types.is_integer, lambda kind: pa.float64())
    return tables


def _cast(tables: list[pa.Table], name: str, which: Any, target: Any) -> None:
    for i, table in enumerate(tables):
        if name in table.column_names and which(table[name].type):
            made = table[name].cast(target(table[name].type))
            tables[i] = table.set_column(table.column_names.index(name), name, made)
