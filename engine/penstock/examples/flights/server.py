"""A `penstock serve` child process: its configuration, its readiness, its end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import yaml

from penstock.errors import UnavailableError
from penstock.examples.flights.train import MODEL

_READY_TIMEOUT_S = 120.0


def write_config(run: Path, bundle: Path, address: str) -> Path:
    """Write `run`/inference-config.yaml, which serves `bundle` at `address`, and return its path.

    Panes of a day and a window of 16 hold the whole of a replay, or a week by itself.
    """
    config = {
        "serving": {"max_batch_size": 64, "max_latency_ms": 50, "allow_replay": True},
        "server": {"listen": [address]},
        "feature_store": {"repo_path": "repo"},
        "models": {MODEL: {"path": str(bundle.relative_to(run))}},
        "monitoring": {"pane": "1d", "window": "16d"},
        "data_dir": "data",
    }
    path = run / "inference-config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def serve_command(config: Path) -> list[str]:
    """`penstock serve` by the Python that runs now."""
    return [sys.executable, "-c", "from penstock.cli import main; main()", "serve", str(config), "--json"]


class ServerProcess:
    """A child that is ready once it has written a line. What it writes goes to `log`.

    The child has its own session, so that Ctrl-C reaches the parent alone, which then stops it.
    """

    def __init__(self, command: Sequence[str], log: Path, *, drain_timeout_s: float = 20.0) -> None:
        self._command = list(command)
        self._log = log
        self._drain_timeout_s = drain_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Start it and return when it is ready; UnavailableError with its last words if it never is."""
        log = self._log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            self._wait_ready(self._process, log)
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        """Return at the first line; a thread sends this and later ones to the log."""
        ready = threading.Event()
        ended = threading.Event()

        def read() -> None:
            assert process.stdout is not None
            with log:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    ready.set()
            ended.set()
            ready.set()

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()
        if not ready.wait(_READY_TIMEOUT_S) or ended.is_set():
            tail = self._log.read_text(encoding="utf-8").splitlines()[-15:]
            raise UnavailableError("\n".join(["the server did not start; its last words:", *tail]))

    def stop(self) -> int:
        """Drain the child with SIGTERM, kill it if it hangs, and return its exit code, 0 if never started."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(self._drain_timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._reader is not None:
            self._reader.join()
        return self._process.returncode
