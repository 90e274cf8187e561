"""The exact two-sample KS p-value by Numba: one pass of O(n m) with one row of state."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def _exact_p(h, n, m):  # type: ignore[no-untyped-def]
    a = np.zeros(m + 1)
    for i in range(n + 1):
        for j in range(m + 1):
            if abs(i * m - j * n) >= h:
                a[j] = 1.0
            elif i + j > 0:
                up = i * a[j] if i > 0 else 0.0
                left = j * a[j - 1] if j > 0 else 0.0
                a[j] = (up + left) / (i + j)
    return a[m]


def ks_exact_p(h: int, n: int, m: int) -> float:
    """P(D >= h / (n m)) under no drift; the recursion of `penstock_kernels.reference.ks_exact_p`."""
    if n < 1 or m < 1:
        raise ValueError(f"n is {n}, m is {m}; expected at least 1 of each")
    return float(_exact_p(h, max(n, m), min(n, m)))
