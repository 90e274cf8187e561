"""The shop's tables, generated from a fixed seed.

Three months of 2026: 500 users, 200 items whose prices change now and then, purchases that become known up to
an hour after they happened, and the visits to ask features for. Some visits are by users without a purchase.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from penstock.features.expressions import timestamp_us

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SEED = 20260101
_USERS, _ITEMS = 500, 200
_CATEGORIES = np.array(["books", "garden", "games", "kitchen", "music"])
_START = timestamp_us(datetime(2026, 1, 1, tzinfo=UTC))
_DAY = 86_400_000_000
_DAYS = 90


def build(repo: Path, note: Callable[[str], None] = lambda name: None) -> Path:
    """Write the tables as Parquet into `repo`/data and return that folder; `note` is told each name.

    transactions: event_timestamp, created_timestamp, user_id, item_id, amount (float64), signup_time.
    prices: event_timestamp, item_id, category (string), price (float64).
    visits: event_timestamp, user_id, item_id.
    """
    rng = np.random.default_rng(_SEED)
    folder = repo / "data"
    folder.mkdir(parents=True, exist_ok=True)
    prices = _prices(rng)
    for name, table in (
        ("prices", prices),
        ("transactions", _transactions(rng, prices)),
        ("visits", _visits(rng)),
    ):
        part = folder / f"{name}.part"
        pq.write_table(table, part)
        part.replace(folder / f"{name}.parquet")
        note(name)
    return folder


def _times(values: NDArray[np.int64]) -> pa.Array:
    return pa.array(values, pa.timestamp("us", "UTC"))


def _table(columns: dict[str, Any]) -> pa.Table:
    return pa.table(columns).sort_by("event_timestamp")


def _prices(rng: np.random.Generator) -> pa.Table:
    changes = 4  # of each item, the first at the start
    when = rng.integers(_START, _START + _DAYS * _DAY, (_ITEMS, changes))
    when[:, 0] = _START
    base = rng.lognormal(3.0, 0.8, (_ITEMS, 1))
    price = np.round(base * rng.uniform(0.8, 1.25, (_ITEMS, changes)), 2)
    category = _CATEGORIES[rng.integers(0, len(_CATEGORIES), _ITEMS)]
    return _table(
        {
            "event_timestamp": _times(when.ravel()),
            "item_id": np.repeat(np.arange(1, _ITEMS + 1), changes),
            "category": np.repeat(category, changes).tolist(),
            "price": price.ravel(),
        }
    )


def _transactions(rng: np.random.Generator, prices: pa.Table) -> pa.Table:
    n = 20_000
    buyers = _USERS - _USERS // 10  # the rest never buys
    user = 1 + np.minimum(rng.exponential(buyers / 4, n).astype(np.int64), buyers - 1)
    signup = _START - rng.integers(0, 3 * 365 * _DAY, _USERS + 1)
    when = rng.integers(_START, _START + _DAYS * _DAY, n)
    item = rng.integers(1, _ITEMS + 1, n)
    listed = np.zeros(_ITEMS + 1)
    listed[prices["item_id"].to_numpy()] = prices["price"].to_numpy()
    return _table(
        {
            "event_timestamp": _times(when),
            "created_timestamp": _times(when + rng.integers(0, _DAY // 24, n)),
            "user_id": user,
            "item_id": item,
            "amount": np.round(listed[item] * rng.integers(1, 4, n), 2),
            "signup_time": _times(signup[user]),
        }
    )


def _visits(rng: np.random.Generator) -> pa.Table:
    n = 2_000
    return pa.table(
        {
            "event_timestamp": _times(rng.integers(_START, _START + _DAYS * _DAY, n)),
            "user_id": rng.integers(1, _USERS + 1, n),
            "item_id": rng.integers(1, _ITEMS + 1, n),
        }
    )
