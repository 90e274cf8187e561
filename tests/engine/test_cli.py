"""The command line: output and exit codes."""

import json

import pytest
from typer.testing import CliRunner

import penstock
from penstock import cli


@pytest.fixture
def run():
    return lambda *args: CliRunner().invoke(cli.app, [str(arg) for arg in args])


def test_version(run):
    done = run("version")
    assert (done.exit_code, done.output) == (0, f"penstock {penstock.__version__}\n")


def test_version_as_json(run):
    assert json.loads(run("version", "--json").output)["penstock"] == penstock.__version__


def test_check_accepts_a_good_file(run, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("serving:\n  max_batch_size: 8\n")
    done = run("check", file)
    assert (done.exit_code, done.output) == (0, f"{file}: ok\n")


def test_check_prints_every_fault_with_its_line(run, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("serving:\n  max_batch_size: 0\n  max_latncy_ms: 5\n")
    done = run("check", file)
    assert done.exit_code == 1
    first, second = done.output.splitlines()
    assert first.startswith(f"{file}:2: serving.max_batch_size is 0")
    assert second.startswith(f"{file}:3: unknown key serving.max_latncy_ms")


def test_check_as_json(run, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("servng: {}\n")
    done = run("check", file, "--json")
    report = json.loads(done.output)
    assert (done.exit_code, report["ok"], report["errors"][0]["line"]) == (1, False, 1)


def test_check_of_a_missing_file_fails(run, tmp_path):
    done = run("check", tmp_path / "none.yaml")
    assert done.exit_code == 1
    assert "cannot be read" in done.output


@pytest.mark.parametrize("args", [["check"], ["nonsense"], ["version", "--nonsense"]])
def test_wrong_usage_exits_2(run, args):
    assert run(*args).exit_code == 2


def test_main_is_the_entry_point(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["penstock", "version"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert penstock.__version__ in capsys.readouterr().out
