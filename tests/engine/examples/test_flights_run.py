"""The demo's parts around the replay: its folder, the server's process, the comparison, the verdict."""

from __future__ import annotations

import io
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from penstock.config import check_config
from penstock.errors import InvalidArgumentError, UnavailableError
from penstock.examples.flights.compare import Comparison, different
from penstock.examples.flights.demo import Result, Snapshot, prepare
from penstock.examples.flights.replay import Tally
from penstock.examples.flights.server import ServerProcess, write_config
from penstock.examples.flights.show import faults, figures, show
from penstock.examples.flights.train import MODEL


def child(code: str, log: Path, **options: Any) -> ServerProcess:
    return ServerProcess([sys.executable, "-u", "-c", code], log, **options)


def test_a_server_is_started_and_drained(tmp_path: Path) -> None:
    code = """
import signal, sys, threading
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
print("ready")
stop.wait()
print("drained")
sys.exit(3)
"""
    server = child(code, tmp_path / "log")
    server.start()
    assert server.stop() == server.stop() == 3
    assert (tmp_path / "log").read_text().splitlines() == ["ready", "drained"]


def test_a_server_that_fails_at_its_start_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    server = child("raise SystemExit('the port is taken')", tmp_path / "log")
    with pytest.raises(UnavailableError, match="the port is taken"):
        server.start()
    assert server.stop() == 1


def test_a_server_that_does_not_drain_is_killed(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); signal.pause()"
    server = child(code, tmp_path / "log", drain_timeout_s=0.1)
    server.start()
    assert server.stop() == -9


def test_a_server_that_was_never_started_is_stopped_already(tmp_path: Path) -> None:
    assert child("", tmp_path / "log").stop() == 0


def test_the_configuration_is_valid_and_allows_replay(tmp_path: Path) -> None:
    bundle = tmp_path / "models" / MODEL / "1"
    path = write_config(tmp_path, bundle, "unix:///tmp/socket")
    config, found = check_config(path)
    assert not found and config is not None
    assert config.serving.allow_replay
    assert config.models[MODEL].path == bundle
    assert config.data_dir == tmp_path / "data"


def test_a_run_takes_an_empty_folder_and_clears_only_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    repo = prepare(run)
    assert (repo / "features.py").is_file() and (repo / "feature_store.yaml").is_file()
    (repo / "data").mkdir()
    for name in ("data", "models", "repo/data"):
        (run / name).mkdir(exist_ok=True)
        (run / name / "file").touch()
    assert prepare(run) == repo
    assert not (run / "data").exists() and not (run / "models").exists()
    assert (repo / "data" / "file").exists()  # the event tables stay


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").touch()
    with pytest.raises(InvalidArgumentError, match="expected a new folder"):
        prepare(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["data", "precious"]


def test_rows_are_compared_bit_by_bit_and_nan_is_nan() -> None:
    other_nan = np.array([0x7FC00001], np.uint32).view(np.float32)[0]
    served = np.array([[1.0, np.nan, 0.0, 2.0]], np.float32)
    joined = np.array([[1.0, other_nan, -0.0, np.nextafter(np.float32(2), np.float32(3))]], np.float32)
    assert different(served, joined).tolist() == [[False, False, True, True]]


def result(**changes: Any) -> Result:
    feature = {"psi": 0.5, "ks_low": 0.6, "missing": 0.0, "missing_reference": 0.01, "state": "alert"}
    calm = {**feature, "psi": None, "state": "ok"}
    report = {
        "n": 100,
        "features": [{"name": "humidity", **calm}, {"name": "temperature", **feature}],
        "score": {"name": "score", **calm},
        "drifted": ["temperature"],
    }
    model = {
        "latency": {"p50_ns": 1_500_000, "p99_ns": 9_000_000},
        "batches": {1: 6, 4: 1},
        "performance": {"auc": 0.8, "auc_error_bound": 0.001},
    }
    stats = {
        "models": {MODEL: model},
        "caches": {"weather": {"hits": 6, "misses": 1, "expired": 1, "busy": 0}},
    }
    given: dict[str, Any] = {
        "trained": SimpleNamespace(holdout_auc=0.78, train_rows=1000, holdout_rows=100),
        "tally": Tally(requests=10, ok=10, labels=9, matched=9, serving_s=2.0, waits_ms=[1.0, 3.0]),
        "live": Snapshot(stats, {MODEL: {"drift": report}}, 0.8005),
        "july": Snapshot(stats, {MODEL: {"drift": report}}, 0.8005),
        "comparison": Comparison(10, 0),
        "never_labelled": 9430,
        "server_exit": 0,
    }
    return Result(**{**given, **changes})


def test_the_figures_have_the_promised_names() -> None:
    found = figures(result())
    assert found["holdout_auc"] == 0.78 and found["live_auc"] == 0.8
    assert (found["requests"], found["ok"], found["errors"]) == (10, 10, 0)
    assert (found["p50_ms"], found["p99_ms"], found["rows_per_s"]) == (1.5, 9.0, 5.0)
    assert found["drifted"] == ["temperature"] and found["mean_batch"] == pytest.approx(10 / 7, abs=0.01)
    assert (found["rows_compared"], found["rows_differing"]) == (10, 0)
    assert found["hit_rates"] == {"weather": 0.75}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tally": Tally(10, 8, 9, 9, 1.0, Counter({"DEADLINE_EXCEEDED": 2}))}, "2 of 10 requests failed"),
        ({"comparison": Comparison(9, 0)}, "9 served rows are in the log, of 10"),
        ({"comparison": Comparison(10, 2, Counter({"humidity": 2}))}, "humidity"),
        ({"tally": Tally(10, 10, 9, 8, 1.0)}, "8 of 9 labels"),
        ({"server_exit": -9}, "exit code -9"),
    ],
)
def test_a_run_with_a_fault_says_which(changes: dict[str, Any], told: str) -> None:
    assert not faults(result())
    assert told in " ".join(faults(result(**changes)))


@pytest.mark.parametrize(
    ("counted", "exact", "told"), [(0.79, 0.8, "of its replies 0.8000"), (0.91, 0.91, "not yet known")]
)
def test_an_auc_that_is_wrong_or_too_good_is_a_fault(counted: float, exact: float, told: str) -> None:
    given = result()
    given.live.stats["models"][MODEL]["performance"]["auc"] = counted
    live = Snapshot(given.live.stats, given.live.drift, exact)
    assert told in " ".join(faults(result(live=live)))


def test_a_july_without_drift_of_temperature_is_a_fault() -> None:
    calm = result()
    calm.july.drift[MODEL]["drift"]["drifted"] = []
    assert "temperature" in " ".join(faults(calm))


def test_the_tables_show_drift_latency_and_the_flights_without_label() -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    show(result(server_exit=1), console)
    text = console.export_text()
    for part in ("temperature", "alert", "p99 9.00 ms", "75.0%", "9,430 flights", "0 mismatches", "FAILED"):
        assert part in text
