"""The request-time expression `ratio_age` by Triton: the bits of `reference.ratio_age`."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from penstock_kernels.gpu.aot import Kernel
from penstock_kernels.gpu.launch import array_module, launch
from penstock_kernels.reference import Column, Floats, check_ratio_age

BLOCK = 256


@triton.jit
def ratio_age_kernel(  # type: ignore[no-untyped-def]
    now, last, last_valid, amount, amount_valid, mean, mean_valid, out, n, BLOCK: tl.constexpr
):
    """Columns of n rows, validity u8; writes out fp32 [n]; grid (ceil(n / BLOCK)).

    All arithmetic is float64: Triton's float32 quotient is not the rounded one. Zeros and NaN are chosen by
    comparison, as min and max leave them to the device.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    elapsed = tl.load(now + i, mask=live, other=0) - tl.load(last + i, mask=live, other=0)
    days = elapsed.to(tl.float64) / 86.4e9
    recent = days <= 90.0
    ratio = tl.load(amount + i, mask=live, other=0.0).to(tl.float64) / tl.load(mean + i, mask=live, other=1.0)
    ratio = tl.where(ratio <= 0.0, 0.0, ratio)
    ratio = tl.where(ratio >= 10.0, 10.0, ratio)
    value = tl.where(recent, ratio / tl.where(days > 1.0, days, 1.0), 0.0).to(tl.float32)
    valid = tl.load(last_valid + i, mask=live, other=0) > 0
    amount_ok = tl.load(amount_valid + i, mask=live, other=0) > 0
    mean_ok = tl.load(mean_valid + i, mask=live, other=0) > 0
    valid = valid & ((amount_ok & mean_ok) | (recent == 0)) & (value == value)
    tl.store(out + i, tl.where(valid, value, float("nan")), mask=live)


RATIO_AGE = Kernel(
    ratio_age_kernel,
    {
        "now": "*i64",
        "last": "*i64",
        "last_valid": "*u8",
        "amount": "*fp32",
        "amount_valid": "*u8",
        "mean": "*fp64",
        "mean_valid": "*u8",
        "out": "*fp32",
        "n": "i64",
        "BLOCK": "constexpr",
    },
)


def ratio_age(now: NDArray[np.int64], last: Column, amount: Column, mean: Column) -> Floats:
    """float32 [n] on the arguments' device; see `penstock_kernels.reference.ratio_age`.

    Raises ValueError naming a bad argument.
    """
    columns = (last, amount, mean)
    xp = array_module(now, *[part for pair in columns for part in pair if part is not None])
    now = xp.ascontiguousarray(xp.asarray(now))
    pairs: list[Any] = [
        tuple(None if part is None else xp.ascontiguousarray(xp.asarray(part)) for part in pair)
        for pair in columns
    ]
    check_ratio_age(now, *pairs)
    every = xp.asarray(np.ones(len(now), dtype=np.uint8))
    args = [now]
    for values, valid in pairs:
        args += [values, every if valid is None else valid.view(np.uint8)]
    out = xp.empty(len(now), dtype=np.float32)
    launch(RATIO_AGE, (-(-len(now) // BLOCK),), (*args, out, len(now)), {"BLOCK": BLOCK})
    return out  # type: ignore[no-any-return]
