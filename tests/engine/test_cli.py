"""The command line: output and exit codes."""

import json

import pytest
from typer.testing import CliRunner

import penstock
from penstock import cli
from penstock.errors import UnavailableError


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


def test_check_names_a_model_that_is_not_there(run, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("models:\n  buy:\n    threads: 1\n    path: bundles/buy/1\n")
    done = run("check", file)
    assert done.exit_code == 1
    assert done.output.startswith(
        f"{file}:4: models.buy.path is '{tmp_path / 'bundles/buy/1'}'; expected the folder"
    )
    (tmp_path / "bundles/buy/1").mkdir(parents=True)
    assert run("check", file).exit_code == 1
    (tmp_path / "bundles/buy/1/model.yaml").touch()
    assert run("check", file).exit_code == 0


def test_predict_asks_where_the_configuration_listens(run, tmp_path, monkeypatch):
    from penstock import cli_serving

    asked = []

    def connect(addresses):
        asked.append(addresses)
        raise UnavailableError("nobody is there")

    monkeypatch.setattr(cli_serving, "connect", connect)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "other.yaml"
    file.write_text(f"server: {{listen: ['unix://{tmp_path}/a']}}\n")
    run("predict", "buy", "{}")
    run("predict", "buy", "{}", "--config", file)
    (tmp_path / "inference-config.yaml").write_text("server: {listen: ['tcp://127.0.0.1:7999']}\n")
    run("predict", "buy", "{}")
    run("predict", "buy", "{}", "--config", file)
    run("predict", "buy", "{}", "--to", "tcp://127.0.0.1:1")
    assert asked == [
        ["tcp://127.0.0.1:7064"],
        [f"unix://{tmp_path}/a"],
        ["tcp://127.0.0.1:7999"],
        [f"unix://{tmp_path}/a"],
        ["tcp://127.0.0.1:1"],
    ]


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
