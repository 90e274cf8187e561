"""Feature programs on an NVIDIA GPU: one fused kernel each, the oracle's bits.

Needs Penstock beside what `make gpu` needs; without it, or without a device, every test skips and says why.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from penstock_kernels import dispatch

core = pytest.importorskip("penstock._core", reason="penstock is not installed: no oracle to compare with")

from feature_programs import SCHEMA, Case, arrays, covering_programs, random_rows  # noqa: E402

from penstock.features.backends.triton_backend import TritonProgram  # noqa: E402
from penstock.features.program import SIGNATURES, lower  # noqa: E402

pytestmark = pytest.mark.gpu
PROGRAMS = covering_programs(0, 12)


@pytest.fixture(scope="module")
def cupy() -> Any:
    """Skips unless the kernels can run on a device; asked late, as other tests choose interpreter mode."""
    reason = dispatch.no_device()
    if reason is not None:
        pytest.skip(reason)
    return pytest.importorskip("cupy")


class OnDevice:
    """A program whose columns go to the device and come back."""

    def __init__(self, cupy: Any, program: TritonProgram) -> None:
        self.cupy, self.program = cupy, program
        self.inputs = program.inputs

    def run(self, inputs: Sequence[tuple[Any, Any]], rows: int = 0) -> list[tuple[Any, Any]]:
        given = [(self.cupy.asarray(v), None if ok is None else self.cupy.asarray(ok)) for v, ok in inputs]
        return [(v.get(), ok.get()) for v, ok in self.program.run(given, rows=rows)]


def lowered(case: Case) -> Any:
    return lower(case.outputs, SCHEMA, case.distributions)


@pytest.mark.parametrize("part", range(len(PROGRAMS)))
def test_every_operation_has_the_oracles_bits(cupy: Any, part: int) -> None:
    program = None
    for seed, rows in enumerate((1, 2, 255, 256, 257, 300)):
        case = Case(seed, rows=rows, program=PROGRAMS[part])
        program = program or OnDevice(cupy, TritonProgram(lowered(case)))
        assert (found := case.differs(program)) is None, found


def test_the_programs_have_every_operation() -> None:
    cases = [Case(0, rows=0, program=program) for program in PROGRAMS]
    assert {step.op for case in cases for step in lowered(case).code} == set(SIGNATURES)


def test_random_programs_have_the_oracles_bits(cupy: Any) -> None:
    for seed in range(24):
        case = Case(seed, outputs=4, depth=3, rows=65)
        assert (found := case.differs(OnDevice(cupy, TritonProgram(lowered(case))))) is None, found


@pytest.mark.parametrize("part", range(len(PROGRAMS)))
def test_many_rows_have_the_cores_bits(cupy: Any, part: int) -> None:
    rng = random.Random(part)
    case = Case(0, rows=0, program=PROGRAMS[part])
    program = lowered(case)
    given = arrays(random_rows(rng, 20_003), case.inputs, rng)
    native = core.FeatureProgram(program.to_bytes()).run(given, rows=20_003)
    device = OnDevice(cupy, TritonProgram(program)).run(given, rows=20_003)
    for (name, _), (want, want_ok), (got, got_ok) in zip(case.outputs, native, device):
        want, want_ok, got, got_ok = map(np.asarray, (want, want_ok, got, got_ok))
        assert np.array_equal(want_ok, got_ok), name
        if want.dtype == np.float64:
            nan = np.isnan(want)
            assert np.array_equal(nan, np.isnan(got)), name
            want, got = want[~nan].view(np.int64), got[~nan].view(np.int64)
        assert np.array_equal(want, got), name


def test_columns_in_several_places_are_refused(cupy: Any) -> None:
    case = Case(3, rows=4, program=PROGRAMS[0])
    mixed = [(cupy.asarray(case.arrays[0][0]), None), *case.arrays[1:]]
    with pytest.raises(ValueError, match="some arrays"):
        TritonProgram(lowered(case)).run(mixed)
