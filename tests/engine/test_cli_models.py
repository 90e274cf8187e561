"""`penstock models`: output and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from penstock.cli_models import app, call_models
from penstock.errors import InvalidArgumentError
from penstock.models.bundle import save_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=60), "b": rng.normal(size=60)})
    frame["y"] = (frame["a"] > 0).astype(int)
    model = lgb.LGBMClassifier(n_estimators=2, verbose=-1, n_jobs=1).fit(frame[["a", "b"]], frame["y"])
    for auc in (0.5, 0.75):
        save_bundle(model, frame, name="fraud", directory=folder, label="y", metrics={"auc": auc})
    return folder / "fraud"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def at(tmp_path: Path, *arguments: Any) -> Any:
    return run(*arguments, "--data-dir", tmp_path / "data")


def test_models_are_added_promoted_and_rolled_back(bundles, tmp_path):
    assert at(tmp_path, "list").output == "no models\n"
    assert at(tmp_path, "add", bundles / "1").output == "added fraud 1: trees (champion)\n"
    assert at(tmp_path, "add", bundles / "2").output == "added fraud 2: trees (challenger)\n"
    assert at(tmp_path, "list").output.splitlines() == [
        "NAME   VERSION  ALIASES     BACKEND  OUTPUT       INPUTS  SERVICE  METRICS",
        "fraud  1        champion    trees    probability  2       -        auc 0.5",
        "fraud  2        challenger  trees    probability  2       -        auc 0.75",
    ]
    assert at(tmp_path, "promote", "fraud").output == "champion of fraud is 2\n"
    assert at(tmp_path, "rollback", "fraud").output == "champion of fraud is 1\n"
    done = at(tmp_path, "promote", "fraud", "2")
    assert (done.exit_code, done.output) == (0, "champion of fraud is 2\n")
    assert at(tmp_path, "add", bundles / "2").output == "added fraud 2: trees (champion)\n"


def test_json_of_every_command(bundles, tmp_path):
    added = json.loads(at(tmp_path, "add", bundles / "1", "--json").output)
    assert (added["name"], added["version"], added["aliases"]) == ("fraud", "1", ["champion"])
    at(tmp_path, "add", bundles / "2")
    listed = json.loads(at(tmp_path, "list", "--json").output)["models"]
    assert listed[0] == added
    assert [m["metrics"] for m in listed] == [{"auc": 0.5}, {"auc": 0.75}]
    wanted = {"model": "fraud", "version": "2"}
    assert json.loads(at(tmp_path, "promote", "fraud", "--json").output) == wanted
    assert json.loads(at(tmp_path, "rollback", "fraud", "--json").output) == {**wanted, "version": "1"}


def test_data_dir_comes_from_the_configuration(bundles, tmp_path, monkeypatch):
    file = tmp_path / "inference-config.yaml"
    file.write_text("data_dir: here\n")
    assert run("add", bundles / "1", "--config", file).exit_code == 0
    assert (tmp_path / "here" / "models" / "fraud" / "1").is_dir()
    monkeypatch.chdir(tmp_path)
    assert "fraud" in run("list").output


def test_corrupt_version_is_listed_as_unreadable(bundles, tmp_path):
    at(tmp_path, "add", bundles / "1")
    (tmp_path / "data" / "models" / "fraud" / "1" / "model.yaml").unlink()
    done = at(tmp_path, "list")
    assert done.exit_code == 0
    assert "unreadable: " in done.output and "model.yaml: is missing" in done.output


def test_failure_is_exit_code_1_and_says_why(tmp_path):
    done = at(tmp_path, "promote", "nope")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: model 'nope' is unknown; expected one of: there is none\n"
    done = at(tmp_path, "add", tmp_path / "nope", "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.exit_code, error["code"]) == (1, "FAILED_PRECONDITION")
    assert "is no folder" in error["message"]


def test_bad_configuration_is_exit_code_1(tmp_path):
    (tmp_path / "c.yaml").write_text("nope: 1\n")
    done = run("list", "--config", tmp_path / "c.yaml")
    assert done.exit_code == 1 and "unknown key nope" in done.stderr


def test_disk_error_is_exit_code_1(bundles, tmp_path):
    (tmp_path / "data").write_text("a file")
    done = at(tmp_path, "add", bundles / "1")
    assert done.exit_code == 1 and done.stderr.startswith("error: ")


def test_wrong_usage_is_exit_code_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("list").exit_code == 2
    assert run("list", "--data-dir", "a", "--config", "b").exit_code == 2
    assert run("promote").exit_code == 2
    assert run("nope").exit_code == 2


def test_unknown_method_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="method is 'drop'"):
        call_models(tmp_path, "drop", {})
