"""The path of device arrays on an emulated device: dispatch, upload, packing and launch are the real ones.

The stand-in for CuPy keeps its arrays in host memory. Its launch turns packed addresses back into arrays and
has Triton's interpreter run the kernel; the real device runs the same cases in tests/gpu.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kernel_cases import Place, check_counts, check_ks, check_psi, check_ratio_age, many_bins_case

pytest.importorskip("triton", reason="triton is not installed")

from penstock_kernels import dispatch, reference
from penstock_kernels.gpu import aot, histogram, interpreter, launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

MEMORY: dict[int, np.ndarray] = {}


class OneDevice(nullcontext[None]):
    id = 0
    compute_capability = "90"


class DeviceArray(np.ndarray):
    """An array that numpy holds and that says it lies on a device."""

    device = OneDevice()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self.ctypes.data
        MEMORY[address] = self.view(np.ndarray)
        strides = None if self.flags.c_contiguous else self.strides
        return {"typestr": self.dtype.str, "data": (address, False), "strides": strides, "version": 3}

    def get(self) -> np.ndarray:
        return np.array(self)


class EmulatedCupy:
    """The part of CuPy that the package uses."""

    def __init__(self) -> None:
        self.compiled: list[tuple[aot.Kernel, dict[str, int]]] = []
        self.launches = 0
        self.uploads = 0
        stream = SimpleNamespace(synchronize=self._synchronize)
        self.cuda = SimpleNamespace(Device=OneDevice, get_current_stream=lambda: stream)

    def _synchronize(self) -> None:
        self.uploads += 1

    def asarray(self, array: Any) -> DeviceArray:
        return np.asarray(array.source if isinstance(array, Foreign) else array).view(DeviceArray)

    def ascontiguousarray(self, array: Any) -> DeviceArray:
        return np.ascontiguousarray(array).view(DeviceArray)

    def empty(self, shape: Any, dtype: Any) -> DeviceArray:
        return np.full(shape, 77, dtype=dtype).view(DeviceArray)

    def zeros(self, shape: Any, dtype: Any) -> DeviceArray:
        return np.zeros(shape, dtype=dtype).view(DeviceArray)

    def compile_kernel(self, kernel: aot.Kernel, capability: int, constants: dict[str, int]) -> aot.Cubin:
        assert capability == 90
        self.compiled.append((kernel, constants))
        name = f"{len(self.compiled) - 1}"
        return aot.Cubin(name, capability, b"", "", 128, 64, len(kernel.parameters) + aot.SCRATCH_POINTERS)

    def RawModule(self, *, path: str) -> Any:
        return SimpleNamespace(get_function=lambda name: self._function(*self.compiled[int(name)]))

    def _function(self, kernel: aot.Kernel, constants: dict[str, int]) -> Any:
        def call(
            grid: tuple[int, ...], block: tuple[int, ...], packed: tuple[Any, ...], *, shared_mem: int
        ) -> None:
            assert (block, shared_mem) == ((128,), 64)
            own, scratch = packed[: len(kernel.parameters)], packed[len(kernel.parameters) :]
            assert [(p.dtype.name, int(p)) for p in scratch] == [("uint64", 0)] * aot.SCRATCH_POINTERS
            args = [
                MEMORY[int(value)] if kind.startswith("*") else int(value)
                for kind, value in zip(kernel.parameters.values(), own)
            ]
            self.launches += 1
            interpreter.run(kernel.function, grid, args, constants)

        return call


class Foreign:
    """Another library's device array."""

    def __init__(self, source: DeviceArray) -> None:
        self.source = source
        self.__cuda_array_interface__ = source.__cuda_array_interface__


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> EmulatedCupy:
    emulated = EmulatedCupy()
    monkeypatch.setitem(sys.modules, "cupy", emulated)  # type: ignore[arg-type]
    monkeypatch.setattr(launch, "compile_kernel", emulated.compile_kernel)
    monkeypatch.setattr(launch, "_loaded", {})
    MEMORY.clear()
    return emulated


@pytest.fixture
def place(cupy: EmulatedCupy) -> Place:
    functions = (dispatch.count_rows, dispatch.psi_values, dispatch.ks_bands, dispatch.ratio_age)
    return Place(*functions, cupy.asarray, lambda array: array.get())


def test_every_kernel_on_device_arrays(cupy: EmulatedCupy, place: Place) -> None:
    check_counts(place, range(6))
    check_psi(place)
    check_ks(place, range(4))
    check_ratio_age(place, range(2))
    # One binary for each kernel and depth of search or width of block, not one a launch.
    assert len(cupy.compiled) < cupy.launches
    keys = [(kernel.function.__name__, tuple(constants.items())) for kernel, constants in cupy.compiled]
    assert len(set(keys)) == len(keys)


def test_a_spec_is_uploaded_once(cupy: EmulatedCupy) -> None:
    spec, rows = many_bins_case()
    device = cupy.asarray(rows[:100])
    counts = [dispatch.count_rows(spec, device) for _ in range(3)]
    assert dispatch.ks_bands(spec, counts[0], counts[1]) is not None
    assert cupy.uploads == 1
    assert isinstance(counts[0], DeviceArray)


def test_arrays_of_another_library_are_read(cupy: EmulatedCupy) -> None:
    spec, rows = many_bins_case()
    got = dispatch.count_rows(spec, Foreign(cupy.asarray(rows)))  # type: ignore[arg-type]
    assert got.tolist() == reference.count_rows(spec, rows).tolist()


def test_numpy_and_device_arrays_do_not_mix(cupy: EmulatedCupy) -> None:
    spec, rows = many_bins_case()
    counts = reference.count_rows(spec, rows)
    with pytest.raises(ValueError, match="some arrays"):
        dispatch.ks_bands(spec, counts, cupy.asarray(counts))
    with pytest.raises(ValueError, match="some arrays"):
        launch.array_module(counts, cupy.asarray(counts))
    assert histogram.spec_arrays(spec, counts).steps == histogram.search_steps(len(spec.columns[0]))  # type: ignore[arg-type]
