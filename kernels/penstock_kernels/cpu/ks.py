"""KS by Numba: the exact p-value in O(n m) with one row of state, and the certified bands of all columns."""

from __future__ import annotations

import numpy as np
from numba import njit

from penstock_kernels.reference import Counts, HistogramSpec, KsBand, bands_of_bounds


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


@njit(cache=True, nogil=True)
def _bounds(offsets, wide, ref, cur, out):  # type: ignore[no-untyped-def]
    for j in range(out.shape[0]):
        at, extra = offsets[j], offsets[j + 1] - 4
        n = np.int64(0)
        m = np.int64(0)
        for i in range(at, extra):
            n += ref[i]
            m += cur[i]
        # f and g: rows at or below the place, in units of 1/(n m); the infinities are places of their own.
        f, g = ref[extra + 2] * m, cur[extra + 2] * n
        lower = abs(f - g)
        upper = lower
        below, below_cur = np.int64(0), np.int64(0)
        for i in range(at, extra):
            below += ref[i]
            below_cur += cur[i]
            last = i == extra - 1
            f_next = (below - (ref[extra + 3] if last else 0)) * m
            g_next = (below_cur - (cur[extra + 3] if last else 0)) * n
            lower = max(lower, abs(f_next - g_next))
            if wide[i]:
                upper = max(upper, f_next - g, g_next - f)
            f, g = f_next, g_next
        out[j, 0], out[j, 1], out[j, 2], out[j, 3] = lower, max(lower, upper), n, m


def ks_bands(spec: HistogramSpec, reference: Counts, current: Counts) -> list[KsBand | None]:
    """`ks_band` of each column from two counts uint64 [n_slots]; None for codes and for an empty window.

    Raises ValueError on counts of another shape or dtype.
    """
    spec.check_counts(reference, "reference")
    spec.check_counts(current, "current")
    bounds = np.zeros((len(spec.columns), 4), dtype=np.int64)
    _bounds(spec.offsets, spec.wide, reference.view(np.int64), current.view(np.int64), bounds)
    return bands_of_bounds(spec, bounds, lambda: (reference, current))
