"""Runs each kernel where its arrays lie: numpy arrays by Numba, arrays of a CUDA device by Triton.

The only choice is the arrays': `__cuda_array_interface__` (CuPy and others) means the device, and the result
stays there. Arguments, results and errors are those of `penstock_kernels.reference`; a ValueError also for
arrays of both kinds. Numba and Triton are imported when first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock_kernels.reference import Column, Counts, Floats, HistogramSpec, KsBand


def no_device() -> str | None:
    """Why kernels cannot run on a GPU in this process; None where they can."""
    for name in ("cupy", "triton"):
        if find_spec(name) is None:
            return f"{name} is not installed"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: Triton interprets kernels in this process"
    from cupy.cuda import runtime

    try:
        return None if runtime.getDeviceCount() else "no NVIDIA GPU"
    except runtime.CUDARuntimeError as error:
        return f"no NVIDIA GPU: {error}"


def _module(op: str, *arrays: Any) -> ModuleType:
    places = {"gpu" if hasattr(a, "__cuda_array_interface__") else "cpu" for a in arrays if a is not None}
    if len(places) > 1:
        raise ValueError(f"{op}: some arrays are numpy's and some a device's; expected one kind")
    return import_module(f"penstock_kernels.{places.pop()}.{op}")


def count_rows(spec: HistogramSpec, rows: Floats) -> Counts:
    """Counts uint64 [n_slots] of float32 rows [n, columns]."""
    return _module("histogram", rows).count_rows(spec, rows)  # type: ignore[no-any-return]


def psi_values(ref: Counts, cur: Counts) -> NDArray[np.float64]:
    """PSI float64 [windows] of grouped counts uint64 [windows, k]; NaN for an empty window."""
    return _module("psi", ref, cur).psi_values(ref, cur)  # type: ignore[no-any-return]


def ks_bands(spec: HistogramSpec, reference: Counts, current: Counts) -> list[KsBand | None]:
    """The certified KS band of each column from two counts uint64 [n_slots]."""
    return _module("ks", reference, current).ks_bands(spec, reference, current)  # type: ignore[no-any-return]


def ratio_age(now: NDArray[np.int64], last: Column, amount: Column, mean: Column) -> Floats:
    """The request-time expression of `reference.ratio_age`, float32 [n]."""
    arrays = (now, *last, *amount, *mean)
    return _module("ratio_age", *arrays).ratio_age(now, last, amount, mean)  # type: ignore[no-any-return]
