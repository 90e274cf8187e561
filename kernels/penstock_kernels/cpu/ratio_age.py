"""The request-time expression `ratio_age` by Numba: the bits of `reference.ratio_age`."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from penstock_kernels.reference import DAY_US, RATIO_CAP, RATIO_DAYS, Column, Floats, check_ratio_age

NAN = np.float32(np.nan)


# The numpy error model divides by zero as IEEE 754 does; without fastmath nothing is fused or reordered.
@njit(cache=True, nogil=True, error_model="numpy")
def _ratio_age(now, last, last_valid, amount, amount_valid, mean, mean_valid, out):  # type: ignore[no-untyped-def]
    for i in range(len(now)):
        days = np.float64(now[i] - last[i]) / DAY_US
        value = np.float32(0.0)
        valid = last_valid[i]
        if days <= RATIO_DAYS:
            ratio = np.float64(amount[i]) / mean[i]
            if ratio >= RATIO_CAP:
                ratio = RATIO_CAP
            elif ratio <= 0.0:
                ratio = 0.0
            value = np.float32(ratio / (days if days > 1.0 else 1.0))
            valid = valid and amount_valid[i] and mean_valid[i]
        out[i] = value if valid and not np.isnan(value) else NAN


def ratio_age(now: NDArray[np.int64], last: Column, amount: Column, mean: Column) -> Floats:
    """float32 [n]; see `penstock_kernels.reference.ratio_age`. Raises ValueError naming a bad argument."""
    check_ratio_age(now, last, amount, mean)
    out = np.empty(len(now), dtype=np.float32)
    every = np.ones(len(now), dtype=np.bool_)
    columns = [(values, every if valid is None else valid) for values, valid in (last, amount, mean)]
    _ratio_age(now, *columns[0], *columns[1], *columns[2], out)
    return out
