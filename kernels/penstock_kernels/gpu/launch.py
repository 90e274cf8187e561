"""Runs a Triton kernel where its arrays are: numpy in the interpreter, CuPy from a cubin by a plain launch.

CuPy loads the cubin and launches it on its current stream, so neither Triton's driver nor PyTorch takes part.
A cubin is compiled once a device kind, kernel and constants; from any thread.
"""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from penstock_kernels.gpu import interpreter
from penstock_kernels.gpu.aot import CAPABILITIES, Cubin, Kernel, compile_kernel

_POINTEES = {
    "*fp32": np.float32,
    "*fp64": np.float64,
    "*i64": np.int64,
    "*u8": np.uint8,
}
_SCALARS = {"i32": np.int32, "i64": np.int64}


def on_device(array: Any) -> bool:
    """Whether the array lies in GPU memory."""
    return hasattr(array, "__cuda_array_interface__")


def array_module(*arrays: Any) -> ModuleType:
    """numpy, or cupy where the arrays lie on a device. Raises ValueError when some do and some do not."""
    places = {on_device(a) for a in arrays}
    if len(places) > 1:
        raise ValueError("some arrays are numpy's and some a device's; expected one kind")
    if True in places:
        import cupy

        return cupy  # type: ignore[no-any-return]
    return np


def to_host(array: Any) -> np.ndarray[Any, Any]:
    """The array as numpy's; waits for the device where it lies on one."""
    return array.get() if on_device(array) else array  # type: ignore[no-any-return]


def launch(kernel: Kernel, grid: tuple[int, ...], args: Sequence[Any], constants: Mapping[str, int]) -> None:
    """Run `kernel` over `grid` (1 to 3 sizes). args: contiguous arrays and ints, in parameter order.

    On a device this returns before the kernel has run; later work on the same stream sees its result. Raises
    ValueError naming an argument of another type, RuntimeError for numpy arrays outside interpreter mode.
    """
    if 0 in grid:
        return
    if not any(on_device(a) for a in args):
        interpreter.run(kernel.function, grid, args, constants)
        return
    import cupy

    with next(a for a in args if on_device(a)).device:
        capability = int(cupy.cuda.Device().compute_capability)
        function, cubin = _load(kernel, binary_capability(capability), tuple(sorted(constants.items())))
        packed = pack_arguments(kernel, cubin, args)
        function(grid, (cubin.threads,), packed, shared_mem=cubin.shared_bytes)


def binary_capability(capability: int) -> int:
    """The capability to compile for: a cubin also runs on later minor versions of its major one."""
    known = [c for c in CAPABILITIES if c // 10 == capability // 10 and c <= capability]
    return max(known, default=capability)


def pack_arguments(kernel: Kernel, cubin: Cubin, args: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments as fixed-width scalars: addresses, integers, then null for each scratch pointer.

    CuPy copies a numpy scalar's bytes as they are; None would pass no address at all.
    """
    if len(args) != len(kernel.parameters):
        raise ValueError(f"got {len(args)} arguments; expected {len(kernel.parameters)}")
    packed: list[Any] = []
    for (name, kind), arg in zip(kernel.parameters.items(), args):
        if kind in _SCALARS:
            packed.append(_SCALARS[kind](arg))
            continue
        interface = arg.__cuda_array_interface__
        wanted = np.dtype(_POINTEES[kind])
        if np.dtype(interface["typestr"]) != wanted or interface.get("strides") is not None:
            raise ValueError(f"{name} is {interface['typestr']}; expected contiguous {wanted.name}")
        packed.append(np.uint64(interface["data"][0]))
    packed += [np.uint64(0)] * (cubin.parameters - len(args))
    return tuple(packed)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    # Kept until the process ends: CuPy reads the file again for each device.
    return tempfile.TemporaryDirectory(prefix="penstock-cubins-")


_lock = threading.Lock()
_loaded: dict[tuple[str, int, tuple[tuple[str, int], ...]], tuple[Any, Cubin]] = {}


def _load(kernel: Kernel, capability: int, constants: tuple[tuple[str, int], ...]) -> tuple[Any, Cubin]:
    import cupy

    key = (kernel.function.__name__, capability, constants)
    with _lock:
        if key not in _loaded:
            cubin = compile_kernel(kernel, capability, dict(constants))
            path = Path(_folder().name) / f"{len(_loaded)}.cubin"
            path.write_bytes(cubin.image)
            _loaded[key] = (cupy.RawModule(path=str(path)).get_function(cubin.name), cubin)
        return _loaded[key]
