"""Runs the Triton kernels on numpy arrays in Triton's interpreter: no GPU, no PyTorch.

TRITON_INTERPRET=1 must be in the environment before Triton is imported. `NumpyTensor` has the tensor methods
that the interpreter asks for, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class NumpyTensor:
    """A contiguous numpy array behind the part of the tensor protocol that Triton's interpreter uses."""

    def __init__(self, array: NDArray[Any]) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("array is not contiguous; expected a C-contiguous array")
        self.array = array

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def untyped_storage(self) -> NumpyTensor:
        return self

    def cpu(self) -> NumpyTensor:
        return NumpyTensor(self.array.copy())

    def new_empty(self, size: int, device: str = "cpu") -> NumpyTensor:
        return NumpyTensor(np.empty(size, dtype=self.array.dtype))

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def set_(self, storage: NumpyTensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        """Becomes a view of the whole storage; the only form that the interpreter uses on these tensors."""
        if offset != 0 or size != storage.size() or stride != storage.stride():
            raise ValueError("expected the storage's own offset, size and stride")
        self.array = storage.array

    def copy_(self, other: NumpyTensor) -> None:
        np.copyto(self.array, other.array)


def run(function: Any, grid: tuple[int, ...], args: Sequence[Any], constants: Mapping[str, int]) -> None:
    """Run a Triton function over `grid`; args are C-contiguous numpy arrays and ints.

    Raises RuntimeError when Triton is not in interpreter mode.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton is not in interpreter mode; set TRITON_INTERPRET=1 before it is imported")
    wrapped = [NumpyTensor(a) if isinstance(a, np.ndarray) else a for a in args]
    function[grid](*wrapped, **constants)
