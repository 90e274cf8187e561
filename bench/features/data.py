"""Events and entity rows of the feature benchmark, the same in every process: needs numpy and pyarrow only.

All event times differ, so that no contender has to break a tie, and none equals an entity row's time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FEATURES = tuple(f"f{i}" for i in range(10))
START_US = 1_767_225_600_000_000  # 2026-01-01
UTC = pa.timestamp("us", "UTC")


def events(rows: int, keys: int, seed: int, *, features: int = 10, step_us: int = 1_000_000) -> pa.Table:
    """`rows` events of `keys` users in random order; one event every `step_us`."""
    rng = np.random.default_rng(seed)
    columns = {
        "user_id": pa.array(rng.integers(0, keys, rows)),
        "event_timestamp": pa.array(START_US + rng.permutation(rows) * step_us, UTC),
    }
    for i in range(features):
        columns[f"f{i}"] = pa.array(rng.random(rows, np.float32))
    return pa.table(columns)


def entities(rows: int, keys: int, span_us: int, seed: int) -> pa.Table:
    """Entity rows at random times of the span, each half a second away from every event."""
    rng = np.random.default_rng(seed)
    seconds = rng.integers(0, span_us // 1_000_000, rows) * 1_000_000
    return pa.table(
        {
            "user_id": pa.array(rng.integers(0, keys, rows)),
            "event_timestamp": pa.array(START_US + seconds + 500_000, UTC),
        }
    )


def latest(rows: int, seed: int, *, features: int, prefix: str = "f") -> pa.Table:
    """One event of each of `rows` users."""
    rng = np.random.default_rng(seed)
    columns = {
        "user_id": pa.array(np.arange(rows)),
        "event_timestamp": pa.array(START_US + np.arange(rows) * 1_000_000, UTC),
    }
    for i in range(features):
        columns[f"{prefix}{i}"] = pa.array(rng.random(rows, np.float32))
    return pa.table(columns)


def write(table: pa.Table, path: Path) -> Path:
    """As Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path
