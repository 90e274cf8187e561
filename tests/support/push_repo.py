"""A feature repository on a push source, and ways to make events for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from store_repo import assert_online_is_offline, bits

from penstock.features.store import FeatureStore

MINUTE = 60_000_000
HOUR = 60 * MINUTE
USERS, SHOPS = list(range(6)), ["a", "b"] * 3
DEFINITIONS = """
from datetime import timedelta
from penstock import (Entity, FeatureService, FeatureView, ParquetSource, PushSource, RequestSource,
                      col, count, max, mean, now, sum)

user = Entity("user", join_keys=["user_id"])
shop = Entity("shop", join_keys=["shop"])
events = PushSource("events", {schema}, timestamp="at"{roles})
users = FeatureView("users", entities=[user], source=events, ttl=timedelta(hours=3), features={{
    "n": count(window="1h"),
    "spend": sum(col("x"), window="90m"),
    "tick": mean(col("x"), window="2h", every="30m"),
    "city": col("city"),
    "age": (now() - col("at")).hours(),
}})
pairs = FeatureView("pairs", entities=[user, shop], source=events, features={{
    "seen": count(window="1d"), "top": max(col("x"), window="1h"), "last": col("x")}})
cart = RequestSource("cart", {{"value": "float64"}})
model = FeatureService("model", features=["users:n", "pairs:top", "cart:value", "users:age"], request=cart)
"""
FEATURES = ["users:n", "pairs:seen", "users:spend", "users:tick", "users:city", "users:age", "pairs:top",
            "pairs:last"]  # fmt: skip
SCHEMA = {"at": "timestamp", "user_id": "int64", "shop": "string", "x": "float64", "city": "string"}
VERSIONED = {**SCHEMA, "id": "int64", "gone": "bool", "known": "timestamp"}


def make_push_repo(
    path: Path, *, versioned: bool = False, batch: list[Any] | None = None, config: str = ""
) -> Path:
    """A repository in `path`; `batch`: earlier rows as `columns` takes them, in Parquet."""
    path.mkdir(exist_ok=True, parents=True)
    (path / "feature_store.yaml").write_text("project: test\n" + config)
    roles = ', created="known", event_id="id", deleted="gone"' if versioned else ""
    schema = VERSIONED if versioned else SCHEMA
    if batch is not None:
        created = ', created="known"' if versioned else ""
        roles += f', batch=ParquetSource("events.parquet", timestamp="at"{created})'
        write_batch(path, batch, schema)
    (path / "features.py").write_text(DEFINITIONS.format(schema=repr(schema), roles=roles))
    return path


def write_batch(path: Path, rows: list[Any], schema: dict[str, str] = SCHEMA) -> None:
    types = {"timestamp": pa.timestamp("us", "UTC"), "int64": pa.int64(), "string": pa.string(),
             "float64": pa.float64(), "bool": pa.bool_()}  # fmt: skip
    made = columns(rows, schema)
    table = pa.table({name: pa.array(made[name], types[dtype]) for name, dtype in schema.items()})
    pq.write_table(table, path / "new")
    (path / "new").rename(path / "events.parquet")  # nobody may read a half


def columns(rows: list[Any], schema: dict[str, str] = SCHEMA) -> dict[str, list[Any]]:
    """Columns of rows (at, user_id, shop, x, city[, id, gone, known])."""
    return {name: [row[i] for row in rows] for i, name in enumerate(schema)}


def some_events(n: int = 200, users: int = 10, seed: int = 3, until: int = 10 * HOUR) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        (
            int(rng.integers(0, until)),
            int(rng.integers(0, users)),
            "ab"[rng.integers(0, 2)],
            float(rng.normal()),
            ["Rome", "Oslo", None][rng.integers(0, 3)],
        )
        for _ in range(n)
    ]


def online(store: FeatureStore, now: int, users: list[Any], shops: list[Any]) -> dict[str, list[Any]]:
    """Online values and statuses at a time, as bits."""
    entities = pa.table({"user_id": pa.array(users, pa.int64()), "shop": pa.array(shops, pa.string())})
    table = store.get_online_features(FEATURES, entities, now=now).to_arrow(with_status=True)
    return {name: bits(table[name]) for name in table.column_names}


def agree(store: FeatureStore, now: int) -> None:
    assert_online_is_offline(store, now, USERS, SHOPS, FEATURES)
