"""PSI of many columns or windows at once by Triton: `psi_values` of `reference`, within `psi_tolerance`."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from penstock_kernels.gpu.aot import Kernel
from penstock_kernels.gpu.launch import array_module, launch
from penstock_kernels.reference import Counts, check_psi_tables


@triton.jit
def psi_kernel(ref, cur, out, k, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """ref, cur i64 [windows, k], k <= BLOCK; writes out fp64 [windows]; grid (windows)."""
    w = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCK)
    live = b < k
    c = tl.load(ref + w * k + b, mask=live, other=0)
    d = tl.load(cur + w * k + b, mask=live, other=0)
    n = tl.sum(c, 0)
    m = tl.sum(d, 0)
    half = k.to(tl.float64) * 0.5
    p = (c.to(tl.float64) + 0.5) / (n.to(tl.float64) + half)
    q = (d.to(tl.float64) + 0.5) / (m.to(tl.float64) + half)
    terms = tl.where(live, (q - p) * tl.log(q / p), 0.0)
    value = tl.sum(terms, 0)
    tl.store(out + w, tl.where((n > 0) & (m > 0), value, float("nan")))


PSI = Kernel(psi_kernel, {"ref": "*i64", "cur": "*i64", "out": "*fp64", "k": "i32", "BLOCK": "constexpr"})


def psi_values(ref: Counts, cur: Counts) -> NDArray[np.float64]:
    """PSI float64 [windows] of grouped counts uint64 [windows, k], on their device; NaN for an empty window.

    Raises ValueError unless both are uint64 of the same 2-D shape.
    """
    xp = array_module(ref, cur)
    ref, cur = (xp.ascontiguousarray(xp.asarray(a)) for a in (ref, cur))
    check_psi_tables(ref, cur)
    windows, k = ref.shape
    out = xp.empty(windows, dtype=np.float64)
    args = (ref.view(np.int64), cur.view(np.int64), out, k)
    launch(PSI, (windows,), args, {"BLOCK": max(32, 1 << (k - 1).bit_length())})
    return out  # type: ignore[no-any-return]
