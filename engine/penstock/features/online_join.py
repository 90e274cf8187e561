"""Features of entity rows at one time, from stored rows: what `get_online_features` gives.

It computes with stored rows and the service's plan only, as the historical join does. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.features import retrieval
from penstock.features.compute import NOT_FOUND, PRESENT
from penstock.features.index import entity_keys
from penstock.features.retrieval import OnlineResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from penstock.features.live import LiveView
    from penstock.features.plan import ServicePlan

    Load = Callable[
        [LiveView, NDArray[np.uint64], NDArray[np.int64]], tuple[NDArray[np.uint64], NDArray[np.int64]]
    ]

_FLOATS = ("float32", "float64")


def online_join(
    plan: ServicePlan,
    entity_rows: Any,
    now_us: int,
    key_seed: bytes,
    current: Callable[[str], LiveView],
    load: Load,
) -> OnlineResult:
    """Read the rows of every view and evaluate the plan.

    Args:
        plan: what is asked.
        entity_rows: see `retrieval.entity_row_table`.
        now_us: request time.
        key_seed: 16 bytes, the views' own.
        current: the newest reading of a view.
        load: stored rows uint64[n, row_words] and meta int64[n, 4] of keys at times.
    """
    table, floats = retrieval.entity_row_table(entity_rows)
    retrieval.check_names(plan, table)
    n = table.num_rows
    times = np.full(n, now_us, np.int64)
    keys = [retrieval.key_column(table, name, dtype, floats=floats) for name, dtype in plan.entities]
    columns: dict[str, tuple[NDArray[Any], NDArray[np.bool_] | None]] = {}
    texts: dict[str, list[str]] = {}
    for name, dtype in plan.inputs:
        given = retrieval.input_column(table, name, dtype)
        columns[f"{plan.request_name}:{name}"] = (given.values, given.valid)
        texts[f"{plan.request_name}:{name}"] = given.dictionary or []
    statuses: dict[str, NDArray[np.uint8]] = {}
    event_time = np.empty((n, len(plan.views)), np.int64)
    for at, (owner, view, positions) in enumerate(zip(plan.view_names, plan.views, plan.view_keys)):
        live = current(view.name)
        computer = live.computer
        words, nulls = entity_keys([keys[i] for i in positions], n, key_seed)
        rows, meta = load(live, words, times)
        status = (rows[:, 0] & np.uint64(0xFF)).astype(np.uint8)
        statuses[owner] = np.where(nulls, np.uint8(NOT_FOUND), status)
        event_time[:, at] = np.where(nulls, np.iinfo(np.int64).min, meta[:, 2])
        for (name, dtype), (values, valid) in zip(computer.schema, computer.row_schema.decode(rows)):
            values = np.where(nulls, 0, values).astype(np.float64 if dtype in _FLOATS else np.int64)
            columns[f"{owner}:{name}"] = (values, valid & ~nulls)
        texts.update({f"{owner}:{name}": found for name, found in computer.dictionaries.items()})
    outputs = [
        (values, np.ones(n, np.bool_) if valid is None else valid)
        for values, valid in plan.evaluate(columns, (times, None))
    ]
    present = np.full(n, PRESENT, np.uint8)
    status = np.empty((n, len(plan.refs)), np.uint8)
    for i, ref in enumerate(plan.refs):
        status[:, i] = retrieval.cell_status(statuses.get(ref.split(":")[0], present), outputs[i][1])
    entities = table.select([name for name, _ in plan.entities])
    return OnlineResult(plan, now_us, entities, outputs, status, event_time, texts)
