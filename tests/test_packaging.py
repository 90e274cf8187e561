"""What an installed Penstock brings: light imports, its data files, true native stubs, a small wheel."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

import penstock.models
from penstock.models import bundle

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("numpy", "pandas", "pyarrow", "numba", "pydantic", "typer", "uvloop", "lightgbm", "lmdb", "triton")
WHEEL_LIMIT = 15_000_000
DATA_FILES = (
    "py.typed",
    "models/model-schema-1.json",
    "examples/shop/next_steps.txt",
    "examples/shop/repo/feature_store.yaml",
    "examples/shop/repo/features.py",
    "examples/flights/next_steps.txt",
    "examples/flights/repo/feature_store.yaml",
    "examples/flights/repo/features.py",
)


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path),
    }


def in_child(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout


@pytest.mark.parametrize("module", ["penstock", "penstock.models"])
def test_an_import_brings_in_nothing_heavy(module):
    program = f"import json, sys, {module}; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    assert json.loads(in_child(program)) == []


def test_the_package_of_models_has_the_functions_of_bundles():
    for name in ("load_bundle", "save_bundle", "score"):
        assert getattr(penstock.models, name) is getattr(bundle, name)
        assert name in dir(penstock.models)


def test_an_unknown_name_of_the_package_of_models():
    with pytest.raises(AttributeError, match=r"penstock\.models' has no attribute 'load_bundl'"):
        penstock.models.load_bundl  # noqa: B018


@pytest.mark.parametrize("path", DATA_FILES)
def test_a_data_file_is_in_the_package(path):
    assert files("penstock").joinpath(path).is_file()


def test_the_stub_of_the_native_module_is_true(tmp_path):
    pytest.importorskip("mypy")
    sources = os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "penstock._core"],
        capture_output=True,
        text=True,
        env={**environment(), "MYPYPATH": sources},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_the_wheel_is_small_and_whole(tmp_path):
    for module in ("scikit_build_core", "pybind11"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: no wheel can be built here without a download")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    options = ["--wheel-dir", str(tmp_path / "wheel"), str(ROOT)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheel").glob("penstock-*.whl")
    assert wheel.stat().st_size < WHEEL_LIMIT
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"penstock/{path}" for path in DATA_FILES} <= names
    assert "penstock_kernels/dispatch.py" in names
    assert any(name.startswith("penstock/_core.") and name.endswith((".so", ".pyd")) for name in names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"penstock", "penstock_kernels"}
    assert not [name for name in names if name.endswith((".h", ".a", ".cmake", ".cc"))]


def test_the_source_archive_has_the_library_for_programs_in_cpp(tmp_path):
    pytest.importorskip("scikit_build_core")
    program = f"import scikit_build_core.build as b; print(b.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("penstock-*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {f"include/penstock/{name}.h" for name in ("status", "bundle", "engine")} <= names
    assert {f"examples/cpp/{name}" for name in ("predict.cc", "CMakeLists.txt", "README.md")} <= names
    assert "csrc/base/status.h" in names
