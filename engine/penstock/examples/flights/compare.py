"""Serving against training: the features of every served row beside the historical join at its `now`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from penstock.examples.flights.train import ENTITIES, MODEL, SERVICE, join
from penstock.models.rows import model_rows

if TYPE_CHECKING:
    from penstock.features.store import FeatureStore

F32 = NDArray[np.float32]


@dataclass
class Comparison:
    """Rows compared, rows that differ in any feature, and how often each feature differs."""

    rows: int = 0
    differing: int = 0
    by_feature: Counter[str] = field(default_factory=Counter)


def different(served: F32, joined: F32) -> NDArray[np.bool_]:
    """Where two float32 arrays differ in a bit; any NaN equals any NaN."""
    unequal = served.view(np.uint32) != joined.view(np.uint32)
    return np.asarray(unequal & ~(np.isnan(served) & np.isnan(joined)))


def compare(
    store: FeatureStore, flights: pa.Table, ids: NDArray[np.uint64], now_us: NDArray[np.int64], rows: F32
) -> Comparison:
    """Compare served `rows` (float32 ``[n, F]``, as the model got them) with the historical join.

    Args:
        flights: the table of `data.build`, in any order.
        ids: request ids ``[n]``: row numbers of flights.
        now_us: request times ``[n]``, microseconds UTC.
    """
    at = np.empty(flights.num_rows, np.int64)
    at[flights["row"].to_numpy()] = np.arange(flights.num_rows)
    asked: dict[str, Any] = {name: flights[name].take(at[ids.astype(np.int64)]) for name in ENTITIES}
    asked["event_timestamp"] = pa.array(now_us, pa.timestamp("us", tz="UTC"))
    names = store.service_plan(SERVICE).output_names
    wrong = different(rows, model_rows(join(store, pa.table(asked)), names))
    return Comparison(
        len(rows),
        int(wrong.any(axis=1).sum()),
        Counter({name: int(n) for name, n in zip(names, wrong.sum(axis=0), strict=True) if n}),
    )


def compare_log(store: FeatureStore, flights: pa.Table, log: Path) -> Comparison:
    """Compare every row in the server's log of served rows."""
    from penstock.monitoring.served_log import read_served

    served = read_served(log, MODEL)
    names = store.service_plan(SERVICE).output_names
    return compare(
        store, flights, served["rid"].to_numpy(), served["now_us"].to_numpy(), model_rows(served, names)
    )
