"""Pushes through an engine: predictions have nothing of what was lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lightgbm import LGBMRegressor
from push_repo import HOUR, columns, make_push_repo

from penstock import Engine, FeatureStore
from penstock.config import check_text
from penstock.errors import StoreError
from penstock.features.online import OnlineStore
from penstock.models.bundle import save_bundle

INPUTS = ["n", "top", "value", "age"]
ROWS = {"user_id": [0, 1, 2, 3], "shop": ["a", "b", "a", "a"]}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    repo = make_push_repo(tmp_path / "r")
    with FeatureStore(repo, data_dir=tmp_path / "data") as store:
        plan = store.service_plan("model")
        rng = np.random.default_rng(1)
        frame = pd.DataFrame(rng.normal(2, 3, (400, 4)).astype(np.float32), columns=INPUTS)
        label = frame.sum(axis=1)
        model = LGBMRegressor(n_estimators=20, num_leaves=15, min_child_samples=2, verbose=-1)
        model.fit(frame, label)
        save_bundle(
            model,
            frame.assign(y=label),
            name="m",
            directory=tmp_path / "b",
            label="y",
            plan=plan,
            kind="value",
        )
    config, faults = check_text(f"""
serving: {{allow_replay: true, max_latency_ms: 5000}}
feature_store: {{repo_path: {repo}}}
models: {{m: {{path: {tmp_path}/b/m/1}}}}
data_dir: {tmp_path}/data
""")
    assert config is not None, faults
    with Engine(config) as engine:
        yield engine


def check(engine: Engine, now: int) -> None:
    """The scores are those of the rows that the store computes."""
    store = engine.store
    assert store is not None
    given = {**ROWS, "value": [1.0, 2.0, 3.0, 4.0]}
    features = store.get_online_features("model", given, now=now).to_numpy()
    expected = engine.live.get("m").bundle.ensemble().predict(np.ascontiguousarray(features))[:, 0]
    found = engine.predict("m", ROWS, {"value": given["value"]}, now=now)
    assert np.asarray(found.scores).ravel().tolist() == expected.ravel().tolist()


def test_a_load_that_saw_lost_events_leaves_no_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stamp of the store is the same before and after: nothing was written."""
    store = engine.store
    assert store is not None
    engine.push("events", columns([(HOUR, user, "a", 1.0, "Rome") for user in range(4)]))
    keys = store.computer("users").keys
    now = np.full(len(keys), HOUR + 1, np.int64)
    waits, fails = threading.Event(), threading.Event()

    def fail(self: OnlineStore, work: Any) -> Any:
        waits.set()
        fails.wait()
        raise StoreError("the disk is full")

    def lose() -> None:
        with pytest.raises(StoreError, match="full"):
            engine.push("events", columns([(HOUR, user, "a", 9.0, "Ulm") for user in range(4)]))

    for held in (False, True):  # in the cache before
        cache = engine.live.caches["users"]
        if held:
            check(engine, HOUR + 1)
        assert cache.resident_many(keys).tolist() == [held] * 4
        with monkeypatch.context() as patch:
            patch.setattr(OnlineStore, "change", fail)
            thread = threading.Thread(target=lose)
            thread.start()
            waits.wait()
            stamp = store.stamp()
            rows, meta = store.load_rows("users", keys, now)
            fails.set()
            thread.join()
        cache.put_many(keys, rows, meta, stamp, engine.clock.mono_ns(), engine.live.cache_owner)
        check(engine, HOUR + 1)
        waits.clear()
        fails.clear()
        engine.push("events", columns([(2 * HOUR, 9, "a", 1.0, "Rome")]))
        cache.clear(0, store.stamp())
