"""`penstock serve` and `penstock predict`: output, exit status, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from penstock import cli_serving
from penstock.serving.client import Client

# The command as it is, with an engine that needs no models.
_SERVE = """
import runpy, sys, types
import typer
from penstock import cli_serving
from penstock.errors import ConfigError
fake = runpy.run_path(sys.argv.pop(1))["FakeEngine"]

class Lock:
    def announce(self, addresses):
        print("announced", *addresses, file=sys.stderr)

class Engine(fake):
    lock = Lock()

    @classmethod
    def from_config(cls, path):
        return cls()

    def close(self):
        print("engine closed", file=sys.stderr)

sys.modules["penstock.serving.engine"] = types.SimpleNamespace(Engine=Engine)
app = typer.Typer()
cli_serving.register(app)
app()
"""


@pytest.fixture
def command():
    app = typer.Typer()
    cli_serving.register(app)
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


def _serve(*args, **streams):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    script = str(Path(__file__).with_name("fake_engine.py"))
    return subprocess.Popen(
        [sys.executable, "-c", _SERVE, script, "serve", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def test_serve_tells_where_it_listens_and_drains_on_sigterm(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("server:\n  listen: ['tcp://127.0.0.1:0']\n")
    with _serve(config, "--json") as process:
        ready = json.loads(process.stdout.readline())
        assert (ready["event"], ready["pid"]) == ("listening", process.pid)
        (address,) = ready["addresses"]
        with Client(address) as client:
            assert client.predict("echo", {"id": 4}).scores.tolist() == [4.0]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == f"announced {address}\npenstock: listening on {address}\nengine closed\n"


def test_serve_on_a_port_in_use(serve, tmp_path):
    address = serve().address
    config = tmp_path / "c.yaml"
    config.write_text("")
    with _serve(config, "--listen", address) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == f"engine closed\npenstock: cannot listen on {address}: the port is in use\n"


def test_serve_with_a_bad_configuration_lists_the_faults(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("serving:\n  max_batch_size: 0\n  max_latncy_ms: 5\n")
    with _serve(config) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "line 2: serving.max_batch_size is 0" in err
    assert "line 3: unknown key serving.max_latncy_ms" in err


def test_predict_prints_scores(serve, command):
    address = serve().address
    done = command("predict", "echo", '{"id": [7, 8]}', "--inputs", '{"km": [1.5, 2]}', "--to", address)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines()]
    assert lines == [["echo", "version", "1"], ["0", "7"], ["1", "8"]]
    done = command("predict", "echo", '{"id": 7}', "--to", address, "--json")
    assert json.loads(done.output) == {"scores": [7.0], "version": "1", "request_ids": [0], "status": None}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eco", '{"id": 1}'], 'model is "eco"; expected one of: echo, hold'),
        (["echo", "{"], "ENTITIES is '{'; expected JSON"),
        (["echo", "[1]"], "ENTITIES is '[1]'; expected a JSON object of columns"),
        (["echo", '{"id": 1}', "--inputs", "5"], "--inputs is '5'; expected a JSON object"),
        (["echo", '{"id": 1}', "--deadline-ms", "0"], "deadline_ms is 0.0; expected a number above 0"),
        (["echo", '{"id": 1}', "--to", "nowhere"], "address is 'nowhere'"),
    ],
)
def test_predict_that_cannot_be(serve, command, args, message):
    done = command("predict", *args, "--to", serve().address)
    assert done.exit_code == 1
    assert f"penstock: {message}" in done.output
