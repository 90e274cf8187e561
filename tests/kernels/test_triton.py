"""The Triton kernels: interpreted on the shared cases, and compiled to cubins; no GPU, no PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kernel_cases import Place, check_counts, check_ks, check_psi, check_ratio_age

pytest.importorskip("triton", reason="triton is not installed")

from penstock_kernels.gpu import aot, histogram, interpreter, ks, launch, psi, ratio_age

PLACE = Place(histogram.count_rows, psi.psi_values, ks.ks_bands, ratio_age.ratio_age)
KERNELS = (histogram.COUNT, psi.PSI, ks.KS, ratio_age.RATIO_AGE)

# Interpreted divisions by zero are part of the cases.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def test_triton_counts_alike_in_the_interpreter() -> None:
    check_counts(PLACE, range(24))
    assert "torch" not in sys.modules


def test_triton_psi_in_the_interpreter() -> None:
    check_psi(PLACE)


def test_triton_ks_bands_in_the_interpreter() -> None:
    check_ks(PLACE, range(16))


def test_triton_ratio_age_in_the_interpreter() -> None:
    check_ratio_age(PLACE, range(6))


def test_foreign_storage_and_strided_arrays_are_refused_by_the_adapter() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        interpreter.NumpyTensor(np.zeros(4)[::2])
    tensor = interpreter.NumpyTensor(np.zeros(4))
    with pytest.raises(ValueError, match="own offset"):
        tensor.set_(tensor, 1, (4,), (1,))


AOT_SCRIPT = """
import json, sys
from penstock_kernels.gpu import aot, histogram, ks, psi, ratio_age
constants = {"STEPS": 11, "BLOCK": 256}
out = []
for kernel in (histogram.COUNT, psi.PSI, ks.KS, ratio_age.RATIO_AGE):
    mine = {k: v for k, v in constants.items() if kernel.signature.get(k) == "constexpr"}
    for capability in aot.CAPABILITIES:
        cubin = aot.compile_kernel(kernel, capability, mine)
        again = aot.compile_kernel(kernel, capability, mine)
        out.append({
            "name": cubin.name, "capability": capability, "ptx": cubin.ptx, "threads": cubin.threads,
            "shared": cubin.shared_bytes, "parameters": cubin.parameters, "elf": cubin.image[:20].hex(),
            "named": cubin.name.encode() in cubin.image, "same": again == cubin,
        })
try:
    aot.compile_kernel(psi.PSI, 75, {"BLOCK": 32})
except ValueError as error:
    out.append(str(error))
assert "torch" not in sys.modules
print(json.dumps(out))
"""


def run_compiler(script: str) -> str:
    """Runs a script with Triton as a compiler: a process interprets kernels or compiles them, never both."""
    env = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built() -> list[Any]:
    return json.loads(run_compiler(AOT_SCRIPT))  # type: ignore[no-any-return]


def test_triton_kernels_compile_ahead_of_time_without_a_gpu(built: list[Any]) -> None:
    *cubins, refusal = built
    assert "capability is 75" in refusal
    assert [(c["name"], c["capability"]) for c in cubins] == [
        (k.function.__name__, capability) for k in KERNELS for capability in (80, 90)
    ]
    for cubin in cubins:
        # An ELF image for machine 190, EM_CUDA.
        elf = bytes.fromhex(cubin["elf"])
        assert elf[:4] == b"\x7fELF" and int.from_bytes(elf[18:20], "little") == 190
        assert cubin["named"] and cubin["same"]


def test_launch_parameters_are_those_of_the_compiled_code(built: list[Any]) -> None:
    """What `launch` relies on: order and widths of parameters, scratch last, block, shared memory."""
    widths = {"i32": ".u32", "i64": ".u64"}
    for cubin, kernel in zip(built[:-1], [k for k in KERNELS for _ in aot.CAPABILITIES]):
        header = cubin["ptx"].split(".entry")[1].split("{")[0]
        kinds = [line.split()[1] for line in header.splitlines() if ".param" in line]
        mine = [widths.get(kind, ".u64") for kind in kernel.parameters.values()]
        assert kinds == mine + [".u64"] * aot.SCRATCH_POINTERS
        assert len(kinds) == cubin["parameters"]
        assert f".reqntid {cubin['threads']}" in header and cubin["threads"] == 32 * kernel.num_warps
        assert ".reqnctapercluster" not in header
        assert 0 <= cubin["shared"] <= 48 * 1024
        assert f".target sm_{cubin['capability']}" in cubin["ptx"]


def test_nothing_is_fused_or_flushed_where_bits_are_promised(built: list[Any]) -> None:
    """Only PSI's logarithm, a library function, may hold fused or approximate steps of its own."""
    for cubin in built[:-1]:
        words = cubin["ptx"]
        if cubin["name"] != "psi_kernel":
            assert not [w for w in ("fma", ".ftz", ".approx", "div.full") if w in words], cubin["name"]
        if cubin["name"] == "ratio_age_kernel":
            assert "div.rn.f64" in words and "cvt.rn.f32.f64" in words
            # The one NaN of a null, 0x7fc00000, is written as such.
            assert "0f7FC00000" in words or "2143289344" in words


class DeviceArray:
    """What `pack_arguments` sees of an array on a device."""

    def __init__(self, typestr: str, address: int, strides: tuple[int, ...] | None = None) -> None:
        self.__cuda_array_interface__ = {"typestr": typestr, "data": (address, False), "strides": strides}
        self.device = nullcontext()


def test_arguments_are_packed_as_the_launch_wants_them() -> None:
    kernel = aot.Kernel(None, {"x": "*fp32", "n": "i64", "k": "i32", "B": "constexpr"})
    cubin = aot.Cubin("name", 80, b"", "", 128, 0, 5)
    packed = launch.pack_arguments(kernel, cubin, [DeviceArray("<f4", 4096), 7, 3])
    assert [(p.dtype.name, int(p)) for p in packed] == [
        ("uint64", 4096), ("int64", 7), ("int32", 3), ("uint64", 0), ("uint64", 0)
    ]  # fmt: skip
    for bad in (DeviceArray("<f8", 0), DeviceArray("<f4", 0, (8,))):
        with pytest.raises(ValueError, match=r"^x is"):
            launch.pack_arguments(kernel, cubin, [bad, 7, 3])
    with pytest.raises(ValueError, match="2 arguments"):
        launch.pack_arguments(kernel, cubin, [DeviceArray("<f4", 0), 7])


class DeviceStub:
    """The part of CuPy that a launch uses, recording what it is given."""

    compute_capability = "86"

    def __init__(self) -> None:
        self.loaded: list[tuple[bytes, str]] = []
        self.calls: list[tuple[Any, ...]] = []
        self.cuda = SimpleNamespace(Device=lambda: self)

    def RawModule(self, *, path: str) -> SimpleNamespace:
        def get_function(name: str) -> Any:
            self.loaded.append((Path(path).read_bytes(), name))
            return lambda *args, **kwargs: self.calls.append((*args, kwargs))

        return SimpleNamespace(get_function=get_function)


def test_a_launch_on_a_device_gives_the_cubin_its_block_and_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub = DeviceStub()
    cubin = aot.Cubin("kernel", 80, b"image", "", 128, 96, 4)
    compiled: list[Any] = []
    monkeypatch.setitem(sys.modules, "cupy", stub)
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(launch, "compile_kernel", lambda *args: compiled.append(args) or cubin)
    kernel = aot.Kernel(test_triton_psi_in_the_interpreter, {"x": "*i64", "k": "i32", "B": "constexpr"})
    array = DeviceArray("<i8", 4096)
    for _ in range(2):
        launch.launch(kernel, (7,), (array, 5), {"B": 32})
    launch.launch(kernel, (0,), (array, 5), {"B": 32})
    # Compiled and loaded once, for a binary that compute capability 8.6 runs.
    assert compiled == [(kernel, 80, {"B": 32})] and stub.loaded == [(b"image", "kernel")]
    assert stub.calls == [((7,), (128,), (4096, 5, 0, 0), {"shared_mem": 96})] * 2


@pytest.mark.parametrize(
    ("device", "binary"), [(80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (120, 120)]
)
def test_device_kinds_get_a_binary_that_they_can_run(device: int, binary: int) -> None:
    assert launch.binary_capability(device) == binary


def test_entry_parameters_of_text_without_an_entry() -> None:
    assert aot.entry_parameters(".version 8.0") == 0


def test_interpreter_mode_refuses_to_compile() -> None:
    with pytest.raises(RuntimeError, match="interpreter mode"):
        aot.compile_kernel(psi.PSI, 80, {"BLOCK": 32})


REFUSED_SCRIPT = """
import numpy as np
from penstock_kernels import reference
from penstock_kernels.gpu import histogram
try:
    histogram.count_rows(reference.HistogramSpec([2]), np.zeros((1, 1), np.float32))
except RuntimeError as error:
    print(error)
"""


def test_compiling_mode_refuses_numpy_arrays() -> None:
    assert "not in interpreter mode" in run_compiler(REFUSED_SCRIPT)


UNLAUNCHABLE_SCRIPT = """
import dataclasses
from penstock_kernels.gpu import aot, psi
for wrong in ({"num_ctas": 2}, {"global_scratch_size": 1}):
    aot.PLAIN.update(wrong)
    try:
        aot.compile_kernel(psi.PSI, 90, {"BLOCK": 32})
    except RuntimeError as error:
        print(error)
    aot.PLAIN.update({"num_ctas": 1, "global_scratch_size": 0})
"""


def test_kernels_that_a_plain_launch_cannot_serve_are_refused() -> None:
    lines = run_compiler(UNLAUNCHABLE_SCRIPT).splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "psi_kernel has num_ctas = 1",
        "psi_kernel has global_scratch_size = 0",
    ]


WITHOUT_REST_SCRIPT = """
import sys
sys.modules["penstock"] = sys.modules["numba"] = sys.modules["cupy"] = None
from penstock_kernels import dispatch, reference
from penstock_kernels.gpu import aot, histogram, ks, launch, psi, ratio_age
print("imported")
"""


def test_gpu_kernels_import_without_penstock_numba_or_cupy() -> None:
    assert run_compiler(WITHOUT_REST_SCRIPT).strip() == "imported"


def test_shared_cases_import_with_numpy_alone() -> None:
    folder = str(Path(__file__).parent)
    blocked = "sys.modules['penstock'] = sys.modules['numba'] = sys.modules['hypothesis'] = None"
    script = f"import sys; sys.path.insert(0, {folder!r}); {blocked}; import kernel_cases; print('imported')"
    assert run_compiler(script).strip() == "imported"
