"""The history of a push source as one table: the rows of its files, then the logged events in their order.

Rows of the files whose key was erased are left out unless both their times are later than that. Pure
functions of the files and the log.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from penstock import _core
from penstock.errors import InvalidArgumentError, MissingColumnError
from penstock.features.event_log import Erased, EventLog, Logged
from penstock.features.push_rows import push_schema
from penstock.features.source_definitions import PushSource, Source
from penstock.features.source_reading import source_stamp
from penstock.features.source_tables import concat_tables, take_rows
from penstock.features.sources import (
    UNKNOWN_TIME,
    SourceColumn,
    SourceTable,
    arrow_column,
    read_source,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


def push_stamp(source: PushSource, base: Path) -> str:
    """A digest of all that decides the events, but for the log, which has its sequence numbers."""
    files = None if source.batch is None else source_stamp(source.batch, base)
    return hashlib.sha256(repr((source.describe(), files)).encode()).hexdigest()


def read_push_source(
    source: PushSource,
    base: Path,
    log: EventLog,
    dictionaries: Mapping[str, list[str]],
    columns: Iterable[str],
    seed: bytes,
    most_bytes: int | None = None,
) -> tuple[SourceTable, int]:
    """The history of a source, and the sequence number of its newest pushed event.

    Args:
        source: what to read; the path of its files is relative to `base`.
        log: where the pushed events are.
        dictionaries: codes given earlier, by column; new strings are appended to a copy.
        columns: the columns to keep besides the time columns.
        seed: of the key hash, by which erased keys are known.
        most_bytes: the memory that the columns of its files may take.

    Raises:
        InvalidArgumentError: the files or the logged events do not fit the schema.
        StoreError: the log is corrupt.
        SourceTooLarge: the columns take more than `most_bytes`.
    """
    wanted = checked_columns(source, columns)
    logged, head = log.read(source.name)
    pushed = logged_table(source, logged, dictionaries, wanted)
    if source.batch is None:
        return pushed, head
    erased = log.erased(source.name)
    asked = [*wanted, *erased_names(erased, wanted)]
    table = read_source(source.batch, base, dictionaries, asked, most_bytes=most_bytes)
    batch = without_erased(batch_events(source, table, asked), wanted, erased, seed)
    return concat_tables(batch, pushed), head


def read_file_source(
    source: Source,
    base: Path,
    log: EventLog,
    dictionaries: Mapping[str, list[str]],
    columns: Iterable[str],
    seed: bytes,
    recorded: Mapping[str, str] | None = None,
    most_bytes: int | None = None,
) -> SourceTable:
    """The events of files without those that were erased. Arguments and errors as `read_push_source`."""
    wanted = list(dict.fromkeys([*source.own_columns, *columns]))
    erased = log.erased(source.name)
    asked = [*wanted, *erased_names(erased, wanted)]
    table = read_source(source, base, dictionaries, asked, recorded, most_bytes)
    return without_erased(table, wanted, erased, seed)


def erased_names(erased: Erased, wanted: Sequence[str]) -> list[str]:
    """The columns besides those wanted by which erased rows are known."""
    return list(dict.fromkeys(name for names in erased for name in names if name not in wanted))


def without_erased(table: SourceTable, wanted: Sequence[str], erased: Erased, seed: bytes) -> SourceTable:
    """Events of a source's files but for erased ones, with the wanted columns alone."""
    if not erased:
        return table
    table = take_rows(table, ~erased_rows(table, erased, seed))
    return replace(table, columns={name: table.columns[name] for name in wanted})


def checked_columns(source: PushSource, columns: Iterable[str]) -> list[str]:
    """As `columns_of`; MissingColumnError where the source has no such column."""
    wanted = columns_of(source, columns)
    for name in wanted:
        if name not in source.schema:
            known = ", ".join(source.schema)
            raise MissingColumnError(
                f"source '{source.name}' has no column '{name}'; expected one of {known}", name
            )
    return wanted


def columns_of(source: PushSource, columns: Iterable[str]) -> list[str]:
    """The columns, and those by which the events of a source are told apart and placed in time."""
    roles = (source.timestamp, source.created, source.event_id, source.deleted)
    return list(dict.fromkeys([*(role for role in roles if role is not None), *columns]))


def logged_table(
    source: PushSource,
    logged: Sequence[Logged],
    dictionaries: Mapping[str, list[str]],
    columns: Iterable[str],
) -> SourceTable:
    """Pushed events as a table of a source."""
    schema = push_schema(source)
    tables = [_as_schema(source, schema, part.table) for part in logged]
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    arrival = (
        np.concatenate([part.arrival_us.to_numpy(zero_copy_only=False) for part in logged])
        if logged
        else np.zeros(0, np.int64)
    )
    return pushed_table(source, table, arrival, dictionaries, columns)


def pushed_table(
    source: PushSource,
    table: pa.Table,
    arrival_us: NDArray[np.int64],
    dictionaries: Mapping[str, list[str]],
    columns: Iterable[str],
) -> SourceTable:
    """Events in the types of `push_schema` as a table of a source.

    Args:
        arrival_us: int64[n]; known-at where the source has no `created`.
        dictionaries: codes given earlier, by column.
        columns: those to keep.
    """
    found = {
        name: _plain_column(source.schema[name], table[name])
        or arrow_column(table[name], f"source '{source.name}': column '{name}'", dictionaries.get(name))
        for name in columns
    }
    return with_roles(source, found, arrival_us)


def _plain_column(dtype: str, column: pa.ChunkedArray) -> SourceColumn | None:
    """What `arrow_column` gives, sooner: of numbers in one chunk without nulls. None for any other."""
    if column.null_count or column.num_chunks != 1:
        return None
    array = column.chunk(0)
    if dtype in ("float64", "int64"):
        return SourceColumn(dtype, array.to_numpy(), None)
    if dtype in ("timestamp", "duration"):
        return SourceColumn(dtype, array.view(pa.int64()).to_numpy(), None)
    return None


def with_roles(
    source: PushSource, columns: dict[str, SourceColumn], known_at: NDArray[np.int64]
) -> SourceTable:
    """A table of columns whose times are all there; `known_at` where the source has no `created`."""
    event_time = columns[source.timestamp].values
    if source.created is not None:
        created = columns[source.created]
        known_at = (
            created.values if created.valid is None else np.where(created.valid, created.values, UNKNOWN_TIME)
        )
    deleted = None
    if source.deleted is not None:
        flags = columns[source.deleted]
        deleted = flags.values.astype(np.bool_)
        if flags.valid is not None:
            deleted &= flags.valid
    event_id = None if source.event_id is None else columns[source.event_id]
    return SourceTable(columns, len(event_time), event_time, known_at, event_id=event_id, deleted=deleted,
                       found=dict(source.schema))  # fmt: skip


def _as_schema(source: PushSource, schema: pa.Schema, table: pa.Table) -> pa.Table:
    """Events of an earlier schema: a column that it lacked is null, one that is gone is left out."""
    arrays = []
    for field in schema:
        if field.name not in table.column_names:
            arrays.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table[field.name]
        if column.type != field.type:
            raise InvalidArgumentError(
                f"source '{source.name}': column '{field.name}' is {field.type}, but pushed events have "
                f"{column.type}; restore the schema or give the source another name"
            )
        arrays.append(column)
    return pa.Table.from_arrays(arrays, schema=schema)


def batch_events(source: PushSource, table: SourceTable, columns: Sequence[str]) -> SourceTable:
    """Rows of a push source's files as events of that source.

    Raises:
        InvalidArgumentError: a column has another dtype than the source's schema says.
    """
    assert source.batch is not None
    for name in columns:
        found, expected = table.columns[name].dtype, source.schema[name]
        if found != expected:
            raise InvalidArgumentError(
                f"source '{source.name}': column '{name}' of '{source.batch.name}' has dtype {found}; the "
                f"schema says {expected}"
            )
    known_at = table.known_at
    made = with_roles(source, dict(table.columns), known_at)
    return replace(made, known_at=known_at, dropped=table.dropped)


def erased_digests(
    columns: Sequence[SourceColumn], names: Sequence[str], n: int, seed: bytes
) -> NDArray[np.uint64]:
    """Digests uint64[n, 2] of keys of the named columns, from which no key can be read back."""
    keyed = _core.siphash128(("erased\0" + "\0".join(names)).encode(), seed)
    parts: list[Any] = [np.zeros(n, np.int64)]  # with a second part, a lone int is hashed too
    for column in columns:
        if column.dictionary is None:
            parts.append(column.values)
        elif column.dictionary:
            parts.append(np.array(column.dictionary, dtype=object)[column.values].tolist())
        else:
            parts.append([""] * n)
    digests, _ = _core.keys128(parts, keyed)
    return digests


def erased_rows(table: SourceTable, erased: Erased, seed: bytes) -> NDArray[np.bool_]:
    """Which rows of a source's files were erased, bool[n]: those not later than that by both their times."""
    gone = np.zeros(table.n_rows, np.bool_)
    for names, moments in erased.items():
        digests = erased_digests([table.columns[name] for name in names], names, table.n_rows, seed)
        pairs, back = np.unique(digests, axis=0, return_inverse=True)
        until = np.array([moments.get(pair.tobytes(), -1) for pair in pairs], np.int64)[back.ravel()]
        for column in (table.columns[name] for name in names):
            if column.valid is not None:
                until[~column.valid] = -1  # a null is no key, whatever stands in its place
        gone |= (until >= 0) & (np.minimum(table.event_time, table.known_at) <= until)
    return gone
