"""Event tables read from files into plain arrays, and the one conversion from Arrow columns.

Every time becomes int64 microseconds UTC (a time without a zone is UTC), every string a dictionary code.
A dictionary only grows, so a code that was given once keeps its meaning. Rows without an event time are
dropped and counted. Tables are immutable; any thread may read them.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.errors import InvalidArgumentError
from penstock.features.expressions import INT_MIN
from penstock.features.source_definitions import ArrowSource, CSVSource, FileSource, Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNKNOWN_TIME = INT_MIN  # `known_at` of a row whose `created` is null: it loses ties and no cut-off admits it
_SUFFIXES = {"ParquetSource": (".parquet", ".pq"), "CSVSource": (".csv",),
             "ArrowSource": (".arrow", ".feather", ".ipc")}  # fmt: skip
_PER_US = {"s": 1_000_000, "ms": 1_000, "us": 1}
_ZONED = r"[0-9][Tt ].*([Zz]|[+-][0-9]{2}(:?[0-9]{2})?)$"


@dataclass(frozen=True)
class SourceColumn:
    """A column of n values.

    Attributes:
        dtype: one of `expressions.DTYPES`.
        values: float64 for floats, int64 for all others; a string is its dictionary code. 0 where null.
        valid: bool, False where null; None if nothing is null.
        dictionary: text of each code, for strings only.
    """

    dtype: str
    values: NDArray[Any]
    valid: NDArray[np.bool_] | None
    dictionary: list[str] | None = None

    def take(self, rows: NDArray[Any]) -> SourceColumn:
        """The rows given by a mask or by positions."""
        valid = None if self.valid is None else self.valid[rows]
        return SourceColumn(self.dtype, self.values[rows], valid, self.dictionary)


@dataclass(frozen=True)
class SourceTable:
    """Events of a source.

    Attributes:
        columns: each column by name, the time columns too.
        event_time: int64[n], microseconds UTC.
        known_at: int64[n]; `event_time` if the source has no `created`, `UNKNOWN_TIME` where that is null.
        unsupported: Arrow type of each column that is no feature type; to use one is an error.
        dropped: rows left out because their event time is null.
        event_id: int64 or string; rows of one key with equal ids are versions of one event. None: every row
            is an event of its own.
        deleted: bool[n]; versions that remove their event. None: no row does.
    """

    columns: dict[str, SourceColumn]
    n_rows: int
    event_time: NDArray[np.int64]
    known_at: NDArray[np.int64]
    unsupported: dict[str, str] = field(default_factory=dict)
    dropped: int = 0
    event_id: SourceColumn | None = None
    deleted: NDArray[np.bool_] | None = None

    @property
    def schema(self) -> dict[str, str]:
        """The dtype of each column."""
        return {name: column.dtype for name, column in self.columns.items()}

    @property
    def dictionaries(self) -> dict[str, list[str]]:
        """The dictionary of each string column."""
        return {n: c.dictionary for n, c in self.columns.items() if c.dictionary is not None}


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
    """A digest that changes with the events: of the names, sizes and modification times of the files."""
    assert isinstance(source, FileSource)
    facts = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in source_files(source, base)]
    return hashlib.sha256(repr((source.describe(), facts)).encode()).hexdigest()


def read_source(
    source: Source,
    base: Path,
    dictionaries: Mapping[str, list[str]] | None = None,
    columns: Iterable[str] | None = None,
) -> SourceTable:
    """Read a source.

    Args:
        source: what to read; its path is relative to `base`.
        dictionaries: codes given earlier, by column; new strings are appended to a copy.
        columns: the columns to keep besides the time columns; all that have a feature type if None.

    Raises:
        InvalidArgumentError: a missing or corrupt file, a missing column, or one whose type does not fit.
    """
    times = [source.timestamp] + ([source.created] if source.created else [])
    wanted = None if columns is None else list(dict.fromkeys([*times, *columns]))
    assert isinstance(source, FileSource)
    table = _read_files(source, base, wanted)
    where = f"source '{source.name}'"
    for name in wanted or times:
        if name not in table.column_names:
            known = ", ".join(table.column_names)
            raise InvalidArgumentError(f"{where} has no column '{name}'; expected one of {known}")
    converted: dict[str, SourceColumn] = {}
    unsupported: dict[str, str] = {}
    for name in wanted or table.column_names:
        given = (dictionaries or {}).get(name)
        if name in times:
            converted[name] = time_column(table[name], f"{where}: column '{name}'")
        elif wanted is None and feature_dtype(table[name].type) is None:
            unsupported[name] = str(table[name].type)
        else:
            converted[name] = arrow_column(table[name], f"{where}: column '{name}'", given)
    present = converted[source.timestamp].valid
    dropped = 0
    if present is not None:
        dropped = int(np.count_nonzero(~present))
        converted = {name: column.take(present) for name, column in converted.items()}
    event_time = converted[source.timestamp].values
    known_at = event_time
    if source.created:
        created = converted[source.created]
        known_at = (
            created.values if created.valid is None else np.where(created.valid, created.values, UNKNOWN_TIME)
        )
    return SourceTable(converted, len(event_time), event_time, known_at, unsupported, dropped)


def _read_files(source: FileSource, base: Path, wanted: list[str] | None) -> pa.Table:
    files = source_files(source, base)
    tables = []
    for path in files:
        try:
            tables.append(_read_file(source, path, wanted))
        except (pa.ArrowException, OSError) as error:
            kind = type(source).__name__.removesuffix("Source")
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InvalidArgumentError(f"file '{path}' cannot be read as {kind}: {reason}") from error
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InvalidArgumentError(
            f"the files of source '{source.path}' differ in schema: {error}"
        ) from error


def _read_file(source: FileSource, path: Path, wanted: list[str] | None) -> pa.Table:
    if isinstance(source, CSVSource):
        from pyarrow import csv

        # Only an empty unquoted cell is null: "NA" and "null" are texts that people use.
        options = csv.ConvertOptions(
            null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
        )
        return csv.read_csv(path, convert_options=options)
    if isinstance(source, ArrowSource):
        with pa.OSFile(str(path)) as file:
            magic = file.read(6)
            file.seek(0)
            reader = pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)
            return reader.read_all()
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        # A file that lacks a column is read whole, so that the error can list what there is.
        whole = wanted is None or not set(wanted) <= set(file.schema_arrow.names)
        return file.read(columns=None if whole else wanted)


def feature_dtype(kind: pa.DataType) -> str | None:
    """The feature dtype of an Arrow type; None if it has none."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int64"
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return "float32"
    if pa.types.is_float64(kind) or pa.types.is_null(kind):
        return "float64"
    if is_text(kind):
        return "string"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "timestamp"
    return "duration" if pa.types.is_duration(kind) else None


def is_text(kind: pa.DataType) -> bool:
    """Whether the Arrow type is a string, dictionary-encoded or not."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _validity(column: pa.ChunkedArray) -> NDArray[np.bool_] | None:
    return column.is_valid().to_numpy() if column.null_count else None


def _integers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """int64[n] of an integer column, 0 where null."""
    wide = column.cast(pa.int64())
    found: NDArray[np.int64] = (wide.fill_null(0) if wide.null_count else wide).to_numpy()
    return np.ascontiguousarray(found)


def arrow_column(column: pa.ChunkedArray, what: str, dictionary: list[str] | None = None) -> SourceColumn:
    """Convert an Arrow column; `what` names it in errors.

    Raises:
        InvalidArgumentError: a type that is no feature type (decimals too), or a value out of range.
    """
    dtype = feature_dtype(column.type)
    if dtype is None:
        hint = "; store it as float64 or int64" if pa.types.is_decimal(column.type) else ""
        raise InvalidArgumentError(
            f"{what} has type {column.type}; "
            f"expected bool, int, float, string, timestamp, date or duration{hint}"
        )
    column = _plain(column)
    valid = _validity(column)
    if dtype == "string":
        return _text_column(column, valid, dictionary)
    try:
        if dtype in ("timestamp", "duration"):
            return SourceColumn(dtype, _microseconds(column), valid)
        if dtype in ("float32", "float64"):
            wide = column.cast(pa.float64())
            filled = wide.fill_null(0.0) if wide.null_count else wide
            return SourceColumn(dtype, np.ascontiguousarray(filled.to_numpy()), valid)
        return SourceColumn(dtype, _integers(column), valid)
    except pa.ArrowInvalid as error:
        raise InvalidArgumentError(f"{what} has a value out of the range of {dtype}: {error}") from error


def _microseconds(column: pa.ChunkedArray) -> NDArray[np.int64]:
    kind = column.type
    if pa.types.is_date32(kind):
        return _scaled(_integers(column.cast(pa.int32())), 86_400_000_000)
    ticks = _integers(column.cast(pa.int64()))
    unit = "ms" if pa.types.is_date64(kind) else kind.unit
    return ticks // 1000 if unit == "ns" else _scaled(ticks, _PER_US[unit])


def _scaled(ticks: NDArray[np.int64], factor: int) -> NDArray[np.int64]:
    limit = (2**63 - 1) // factor
    if factor > 1 and len(ticks) and (ticks.max() > limit or ticks.min() < -limit):
        raise pa.ArrowInvalid("a time does not fit into microseconds")
    return ticks * factor


def _text_column(
    column: pa.ChunkedArray, valid: NDArray[np.bool_] | None, dictionary: list[str] | None
) -> SourceColumn:
    encoded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = (
            encoded.combine_chunks()
            if encoded.num_chunks
            else pa.array([], pa.large_string()).dictionary_encode()
        )
    texts = list(dictionary or [])
    at = {text: code for code, text in enumerate(texts)}
    renumber = np.array([at.setdefault(text, len(at)) for text in encoded.dictionary.to_pylist()], np.int64)
    indices = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
    if len(renumber):
        codes = renumber[indices]
    else:
        codes = np.zeros(len(column), np.int64)
    if valid is not None:
        codes[~valid] = 0
    return SourceColumn("string", codes, valid, list(at))


def time_column(column: pa.ChunkedArray, what: str) -> SourceColumn:
    """Convert a column of times: timestamps of any zone and unit, dates, or ISO 8601 texts.

    Raises:
        InvalidArgumentError: another type, or a text that is no time.
    """
    kind = column.type
    if pa.types.is_null(kind):
        return SourceColumn("timestamp", np.zeros(len(column), np.int64), np.zeros(len(column), np.bool_))
    if is_text(kind):
        column = _parse_times(_plain(column), what)
    elif feature_dtype(kind) != "timestamp":
        raise InvalidArgumentError(f"{what} has type {kind}; expected a timestamp, a date or ISO 8601 texts")
    return arrow_column(column, what)


def _parse_times(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    """ISO texts to timestamp[us, UTC]. Each keeps its own offset; without one it is UTC."""
    column = column.cast(pa.string())
    # Digits beyond microseconds are cut: the fraction always counts upwards, so that is the floor.
    texts = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r"([.][0-9]{6})[0-9]+", r"\1")
    zoned = pc.match_substring_regex(texts, _ZONED)
    texts = pc.if_else(zoned, texts, pc.binary_join_element_wise(texts, "Z", ""))
    # A lone date takes no offset in Arrow's parser.
    texts = pc.replace_substring_regex(texts, r"^([0-9]{4}-[0-9]{2}-[0-9]{2})Z$", r"\1T00:00:00Z")
    try:
        return texts.cast(pa.timestamp("us", "UTC"))
    except pa.ArrowInvalid as error:
        raise InvalidArgumentError(f"{what}: {error}; expected ISO 8601 texts") from error
