"""Histogram counts by Triton: equal to `penstock_kernels.reference.count_rows`, slot for slot.

One program counts one block of rows of one column. Integer atomics commute, so any launch order gives the
same counts. Imports Triton; needs neither PyTorch nor a GPU until launched.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 256

# Argument types for ahead-of-time compilation, in the order of the kernel's parameters.
SIGNATURE = {
    "rows": "*fp32",
    "n": "i32",
    "stride": "i32",
    "edges": "*fp32",
    "starts": "*i64",
    "codes": "*i64",
    "offsets": "*i64",
    "counts": "*i64",
    "STEPS": "constexpr",
    "BLOCK": "constexpr",
}


def search_steps(max_edges: int) -> int:
    """Halvings that find a place among max_edges edges."""
    return max(1, max_edges.bit_length())


@triton.jit
def count_kernel(  # type: ignore[no-untyped-def]
    rows, n, stride, edges, starts, codes, offsets, counts, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """rows fp32 [n, stride]; adds to counts i64 [n_slots]; grid (columns, ceil(n / BLOCK))."""
    j = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    v = tl.load(rows + i.to(tl.int64) * stride + j, mask=live, other=0.0)
    start = tl.load(starts + j)
    # A block, not a scalar: the interpreter takes no mask made from a broadcast scalar bool.
    n_codes = tl.load(codes + j) + tl.zeros([BLOCK], dtype=tl.int64)
    at = tl.load(offsets + j)
    extra = tl.load(offsets + j + 1) - 4
    nan = v != v
    categorical = n_codes > 0

    lo = tl.zeros([BLOCK], dtype=tl.int64)
    hi = lo + (tl.load(starts + j + 1) - start)
    for _ in range(STEPS):
        open_ = lo < hi
        mid = (lo + hi) // 2
        edge = tl.load(edges + start + mid, mask=open_, other=0.0)
        below = edge < v
        hi = tl.where(open_ & (below == 0), mid, hi)
        lo = tl.where(open_ & below, mid + 1, lo)

    known = (v >= 0.0) & (v < n_codes.to(tl.float32)) & (v == tl.floor(v))
    code = tl.where(known, v, 0.0).to(tl.int64)
    slot = tl.where(categorical, tl.where(known, at + code, extra + 1), at + lo)
    slot = tl.where(nan, extra, slot)
    one = tl.full([BLOCK], 1, dtype=tl.int64)
    tl.atomic_add(counts + slot, one, mask=live)
    low = v == float("-inf")
    infinite = live & (low | (v == float("inf"))) & (n_codes == 0)
    tl.atomic_add(counts + tl.where(low, extra + 2, extra + 3), one, mask=infinite)
