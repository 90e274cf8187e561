"""A Feast repository in Feast's own words: its tables and definitions, and what to ask of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

T = datetime(2024, 3, 1, 12, tzinfo=UTC)
HOUR, US = timedelta(hours=1), timedelta(microseconds=1)
_UTC = pa.timestamp("us", "UTC")
FEATURES = [
    "driver_stats:conv_rate", "driver_stats:trips", "driver_stats:city", "driver_stats:active",
    "driver_stats:hired", "trips_between:distance", "market:rate",
]  # fmt: skip
DEFINITIONS = """
from datetime import timedelta

import pandas as pd
from feast import (Entity, FeatureService, FeatureView, Field, FileSource, PushSource, RequestSource,
                   ValueType)
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Bool, Float32, Float64, Int64, String, UnixTimestamp

driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)

stats = FileSource(name="stats", path="data/stats.parquet", timestamp_field="at",
                   created_timestamp_column="created", field_mapping={"conv": "conv_rate", "when": "at"})
driver_stats = FeatureView(name="driver_stats", entities=[driver], ttl=timedelta(days=1), source=stats,
    schema=[Field(name="conv_rate", dtype=Float64), Field(name="trips", dtype=Int64),
            Field(name="city", dtype=String), Field(name="active", dtype=Bool),
            Field(name="hired", dtype=UnixTimestamp), Field(name="scores", dtype=Array(Float32)),
            Field(name="driver_id", dtype=Int64)])
trips_between = FeatureView(name="trips_between", entities=[driver, customer], ttl=timedelta(0),
    source=PushSource(name="pushed", batch_source=FileSource(name="pairs", path="data/pairs.parquet",
                                                            timestamp_field="event_timestamp")),
    schema=[Field(name="distance", dtype=Float32), Field(name="driver_id", dtype=Int64),
            Field(name="customer_id", dtype=String)])
market = FeatureView(name="market", entities=[], ttl=timedelta(0), schema=[Field(name="rate", dtype=Float64)],
    source=FileSource(name="rates", path="data/rates.parquet", timestamp_field="event_timestamp"))

request = RequestSource(name="request", schema=[Field(name="bonus", dtype=Float64)])


@on_demand_feature_view(sources=[driver_stats, request], schema=[Field(name="with_bonus", dtype=Float64)])
def adjusted(inputs: pd.DataFrame) -> pd.DataFrame:
    out = pd.DataFrame()
    out["with_bonus"] = inputs["conv_rate"] + inputs["bonus"]
    return out


@on_demand_feature_view(sources=[market], schema=[Field(name="doubled", dtype=Float64)], mode="python")
def twice(inputs):
    return {"doubled": [None if rate is None else rate * 2 for rate in inputs["rate"]]}


drivers = FeatureService(name="drivers", features=[driver_stats[["trips", "city"]], market])
swap = FeatureService(name="swap", features=[
    driver_stats[["trips"]].with_name("first").with_join_key_map({"driver_id": "first_id"}),
    driver_stats[["trips"]].with_name("second").with_join_key_map({"driver_id": "second_id"})])
bonus = FeatureService(name="bonus", features=[driver_stats[["trips"]], adjusted])
"""


def write_feast_repo(path: Path, online_store: str = "{type: sqlite, path: data/online.db}") -> Path:
    """Write tables and definitions into a folder."""
    (path / "data").mkdir(parents=True, exist_ok=True)
    (path / "feature_store.yaml").write_text(
        f"project: rides\nregistry: data/registry.db\nprovider: local\nonline_store: {online_store}\n"
        "entity_key_serialization_version: 3\n"
    )
    (path / "definitions.py").write_text(DEFINITIONS)
    nan = float("nan")
    rows = [
        # driver, when, created, conv, trips, city, active, hired, scores
        (1, T - 2 * HOUR, T - 2 * HOUR, 0.5, 1, "Rome", True, T - 900 * HOUR, [1.0, 2.0]),
        (1, T - HOUR, T - HOUR, 0.75, 2**53 + 1, "Zürich", False, T - 90 * HOUR, []),
        (2, T - HOUR / 2, T, None, None, None, None, None, None),
        (3, T - 25 * HOUR, T - 25 * HOUR, 0.1, 7, "Oslo", True, T, [0.5]),  # expired at T
        (4, T - 24 * HOUR, T, nan, -5, "", False, T, [nan]),  # the last moment of its ttl
        (5, T + HOUR, T + HOUR, 0.9, 9, "Bern", True, T, [9.0]),
        (-6, T - 3 * HOUR, T, -0.0, 0, "x" * 300, True, datetime(1969, 12, 31, tzinfo=UTC), [3.0] * 9),
    ]
    columns = list(zip(*rows))
    pq.write_table(
        pa.table(
            {
                "driver_id": pa.array(columns[0], pa.int64()),
                "when": pa.array(columns[1], _UTC),
                "created": pa.array(columns[2], _UTC),
                "conv": pa.array(columns[3], pa.float64()),
                "trips": pa.array(columns[4], pa.int64()),
                "city": pa.array(columns[5], pa.string()),
                "active": pa.array(columns[6], pa.bool_()),
                "hired": pa.array(columns[7], _UTC),
                "scores": pa.array(columns[8], pa.list_(pa.float32())),
            }
        ),
        path / "data" / "stats.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "driver_id": pa.array([1, 1, 2, 12], pa.int64()),
                "customer_id": ["ä", "b", "ä", "3"],
                "event_timestamp": pa.array([T - HOUR, T - US, T - HOUR, T - HOUR], _UTC),
                "distance": pa.array([1.5, 2.5, None, 0.1], pa.float32()),
            }
        ),
        path / "data" / "pairs.parquet",
    )
    pq.write_table(
        pa.table({"event_timestamp": pa.array([T - 9 * HOUR, T - HOUR], _UTC), "rate": [0.25, 0.5]}),
        path / "data" / "rates.parquet",
    )
    return path


def entity_table() -> pa.Table:
    """Entity rows that hit, miss, expire, and lie before everything."""
    rows = [(1, "ä", T), (1, "b", T - US), (2, "ä", T), (3, "b", T), (4, "ä", T), (5, "b", T), (-6, "?", T),
            (99, "ä", T), (1, "ä", T - 90 * HOUR), (1, "ä", T - HOUR - US), (None, "ä", T),
            (12, "3", T)]  # fmt: skip
    driver, customer, at = zip(*rows)
    return pa.table(
        {
            "event_timestamp": pa.array(at, _UTC),
            "driver_id": pa.array(driver, pa.int64()),
            "customer_id": list(customer),
            "label": list(range(len(rows))),
        }
    )
