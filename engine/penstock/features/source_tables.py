"""Event tables of one source put together: what was there, then what came later. Pure functions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.errors import InvalidArgumentError
from penstock.features.sources import SourceColumn, SourceTable

if TYPE_CHECKING:
    from numpy.typing import NDArray


def concat_tables(first: SourceTable, second: SourceTable) -> SourceTable:
    """The rows of two tables with the columns of the first.

    Codes of the first table keep their meaning; a text that only the second has gets the next one.

    Raises:
        InvalidArgumentError: the second lacks a column of the first, or has another dtype there.
    """
    columns: dict[str, SourceColumn] = {}
    for name, column in first.columns.items():
        other = second.columns.get(name)
        if other is None or other.dtype != column.dtype:
            found = "is missing" if other is None else f"has dtype {other.dtype}"
            raise InvalidArgumentError(f"column '{name}' {found}; expected {column.dtype}")
        columns[name] = concat_columns(column, other)
    event_id = None
    if first.event_id is not None or second.event_id is not None:
        if first.event_id is None or second.event_id is None:
            raise InvalidArgumentError("one table has event ids and the other none")
        event_id = concat_columns(first.event_id, second.event_id)
    deleted = None
    if first.deleted is not None or second.deleted is not None:
        deleted = np.concatenate([_flags(first), _flags(second)])
    event_time = np.concatenate([first.event_time, second.event_time])
    same = first.known_at is first.event_time and second.known_at is second.event_time
    known_at = event_time if same else np.concatenate([first.known_at, second.known_at])
    return SourceTable(
        columns,
        first.n_rows + second.n_rows,
        event_time,
        known_at,
        first.unsupported,
        first.dropped + second.dropped,
        event_id,
        deleted,
    )


def concat_columns(first: SourceColumn, second: SourceColumn) -> SourceColumn:
    """The values of two columns of one dtype."""
    values, dictionary = second.values, first.dictionary
    if first.dictionary is not None:
        dictionary, values = _merged(first.dictionary, second)
    valid = None
    if first.valid is not None or second.valid is not None:
        valid = np.concatenate([_valid(first), _valid(second)])
    return SourceColumn(first.dtype, np.concatenate([first.values, values]), valid, dictionary)


def take_rows(table: SourceTable, rows: NDArray[Any]) -> SourceTable:
    """The rows given by a mask or by positions, in that order."""
    event_time = table.event_time[rows]
    return replace(
        table,
        columns={name: column.take(rows) for name, column in table.columns.items()},
        n_rows=len(event_time),
        event_time=event_time,
        known_at=event_time if table.known_at is table.event_time else table.known_at[rows],
        event_id=None if table.event_id is None else table.event_id.take(rows),
        deleted=None if table.deleted is None else table.deleted[rows],
    )


def _merged(texts: list[str], second: SourceColumn) -> tuple[list[str], NDArray[Any]]:
    later = second.dictionary or []
    if later is texts or later[: len(texts)] == texts:
        return later, second.values
    if not later:
        return texts, second.values
    at = {text: code for code, text in enumerate(texts)}
    renumber = np.array([at.setdefault(text, len(at)) for text in later], np.int64)
    codes = renumber[second.values]
    if second.valid is not None:
        codes[~second.valid] = 0
    return list(at), codes


def _valid(column: SourceColumn) -> NDArray[np.bool_]:
    return np.ones(len(column.values), np.bool_) if column.valid is None else column.valid


def _flags(table: SourceTable) -> NDArray[np.bool_]:
    return np.zeros(table.n_rows, np.bool_) if table.deleted is None else table.deleted
