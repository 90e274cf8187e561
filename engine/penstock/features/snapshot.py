"""Entity rows of a snapshot: every key of the views at one time, for a historical join without an entity
table.

Pure functions of the sources; any thread may call.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from penstock.errors import InvalidArgumentError
from penstock.features.expressions import INT_MIN
from penstock.features.offline import _to_arrow
from penstock.features.plan import ServicePlan
from penstock.features.sources import read_source

TIME_COLUMN = "event_timestamp"


def snapshot_rows(plan: ServicePlan, base: Path, start_us: int | None, end_us: int) -> pa.Table:
    """A row for each key that has an event in [start, end], at `end`.

    Args:
        plan: its views must share their entity columns; those without entities add no key.
        base: folder of the sources.
        start_us: by default `end` minus the longest ttl, or no bound where a view has none.
        end_us: time of every row.

    Returns:
        The key columns, ascending, and `event_timestamp`. One row if no view has entities.

    Raises:
        InvalidArgumentError: views with different entities, or features that need request inputs.
    """
    if plan.inputs:
        names = ", ".join(name for name, _ in plan.inputs)
        raise InvalidArgumentError(f"a snapshot has no request input {names}; give entity_df")
    keyed = [(view, at) for view, at in zip(plan.views, plan.view_keys) if at]
    columns = {tuple(sorted(plan.entities[i][0] for i in at)) for _, at in keyed}
    if len(columns) > 1:
        found = " and ".join("(" + ", ".join(names) + ")" for names in sorted(columns))
        raise InvalidArgumentError(f"features are of the different entities {found}; give entity_df")
    if start_us is None:
        ttls = [view.ttl_us for view, _ in keyed] or [None]
        start_us = INT_MIN if None in ttls else max(INT_MIN, end_us - max(ttl or 0 for ttl in ttls))
    parts = []
    for view, at in keyed:
        table = read_source(view.source, base, None, view.join_keys)
        wanted = (table.event_time >= start_us) & (table.event_time <= end_us)
        arrays = {}
        for key, position in zip(view.join_keys, at):
            column = table.columns[key].take(wanted)
            empty = np.zeros(len(column.values), np.bool_) if column.valid is None else ~column.valid
            array = _to_arrow(column.dtype, column.values, empty, column.dictionary or [])
            arrays[plan.entities[position][0]] = array.cast(pa.string()) if column.dictionary else array
        parts.append(pa.table(arrays).drop_null())
    if not parts:
        return _timed(pa.table({"": pa.nulls(1)}).select([]), end_us)
    order = [name for name, _ in plan.entities]
    rows = pa.concat_tables([part.select(order) for part in parts], promote_options="permissive")
    rows = rows.group_by(order).aggregate([]).sort_by([(name, "ascending") for name in order])
    return _timed(rows.select(order), end_us)


def _timed(rows: pa.Table, end_us: int) -> pa.Table:
    times = pa.array(np.full(rows.num_rows, end_us, np.int64)).cast(pa.timestamp("us", "UTC"))
    return rows.append_column(TIME_COLUMN, times)
