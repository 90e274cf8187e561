"""Event tables of sources as plain arrays, and the one conversion from Arrow columns.

Every time becomes int64 microseconds UTC (a time without a zone is UTC), every string a dictionary code.
A dictionary only grows, so a code that was given once keeps its meaning. Rows without an event time are
dropped and counted. Tables are immutable; any thread may read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.errors import InvalidArgumentError
from penstock.features.expressions import INT_MIN
from penstock.features.source_definitions import Source
from penstock.features.source_reading import raw_table, where_of
from penstock.features.source_schema import (
    as_expected,
    check_columns,
    check_declared,
    check_recorded,
    feature_dtype,
    found_schema,
    is_text,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNKNOWN_TIME = INT_MIN  # `known_at` of a row whose `created` is null: it loses ties and no cut-off admits it
_PER_US = {"s": 1_000_000, "ms": 1_000, "us": 1}
_ZONED = r"[0-9][Tt ].*([Zz]|[+-][0-9]{2}(:?[0-9]{2})?)$"


@dataclass(frozen=True)
class SourceColumn:
    """A column of n values.

    Attributes:
        dtype: one of `expressions.DTYPES`.
        values: float64 (float32 may stay as it is), or int64 for all others; a string is its dictionary
            code. 0 where null.
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
        event_id: what names each row's event, int64 or string, or None; a null names none.
        deleted: bool[n]; true where the row takes its event back. None: no row does.
        found: the dtype of every column that the source has, read or not.
    """

    columns: dict[str, SourceColumn]
    n_rows: int
    event_time: NDArray[np.int64]
    known_at: NDArray[np.int64]
    unsupported: dict[str, str] = field(default_factory=dict)
    dropped: int = 0
    event_id: SourceColumn | None = None
    deleted: NDArray[np.bool_] | None = None
    found: dict[str, str] = field(default_factory=dict)

    @property
    def schema(self) -> dict[str, str]:
        """The dtype of each column."""
        return {name: column.dtype for name, column in self.columns.items()}

    @property
    def dictionaries(self) -> dict[str, list[str]]:
        """The dictionary of each string column."""
        return {n: c.dictionary for n, c in self.columns.items() if c.dictionary is not None}


def read_source(
    source: Source,
    base: Path,
    dictionaries: Mapping[str, list[str]] | None = None,
    columns: Iterable[str] | None = None,
    recorded: Mapping[str, str] | None = None,
    most_bytes: int | None = None,
) -> SourceTable:
    """Read a source.

    Args:
        source: what to read; its paths are relative to `base`.
        dictionaries: codes given earlier, by column; new strings are appended to a copy.
        columns: the columns to keep besides the source's own; all that have a feature type if None.
        recorded: the schema that `apply` recorded; None: it is not held to one.
        most_bytes: the memory that its columns may take, by an estimate or as they are read.

    Raises:
        InvalidArgumentError: a missing or corrupt file, a missing column, one whose type does not fit, a row
            that the declared schema forbids, or a wrong query.
        FailedPreconditionError: a column has another type than `recorded` says.
        SourceTooLarge: they take more than `most_bytes`.
    """
    wanted = None if columns is None else list(dict.fromkeys([*source.own_columns, *columns]))
    table, schema = raw_table(source, base, wanted, most_bytes)
    return source_table(source, table, schema, wanted, dictionaries, recorded)


def source_table(
    source: Source,
    table: pa.Table,
    schema: pa.Schema,
    wanted: Sequence[str] | None,
    dictionaries: Mapping[str, list[str]] | None = None,
    recorded: Mapping[str, str] | None = None,
) -> SourceTable:
    """The events of rows of a source.

    Args:
        table: the rows, with the types that all rows of the source have.
        schema: of all columns of the source.
        wanted: the columns to keep, the source's own among them; all if None.
        dictionaries, recorded: as of `read_source`, and the errors too.
    """
    where = where_of(source)
    check_columns(source, schema, wanted or source.own_columns)
    check_declared(source, schema)
    used = wanted or list(dict.fromkeys(schema.names))
    if recorded is not None:
        check_recorded(source, schema, recorded, used)
    table = as_expected(source, table, expected_types(source, recorded), used)
    times = [name for name in (source.timestamp, source.created) if name is not None]
    converted: dict[str, SourceColumn] = {}
    unsupported: dict[str, str] = {}
    for name in used:
        given = (dictionaries or {}).get(name)
        what = f"{where}: column '{name}'"
        if name in times:
            converted[name] = time_column(table[name], what, one_kind=source.schema is not None)
        elif wanted is None and feature_dtype(table[name].type) is None:
            unsupported[name] = str(table[name].type)
        else:
            converted[name] = arrow_column(table[name], what, given)
    present = converted[source.timestamp].valid
    dropped = 0
    if present is not None:
        dropped = int(np.count_nonzero(~present))
        if source.schema is not None:
            raise null_times(source, dropped, len(present), int(np.argmin(present)))
        converted = {name: column.take(present) for name, column in converted.items()}
    event_time = converted[source.timestamp].values
    known_at = event_time
    if source.created:
        created = converted[source.created]
        known_at = (
            created.values if created.valid is None else np.where(created.valid, created.values, UNKNOWN_TIME)
        )
    event_id, deleted = _versions(source, converted)
    return SourceTable(
        converted, len(event_time), event_time, known_at, unsupported, dropped, event_id, deleted,
        found_schema(source, schema),
    )  # fmt: skip


def expected_types(source: Source, recorded: Mapping[str, str] | None) -> dict[str, str]:
    """The dtype of columns whose own type may not tell it: by their use, as recorded, or as declared."""
    by_use = {name: dtype for name, dtype in ((source.event_id, "int64"), (source.deleted, "bool")) if name}
    return {**by_use, **(recorded or {}), **(source.schema or {})}


def null_times(source: Source, nulls: int, rows: int, first: int) -> InvalidArgumentError:
    """The error of rows without a time in a source that declares a schema."""
    return InvalidArgumentError(
        f"{where_of(source)}: column '{source.timestamp}' is null in {nulls} of {rows} rows, first in "
        f"row {first}; expected a time in each, as a schema is declared"
    )


def _versions(
    source: Source, columns: Mapping[str, SourceColumn]
) -> tuple[SourceColumn | None, NDArray[np.bool_] | None]:
    """The name of each row's event, and whether the row takes it back."""
    where = where_of(source)
    event_id = deleted = None
    if source.event_id is not None:
        event_id = columns[source.event_id]
        if event_id.dtype not in ("int64", "string"):
            raise InvalidArgumentError(
                f"{where}: column '{source.event_id}' is {event_id.dtype}; "
                "expected int64 or string, as it names events"
            )
    if source.deleted is not None:
        column = columns[source.deleted]
        if column.dtype != "bool":
            raise InvalidArgumentError(
                f"{where}: column '{source.deleted}' is {column.dtype}; "
                "expected bool, as it says what is deleted"
            )
        deleted = column.values.astype(np.bool_)  # null is 0: not deleted
    return event_id, deleted


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
            wide = column.cast(pa.float32() if dtype == "float32" else pa.float64())
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


def time_column(column: pa.ChunkedArray, what: str, *, one_kind: bool = False) -> SourceColumn:
    """Convert a column of times: timestamps of any zone and unit, dates, or ISO 8601 texts.

    Args:
        one_kind: refuse texts of which some have a zone and some have none.

    Raises:
        InvalidArgumentError: another type, or a text that is no time.
    """
    kind = column.type
    if pa.types.is_null(kind):
        return SourceColumn("timestamp", np.zeros(len(column), np.int64), np.zeros(len(column), np.bool_))
    if is_text(kind):
        column = _parse_times(_plain(column), what, one_kind)
    elif feature_dtype(kind) != "timestamp":
        raise InvalidArgumentError(f"{what} has type {kind}; expected a timestamp, a date or ISO 8601 texts")
    return arrow_column(column, what)


def _parse_times(column: pa.ChunkedArray, what: str, one_kind: bool) -> pa.ChunkedArray:
    """ISO texts to timestamp[us, UTC]. Each keeps its own offset; without one it is UTC."""
    column = column.cast(pa.string())
    # Digits beyond microseconds are cut: the fraction always counts upwards, so that is the floor.
    texts = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r"([.][0-9]{6})[0-9]+", r"\1")
    zoned = pc.match_substring_regex(texts, _ZONED)
    if one_kind and len(kinds := pc.unique(zoned.drop_null())) > 1:
        first = [texts[pc.index(zoned, kind).as_py()].as_py() for kind in kinds]
        raise InvalidArgumentError(
            f"{what} has times with a zone and without one, '{first[0]}' and '{first[1]}'; "
            "expected one or the other"
        )
    texts = pc.if_else(zoned, texts, pc.binary_join_element_wise(texts, "Z", ""))
    # A lone date takes no offset in Arrow's parser.
    texts = pc.replace_substring_regex(texts, r"^([0-9]{4}-[0-9]{2}-[0-9]{2})Z$", r"\1T00:00:00Z")
    try:
        return texts.cast(pa.timestamp("us", "UTC"))
    except pa.ArrowInvalid as error:
        for given, text in zip(column.drop_null(), texts.drop_null()):
            try:
                text.cast(pa.timestamp("us", "UTC"))
            except pa.ArrowInvalid:
                raise InvalidArgumentError(
                    f"{what} has {given.as_py()!r}; expected ISO 8601 texts such as '2013-05-01T12:00:00Z'"
                ) from error
        raise InvalidArgumentError(f"{what}: {error}; expected ISO 8601 texts") from error
