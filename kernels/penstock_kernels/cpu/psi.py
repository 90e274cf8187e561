"""PSI of many columns or windows at once by Numba: `psi_values` of `reference`, within `psi_tolerance`."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from penstock_kernels.reference import Counts, check_psi_tables


@njit(cache=True, nogil=True)
def _psi(ref, cur, out):  # type: ignore[no-untyped-def]
    k = ref.shape[1]
    for w in range(ref.shape[0]):
        n = 0.0
        m = 0.0
        for b in range(k):
            n += np.float64(ref[w, b])
            m += np.float64(cur[w, b])
        if n == 0.0 or m == 0.0:
            out[w] = np.nan
            continue
        total = 0.0
        for b in range(k):
            p = (np.float64(ref[w, b]) + 0.5) / (n + 0.5 * k)
            q = (np.float64(cur[w, b]) + 0.5) / (m + 0.5 * k)
            total += (q - p) * np.log(q / p)
        out[w] = total


def psi_values(ref: Counts, cur: Counts) -> NDArray[np.float64]:
    """PSI float64 [windows] of grouped counts uint64 [windows, k], Jeffreys counts; NaN for an empty window.

    Raises ValueError unless both are uint64 of the same 2-D shape.
    """
    check_psi_tables(ref, cur)
    out = np.empty(len(ref))
    _psi(ref, cur, out)
    return out
