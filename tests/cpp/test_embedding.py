"""The C++ library as others use it: installed, found by CMake, and the example built against it alone."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_builds import build

from penstock.models.bundle import load_bundle, save_bundle, score
from penstock.models.manifest import Manifest, dump_manifest, read_manifest

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ["a", "b: not a key", 'c\'s "long" name ' + "word " * 30 + "#", "naïve\nline", "null", "1"]

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH"),
]


def cmake(*arguments: str | Path) -> None:
    done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def configure(source: Path, build: Path, *options: str) -> None:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    if shutil.which("ccache"):
        options = ("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache", *options)
    cmake("-S", source, "-B", build, *generator, "-DCMAKE_BUILD_TYPE=Release", *options)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix that the library is installed to."""
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    # A folder that is kept, so that only the first run builds the library.
    made = build("cpp-embedding", "-DCMAKE_BUILD_TYPE=Release", *launcher, target="core")
    folder = tmp_path_factory.mktemp("prefix")
    cmake("--install", made, "--component", "cpp", "--prefix", folder)
    return folder


def built(prefix: Path, source: Path, folder: Path) -> Path:
    """The programs of a copy of `source`, which knows nothing of the checkout but the prefix."""
    shutil.copytree(source, folder / "source", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    exported = "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"
    configure(folder / "source", folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}", exported)
    cmake("--build", folder / "build")
    return folder / "build"


@pytest.fixture(scope="module")
def example(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(prefix, ROOT / "examples" / "cpp", tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module")
def describe(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(prefix, ROOT / "tests" / "cpp", tmp_path_factory.mktemp("describe")) / "describe"


def training(classes: int) -> pd.DataFrame:
    rng = np.random.default_rng(7)
    frame = pd.DataFrame({name: rng.normal(size=600).astype(np.float32) for name in INPUTS})
    frame.loc[::9, "a"] = np.nan
    frame["label"] = (frame[INPUTS[1]] * classes).round().astype(int) % classes
    return frame


@pytest.fixture(scope="module", params=[2, 3])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a binary or of a three-class model."""
    frame = training(request.param)
    model = lgb.LGBMClassifier(n_estimators=12, num_leaves=9, verbose=-1, n_jobs=1)
    model.fit(frame[INPUTS].to_numpy(), frame["label"])
    return save_bundle(
        model,
        frame,
        name="churn",
        directory=tmp_path_factory.mktemp("models"),
        label="label",
        inputs=INPUTS,
        kind="probability",
        facts={"note": "a: b # c\n- d", "deep": [[1, {"x": []}], None], "long": "word " * 60},
        metrics={"auc": 0.5},
    ).path


def predict(example: Path, bundle: Path, rows: bytes, *more: str) -> subprocess.CompletedProcess[str]:
    command = [str(example / "predict"), str(bundle), *more]
    done = subprocess.run(command, input=rows, capture_output=True, timeout=60, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_what_is_installed_points_nowhere_else(prefix: Path, example: Path) -> None:
    installed = [path for path in prefix.rglob("*") if path.is_file()]
    headers = {path.name for path in installed if path.suffix == ".h"}
    assert headers == {"status.h", "bundle.h", "engine.h"}
    for path in installed:
        if path.suffix in (".h", ".cmake"):
            assert str(ROOT) not in path.read_text(), path
    assert str(ROOT) not in (example / "compile_commands.json").read_text()


@pytest.mark.parametrize("n", [1, 64, 257])
def test_scores_are_those_of_python(example: Path, folder: Path, tmp_path: Path, n: int) -> None:
    rows = np.random.default_rng(n).normal(size=(n, len(INPUTS))).astype(np.float32)
    rows[::5, 0] = np.nan
    expected = score(load_bundle(folder), rows).reshape(n, -1)
    (tmp_path / "rows.f32").write_bytes(rows.tobytes())
    for done in (
        predict(example, folder, rows.tobytes()),
        predict(example, folder, b"", str(tmp_path / "rows.f32")),
    ):
        assert (done.returncode, done.stderr) == (0, "")
        got = np.array([[float(text) for text in line.split()] for line in done.stdout.splitlines()])
        np.testing.assert_array_equal(got, expected)


def changed(folder: Path, tmp_path: Path, file: str, change: Any) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(change(data))
    return copy


DICTIONARY = b"dictionaries:\n- source: events\n  column: city\n  texts: 3\n"


def with_service(data: bytes) -> bytes:
    return data.replace(b"service: null\nfingerprint: null", b"service: s\nfingerprint: " + b"a" * 64)


def flip(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("trees.bin", flip, "trees.bin: its sha256 is not the one in model.yaml"),
        ("trees.bin", lambda data: data[:-1], "bytes; model.yaml says"),
        ("reference.arrow", flip, "reference.arrow: its sha256 is not the one in model.yaml"),
        ("model.yaml", lambda data: data.replace(b"format: trees", b"format: onnx"), "format is onnx; C++"),
        ("model.yaml", lambda data: data.replace(b"on: 1\n", b"on: 2\n", 1), "schema_version is '2'"),
        ("model.yaml", lambda data: data + b"more: 1\n", "unknown key more"),
        ("model.yaml", lambda data: data.replace(b"service:", b"# x\nservice:"), "expected a key"),
        ("model.yaml", lambda data: data.replace(b"service: null", b"service: &a x"), "expected a value"),
        ("model.yaml", lambda data: data.replace(b"name: churn", b"name: ../churn"), "name is wrong"),
        ("model.yaml", lambda data: data.replace(b"- name: a\n", b"- name: '1'\n"), "inputs repeats '1'"),
        ("model.yaml", lambda data: data.replace(b"churn", b"ch\xffrn"), "is not UTF-8"),
        ("model.yaml", lambda data: data + b"dictionaries: []\n", "dictionaries is there without a service"),
        ("model.yaml", lambda data: with_service(data) + b"dictionaries: []\n", "a list of at least 1"),
        (
            "model.yaml",
            lambda data: with_service(data) + DICTIONARY + DICTIONARY[14:],
            "dictionaries repeats a column",
        ),
        (
            "model.yaml",
            lambda data: with_service(data) + DICTIONARY.replace(b"3", b"-3"),
            "dictionaries.0.texts is wrong; expected a count",
        ),
        (
            "model.yaml",
            lambda data: with_service(data) + DICTIONARY + b"  more: 1\n",
            "unknown key dictionaries.0.more",
        ),
    ],
)
def test_a_faulty_bundle(
    example: Path, folder: Path, tmp_path: Path, file: str, change: Any, message: str
) -> None:
    bundle = changed(folder, tmp_path, file, change)
    assert (bundle / file).read_bytes() != (folder / file).read_bytes()
    done = predict(example, bundle, b"")
    assert done.returncode == 1
    assert message in done.stderr
    assert str(bundle / file) in done.stderr


def test_other_mistakes(example: Path, folder: Path, tmp_path: Path) -> None:
    done = predict(example, tmp_path / "nowhere", b"")
    assert done.returncode == 1
    assert done.stderr == f"NOT_FOUND: {tmp_path / 'nowhere'}: is no folder; expected a model bundle\n"
    done = predict(example, folder, bytes(4 * (2 * len(INPUTS) + 1)))
    assert done.returncode == 1
    width = len(INPUTS)
    assert done.stderr == (
        f"INVALID_ARGUMENT: data is of {8 * width + 4} bytes; expected 2 rows of {width} float32\n"
    )
    copy = tmp_path / "linked"
    shutil.copytree(folder, copy)
    (copy / "trees.bin").unlink()
    (copy / "trees.bin").symlink_to(folder / "trees.bin")
    assert f"{copy / 'trees.bin'}: is not a plain file" in predict(example, copy, b"").stderr


# Without what YAML 1.1 takes for line ends.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029\ufeff")
AWKWARD = " '\"\\:#-\nab{}[]&*?|>%@`!,"
TEXT = st.text(CHARACTERS, min_size=1, max_size=300) | st.text(AWKWARD, min_size=1, max_size=200)
LABEL = TEXT | st.integers(-(10**12), 10**12) | st.booleans()
FACTS = st.dictionaries(TEXT, st.recursive(TEXT | st.none(), st.lists, max_leaves=4), max_size=3)


def hexed(text: str) -> str:
    return "x" + text.encode().hex()


def label_text(label: Any) -> str:
    return str(label).lower() if isinstance(label, bool) else str(label)


def test_every_text_that_save_bundle_writes_is_read_back(
    describe: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = read_manifest(folder).model_dump()
    n_classes = len(base["output"]["classes"])
    files = {name: (folder / name).read_bytes() for name in ("trees.bin", "reference.arrow")}
    parent = tmp_path_factory.mktemp("texts")
    cases: list[tuple[Path, str]] = []

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        names=st.lists(TEXT, min_size=len(INPUTS), max_size=len(INPUTS), unique=True),
        labels=st.lists(LABEL, min_size=n_classes, max_size=n_classes),
        service=st.none() | TEXT,
        facts=FACTS,
        counts=st.none()
        | st.dictionaries(st.tuples(TEXT, TEXT), st.integers(0, 2**53), min_size=1, max_size=3),
    )
    def make(
        names: list[str], labels: list[Any], service: str | None, facts: dict[str, Any], counts: Any
    ) -> None:
        if service is None:
            counts = None
        plain = {
            **base,
            "inputs": [{"name": name, "dtype": "float64"} for name in names],
            "output": {"kind": "value", "classes": labels},
            "service": service,
            "fingerprint": None if service is None else hashlib.sha256(service.encode()).hexdigest(),
            "training": {**base["training"], "facts": facts},
            "dictionaries": counts
            and [{"source": source, "column": column, "texts": n} for (source, column), n in counts.items()],
        }
        data = dump_manifest(Manifest.model_validate(plain))
        if yaml.safe_load(data)["inputs"] != plain["inputs"]:  # YAML itself loses it
            return
        at = parent / str(len(cases))
        at.mkdir()
        (at / "model.yaml").write_bytes(data)
        for name, content in files.items():
            (at / name).write_bytes(content)
        inputs = " ".join(f"{hexed(name)}:{hexed('float64')}" for name in names)
        head = f"{hexed('churn')} {hexed('1')} {hexed('value')} {hexed(service or '')}"
        line = f"ok {head} inputs {inputs} classes {' '.join(hexed(label_text(x)) for x in labels)}"
        cases.append((at, line))

    make()
    assert len(cases) > 100
    stdin = "".join(f"{at}\n" for at, _ in cases)
    done = subprocess.run([describe], input=stdin, capture_output=True, text=True, timeout=60, check=True)
    for (at, expected), line in zip(cases, done.stdout.splitlines(), strict=True):
        assert line == expected, (at / "model.yaml").read_text()
