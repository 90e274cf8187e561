"""What the retrieval calls of a feature store take and give: entity rows in, tables, dicts and arrays out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from penstock import diskio
from penstock.errors import (
    FailedPreconditionError,
    FeatureNameCollisionError,
    InvalidArgumentError,
    UnavailableError,
)
from penstock.features import offline
from penstock.features.compute import NULL, PRESENT
from penstock.features.expressions import is_floating
from penstock.features.plan import ServicePlan
from penstock.features.source_schema import feature_dtype
from penstock.features.sources import SourceColumn, arrow_column, time_column

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    from numpy.typing import NDArray

    Column = tuple[NDArray[Any], NDArray[np.bool_]]


class RetrievalJob:
    """A historical join that runs when its result is first asked for. Any thread may ask."""

    def __init__(self, compute: Callable[[], pa.Table]) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._table: pa.Table | None = None

    def to_arrow(self) -> pa.Table:
        """The entity table with the features appended: its rows, in its order."""
        with self._lock:
            if self._table is None:
                self._table = self._compute()
            return self._table

    def persist(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the result as one Parquet file, whole or absent, and return its path.

        `pyarrow.parquet.read_table(path)` equals `to_arrow()`, types included.

        Raises:
            FailedPreconditionError: the file is there and `overwrite` is false.
            UnavailableError: it cannot be written.
        """
        from pyarrow import parquet

        path = Path(path)
        if path.exists() and not overwrite:
            raise FailedPreconditionError(
                f"'{path}' is there already; expected a new path, or overwrite=True"
            )
        sink = pa.BufferOutputStream()
        parquet.write_table(self.to_arrow(), sink)
        try:
            diskio.make_folders(path.parent)
            diskio.write_file(path, sink.getvalue().to_pybytes())
        except OSError as error:
            raise UnavailableError(f"'{path}' cannot be written: {error}") from error
        return path

    def to_df(self) -> pd.DataFrame:
        """The same as a pandas frame with index 0..N-1; integers with nulls become Int64."""
        return offline.to_frame(self.to_arrow())

    def to_polars(self) -> pl.DataFrame:
        """The same as a polars frame; polars must be installed."""
        import polars as pl

        frame = pl.from_arrow(self.to_arrow())
        assert isinstance(frame, pl.DataFrame)
        return frame


@dataclass(frozen=True, eq=False)
class OnlineResult:
    """Features of n entity rows at one time.

    Attributes:
        plan: what was asked.
        now_us: the time asked for.
        entities: the join-key columns that were given.
        columns: (values, valid) of each feature, in the order of `plan.refs`.
        status: uint8[n, features]; why a cell is empty: PRESENT 0, NULL 1, NOT_FOUND 2 or EXPIRED 3.
        event_time: int64[n, views]; time of the newest event behind each view's row, INT64_MIN if none.
        texts: the dictionary of each string feature, by ref.
    """

    plan: ServicePlan
    now_us: int
    entities: pa.Table
    columns: Sequence[Column]
    status: NDArray[np.uint8]
    event_time: NDArray[np.int64]
    texts: Mapping[str, list[str]]

    def __len__(self) -> int:
        return len(self.status)

    def to_arrow(self, *, with_status: bool = False) -> pa.Table:
        """Join keys, then features in the order asked; with status, `<feature>__status` behind each."""
        table = self.entities
        for i, name in enumerate(self.plan.output_names):
            values, valid = self.columns[i]
            texts = self.texts.get(self.plan.refs[i], [])
            table = table.append_column(
                name, offline._to_arrow(self.plan.output_dtypes[i], values, ~valid, texts)
            )
            if with_status:
                codes = pa.array(self.status[:, i], pa.int8())
                reasons = pa.DictionaryArray.from_arrays(codes, pa.array(offline.STATUS_NAMES))
                table = table.append_column(name + "__status", reasons)
        return table

    def to_dict(self) -> dict[str, list[Any]]:
        """Lists of Python values by column; None where empty, datetimes with zone UTC."""
        found: dict[str, list[Any]] = self.to_arrow().to_pydict()
        return found

    def statuses(self) -> dict[str, list[int]]:
        """The status of each cell, by feature."""
        return {name: self.status[:, i].tolist() for i, name in enumerate(self.plan.output_names)}

    def to_numpy(self, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Model rows: float32[n, features], NaN where null; a string is its dictionary code.

        Args:
            out: array to fill and return; float32 of that shape.
        """
        shape = (len(self), len(self.columns))
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32:
            raise InvalidArgumentError(f"out is {out.dtype}{list(out.shape)}; expected float32{list(shape)}")
        with np.errstate(over="ignore"):
            for i, (values, valid) in enumerate(self.columns):
                out[:, i] = np.where(valid, values.astype(np.float32), np.float32("nan"))
        return out


def cell_status(rows: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Status of each cell of a feature from its row's status."""
    return np.where((rows == PRESENT) & ~valid, np.uint8(NULL), rows)


def entity_row_table(entity_rows: Any) -> tuple[pa.Table, bool]:
    """An Arrow table of a list of dicts, a dict of scalars or lists, or a pandas, polars or Arrow table.

    Returns:
        The table, and whether it was one before.

    Raises:
        InvalidArgumentError: another object, rows or columns that do not match, or values of mixed types.
    """
    if isinstance(entity_rows, Mapping):
        return _from_columns(dict(entity_rows)), False
    if isinstance(entity_rows, list | tuple):
        columns = _columns_of(entity_rows)
        if not columns:  # every view asked has one row for all
            return pa.table({"": pa.nulls(len(entity_rows))}).select([]), False
        return _from_columns(columns), False
    return offline.entity_table(entity_rows), True


def _columns_of(rows: Sequence[Any]) -> dict[str, list[Any]]:
    if not rows:
        raise InvalidArgumentError("entity_rows is empty; expected at least one row")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InvalidArgumentError(f"entity_rows[{i}] is a {type(row).__name__}; expected a dict")
        if row.keys() != rows[0].keys():
            raise InvalidArgumentError(
                f"entity_rows[{i}] has the columns {sorted(map(str, row))}; "
                f"entity_rows[0] has {sorted(map(str, rows[0]))}"
            )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _from_columns(columns: dict[Any, Any]) -> pa.Table:
    arrays: dict[str, Any] = {}
    for name, values in columns.items():
        if not isinstance(name, str):
            raise InvalidArgumentError(f"entity_rows: column name is {name!r}; expected a text")
        if not isinstance(values, list | tuple | np.ndarray):
            values = [values]
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise InvalidArgumentError(f"entity_rows: column '{name}': {error}") from error
        if len(arrays[name]) != len(next(iter(arrays.values()))):
            raise InvalidArgumentError(
                f"entity_rows: column '{name}' has {len(arrays[name])} rows; "
                f"column '{next(iter(arrays))}' has {len(next(iter(arrays.values())))}"
            )
    return pa.table(arrays)


def key_column(table: pa.Table, name: str, dtype: str, *, floats: bool) -> SourceColumn:
    """A join-key column; `floats` takes whole floats for int64 (pandas makes them of ints with nulls)."""
    column = _given(table, name, "join key")
    what = f"entity_rows: join key '{name}'"
    if pa.types.is_null(column.type):
        column = column.cast(pa.int64() if dtype == "int64" else pa.string())
    if floats and dtype == "int64" and pa.types.is_floating(column.type):
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise InvalidArgumentError(f"{what}: {error}") from error
    if feature_dtype(column.type) != dtype:
        raise InvalidArgumentError(f"{what} has type {column.type}; expected {dtype}")
    return arrow_column(column, what)


def check_keys(table: pa.Table, names: Sequence[str], columns: Sequence[SourceColumn]) -> None:
    """Refuse keys with a null or with another column than the join keys."""
    for name in table.column_names:
        if name not in names:
            raise InvalidArgumentError(f"keys: column '{name}' is no join key; expected {', '.join(names)}")
    for name, column in zip(names, columns):
        if column.valid is not None and not column.valid.all():
            row = int(np.flatnonzero(~column.valid)[0])
            raise InvalidArgumentError(f"keys: join key '{name}' is null in row {row}; expected a value")


def input_column(table: pa.Table, name: str, dtype: str) -> SourceColumn:
    """A request-input column; an int64 is taken for a float."""
    column = _given(table, name, "request input")
    what = f"entity_rows: request input '{name}'"
    if pa.types.is_null(column.type):
        count = len(column)
        values = np.zeros(count, np.float64 if is_floating(dtype) else np.int64)
        return SourceColumn(dtype, values, np.zeros(count, np.bool_), [] if dtype == "string" else None)
    if dtype == "timestamp" and not pa.types.is_integer(column.type):
        return time_column(column, what)
    given = arrow_column(column, what)
    if is_floating(dtype) and (is_floating(given.dtype) or given.dtype == "int64"):
        with np.errstate(over="ignore"):
            values = given.values.astype(np.float32 if dtype == "float32" else np.float64)
        return SourceColumn(dtype, values.astype(np.float64), given.valid)
    if given.dtype == dtype or (given.dtype == "int64" and dtype in ("timestamp", "duration")):
        return SourceColumn(dtype, given.values, given.valid, given.dictionary)
    raise InvalidArgumentError(f"{what} has type {column.type}; expected {dtype}")


def check_names(plan: ServicePlan, table: pa.Table) -> None:
    """Refuse a feature that has the name of a join key."""
    keys = {name for name, _ in plan.entities}
    for ref, name in zip(plan.refs, plan.output_names):
        if name in keys:
            raise FeatureNameCollisionError(
                f"feature '{ref}' would be named '{name}', which is a join key; use full_feature_names=True"
            )
    known = keys | {name for name, _ in plan.inputs}
    for name in table.column_names:
        if name not in known:
            raise InvalidArgumentError(
                f"entity_rows: column '{name}' is neither join key nor request input; "
                f"expected {', '.join(sorted(known))}"
            )


def _given(table: pa.Table, name: str, what: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        known = ", ".join(table.column_names) or "none"
        raise InvalidArgumentError(f"entity_rows has no {what} '{name}'; its columns are {known}")
    return table[name]
