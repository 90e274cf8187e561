"""Histogram counts by Numba: equal to `penstock_kernels.reference.count_rows`, slot for slot."""

from __future__ import annotations

import numpy as np
from numba import njit

from penstock_kernels.reference import Counts, Floats, HistogramSpec


@njit(cache=True, nogil=True)
def _count(rows, edges, starts, codes, offsets, out):  # type: ignore[no-untyped-def]
    for j in range(rows.shape[1]):
        at = offsets[j]
        extra = offsets[j + 1] - 4
        for i in range(rows.shape[0]):
            v = rows[i, j]
            if np.isnan(v):
                out[extra] += np.uint64(1)
            elif codes[j] > 0:
                # Compare before the cast: a cast of a large float to int is undefined.
                if v >= 0 and v < codes[j] and v == np.floor(v):
                    out[at + np.int64(v)] += np.uint64(1)
                else:
                    out[extra + 1] += np.uint64(1)
            else:
                lo, hi = starts[j], starts[j + 1]
                while lo < hi:
                    mid = (lo + hi) // 2
                    if edges[mid] < v:
                        lo = mid + 1
                    else:
                        hi = mid
                out[at + lo - starts[j]] += np.uint64(1)
                if v == -np.inf:
                    out[extra + 2] += np.uint64(1)
                elif v == np.inf:
                    out[extra + 3] += np.uint64(1)


def count_rows(spec: HistogramSpec, rows: Floats) -> Counts:
    """Counts uint64 [n_slots] of float32 rows [n, columns]. Raises ValueError on another shape or dtype."""
    spec.check_rows(rows)
    out = np.zeros(spec.n_slots, dtype=np.uint64)
    _count(np.ascontiguousarray(rows), *spec.flat, spec.offsets, out)
    return out
