"""What a push brings, checked against its source's schema and turned into one Arrow table of fixed types.

Everything is checked before anything is returned, so a refused push has no effect. Pure functions.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.errors import InvalidArgumentError
from penstock.features.expressions import INT_MAX, INT_MIN, is_floating
from penstock.features.source_definitions import PushSource
from penstock.features.source_schema import feature_dtype, is_text
from penstock.features.sources import time_column

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARROW_TYPES: dict[str, pa.DataType] = {
    "float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(),
    "string": pa.string(), "timestamp": pa.timestamp("us", "UTC"), "duration": pa.duration("us"),
}  # fmt: skip
_EXACT = 1 << 53


def push_schema(source: PushSource) -> pa.Schema:
    """The Arrow schema of the events of a source."""
    return _schema(tuple(source.schema.items()))


@functools.lru_cache(256)
def _schema(columns: tuple[tuple[str, str], ...]) -> pa.Schema:
    return pa.schema([(name, ARROW_TYPES[dtype]) for name, dtype in columns])


def empty_batch(source: PushSource) -> pa.RecordBatch:
    """A batch without events."""
    schema = push_schema(source)
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def required_columns(source: PushSource, keys: Collection[str]) -> set[str]:
    """The columns that must not be null, `keys` among them."""
    roles = (source.timestamp, source.event_id, source.deleted)
    return {*keys, *(role for role in roles if role is not None)}


def read_rows(source: PushSource, rows: Any, keys: Collection[str]) -> pa.Table:
    """Check pushed rows.

    Args:
        source: its schema decides.
        rows: dict of columns (or scalars: one row), list of dicts, pandas, polars or Arrow table.
        keys: see `required_columns`.

    Returns:
        The rows with the columns of `push_schema`, in one chunk.

    Raises:
        InvalidArgumentError: names the column, the row and what was expected.
    """
    where = f"push to '{source.name}'"
    given, framed = _columns(rows, where)
    for name in given:
        if name not in source.schema:
            near = difflib.get_close_matches(str(name), source.schema, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected {', '.join(source.schema)}"
            raise InvalidArgumentError(f"{where}: column '{name}' is unknown; {hint}")
    count = None
    first = ""
    for name, column in given.items():
        if count is None:
            first, count = name, len(column)
        elif len(column) != count:
            raise InvalidArgumentError(
                f"{where}: column '{name}' has {len(column)} rows; column '{first}' has {count}"
            )
    arrays = []
    required = required_columns(source, keys)
    for name, dtype in source.schema.items():
        what = f"{where}: column '{name}'"
        if name not in given:
            if name == source.deleted:
                arrays.append(pa.array(np.zeros(count or 0, np.bool_)))
                continue
            raise InvalidArgumentError(f"{what} is missing; expected {dtype}")
        column = _typed(given[name], dtype, what, framed)
        if column.null_count and name in required:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise InvalidArgumentError(f"{what} is null in row {row}; expected {dtype}")
        arrays.append(column)
    return pa.Table.from_arrays(arrays, schema=push_schema(source))


def _columns(rows: Any, where: str) -> tuple[dict[str, Any], bool]:
    """Arrow arrays by column name, and whether they came from a frame."""
    if isinstance(rows, Mapping):
        return {name: _array(name, values, where) for name, values in rows.items()}, False
    if isinstance(rows, list | tuple):
        return {name: _array(name, values, where) for name, values in _from_dicts(rows, where).items()}, False
    try:
        if isinstance(rows, pa.Table):
            table = rows
        elif isinstance(rows, pa.RecordBatch):
            table = pa.Table.from_batches([rows])
        elif type(rows).__module__.partition(".")[0] == "pandas":
            repeated = [str(name) for name in rows.columns[rows.columns.duplicated()]]
            if repeated:
                raise InvalidArgumentError(f"{where}: column '{repeated[0]}' is given twice")
            table = pa.Table.from_pandas(rows, preserve_index=False)
        elif hasattr(rows, "__arrow_c_stream__"):
            table = pa.table(rows)
        else:
            raise InvalidArgumentError(
                f"{where}: rows is a {type(rows).__name__}; expected a dict of columns, a list of dicts, "
                "or a pandas, polars or Arrow table"
            )
    except (pa.ArrowException, ValueError, TypeError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"{where}: rows cannot be read as an Arrow table: {error}") from error
    found: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns):
        if name in found:
            raise InvalidArgumentError(f"{where}: column '{name}' is given twice")
        found[name] = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return found, True


def _from_dicts(rows: Sequence[Any], where: str) -> dict[str, list[Any]]:
    if not rows:
        raise InvalidArgumentError(f"{where}: rows is an empty list; expected at least one dict")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InvalidArgumentError(f"{where}: rows[{i}] is a {type(row).__name__}; expected a dict")
        if row.keys() != rows[0].keys():
            raise InvalidArgumentError(
                f"{where}: rows[{i}] has the columns {sorted(map(str, row))}; "
                f"rows[0] has {sorted(map(str, rows[0]))}"
            )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _array(name: Any, values: Any, where: str) -> pa.Array:
    if not isinstance(name, str):
        raise InvalidArgumentError(f"{where}: column name is {name!r}; expected a text")
    if type(values) is not list:  # the usual one first: a push of one event is all overhead
        if isinstance(values, pa.ChunkedArray):
            return values.combine_chunks()
        if isinstance(values, pa.Array):
            return values
        if type(values).__module__.partition(".")[0] in ("pandas", "polars") and hasattr(values, "to_list"):
            values = values.to_list()
        elif not isinstance(values, list | tuple | np.ndarray):
            values = [values]
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{where}: column '{name}': {error}") from error


def _typed(column: pa.Array, dtype: str, what: str, framed: bool) -> pa.Array:
    """The column in the type that the log keeps."""
    kind, wanted = column.type, ARROW_TYPES[dtype]
    if kind == wanted and dtype != "timestamp":
        return column
    if pa.types.is_dictionary(kind):
        values = column.dictionary
        column = (values.cast(pa.string()) if is_text(values.type) else values).take(column.indices)
        kind = column.type
        if kind == wanted:
            return column
    if pa.types.is_null(kind):
        return column.cast(wanted)
    try:
        if dtype == "string" and is_text(kind):
            return column.cast(wanted)
        if is_floating(dtype):
            return _real(column, wanted, what)
        if dtype == "int64" and (pa.types.is_integer(kind) or (framed and pa.types.is_floating(kind))):
            return column.cast(wanted)  # pandas makes floats of ints with nulls: whole ones are taken
        if dtype == "timestamp":
            return _times(column, what)
        if dtype == "duration" and (pa.types.is_duration(kind) or pa.types.is_integer(kind)):
            if pa.types.is_integer(kind):
                return column.cast(pa.int64()).cast(wanted)
            return column.cast(wanted, safe=kind.unit != "ns")
    except pa.ArrowInvalid as error:
        raise InvalidArgumentError(f"{what} has a value that is no {dtype}: {error}") from error
    raise InvalidArgumentError(f"{what} has type {kind}; expected {dtype}")


def _real(column: pa.Array, wanted: pa.DataType, what: str) -> pa.Array:
    kind = column.type
    if pa.types.is_integer(kind):
        ints = column.cast(pa.int64())
        limit = 1 << 24 if wanted == pa.float32() else _EXACT
        bounds = pc.min_max(ints).as_py()
        for bound in (bounds["min"], bounds["max"]):
            if bound is not None and abs(bound) > limit:
                raise InvalidArgumentError(
                    f"{what} has the integer {bound}, which {wanted} may not hold exactly; push it as a float"
                )
        return ints.cast(wanted)
    if pa.types.is_floating(kind):
        return column.cast(wanted, safe=False)
    raise InvalidArgumentError(f"{what} has type {kind}; expected a number")


def _times(column: pa.Array, what: str) -> pa.Array:
    if pa.types.is_integer(column.type):
        ticks = column if column.type == pa.int64() else column.cast(pa.int64())
        if not ticks.null_count:
            _check_times(ticks.to_numpy(), what)
            return ticks.view(ARROW_TYPES["timestamp"])
        valid = ticks.is_valid().to_numpy(zero_copy_only=False)
        values = ticks.fill_null(0).to_numpy(zero_copy_only=False)
    else:
        if feature_dtype(column.type) not in ("timestamp", "string"):
            raise InvalidArgumentError(
                f"{what} has type {column.type}; expected a time: datetimes, ISO 8601 texts or microseconds"
            )
        found = time_column(pa.chunked_array([column]), what)
        values, valid = found.values, found.valid
    _check_times(values, what)
    mask = None if valid is None else ~valid
    return pa.array(values, pa.int64(), mask=mask).cast(ARROW_TYPES["timestamp"])


def _check_times(values: NDArray[np.int64], what: str) -> None:
    for value in (values.min(), values.max()) if len(values) else ():
        if not INT_MIN < value < INT_MAX:
            raise InvalidArgumentError(f"{what} has {value}; expected microseconds since 1970 within int64")
