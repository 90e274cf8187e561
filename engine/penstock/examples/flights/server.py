"""A `penstock serve` child process: its configuration, its readiness, its end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any, Self

import yaml

from penstock.errors import UnavailableError
from penstock.examples.flights.train import MODEL

_READY_TIMEOUT_S = 120.0
_DRAIN_TIMEOUT_S = 20.0


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


class ServerProcess:
    """Context manager around the child. Leaving it drains the child with SIGTERM; a hung child is killed.

    The child has its own session, so that Ctrl-C reaches the parent alone, which then stops the child.
    """

    def __init__(self, config: Path, log: Path) -> None:
        self._config = config
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._log_file: IO[Any] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "penstock.cli", "serve", str(self._config)]
        self._log_file = self._log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log_file, text=True, start_new_session=True
        )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_ready(self) -> None:
        """Return at the ready line; later output goes on to the log."""
        ready = threading.Event()
        ended = threading.Event()

        def read(process: subprocess.Popen[str], log: IO[Any]) -> None:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                if "ready" in line:
                    ready.set()
            ended.set()
            ready.set()

        threading.Thread(target=read, args=(self._process, self._log_file), daemon=True).start()
        if not ready.wait(_READY_TIMEOUT_S) or ended.is_set():
            tail = self._log.read_text(encoding="utf-8").splitlines()[-15:]
            raise UnavailableError("\n".join(["the server did not start; its last lines:", *tail]))

    def stop(self) -> int:
        """Stop the child and return its exit code; once stopped, the same code again."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_DRAIN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return self._process.returncode
