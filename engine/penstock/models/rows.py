"""Tables (pandas, Arrow, polars) to float32 model rows, cast as the serving path casts: null becomes NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import InvalidArgumentError

if TYPE_CHECKING:
    import pyarrow as pa


def as_table(data: Any, field: str = "table") -> pa.Table:
    """`data` as an Arrow table. Raises InvalidArgumentError for what is no table or repeats a column name."""
    import pyarrow as pa

    try:
        if isinstance(data, pa.Table):
            table = data
        elif type(data).__module__.partition(".")[0] == "pandas":
            table = pa.Table.from_pandas(data, preserve_index=False)
        elif hasattr(data, "__arrow_c_stream__"):
            table = pa.table(data)
        else:
            raise InvalidArgumentError(
                f"{field} is a {type(data).__name__}; expected a pandas, Arrow or polars table"
            )
    except (pa.ArrowException, AttributeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{field} cannot be read as a table: {error}") from error
    names = table.column_names
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise InvalidArgumentError(f"{field} repeats column {repeated!r}")
    return table


def input_dtype(table: pa.Table, name: str, field: str = "table") -> str:
    """The feature dtype of a column, if it can be a model input. Raises InvalidArgumentError naming it."""
    import pyarrow.types as kinds

    if name not in table.column_names:
        raise InvalidArgumentError(f"{field} has no column {name!r}; it has {table.column_names}")
    kind = table.schema.field(name).type
    if kinds.is_boolean(kind):
        return "bool"
    if kinds.is_integer(kind):
        return "int64"
    if kinds.is_float32(kind) or kinds.is_float16(kind):
        return "float32"
    if kinds.is_float64(kind) or kinds.is_null(kind):
        return "float64"
    hint = "make it a number first (a timestamp as an age, a string as a code)"
    raise InvalidArgumentError(
        f"column {name!r} of {field} is {kind}; expected a float, an integer or a bool: "
        f"leave it out of the inputs or {hint}"
    )


def model_rows(table: pa.Table, inputs: Sequence[str], field: str = "table") -> NDArray[np.float32]:
    """float32 [n, F] of the columns `inputs`, in order. Raises InvalidArgumentError naming a bad column."""
    import pyarrow as pa

    rows = np.empty((table.num_rows, len(inputs)), np.float32)
    for j, name in enumerate(inputs):
        dtype = input_dtype(table, name, field)
        column = table[name]
        # One rounding, from the stored type: int64 through float64 would round twice.
        wide = {"bool": pa.uint8(), "int64": pa.int64()}.get(dtype, pa.float64())
        try:
            filled = column.cast(wide).fill_null(0).to_numpy()
        except pa.ArrowInvalid as error:
            raise InvalidArgumentError(f"column {name!r} of {field} does not fit int64: {error}") from error
        with np.errstate(over="ignore"):
            rows[:, j] = filled
        if column.null_count:
            rows[column.is_null().to_numpy(), j] = np.nan
    return rows
