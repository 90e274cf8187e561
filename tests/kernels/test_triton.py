"""The Triton kernel: interpreted against numpy, and compiled to cubins; neither needs a GPU or PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRITON_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_histogram as cases
from penstock_kernels import reference
from penstock_kernels.gpu import interpreter
for seed in range(24):
    spec, rows = cases.make_case(seed)
    got = interpreter.count_rows(spec, rows)
    assert got.tolist() == reference.count_rows(spec, rows).tolist(), seed
assert "torch" not in sys.modules
print("equal")
"""


def run_python(script: str, interpret: str) -> subprocess.CompletedProcess[str]:
    here = str(Path(__file__).parent)
    env = dict(os.environ, TRITON_INTERPRET=interpret, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    return subprocess.run(
        [sys.executable, "-c", script, here], env=env, capture_output=True, text=True, check=False
    )


def test_triton_kernel_counts_alike_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = run_python(TRITON_SCRIPT, "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


AOT_SCRIPT = """
from penstock_kernels.gpu import aot
for capability in aot.CAPABILITIES:
    cubin = aot.compile_histogram(capability, 1280)
    assert cubin.image[:4] == bytes([127]) + b"ELF"
    assert cubin.name.encode() in cubin.image and cubin.threads == 128
try:
    aot.compile_histogram(75, 1280)
except ValueError as error:
    assert "75" in str(error)
    print("built")
"""


def test_triton_kernel_compiles_ahead_of_time_without_a_gpu() -> None:
    pytest.importorskip("triton")
    done = run_python(AOT_SCRIPT, "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "built"


REFUSED_SCRIPT = """
import numpy as np
from penstock_kernels import reference
from penstock_kernels.gpu import aot, interpreter
spec = reference.HistogramSpec([2])
rows = np.zeros((1, 1), np.float32)
for call in (lambda: aot.compile_histogram(80, 4), lambda: interpreter.count_rows(spec, rows)):
    try:
        call()
        print("ran")
    except RuntimeError as error:
        print(str(error).split(";")[0])
"""


@pytest.mark.parametrize(
    ("interpret", "lines"),
    [
        ("1", ["Triton is in interpreter mode", "ran"]),
        ("0", ["ran", "Triton is not in interpreter mode"]),
    ],
)
def test_each_mode_refuses_the_others_work(interpret: str, lines: list[str]) -> None:
    pytest.importorskip("triton")
    done = run_python(REFUSED_SCRIPT, interpret)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == lines
