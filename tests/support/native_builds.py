"""Native programs in folders of their own under build/, kept from run to run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One test process at a time."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(folder: str, *options: str, target: str = "all") -> Path:
    """Build `target` with CMake in build/<folder> and return that; skips where there is no cmake.

    Test processes that want the same folder at once wait for each other.
    """
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on PATH")
    path = ROOT / "build" / folder
    path.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    with alone(path / "lock"):
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(path), *generator, *options],
            ["cmake", "--build", str(path), "-j", str(os.cpu_count() or 1), "--target", target],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return path
