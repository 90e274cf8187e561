"""`penstock report`, and `penstock models` beside a server: against a real server in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from sklearn.ensemble import RandomForestClassifier
from typer.testing import CliRunner

from penstock import cli, cli_report
from penstock.data_lock import DataDirLock
from penstock.models import save_bundle
from penstock.models.registry import ModelRegistry
from penstock.monitoring.report_data import check_data
from penstock.serving.client import Client

NAMES = ["calm", "moved"]
ROWS = 600


class Served:
    """`penstock serve` on the registry of `folder`/data: fraud 1 (the champion) and 2, and other 1."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(3)
        rows = rng.normal(size=(4_000, 2)).astype(np.float32)
        forest = RandomForestClassifier(4, max_depth=3, random_state=1).fit(rows, rows[:, 0] > 0)
        table = pa.table(dict(zip(NAMES, rows.T)))
        registry = ModelRegistry(folder / "data/models", folder / "data/registry")
        for name, version in (("fraud", "1"), ("fraud", "2"), ("other", "1")):
            save_bundle(forest, table, name=name, version=version, directory=folder, inputs=NAMES)
            registry.add(folder / name / version)
        self.folder = folder
        self.config = folder / "inference-config.yaml"
        settings = {"serving": {"max_latency_ms": 2000}, "data_dir": "data"}
        self.config.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-c", "from penstock.cli import main; main()", "serve", str(self.config)]
        with (folder / "server.log").open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--listen", "tcp://127.0.0.1:0", "--json"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (folder / "server.log").read_text()
        (self.address,) = json.loads(line)["addresses"]

    def send_drifted_rows(self) -> None:
        rows = np.random.default_rng(4).normal(size=(ROWS, 2)).astype(np.float32)
        rows[:, 1] += 3.0
        with Client(self.address) as client:
            for start in range(0, ROWS, 50):
                made = client.predict_vectors("fraud", rows[start : start + 50])
                client.label(made.request_ids, (rows[start : start + 50, 0] > 0).astype(int).tolist())

    def live_versions(self) -> dict[str, str]:
        with Client(self.address) as client:
            return client.health()["models"]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.communicate(timeout=60)
            finally:
                self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"))
    try:
        served.send_drifted_rows()
        yield served
    finally:
        served.stop()


def run(*args: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": "160"})


def test_the_terminal_shows_each_model(server):
    done = run("report", "--config", server.config)
    assert (done.exit_code, done.stderr) == (0, "")
    fraud, other = done.output.split("other version 1")
    for expected in ("fraud version 1  alert  600 rows", "moved", "600 (100.0 %)", "AUC", "Latency", "2 s"):
        assert expected in fraud
    assert "insufficient" in other


def test_json_has_the_report_data_of_each_model(server):
    done = run("report", "--to", server.address, "--json")
    found = json.loads(done.stdout, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert found["html"] == []
    fraud, other = found["reports"]
    for data in (fraud, other):
        check_data(data)
    assert (fraud["model"], fraud["version"], fraud["drift"]["n"]) == ("fraud", "1", ROWS)
    assert {item["name"]: item["state"] for item in fraud["drift"]["features"]} == {
        "calm": "ok",
        "moved": "alert",
    }
    assert (fraud["latency"]["count"], fraud["latency"]["limit_ms"]) == (ROWS // 50, 2000.0)
    assert fraud["stages"]["run"]["count"] == fraud["service"]["slo"]["due"] == ROWS // 50
    assert fraud["service"]["slo"]["attainment"] == 1.0
    assert fraud["performance"]["labelled"] == ROWS
    assert fraud["performance"]["auc"] > 0.9
    assert other["performance"]["auc"] is None


def test_one_model_and_a_window(server):
    done = run("report", "--config", server.config, "--model", "fraud", "--window", "6h", "--json")
    (data,) = json.loads(done.stdout)["reports"]
    assert data["model"] == "fraud"
    assert data["drift"]["end_us"] - data["drift"]["start_us"] == 6 * 3_600_000_000


def test_the_page_of_one_model_is_the_file(server, tmp_path):
    page = tmp_path / "r.html"
    done = run("report", "--config", server.config, "--model", "fraud", "--html", page)
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == f"wrote {page}"
    root = ET.fromstring(page.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>"))
    said = " ".join(" ".join(root.itertext()).split())
    for expected in ("fraud version 1", "alert", "moved", "latency p99", "limit 2 s", "AUC"):
        assert expected in said
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_each_of_several_models_has_a_page(server, tmp_path):
    done = run("report", "--config", server.config, "--html", tmp_path / "r.html", "--json")
    pages = [tmp_path / "r-fraud.html", tmp_path / "r-other.html"]
    assert json.loads(done.stdout)["html"] == [str(page) for page in pages]
    assert sorted(tmp_path.iterdir()) == pages


def test_the_configuration_here_is_the_default(server, monkeypatch):
    monkeypatch.chdir(server.folder)
    assert "fraud version 1" in run("report").output


def test_figures_of_another_version_are_left_out():
    class Promoted:
        """A server whose model changed between the two calls."""

        def drift(self, model: str | None, window_s: float | None) -> Any:
            return {"m": {"version": "1", "drift": {}, "freshness": None}}

        def stats(self) -> Any:
            return {"models": {"m": {"version": "2", "latency": {}, "limit_ms": 1.0}}}

    (data,) = cli_report.collect(Promoted())  # type: ignore[arg-type]
    assert data["version"] == "1"
    assert "latency" not in data and "performance" not in data


def test_a_server_without_models_is_said(monkeypatch):
    monkeypatch.setattr(cli_report, "collect", lambda *_: [])
    assert run("report", "--to", "tcp://127.0.0.1:9").output == "the server runs no models\n"


def test_an_unknown_model_is_exit_code_1(server):
    done = run("report", "--to", server.address, "--model", "nope")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "penstock: model 'nope' is unknown; expected one of: fraud, other\n"
    done = run("report", "--to", server.address, "--model", "nope", "--json")
    assert (done.exit_code, json.loads(done.stdout)["error"]["code"]) == (1, "NOT_FOUND")


def test_a_page_that_cannot_be_written_is_exit_code_1(server, tmp_path):
    done = run("report", "--to", server.address, "--html", tmp_path / "none" / "r.html", "--model", "fraud")
    assert done.exit_code == 1
    assert "r.html" in done.stderr


def test_no_server_says_how_to_start_one(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data_dir: data\n")
    done = run("report", "--config", file)
    assert done.exit_code == 1
    assert f"no server uses the data folder {tmp_path / 'data'}" in done.stderr
    assert f"start one with `penstock serve {file}`" in done.stderr


def test_an_engine_that_listens_nowhere_cannot_be_asked(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data_dir: data\n")
    lock = DataDirLock(tmp_path / "data")
    try:
        done = run("report", "--config", file)
    finally:
        lock.release()
    assert (done.exit_code, "listens nowhere" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--to", "tcp://127.0.0.1:9", "--config", "c.yaml"],
        *(["--to", "tcp://127.0.0.1:9", "--window", bad] for bad in ("x", "0s", "-1d", "60", "nan")),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("report", *args)
    assert done.exit_code == 2
    assert "Usage: " in done.stderr


def test_the_server_promotes_and_rolls_back_what_it_serves(tmp_path):
    server = Served(tmp_path)
    try:
        assert server.live_versions() == {"fraud": "1", "other": "1"}
        done = run("models", "promote", "fraud", "--config", server.config)
        assert (done.exit_code, done.output) == (0, "champion of fraud is 2\n")
        assert server.live_versions()["fraud"] == "2"
        done = run("models", "rollback", "fraud", "--config", server.config, "--json")
        assert json.loads(done.stdout) == {"model": "fraud", "version": "1"}
        assert server.live_versions()["fraud"] == "1"
        assert run("models", "list", "--config", server.config).exit_code == 0
        done = run("models", "promote", "nope", "--config", server.config)
        assert done.exit_code == 1
        assert "expected one of: fraud, other" in done.stderr
    finally:
        server.stop()
    done = run("models", "promote", "fraud", "2", "--config", server.config)  # nobody holds the folder now
    assert (done.exit_code, done.output) == (0, "champion of fraud is 2\n")


def test_models_promote_beside_an_engine_that_listens_nowhere_changes_nothing(tmp_path):
    lock = DataDirLock(tmp_path / "data")
    try:
        done = run("models", "promote", "fraud", "--data-dir", tmp_path / "data")
    finally:
        lock.release()
    assert (done.exit_code, "listens nowhere" in done.stderr) == (1, True)
    assert not (tmp_path / "data" / "registry").exists()
