"""What the engine says of itself: drift counts of every row, stages, objectives, spans, the exposition."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import RandomForestClassifier

from penstock import Engine
from penstock.config import check_text
from penstock.errors import DeadlineExceededError, InvalidArgumentError
from penstock.models.bundle import save_bundle

F = 4
INPUTS = [f"x{j}" for j in range(F)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with version 1 of `bare`, on bare vectors."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(rng.normal(size=(500, F)).astype(np.float32), columns=INPUTS)
    frame["y"] = (frame["x0"] + frame["x1"] > 0).astype(int)
    forest = RandomForestClassifier(n_estimators=5, max_leaf_nodes=8, random_state=1)
    forest.fit(frame[INPUTS].to_numpy(), frame["y"])
    folder = tmp_path_factory.mktemp("bundles")
    save_bundle(forest, frame, name="bare", directory=folder, label="y", inputs=INPUTS)
    return folder


def config_of(bundles: Path, data_dir: Path, monitoring: str = "") -> Any:
    text = f"""
serving: {{max_latency_ms: 10s, allow_replay: true}}
models: {{bare: {{path: {bundles}/bare/1}}}}
monitoring: {{pane: 1d, window: 10d, {monitoring}}}
data_dir: {data_dir}
"""
    config, faults = check_text(text)
    assert config is not None, faults
    return config


@pytest.fixture
def engine(bundles: Path, tmp_path: Path) -> Iterator[Engine]:
    with Engine(config_of(bundles, tmp_path / "data")) as engine:
        yield engine


def test_drift_counts_every_row_answered_however_small_the_ring(bundles: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(2).normal(size=(64, F)).astype(np.float32)
    with Engine(config_of(bundles, tmp_path / "data", "ring_rows: 100")) as engine:

        def saturate() -> None:
            for _ in range(300):
                engine.predict_vectors("bare", rows)

        threads = [threading.Thread(target=saturate) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()["models"]["bare"]
        drift = engine.drift("bare")["bare"]["drift"]
        assert stats["rows"]["ok"] == 3 * 300 * 64
        assert stats["served_dropped"] > 0  # the log lost rows, drift none
        assert (drift["n"], drift["rows"]) == (stats["rows"]["ok"],) * 2
        log = engine.stats()["served_log"]
        assert log["rows"] + stats["served_dropped"] == stats["rows"]["ok"]
        # The counts themselves: 900 times those of one request.
        *_, inputs, scores = engine.live.get("bare").drift.panes.window(None, 1)
        native = engine.live.get("bare").bundle.reference.spec
        one = np.zeros(native.n_slots, np.uint64)
        from penstock_kernels.reference import count_rows

        one += count_rows(native, rows)
        np.testing.assert_array_equal(inputs, 900 * one)
        assert int(scores.sum()) == 900 * 64


def test_a_large_request_is_counted_whole_by_a_ring_smaller_than_it(bundles: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(3).normal(size=(4096, F)).astype(np.float32)
    with Engine(config_of(bundles, tmp_path / "data", "ring_rows: 1000")) as engine:
        for _ in range(3):
            engine.predict_vectors("bare", rows)
        assert engine.drift("bare")["bare"]["drift"]["n"] == 3 * 4096


def test_stages_are_told_in_whole_nanoseconds_and_add_up(engine: Engine) -> None:
    rows = np.zeros((5, F), np.float32)
    for n in range(1, 41):
        timings = engine.predict_vectors("bare", rows, timings=True).timings
        assert timings is not None
        assert list(timings) == ["receive", "gather", "queue", "run", "total"]
        assert all(type(ns) is int and ns >= 0 for ns in timings.values())
        stages = engine.stats()["models"]["bare"]["stages"]
        assert timings["gather"] == 0 and stages["gather"]["count"] == 0  # vectors need none
        assert timings["run"] > 0
        parts = sum(stages[stage]["sum_ns"] for stage in ("receive", "queue", "run", "encode"))
        assert parts == stages["total"]["sum_ns"]
        assert {stages[stage]["count"] for stage in ("receive", "queue", "run", "encode", "total")} == {n}
    assert engine.predict_vectors("bare", rows).timings is None


def test_cumulative_counts_rise_to_the_count(engine: Engine) -> None:
    for _ in range(20):
        engine.predict_vectors("bare", np.zeros((64, F), np.float32))
    found = engine.stats()["models"]["bare"]
    edges = [m * 10**d for d in range(6) for m in (1, 2, 5)] + [10**6]
    for latency in (*found["stages"].values(), found["latency"], found["run"]):
        assert [edge for edge, _ in latency["le_us"]] == edges
        counts = [n for _, n in latency["le_us"]]
        assert counts == sorted(counts) and counts[-1] <= latency["count"]
    total = found["stages"]["total"]
    assert total["le_us"][-1][1] == total["count"] == 20  # none took a second
    slower = next(edge for edge, n in total["le_us"] if n == 20)
    assert total["p999_ns"] <= 1000 * slower


def test_objectives_count_what_was_due(engine: Engine) -> None:
    served = engine.live.get("bare").served
    row = np.zeros((2, F), np.float32)
    slo = engine.stats()["models"]["bare"]["slo"]
    assert slo["due"] == 0 and slo["attainment"] is None and slo["attainment_10s"] is None
    for _ in range(3):
        engine.predict_vectors("bare", row)
    with pytest.raises(InvalidArgumentError):
        engine.predict_vectors("bare", row[:, :1])  # wrong in itself: nothing was due
    served._hold(True)
    try:
        with pytest.raises(DeadlineExceededError):
            engine.predict_vectors("bare", row, deadline_ms=30)
        while_held = engine.stats()["models"]["bare"]
    finally:
        served._hold(False)
    found = engine.stats()["models"]["bare"]
    assert (found["slo"]["met"], found["slo"]["due"], found["slo"]["attainment"]) == (3, 4, 0.75)
    assert found["requests"]["rejected"] == 1 and found["requests"]["expired"] == 1
    assert 0 < while_held["busy_ratio"] <= 1  # a run that does not end is busy
    assert found["goodput"]["rows_per_s_60s"] == 2 * found["goodput"]["requests_per_s_60s"]
    assert found["goodput"]["requests_per_s_60s"] > 0
    assert found["queue_delay_ratio"] > 0
