"""The request-time expression: C++ == numpy == Numba, bit for bit, and what its rules mean by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import program_ratio_age, ratio_case

from penstock_kernels import reference
from penstock_kernels.cpu import ratio_age as cpu

DAY = 86_400_000_000


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_core_numpy_and_numba_give_the_same_bits(seed: int) -> None:
    case = ratio_case(seed, 300)
    want = program_ratio_age(*case).view(np.uint32).tolist()
    assert reference.ratio_age(*case).view(np.uint32).tolist() == want
    assert cpu.ratio_age(*case).view(np.uint32).tolist() == want


@pytest.mark.parametrize(
    ("age_days", "amount", "mean", "expected"),
    [
        (0.5, 3.0, 2.0, 1.5),
        (2.0, 3.0, 2.0, 0.75),
        (90.0, 9.0, 1.0, 0.1),
        (90.5, 9.0, 1.0, 0.0),
        (-3.0, 9.0, 1.0, 9.0),
        (4.0, 1e6, 1.0, 2.5),
        (4.0, -1.0, 1.0, 0.0),
        (1.0, 1.0, 0.0, 10.0),
        (1.0, 1.0, -0.0, 0.0),
        (1.0, 0.0, 0.0, np.nan),
        (1.0, None, 1.0, np.nan),
        (1.0, 1.0, None, np.nan),
        (91.0, None, None, 0.0),
        (None, 1.0, 1.0, np.nan),
    ],
)
def test_rules_by_hand(
    age_days: float | None, amount: float | None, mean: float | None, expected: float
) -> None:
    def column(value: float | None, dtype: type) -> reference.Column:
        return np.array([0 if value is None else value], dtype=dtype), np.array([value is not None])

    last = column(None if age_days is None else -age_days * DAY, np.int64)
    got = reference.ratio_age(
        np.zeros(1, np.int64), last, column(amount, np.float32), column(mean, np.float64)
    )
    assert got.tolist() == pytest.approx([np.float32(expected)], nan_ok=True, rel=0, abs=0)
    assert not np.signbit(got[0])
