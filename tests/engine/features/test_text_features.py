"""Strings and Python functions in a repository's features: offline, stored and at request time alike."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.errors import DefinitionError
from penstock.features.store import FeatureStore
from penstock.features.text_inputs import text_hash

T0 = datetime(2024, 5, 1, tzinfo=UTC)
DEFINITIONS = """
import numpy as np
from penstock import Entity, FeatureView, ParquetSource, col, count, now, sum, udf, where

user = Entity("user", join_keys=["user_id"])
events = ParquetSource("events.parquet", timestamp="at")

@udf(returns="float64")
def halved(x):
    return x / 2

users = FeatureView("users", entities=[user], source=events, features={
    "is_gold": col("tier") == "gold",
    "bucket": col("tier").hash_bucket(100),
    "half": halved(col("x")),
    "gold_spend": sum(where(col("tier").isin(["gold", "platinum"]), col("x"), 0.0), window="1d"),
    "gold_age": where(col("tier") == "gold", (now() - col("at")).hours(), -1.0),
    "bucket_now": (col("tier").hash_bucket(7) + now().hour()) % 7,
    "tier_code": where(col("tier") != "tin", col("tier").code(), -1) + now().minute() * 0,
})
"""
REFUSED = DEFINITIONS.replace('"half": halved(col("x"))', '"half": halved(col("x")) + now().hour()')


def make(path: Path, text: str = DEFINITIONS) -> Path:
    path.mkdir()
    (path / "feature_store.yaml").write_text("project: test\n")
    (path / "features.py").write_text(text)
    rows = [(1, "gold", 3.0), (2, "tin", 5.0), (3, None, 7.0), (1, "platinum", 4.0), (1, "gold", None)]
    pq.write_table(
        pa.table(
            {
                "at": pa.array(
                    [T0 + timedelta(hours=n) for n in range(len(rows))], pa.timestamp("us", "UTC")
                ),
                "user_id": pa.array([r[0] for r in rows], pa.int64()),
                "tier": pa.array([r[1] for r in rows], pa.string()),
                "x": pa.array([r[2] for r in rows], pa.float64()),
            }
        ),
        path / "events.parquet",
    )
    return path


FEATURES = ["is_gold", "bucket", "half", "gold_spend", "gold_age", "bucket_now", "tier_code"]
REFS = [f"users:{name}" for name in FEATURES]


def bucket(text: str, n: int) -> int:
    return (text_hash(text) % 2**64 >> 1) % n


def test_strings_and_functions_give_one_answer_everywhere(tmp_path: Path) -> None:
    ask = T0 + timedelta(hours=10)
    with FeatureStore(make(tmp_path / "repo")) as store:
        frame = pd.DataFrame({"user_id": [1, 2, 3], "event_timestamp": [ask] * 3})
        offline = store.get_historical_features(frame, REFS).to_df()
        rows = [[None if pd.isna(v) else v for v in offline.loc[n, FEATURES]] for n in range(3)]
        gold = (bucket("gold", 7) + 10) % 7
        tin = (bucket("tin", 7) + 10) % 7
        assert rows == [
            [True, bucket("gold", 100), None, 7.0, 6.0, gold, 0],
            [False, bucket("tin", 100), 2.5, 0.0, -1.0, tin, -1],
            [None, None, 3.5, 0.0, None, None, None],
        ]
        store.materialize_incremental(ask)
        online = store.get_online_features(REFS, [{"user_id": n} for n in (1, 2, 3)], now=ask).to_dict()
        assert [[online[name][n] for name in FEATURES] for n in range(3)] == rows


def test_a_function_at_request_time_is_refused(tmp_path: Path) -> None:
    with FeatureStore(make(tmp_path / "repo", REFUSED)) as store:
        frame = pd.DataFrame({"user_id": [1], "event_timestamp": [T0]})
        with pytest.raises(DefinitionError, match=r"udf 'halved' is opaque Python.*features\.py:\d+"):
            store.get_historical_features(frame, REFS)
