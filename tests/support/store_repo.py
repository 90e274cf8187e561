"""A small feature repository, and the comparison of its online with its offline values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from penstock.features.store import FeatureStore

MINUTE = 60_000_000
HOUR = 60 * MINUTE
DEFINITIONS = """
from datetime import timedelta
from penstock import (Entity, FeatureService, FeatureView, ParquetSource, RequestSource,
                      col, count, max, mean, now, percentile_rank, sum)

user = Entity("user", join_keys=["user_id"])
shop = Entity("shop", join_keys=["shop"])
events = ParquetSource("events.parquet", timestamp="at")
users = FeatureView("users", entities=[user], source=events, ttl=timedelta(hours=3), features={
    "n": count(window="1h"),
    "spend": sum(col("x"), window="90m"),
    "tick": mean(col("x"), window="2h", every="30m"),
    "city": col("city"),
    "rank": percentile_rank(col("x")),
    "age": (now() - col("at")).hours(),
    "late": percentile_rank(col("x")) + now().hour(),
})
pairs = FeatureView("pairs", entities=[user, shop], source=events, features={
    "seen": count(window="1d"), "top": max(col("x"), window="1h"), "last": col("x")})
cart = RequestSource("cart", {"value": "float64", "clicks": "int64"})
model = FeatureService("model", features=["users:n", "pairs:top", "cart:value", "users:age"], request=cart)
"""
FEATURES = ["users:n", "pairs:seen", "users:spend", "users:tick", "users:city", "users:rank", "users:age",
            "users:late", "pairs:top", "pairs:last"]  # fmt: skip


def make_repo(path: Path, rows: list[tuple[int, int | None, str | None, float | None, str | None]]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "feature_store.yaml").write_text("project: test\n")
    (path / "features.py").write_text(DEFINITIONS)
    write_events(path, rows)
    return path


def write_events(path: Path, rows: list[Any]) -> None:
    at, user, shop, x, city = zip(*rows)
    table = pa.table(
        {
            "at": pa.array(at, pa.timestamp("us", "UTC")),
            "user_id": pa.array(user, pa.int64()),
            "shop": pa.array(shop, pa.string()),
            "x": pa.array(x, pa.float64()),
            "city": pa.array(city, pa.string()),
        }
    )
    before = (path / "events.parquet").stat().st_mtime_ns if (path / "events.parquet").exists() else 0
    pq.write_table(table, path / "events.parquet")
    # The stamp sees size and time: two quick writes of one size must still differ.
    now = max((path / "events.parquet").stat().st_mtime_ns, before + 1000)
    os.utime(path / "events.parquet", ns=(now, now))


def some_rows(n: int = 400, users: int = 20, seed: int = 3) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        (
            int(rng.integers(0, 10 * HOUR)),
            int(rng.integers(0, users)),
            "ab"[rng.integers(0, 2)],
            float(rng.normal()),
            ["Rome", "Oslo", None][rng.integers(0, 3)],
        )
        for _ in range(n)
    ]


def bits(column: pa.ChunkedArray) -> list[Any]:
    """A column as hashable values in which equal means the same bits."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    if pa.types.is_floating(column.type):
        return [None if v is None else np.float64(v).tobytes() for v in column.to_pylist()]
    return list(column.to_pylist())


def assert_online_is_offline(
    store: FeatureStore, now: int, users: list[Any], shops: list[Any], features: Any = FEATURES
) -> None:
    entities = pa.table({"user_id": pa.array(users, pa.int64()), "shop": pa.array(shops, pa.string())})
    served = store.get_online_features(features, entities, now=now).to_arrow(with_status=True)
    times = pa.array([now] * len(users), pa.timestamp("us", "UTC"))
    table = entities.append_column("event_timestamp", times)
    joined = store.get_historical_features(table, features, with_status=True).to_arrow()
    for name in served.column_names:
        expected = bits(joined[name])
        if name.endswith("__status"):  # an event in the future is no event online
            expected = ["NOT_FOUND" if s == "FUTURE" else s for s in expected]
        assert bits(served[name]) == expected, (name, now)
