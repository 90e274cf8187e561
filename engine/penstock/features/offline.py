"""The historical join: features as they were at each entity row's time, N rows in, N rows out, in order.

A snapshot is the join of every key at one time (`snapshot_entities`). The join computes with
`ViewComputer.rows_at` and the service's plan only, as serving does. A null key matches nothing, a row without
a time gets nulls, and of fully tied events the last in the source wins. Pure functions of their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from penstock.errors import FeatureNameCollisionError, InvalidArgumentError
from penstock.features.compute import NULL, PRESENT, ViewComputer, ViewRows
from penstock.features.expressions import INT_MIN, is_floating
from penstock.features.index import entity_keys
from penstock.features.plan import ServicePlan
from penstock.features.progress_bars import Progress
from penstock.features.source_reading import arrow_table
from penstock.features.source_schema import feature_dtype
from penstock.features.sources import SourceColumn, arrow_column, time_column
from penstock.features.streamed import StreamedView
from penstock.features.times import Time, iso, to_us

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Column = tuple[NDArray[Any], NDArray[np.bool_] | None]

_PROGRESS_ROWS = 65_536  # between two calls
STATUS_NAMES = ("PRESENT", "NULL", "NOT_FOUND", "EXPIRED", "FUTURE")
_UTC = pa.timestamp("us", "UTC")
_ARROW = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(),
          "timestamp": _UTC, "duration": pa.duration("us")}  # fmt: skip


def entity_table(entity_df: Any) -> pa.Table:
    """An Arrow table of a pandas frame, an Arrow table, or anything with `__arrow_c_stream__` (polars).

    Raises:
        InvalidArgumentError: another object, a column that Arrow cannot hold, or a repeated column name.
    """
    return arrow_table(entity_df, "entity_df")


def asked_rows(
    entity_df: Any,
    plan: ServicePlan,
    computers: Mapping[str, ViewComputer | StreamedView],
    start_date: Time | None,
    end_date: Time | None,
    now_us: Callable[[], int],
) -> pa.Table:
    """The entity table of a join: `entity_df`, or without one that of a snapshot.

    Raises:
        InvalidArgumentError: both, or see `entity_table` and `snapshot_entities`.
    """
    if entity_df is None:
        end_us = now_us() if end_date is None else to_us(end_date, "end_date")
        start_us = None if start_date is None else to_us(start_date, "start_date")
        return snapshot_entities(plan, computers, start_us, end_us)
    if start_date is not None or end_date is not None:
        raise InvalidArgumentError(
            "start_date and end_date are of a snapshot; expected them without entity_df"
        )
    return entity_table(entity_df)


def time_column_name(table: pa.Table) -> str:
    """`event_timestamp`, or else the only column of timestamps or dates.

    Raises:
        InvalidArgumentError: none, or several.
    """
    if "event_timestamp" in table.column_names:
        return "event_timestamp"
    times = [f.name for f in table.schema if feature_dtype(f.type) == "timestamp"]
    if len(times) != 1:
        found = f"the time columns {', '.join(times)}" if times else "no time column"
        raise InvalidArgumentError(f"entity_df has {found}; expected a column 'event_timestamp'")
    return times[0]


def historical_join(
    entities: pa.Table,
    plan: ServicePlan,
    computers: Mapping[str, ViewComputer | StreamedView],
    key_seed: bytes,
    *,
    filter_by_created_timestamp: bool = False,
    known_by: NDArray[np.int64] | None = None,
    with_status: bool = False,
    with_age: bool = False,
    progress: Progress | None = None,
) -> pa.Table:
    """Append the plan's features to an entity table (see `entity_table`).

    Args:
        entities: N rows with a time column, the join keys and the request inputs.
        plan: what to append: features by view in first-mention order, then request inputs that the plan names
            otherwise than the table does.
        computers: by view name.
        key_seed: 16 bytes, the computers' own.
        filter_by_created_timestamp: leave out events that became known after the row's time.
        known_by: int64[N], microseconds; leave out events that became known after these times instead.
        with_status: append `<feature>__status`: PRESENT, NULL, NOT_FOUND, EXPIRED or FUTURE for each cell.
        with_age: append `<feature>__age` to each feature of a view: int64, microseconds from the newest event
            behind the cell to the row's time; null where the cell is.
        progress: called as the work goes on.

    Returns:
        The N rows in order, with the time column as timestamp[us, UTC]. Strings are dictionary-encoded with
        the codes that models see.

    Raises:
        InvalidArgumentError: a column that is missing or of a wrong type.
        FeatureNameCollisionError: a feature with the name of a column of the table.
    """
    n = entities.num_rows
    time_name = time_column_name(entities)
    order = _output_order(plan)
    _check_names(entities, plan, order, ["__status"] * with_status + ["__age"] * with_age)
    times = time_column(entities[time_name], f"entity_df: column '{time_name}'")
    keys = [_key_column(entities, name, dtype) for name, dtype in plan.entities]
    columns: dict[str, Column] = {}
    texts: dict[str, list[str]] = {}
    for name, dtype in plan.inputs:
        given = _input_column(entities, name, dtype)
        source_name = f"{plan.request_name}:{name}"
        columns[source_name] = (given.values, given.valid)
        texts[source_name] = given.dictionary or []
    found: dict[str, ViewRows] = {}
    for owner, view, positions in zip(plan.view_names, plan.views, plan.view_keys):
        computer = computers[view.name]
        words, nulls = entity_keys([keys[i] for i in positions], n, key_seed)
        if times.valid is not None:
            nulls |= ~times.valid
        cut = times.values if filter_by_created_timestamp else known_by
        rows = _rows(computer, words, times.values, nulls, cut, owner, progress)
        for (name, _), column in zip(computer.schema, rows.columns):
            columns[f"{owner}:{name}"] = column
        for name, dictionary in computer.dictionaries.items():
            texts[f"{owner}:{name}"] = dictionary
        found[owner] = rows
    if all(ref in columns for ref in plan.refs):  # nothing is left to compute
        outputs: Sequence[Column] = [columns[ref] for ref in plan.refs]
    else:
        outputs = plan.evaluate(columns, (times.values, times.valid))
    result = _with_time(entities, time_name, times)
    for i in order:
        values, valid = outputs[i]
        mask = np.zeros(n, np.bool_) if valid is None else ~valid
        array = _to_arrow(plan.output_dtypes[i], values, mask, texts.get(plan.refs[i], []))
        result = result.append_column(plan.output_names[i], array)
        of_view = found.get(plan.refs[i].split(":")[0])
        if with_status:
            status = np.full(n, PRESENT, np.uint8) if of_view is None else of_view.status
            status = np.where((status == PRESENT) & mask, np.uint8(NULL), status)
            reasons = pa.DictionaryArray.from_arrays(pa.array(status, pa.int8()), pa.array(STATUS_NAMES))
            result = result.append_column(plan.output_names[i] + "__status", reasons)
        if with_age and of_view is not None:
            empty = mask | (of_view.status != PRESENT)
            age = np.where(empty, 0, times.values - np.where(empty, 0, of_view.meta[:, 2]))
            result = result.append_column(plan.output_names[i] + "__age", pa.array(age, mask=empty))
    return result


def _rows(
    computer: ViewComputer | StreamedView,
    keys: NDArray[np.uint64],
    times: NDArray[np.int64],
    nulls: NDArray[np.bool_],
    known_by: NDArray[np.int64] | None,
    name: str,
    progress: Progress | None,
) -> ViewRows:
    n = len(keys)
    if isinstance(computer, StreamedView):
        tell = None if progress is None else partial(progress, name)
        return computer.rows_at(keys, times, nulls=nulls, known_by=known_by, progress=tell)
    if progress is None:
        return computer.rows_at(keys, times, nulls=nulls, known_by=known_by)
    parts = []
    for at in range(0, max(n, 1), _PROGRESS_ROWS):
        part = slice(at, at + _PROGRESS_ROWS)
        cut = None if known_by is None else known_by[part]
        parts.append(computer.rows_at(keys[part], times[part], nulls=nulls[part], known_by=cut))
        progress(name, min(n, at + _PROGRESS_ROWS), n)
    return ViewRows.concatenate(parts)


def snapshot_entities(
    plan: ServicePlan, computers: Mapping[str, ViewComputer | StreamedView], start_us: int | None, end_us: int
) -> pa.Table:
    """An entity table of the keys that the plan's views know, each at `end_us`, ascending.

    A key is there if its newest event by `end_us`, in one of the views, is not before `start_us`. By default
    that is `end_us` less the longest ttl, or without bound where a view has no ttl.

    Raises:
        InvalidArgumentError: the views have different join keys or the plan reads request inputs, so that no
            table of keys alone can answer; or `start_us` is after `end_us`.
    """
    if start_us is not None and start_us > end_us:
        raise InvalidArgumentError(f"start_date is {iso(start_us)}, after end_date {iso(end_us)}")
    if plan.inputs:
        names = ", ".join(name for name, _ in plan.inputs)
        raise InvalidArgumentError(f"the features read the request inputs {names}; expected an entity_df")
    keyed = [(view, positions) for view, positions in zip(plan.views, plan.view_keys) if positions]
    for view, positions in keyed:
        if sorted(positions) != list(range(len(plan.entities))):
            raise InvalidArgumentError(
                f"view '{view.name}' has the join keys {', '.join(view.join_keys)}, of "
                f"{', '.join(name for name, _ in plan.entities)}; expected an entity_df"
            )
    ttls = [view.ttl_us for view, _ in keyed] or [None]
    if start_us is None and None not in ttls:
        start_us = end_us - max(ttl or 0 for ttl in ttls)
    order = [name for name, _ in plan.entities]
    tables = [] if keyed else [pa.table({"": pa.nulls(1)})]  # views without entities have one row
    for view, positions in keyed:
        computer = computers[view.name]
        held = [computer] if isinstance(computer, ViewComputer) else computer.computers()
        tables += [_keys_at(part, plan, positions, start_us, end_us).select(order) for part in held]
    table = pa.concat_tables(tables)
    if keyed:
        table = table.group_by(order).aggregate([]).sort_by([(name, "ascending") for name in order])
    table = table.select(order)
    times = pa.array(np.full(table.num_rows, end_us), pa.int64()).cast(_UTC)
    return table.append_column("event_timestamp", times)


def _keys_at(
    computer: ViewComputer, plan: ServicePlan, positions: Sequence[int], start_us: int | None, end_us: int
) -> pa.Table:
    """The keys whose newest event by `end_us` is not before `start_us`."""
    keys, columns = computer.entities()
    newest = computer.newest_events(keys, end_us)
    chosen = newest > INT_MIN if start_us is None else (newest > INT_MIN) & (newest >= start_us)
    arrays = {}
    for at, column in zip(positions, columns):
        part = column.take(chosen)
        array = _to_arrow(part.dtype, part.values, None, part.dictionary or [])
        arrays[plan.entities[at][0]] = array.dictionary_decode() if part.dtype == "string" else array
    return pa.table(arrays)


def to_frame(table: pa.Table) -> pd.DataFrame:
    """A pandas frame with index 0..N-1; integers and booleans with nulls become Int64 and boolean."""
    import pandas as pd

    nullable = {
        pa.int8(): pd.Int8Dtype(), pa.int16(): pd.Int16Dtype(), pa.int32(): pd.Int32Dtype(),
        pa.int64(): pd.Int64Dtype(), pa.uint8(): pd.UInt8Dtype(), pa.uint16(): pd.UInt16Dtype(),
        pa.uint32(): pd.UInt32Dtype(), pa.uint64(): pd.UInt64Dtype(), pa.bool_(): pd.BooleanDtype(),
    }  # fmt: skip
    special = [f.name for f, c in zip(table.schema, table.columns) if c.null_count and f.type in nullable]
    plain = table.drop_columns(special) if special else table
    frame = plain.to_pandas()
    if special:
        frame = frame.join(table.select(special).to_pandas(types_mapper=nullable.get))
    return frame[table.column_names]


def _output_order(plan: ServicePlan) -> list[int]:
    """Positions of the refs to append: by view, then request inputs that get a name of their own."""
    owners = [ref.split(":")[0] for ref in plan.refs]
    order = [i for name in plan.view_names for i, owner in enumerate(owners) if owner == name]
    inputs = [i for i, owner in enumerate(owners) if owner == plan.request_name]
    return order + [i for i in inputs if plan.output_names[i] != plan.refs[i].split(":")[1]]


def _check_names(
    entities: pa.Table, plan: ServicePlan, order: Sequence[int], suffixes: Sequence[str]
) -> None:
    taken = set(entities.column_names)
    for i in order:
        for name in [plan.output_names[i] + suffix for suffix in ["", *suffixes]]:
            if name in taken:
                raise FeatureNameCollisionError(
                    f"feature '{plan.refs[i]}' would be named '{name}', which is a column already; "
                    "rename that column or use full_feature_names=True"
                )
            taken.add(name)


def _column(entities: pa.Table, name: str, what: str) -> pa.ChunkedArray:
    if name not in entities.column_names:
        known = ", ".join(entities.column_names)
        raise InvalidArgumentError(f"entity_df has no {what} '{name}'; its columns are {known}")
    return entities[name]


def _key_column(entities: pa.Table, name: str, dtype: str) -> SourceColumn:
    column = _column(entities, name, "join key")
    what = f"entity_df: join key '{name}'"
    if pa.types.is_null(column.type):
        column = column.cast(pa.int64() if dtype == "int64" else pa.string())
    if dtype == "int64" and pa.types.is_floating(column.type):
        # pandas turns integers with a missing value into floats.
        try:
            column = column.cast(pa.float64()).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise InvalidArgumentError(f"{what} has type {entities[name].type}: {error}") from error
    if feature_dtype(column.type) != dtype:
        raise InvalidArgumentError(f"{what} has type {column.type}; the view's source has {dtype}")
    return arrow_column(column, what)


def _input_column(entities: pa.Table, name: str, dtype: str) -> SourceColumn:
    column = _column(entities, name, "request input")
    what = f"entity_df: request input '{name}'"
    if dtype == "timestamp":
        return time_column(column, what)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string() if dtype == "string" else _ARROW[dtype])
    given = arrow_column(column, what)
    if given.dtype == dtype:
        return given
    if is_floating(dtype) and (is_floating(given.dtype) or given.dtype == "int64"):
        with np.errstate(over="ignore"):
            values = given.values.astype(np.float32 if dtype == "float32" else np.float64)
        return SourceColumn(dtype, values.astype(np.float64), given.valid)
    raise InvalidArgumentError(f"{what} has type {column.type}; expected {dtype}")


def _with_time(entities: pa.Table, name: str, times: SourceColumn) -> pa.Table:
    array = _to_arrow("timestamp", times.values, None if times.valid is None else ~times.valid, [])
    return entities.set_column(entities.column_names.index(name), name, array)


def _to_arrow(dtype: str, values: NDArray[Any], mask: NDArray[np.bool_] | None, texts: list[str]) -> pa.Array:
    if dtype == "string":
        codes = pa.array(values.astype(np.int32), mask=mask)
        return pa.DictionaryArray.from_arrays(codes, pa.array(texts, pa.string()))
    if dtype == "bool":
        return pa.array(values.astype(np.bool_), mask=mask)
    if dtype in ("timestamp", "duration"):
        return pa.array(values, pa.int64(), mask=mask).cast(_ARROW[dtype])
    return pa.array(values.astype(np.float32) if dtype == "float32" else values, mask=mask)
