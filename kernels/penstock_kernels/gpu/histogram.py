"""Histogram counts by Triton: equal to `penstock_kernels.reference.count_rows`, slot for slot.

One program counts one block of rows of one column. Integer atomics commute, so any launch order gives the
same counts. Imports Triton; needs neither PyTorch nor a GPU until launched.
"""

from __future__ import annotations

import threading
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import triton
import triton.language as tl

from penstock_kernels.gpu.aot import Kernel
from penstock_kernels.gpu.launch import array_module, launch
from penstock_kernels.reference import Counts, Floats, HistogramSpec

BLOCK = 256


def search_steps(max_edges: int) -> int:
    """Halvings that find a place among max_edges edges."""
    return max(1, max_edges.bit_length())


@triton.jit
def count_kernel(  # type: ignore[no-untyped-def]
    rows, n, columns, edges, starts, codes, offsets, counts, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """rows fp32 [n, columns]; adds to counts i64 [n_slots]; grid (columns * ceil(n / BLOCK)).

    Neighbouring programs read neighbouring columns of the same rows, which share sectors of memory.
    """
    program = tl.program_id(0)
    j = program % columns
    i = (program // columns).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    v = tl.load(rows + i * columns + j, mask=live, other=0.0)
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

    # Compared before the cast, which is undefined beyond int64; back again, as floor may flush subnormals.
    inside = (v >= 0.0) & (v < n_codes.to(tl.float32))
    code = tl.where(inside, v, 0.0).to(tl.int64)
    known = inside & (code.to(tl.float32) == v)
    slot = tl.where(categorical, tl.where(known, at + code, extra + 1), at + lo)
    slot = tl.where(nan, extra, slot)
    one = tl.full([BLOCK], 1, dtype=tl.int64)
    tl.atomic_add(counts + slot, one, mask=live, sem="relaxed")
    low = v == float("-inf")
    infinite = live & (low | (v == float("inf"))) & (n_codes == 0)
    tl.atomic_add(counts + tl.where(low, extra + 2, extra + 3), one, mask=infinite, sem="relaxed")


COUNT = Kernel(
    count_kernel,
    {
        "rows": "*fp32",
        "n": "i64",
        "columns": "i32",
        "edges": "*fp32",
        "starts": "*i64",
        "codes": "*i64",
        "offsets": "*i64",
        "counts": "*i64",
        "STEPS": "constexpr",
        "BLOCK": "constexpr",
    },
)


class SpecArrays:
    """A spec's flat arrays where a kernel can read them; `steps` is its search's depth."""

    def __init__(self, spec: HistogramSpec, xp: ModuleType) -> None:
        edges, starts, codes = spec.flat
        self.steps = search_steps(int(np.diff(starts).max(initial=0)))
        # One edge at least, so that there is an address; no kernel reads it.
        self.edges = xp.asarray(edges if len(edges) else np.zeros(1, np.float32))
        self.starts, self.codes = xp.asarray(starts), xp.asarray(codes)
        self.offsets, self.wide = xp.asarray(spec.offsets), xp.asarray(spec.wide)


_lock = threading.Lock()
_held: weakref.WeakKeyDictionary[HistogramSpec, dict[int, SpecArrays]] = weakref.WeakKeyDictionary()


def spec_arrays(spec: HistogramSpec, array: Any) -> SpecArrays:
    """The spec's arrays beside `array`: uploaded once to each device that counts with it. Any thread."""
    xp = array_module(array)
    place = -1 if xp is np else int(array.device.id)
    with _lock:
        kept = _held.setdefault(spec, {})
        if place not in kept:
            if xp is np:
                kept[place] = SpecArrays(spec, xp)
            else:
                with array.device:
                    kept[place] = SpecArrays(spec, xp)
                    # Another stream may be the first to read them.
                    xp.cuda.get_current_stream().synchronize()
        return kept[place]


def count_rows(spec: HistogramSpec, rows: Floats) -> Counts:
    """Counts uint64 [n_slots] of float32 rows [n, columns], on the device of the rows.

    Raises ValueError on another shape or dtype; see `penstock_kernels.gpu.launch.launch`.
    """
    xp = array_module(rows)
    rows = xp.ascontiguousarray(xp.asarray(rows))
    spec.check_rows(rows)
    given = spec_arrays(spec, rows)
    out = xp.zeros(spec.n_slots, dtype=np.int64)
    grid = (rows.shape[1] * -(-len(rows) // BLOCK),)
    args = (rows, len(rows), rows.shape[1], given.edges, given.starts, given.codes, given.offsets, out)
    launch(COUNT, grid, args, {"STEPS": given.steps, "BLOCK": BLOCK})
    return out.view(np.uint64)  # type: ignore[no-any-return]
