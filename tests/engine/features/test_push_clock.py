"""A wall clock that is set back: what arrives later is known later all the same, also after a restart."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from push_repo import HOUR, MINUTE

from penstock.clock import ManualClock
from penstock.features import event_log
from penstock.features.store import FeatureStore

DEFINITIONS = """
from penstock import Entity, FeatureView, PushSource, col, sum

user = Entity("user", join_keys=["user_id"])
events = PushSource("events", {"at": "timestamp", "user_id": "int64", "x": "float64", "id": "int64"},
                    timestamp="at", event_id="id")
users = FeatureView("users", entities=[user], source=events, features={
    "x": col("x"), "spend": sum(col("x"), window="1h")})
"""
NOW = 10 * HOUR
ORDER = [9 * HOUR, 5 * HOUR, 0, 8 * HOUR, 9 * HOUR + MINUTE, MINUTE]  # what the clock says at each push


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    path = tmp_path / "repo"
    path.mkdir()
    (path / "feature_store.yaml").write_text("project: test\n")
    (path / "features.py").write_text(DEFINITIONS)
    return path


def correct(store: FeatureStore, x: float) -> None:
    """Push the one event again, with another value."""
    store.push("events", {"at": NOW - MINUTE, "user_id": 1, "x": x, "id": 7})


def check(store: FeatureStore, x: float) -> None:
    refs = ["users:x", "users:spend"]
    online = store.get_online_features(refs, {"user_id": [1]}, now=NOW).to_dict()
    assert (online["x"], online["spend"]) == ([x], [x])
    frame = pd.DataFrame({"user_id": [1], "event_timestamp": pd.to_datetime([NOW], unit="us", utc=True)})
    offline = store.get_historical_features(frame, refs).to_df()
    assert offline[["x", "spend"]].to_numpy().tolist() == [[x, x]]


@pytest.mark.parametrize("between", ["nothing", "restart", "compaction", "earlier build", "another store"])
def test_a_correction_wins_whatever_the_clock_does(repo: Path, between: str) -> None:
    clock = ManualClock()
    store = FeatureStore(repo, clock=clock)
    other = FeatureStore(repo, clock=clock)
    try:
        for i, us in enumerate(ORDER):
            clock.us = us
            if between == "another store":
                store, other = other, store
            elif between != "nothing" and i:
                if between == "compaction":
                    store._pushes.compact("events")
                if between == "earlier build":  # which wrote down no newest arrival
                    store._local.change(lambda txn: txn.delete(event_log._key(event_log._ARRIVED, "events")))
                store.close()
                store = FeatureStore(repo, clock=clock)
            correct(store, float(i))
            check(store, float(i))
        parts, _ = store._log.read("events")
        arrivals = [us for part in parts for us in part.arrival_us.to_pylist()]
        assert arrivals == [9 * HOUR] * 4 + [9 * HOUR + MINUTE] * 2
    finally:
        store.close()
        other.close()
    with FeatureStore(repo, clock=clock) as fresh:
        check(fresh, float(len(ORDER) - 1))
