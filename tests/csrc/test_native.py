"""The native test programs (tests/csrc/*/native_*.cc) under ThreadSanitizer and AddressSanitizer + UBSan."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from native_builds import build

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(path.stem for path in (ROOT / "tests" / "csrc").glob("*/native_*.cc"))


def built(sanitizer: str, target: str = "all") -> Path:
    """The folder of the programs with one sanitizer, with `target` built."""
    options = ("-DPENSTOCK_TESTS=ON", f"-DPENSTOCK_SANITIZE={sanitizer}")
    return build(f"sanitize-{sanitizer}", *options, target=target)


@pytest.fixture(scope="session", params=["thread", "address"])
def sanitized(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """Build every program with one sanitizer; return its name and the folder of the programs."""
    return request.param, built(request.param)


LONG = {"native_arena_kill": ["1000"]}  # arguments of the long forms


@pytest.mark.timeout(900)  # the first of a sanitizer builds them all
@pytest.mark.parametrize("program", PROGRAMS)
def test_program_is_clean(sanitized: tuple[str, Path], program: str) -> None:
    run_clean(*sanitized, program, [])


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("program", sorted(LONG))
def test_long_form_is_clean(sanitizer: str, program: str) -> None:
    run_clean(sanitizer, built(sanitizer, program), program, LONG[program])


def run_clean(sanitizer: str, folder: Path, program: str, arguments: list[str]) -> None:
    command = [str(folder / program), *arguments]
    if sanitizer == "thread" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # TSAN cannot map its shadow under some address-space layouts
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
