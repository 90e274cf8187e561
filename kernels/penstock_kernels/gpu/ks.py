"""Certified KS bands of all columns by Triton: exact integers on the device, one division on the host."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from penstock_kernels.gpu.aot import Kernel
from penstock_kernels.gpu.histogram import spec_arrays
from penstock_kernels.gpu.launch import array_module, launch, to_host
from penstock_kernels.reference import Counts, HistogramSpec, KsBand, bands_of_bounds

BLOCK = 512


@triton.jit
def ks_kernel(offsets, wide, ref, cur, bounds, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """ref, cur i64 [n_slots]; writes bounds i64 [columns, 4]: lower, upper (in 1/(n m)), n, m.

    The grid is (columns): a program walks a column's fine bins, a block at a time. The infinities are places
    of their own.
    """
    j = tl.program_id(0)
    at = tl.load(offsets + j)
    extra = tl.load(offsets + j + 1) - 4
    bins = (extra - at).to(tl.int32)
    n = tl.full((), 0, dtype=tl.int64)
    m = tl.full((), 0, dtype=tl.int64)
    for first in range(0, bins, BLOCK):
        i = first + tl.arange(0, BLOCK)
        n += tl.sum(tl.load(ref + at + i, mask=i < bins, other=0), 0)
        m += tl.sum(tl.load(cur + at + i, mask=i < bins, other=0), 0)
    ref_low = tl.load(ref + extra + 2)
    cur_low = tl.load(cur + extra + 2)
    ref_high = tl.load(ref + extra + 3)
    cur_high = tl.load(cur + extra + 3)
    lower = tl.abs(ref_low * m - cur_low * n)
    upper = lower
    f_sum = tl.full((), 0, dtype=tl.int64)
    g_sum = tl.full((), 0, dtype=tl.int64)
    for first in range(0, bins, BLOCK):
        i = first + tl.arange(0, BLOCK)
        live = i < bins
        c = tl.load(ref + at + i, mask=live, other=0)
        d = tl.load(cur + at + i, mask=live, other=0)
        f = f_sum + tl.cumsum(c, 0)
        g = g_sum + tl.cumsum(d, 0)
        f_before = tl.where(i == 0, ref_low, f - c) * m
        g_before = tl.where(i == 0, cur_low, g - d) * n
        f_after = tl.where(i == bins - 1, f - ref_high, f) * m
        g_after = tl.where(i == bins - 1, g - cur_high, g) * n
        lower = tl.maximum(lower, tl.max(tl.where(live, tl.abs(f_after - g_after), 0), 0))
        open_ = tl.load(wide + at + i, mask=live, other=0) > 0
        gap = tl.maximum(f_after - g_before, g_after - f_before)
        upper = tl.maximum(upper, tl.max(tl.where(open_, gap, 0), 0))
        f_sum += tl.sum(c, 0)
        g_sum += tl.sum(d, 0)
    row = bounds + j * 4
    tl.store(row, lower)
    tl.store(row + 1, tl.maximum(lower, upper))
    tl.store(row + 2, n)
    tl.store(row + 3, m)


KS = Kernel(
    ks_kernel,
    {"offsets": "*i64", "wide": "*u8", "ref": "*i64", "cur": "*i64", "bounds": "*i64", "BLOCK": "constexpr"},
)


def ks_bands(spec: HistogramSpec, reference: Counts, current: Counts) -> list[KsBand | None]:
    """`ks_band` of each column from two counts uint64 [n_slots]; None for codes and for an empty window.

    Waits for the device. Raises ValueError on counts of another shape or dtype.
    """
    xp = array_module(reference, current)
    ref, cur = (xp.ascontiguousarray(xp.asarray(a)) for a in (reference, current))
    spec.check_counts(ref, "reference")
    spec.check_counts(cur, "current")
    given = spec_arrays(spec, ref)
    columns = len(spec.columns)
    bounds = xp.empty((columns, 4), dtype=np.int64)
    args = (given.offsets, given.wide, ref.view(np.int64), cur.view(np.int64), bounds)
    launch(KS, (columns,), args, {"BLOCK": BLOCK})
    return bands_of_bounds(spec, to_host(bounds), lambda: (to_host(ref), to_host(cur)))
