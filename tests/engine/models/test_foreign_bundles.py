"""Bundles of ONNX models and Python entry points: what they hold, what they score, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from foreign_models import (
    FEATURES,
    NAN,
    RAISE,
    SCORER,
    code_folder,
    expected,
    frame,
    onnx_direct,
    onnx_graph,
    rows_of,
    save_onnx,
    save_python,
)

from penstock.errors import BundleError, FailedPreconditionError, InternalError, InvalidArgumentError
from penstock.models import EntryPoint, load_bundle, save_bundle, score
from penstock.models.backends import open_backend
from penstock.models.child import ChildSettings
from penstock.models.registry import ModelRegistry

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.fixture(scope="module")
def python_bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_python(tmp_path_factory.mktemp("py"))


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_onnx(tmp_path_factory.mktemp("onnx"))


@pytest.fixture
def copy(python_bundle: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(python_bundle.path, tmp_path / "copy"))


def edit(folder: Path, change: Any) -> None:
    data = yaml.safe_load((folder / "model.yaml").read_text())
    change(data)
    (folder / "model.yaml").write_text(yaml.safe_dump(data))


# ONNX


def test_onnx_bundle_says_what_it_was_made_of(onnx_bundle):
    assert sorted(entry.name for entry in onnx_bundle.path.iterdir()) == [
        "model.onnx",
        "model.yaml",
        "reference.arrow",
    ]
    assert (onnx_bundle.format, onnx_bundle.output_kind, onnx_bundle.classes) == (
        "onnx",
        "probability",
        (0, 1),
    )
    assert [name for name, _ in onnx_bundle.inputs] == FEATURES
    assert onnx_bundle.onnx.model_dump() == {
        "width": 1, "column": None, "input": "x", "output": "p", "rank": 2, "dtype": "float32",
    }  # fmt: skip
    assert "onnxruntime" in onnx_bundle.facts["libraries"]


@pytest.mark.parametrize("given", ["proto", "bytes", "path"])
def test_onnx_model_is_taken_in_each_form(given, tmp_path):
    model = onnx_graph()
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    forms = {"proto": model, "bytes": model.SerializeToString(), "path": tmp_path / "m.onnx"}
    made = save_onnx(tmp_path, forms[given])
    assert (made.path / "model.onnx").read_bytes() == model.SerializeToString()


@pytest.mark.parametrize(
    ("graph", "kind", "pick"),
    [
        ({}, "probability", lambda raw: raw[:, 0]),
        ({"flat": True}, "probability", lambda raw: raw),
        ({"double": True}, "probability", lambda raw: raw[:, 0]),
        ({"outputs": 2, "op": "Softmax"}, "probability", lambda raw: raw[:, 1]),
        ({"outputs": 3, "op": "Softmax"}, "probability", lambda raw: raw),
        ({"outputs": 2, "op": "Identity"}, "value", lambda raw: raw),
        ({"op": "Identity"}, "margin", lambda raw: raw[:, 0]),
    ],
)
def test_onnx_scores_are_those_of_onnxruntime(graph, kind, pick, tmp_path):
    model = onnx_graph(**graph)
    made = save_onnx(tmp_path, model, kind=kind)
    rows = rows_of(150)
    want = pick(onnx_direct(model, rows)).astype(np.float64)
    np.testing.assert_allclose(score(made, rows), want, rtol=1e-6, atol=1e-7)
    assert made.n_outputs == (1 if want.ndim == 1 else want.shape[1])
    one = np.array([score(made, row[None])[0] for row in rows[:20]])
    np.testing.assert_array_equal(one, [pick(onnx_direct(model, row[None]))[0] for row in rows[:20]])


def test_onnx_trees_of_lightgbm_give_onnxruntimes_scores(tmp_path):
    onnxmltools = pytest.importorskip("onnxmltools", reason="onnxmltools is not installed")
    import lightgbm
    from onnxmltools.convert.common.data_types import FloatTensorType

    rows = rows_of(500)
    fitted = lightgbm.LGBMClassifier(n_estimators=30, num_leaves=15, verbose=-1, n_jobs=1).fit(
        rows, (rows[:, 0] > rows[:, 1]).astype(int)
    )
    made = {
        zipmap: onnxmltools.convert_lightgbm(
            fitted, initial_types=[("x", FloatTensorType([None, 3]))], zipmap=zipmap, target_opset=15
        )
        for zipmap in (False, True)
    }
    saved = save_onnx(tmp_path, made[False])
    np.testing.assert_array_equal(score(saved, rows), onnx_direct(made[False], rows, 1)[:, 1])
    with pytest.raises(InvalidArgumentError, match="zipmap=False"):
        save_onnx(tmp_path, made[True])
    with pytest.raises(InvalidArgumentError, match=r"'label' is tensor\(int64\)"):
        save_onnx(tmp_path, made[False], output="label")


def refused_graphs() -> list[Any]:
    from onnx import TensorProto

    floats, doubles = TensorProto.FLOAT, TensorProto.DOUBLE
    return [
        ({"inputs": (("x", floats, [None, 3]), ("y", floats, [None, 1]))}, {}, "has 2 inputs"),
        ({"inputs": (("x", floats, [None, 3, 1]),)}, {}, "expected tensor|refused"),
        ({"inputs": (("x", doubles, [None, 3]),)}, {}, r"expected tensor\(float\)|refused"),
        ({"batch": 8}, {}, "batches of 8 rows alone"),
        ({}, {"output": "nope"}, "output is 'nope'; the ONNX model has 'p'"),
        ({}, {"inputs": ["a", "b"]}, r"expected tensor\(float\) \[n, 2\]"),
        ({"op": "Identity"}, {}, "no finite score of kind 'probability'"),
        ({}, {"classes": [1, 2, 3]}, "classes has 3 labels"),
    ]


@pytest.mark.parametrize(("graph", "options", "message"), refused_graphs())
def test_onnx_model_that_cannot_be_served_is_refused(graph, options, message, tmp_path):
    with pytest.raises(InvalidArgumentError, match=message):
        save_onnx(tmp_path, onnx_graph(**graph), **options)
    assert not (tmp_path / "bundles" / "net" / "1").exists()


def test_bytes_that_are_no_onnx_model_are_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="refused by onnxruntime"):
        save_onnx(tmp_path, b"no model")
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        save_onnx(tmp_path, tmp_path / "nope.onnx")


def test_without_onnxruntime_an_onnx_bundle_is_listed_but_not_scored(onnx_bundle, tmp_path):
    code = (
        "import sys\n"
        "sys.modules['onnxruntime'] = None\n"
        "import numpy as np\n"
        "from penstock.errors import FailedPreconditionError\n"
        "from penstock.models import load_bundle, score\n"
        "bundle = load_bundle(sys.argv[1])\n"
        "try: score(bundle, np.zeros((1, 3), np.float32))\n"
        "except FailedPreconditionError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(onnx_bundle.path)], capture_output=True, text=True, check=False
    )
    assert "pip install 'penstock[onnx]'" in done.stdout, done.stderr


def test_trees_and_python_do_not_import_onnxruntime(python_bundle):
    code = (
        "import sys\n"
        "import numpy as np\n"
        "import penstock, penstock.serving.engine\n"
        "from penstock.models import load_bundle, score\n"
        "score(load_bundle(sys.argv[1]), np.zeros((1, 3), np.float32))\n"
        "assert 'onnxruntime' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(python_bundle.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# Entry points


def test_python_bundle_holds_the_files_of_the_entry_point(python_bundle):
    found = sorted(p.name for p in python_bundle.path.iterdir())
    assert found == [
        "model.yaml",
        "reference.arrow",
        "scale.txt",
        "scorer.py",
        "weights.py",
    ]  # no __pycache__
    assert python_bundle.python.model_dump() == {"width": 1, "column": None, "entry_point": "scorer:make"}


def test_python_scores_are_the_functions(python_bundle):
    rows = rows_of(150)
    np.testing.assert_allclose(score(python_bundle, rows), expected(rows), rtol=1e-6)
    np.testing.assert_array_equal(score(python_bundle, frame(1)), score(python_bundle, frame(1)))
    assert score(python_bundle, rows[:0]).shape == (0,)


def test_offline_scoring_tells_what_the_model_did(python_bundle):
    rows = rows_of(70)
    rows[66, 0] = RAISE
    with pytest.raises(InternalError, match=r"rows 64 to 69: the model raised ValueError: this row"):
        score(python_bundle, rows)
    rows[66, 0] = NAN
    assert np.flatnonzero(np.isnan(score(python_bundle, rows))).tolist() == [66]


def test_probabilities_of_two_classes_are_served_as_the_second(tmp_path):
    source = "def make(folder):\n    return lambda rows: [[0.25, 0.75]] * len(rows)\n"
    code = code_folder(tmp_path / "code", source)
    made = save_bundle(EntryPoint("scorer:make", code), frame(), name="two", directory=tmp_path)
    assert (made.python.width, made.python.column, made.classes) == (2, 1, (0, 1))
    assert score(made, rows_of(3)).tolist() == [0.75] * 3
    both = save_bundle(
        EntryPoint("scorer:make", code), frame(), name="both", directory=tmp_path, kind="value"
    )
    assert score(both, rows_of(2)).tolist() == [[0.25, 0.75]] * 2


@pytest.mark.parametrize(
    ("source", "entry", "message"),
    [
        ("import nowhere_to_be_found\n", "scorer:make", "ModuleNotFoundError: No module named 'nowhere"),
        ("def make(folder): raise OSError('no licence')", "scorer:make", "OSError: no licence"),
        ("def make(folder): return 3", "scorer:make", "returned a int; expected a callable"),
        ("x = 1", "scorer:make", "AttributeError: module 'scorer' has no attribute 'make'"),
        (
            "def make(folder): return lambda rows: [0.5]",
            "scorer:make",
            r"scores \[1\] for 2 rows; expected \[2\]",
        ),
        ("def make(folder): return lambda rows: ['x'] * len(rows)", "scorer:make", "expected numbers"),
        ("import os\nos._exit(3)", "scorer:make", r"died before it was ready \(exit status 3\)"),
        (SCORER, "other:make", "no file other.py"),
        (SCORER, "scorer", 'expected "module:factory"'),
        (SCORER, "../scorer:make", 'expected "module:factory"'),
        ("def make(folder): return lambda rows: rows[:, 0] + 7", "scorer:make", "no finite score of kind"),
    ],
)
def test_entry_point_that_fails_is_not_published(source, entry, message, tmp_path):
    code = code_folder(tmp_path / "code", source)
    with pytest.raises(InvalidArgumentError, match=message):
        save_bundle(EntryPoint(entry, code), frame(), name="bad", directory=tmp_path / "out")
    assert not (tmp_path / "out" / "bad").exists() or not any((tmp_path / "out" / "bad").iterdir())


def test_child_that_never_gets_ready_is_given_up(copy):
    made = load_bundle(copy)
    (copy / "scorer.py").write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(FailedPreconditionError, match=r"was not ready within 0\.3 s"):
        open_backend(made, settings=ChildSettings(start_timeout=0.3))


def test_folder_of_the_entry_point_is_checked(tmp_path):
    for name, message in (("model.yaml", "makes its own"), ("a b.py", "cannot be in a bundle")):
        code = code_folder(tmp_path / f"code-{name[0]}")
        (code / name).write_text("")
        with pytest.raises(InvalidArgumentError, match=message):
            save_bundle(EntryPoint("scorer:make", code), frame(), name="bad", directory=tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match="is no folder"):
        save_bundle(
            EntryPoint("scorer:make", tmp_path / "no"), frame(), name="bad", directory=tmp_path / "out"
        )


def test_packages_and_folders_of_files_go_in(tmp_path):
    code = tmp_path / "code"
    (code / "net" / "data").mkdir(parents=True)
    (code / "net" / "__init__.py").write_text("")
    (code / "net" / "core.py").write_text(
        "import json\ndef make(folder):\n"
        "    value = json.loads((folder / 'net/data/v.json').read_text())\n"
        "    return lambda rows: [value] * len(rows)\n"
    )
    (code / "net" / "data" / "v.json").write_text("0.5")
    (code / ".git").mkdir()
    (code / ".git" / "config").write_text("secret")
    made = save_bundle(EntryPoint("net.core:make", code), frame(), name="deep", directory=tmp_path / "out")
    assert not (made.path / ".git").exists()
    registry = ModelRegistry(tmp_path / "models", tmp_path / "registry")
    assert registry.add(made.path).format == "python"
    assert score(registry.get("deep"), rows_of(2)).tolist() == [0.5, 0.5]


def test_registry_copies_every_file(onnx_bundle, python_bundle, tmp_path):
    registry = ModelRegistry(tmp_path / "models", tmp_path / "registry")
    for bundle in (onnx_bundle, python_bundle):
        registry.add(bundle.path)
        again = registry.get(bundle.name)
        rows = rows_of(5)
        np.testing.assert_array_equal(score(again, rows), score(bundle, rows))


# Manifests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("python"), "format is 'python', but the file lacks section python"),
        (lambda d: d.update(format="trees"), "has section python"),
        (lambda d: d["python"].update(width=0), "python.width is '0'"),
        (lambda d: d["python"].update(column=4), "column is 4; expected one of 1"),
        (lambda d: d["python"].update(entry_point="os:system"), "no file os.py"),
        (lambda d: d["python"].update(entry_point="../x:y"), "python.entry_point"),
        (lambda d: d["files"].pop("scorer.py"), "no file scorer.py"),
        (lambda d: d["files"].update({"../x.py": d["files"]["scorer.py"]}), r"\.\./x"),
        (lambda d: d["files"].update({"/etc/x": d["files"]["scorer.py"]}), "/etc/x"),
        (lambda d: d["files"].update({"model.yaml": d["files"]["scorer.py"]}), "files has model.yaml"),
        (lambda d: d["output"].update(classes=[1, 2, 3]), "output.classes has 3 labels"),
    ],
)
def test_bad_manifest_of_an_entry_point_is_refused(change, message, copy):
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        load_bundle(copy)


def test_changed_code_is_refused(copy):
    (copy / "weights.py").write_text((copy / "weights.py").read_text().replace("0.5", "0.6"))
    with pytest.raises(BundleError, match=r"weights\.py: its sha256"):
        load_bundle(copy)


def test_folder_that_is_a_link_is_refused(tmp_path):
    code = tmp_path / "code"
    (code / "net").mkdir(parents=True)
    (code / "net" / "core.py").write_text("def make(folder): return lambda rows: [0.5] * len(rows)\n")
    made = save_bundle(EntryPoint("net.core:make", code), frame(), name="deep", directory=tmp_path / "out")
    (made.path / "net").rename(tmp_path / "elsewhere")
    (made.path / "net").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"net/core\.py: is not a plain file"):
        load_bundle(made.path)


def test_trees_have_a_manifest_that_older_builds_read(tmp_path):
    import lightgbm

    table = frame()
    fitted = lightgbm.LGBMClassifier(n_estimators=2, verbose=-1).fit(table, table["a"] > 0)
    made = save_bundle(fitted, table, name="trees", directory=tmp_path)
    data = yaml.safe_load((made.path / "model.yaml").read_text())
    assert data["format"] == "trees"
    assert not {"onnx", "python"} & set(data)
    with pytest.raises(InvalidArgumentError, match="the model knows its own"):
        save_bundle(fitted, table, name="trees", directory=tmp_path, classes=[0, 1])
    with pytest.raises(InvalidArgumentError, match="the model is no ONNX model"):
        save_bundle(fitted, table, name="trees", directory=tmp_path, output="p")


def test_models_list_names_the_backend(onnx_bundle, python_bundle, tmp_path):
    from typer.testing import CliRunner

    from penstock.cli import app

    for bundle in (onnx_bundle, python_bundle):
        done = CliRunner().invoke(app, ["models", "add", str(bundle.path), "--data-dir", str(tmp_path)])
        assert done.output == f"added {bundle.name} 1: {bundle.format} (champion)\n"
    done = CliRunner().invoke(app, ["models", "list", "--data-dir", str(tmp_path), "--json"])
    found = {model["name"]: model["format"] for model in json.loads(done.output)["models"]}
    assert found == {"net": "onnx", "py": "python"}
