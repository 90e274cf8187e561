"""The choice of a kernel by where its arrays lie."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from kernel_cases import Place, check_counts, check_ks, check_psi, check_ratio_age

from penstock_kernels import dispatch, reference
from penstock_kernels.cpu import psi as cpu_psi

PLACE = Place(dispatch.count_rows, dispatch.psi_values, dispatch.ks_bands, dispatch.ratio_age)


class OnDevice:
    """An array on a device, as far as the choice looks."""

    __cuda_array_interface__: ClassVar[dict[str, Any]] = {}


def test_numpy_arrays_run_on_the_cpu() -> None:
    check_counts(PLACE, range(2))
    check_psi(PLACE)
    check_ks(PLACE, range(2))
    check_ratio_age(PLACE, range(2))
    assert dispatch._module("psi", np.zeros(1)) is cpu_psi


def test_device_arrays_run_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for op, name in {
        "histogram": "count_rows",
        "psi": "psi_values",
        "ks": "ks_bands",
        "ratio_age": "ratio_age",
    }.items():
        module = ModuleType(op)
        setattr(module, name, lambda *args, name=name: calls.append(name))
        monkeypatch.setitem(sys.modules, f"penstock_kernels.gpu.{op}", module)
    array: Any = OnDevice()
    spec = reference.HistogramSpec([2])
    dispatch.count_rows(spec, array)
    dispatch.psi_values(array, array)
    dispatch.ks_bands(spec, array, array)
    dispatch.ratio_age(array, (array, None), (array, array), (array, None))
    assert calls == ["count_rows", "psi_values", "ks_bands", "ratio_age"]


def test_arrays_of_both_kinds_are_refused() -> None:
    array: Any = OnDevice()
    with pytest.raises(ValueError, match="psi: some arrays"):
        dispatch.psi_values(array, np.zeros((1, 1), np.uint64))
    with pytest.raises(ValueError, match="ratio_age: some arrays"):
        dispatch.ratio_age(array, (array, np.ones(1, bool)), (array, None), (array, None))


def test_a_missing_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDARuntimeError(Exception):
        pass

    def count() -> int:
        if failure:
            raise CUDARuntimeError(failure)
        return devices

    failure, devices = "", 0
    runtime: Any = SimpleNamespace(getDeviceCount=count, CUDARuntimeError=CUDARuntimeError)
    installed = {"cupy", "triton"}
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cast(ModuleType, SimpleNamespace(runtime=runtime)))
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    assert "TRITON_INTERPRET" in str(dispatch.no_device())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert dispatch.no_device() == "no NVIDIA GPU"
    failure = "driver too old"
    assert dispatch.no_device() == "no NVIDIA GPU: driver too old"
    failure, devices = "", 1
    assert dispatch.no_device() is None
    installed.remove("triton")
    assert dispatch.no_device() == "triton is not installed"
