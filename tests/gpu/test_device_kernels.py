"""The shared kernel cases on an NVIDIA GPU: CuPy arrays, cubins of the Triton kernels.

Needs numpy, CuPy, Triton and pytest (`make gpu`); without a device every test skips and says why.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import kernel_cases
from kernel_cases import Place, check_counts, check_ks, check_psi, check_ratio_age

from penstock_kernels import dispatch, reference

NO_CORE = "penstock is not installed: no C++ core to compare with"
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    """Skips unless the kernels can run on a device; asked late, as other tests choose interpreter mode."""
    reason = dispatch.no_device()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.fixture(scope="module")
def place(cupy: Any) -> Place:
    return Place(
        dispatch.count_rows,
        dispatch.psi_values,
        dispatch.ks_bands,
        dispatch.ratio_age,
        cupy.asarray,
        cupy.asnumpy,
    )


def test_counts_on_the_device(place: Place) -> None:
    check_counts(place, range(40))


def test_psi_on_the_device(place: Place) -> None:
    check_psi(place)


def test_ks_bands_on_the_device(place: Place) -> None:
    check_ks(place, range(40))


def test_ratio_age_on_the_device(place: Place) -> None:
    check_ratio_age(place, range(40))


def test_ratio_age_on_the_device_is_the_cores(place: Place) -> None:
    pytest.importorskip("penstock._core", reason=NO_CORE)
    for seed in range(20):
        case = kernel_cases.ratio_case(seed)
        got = place.get(place.ratio_age(*kernel_cases.put_columns(place, case)))
        want = kernel_cases.program_ratio_age(*case)
        assert got.view(np.uint32).tolist() == want.view(np.uint32).tolist()


def test_counts_on_the_device_are_the_cores(place: Place) -> None:
    core = pytest.importorskip(
        "penstock._core", reason="penstock is not installed: no C++ core to compare with"
    )
    for seed in range(20):
        spec, rows = kernel_cases.make_case(seed)
        native = core.HistogramCounts(spec.columns)
        native.count(rows)
        assert place.get(place.count_rows(spec, place.put(rows))).tolist() == native.snapshot().tolist()


def test_many_rows_and_one_value_count_exactly(cupy: Any) -> None:
    """Every thread of the grid adds to one slot: no count is lost."""
    spec = reference.HistogramSpec([np.array([0.0, 1.0], np.float32), 3])
    rows = np.ones((1_000_003, 2), dtype=np.float32)
    got = cupy.asnumpy(dispatch.count_rows(spec, cupy.asarray(rows)))
    assert got.tolist() == reference.count_rows(spec, rows).tolist()


def test_work_follows_the_current_stream(cupy: Any) -> None:
    spec, rows = kernel_cases.many_bins_case()
    want = reference.count_rows(spec, rows).tolist()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        given = cupy.asarray(rows)
        results = [dispatch.count_rows(spec, given) for _ in range(8)]
        stream.synchronize()
        assert [r.get(stream=stream).tolist() for r in results] == [want] * 8


def test_arrays_of_another_library_are_read_in_place(cupy: Any) -> None:
    class Foreign:
        def __init__(self, array: Any) -> None:
            self.array = array
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    spec, rows = kernel_cases.many_bins_case()
    got = dispatch.count_rows(spec, Foreign(cupy.asarray(rows)))  # type: ignore[arg-type]
    assert cupy.asnumpy(got).tolist() == reference.count_rows(spec, rows).tolist()


def test_numpy_and_device_arrays_do_not_mix(cupy: Any) -> None:
    table = np.ones((1, 2), np.uint64)
    with pytest.raises(ValueError, match="some arrays"):
        dispatch.psi_values(cupy.asarray(table), table)


def test_loaded_code_has_the_shape_that_it_was_compiled_for(cupy: Any) -> None:
    from penstock_kernels.gpu import launch
    from penstock_kernels.gpu.psi import PSI

    capability = launch.binary_capability(int(cupy.cuda.Device().compute_capability))
    function, cubin = launch._load(PSI, capability, (("BLOCK", 32),))
    assert function.max_threads_per_block >= cubin.threads
    assert function.shared_size_bytes + cubin.shared_bytes <= 48 * 1024
