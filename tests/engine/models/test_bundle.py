"""Model bundles: saved whole or not at all, proved against the library, refused when a byte is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import sklearn.ensemble as ske
import xgboost as xgb
import yaml

from penstock.errors import BundleError, FailedPreconditionError, InvalidArgumentError
from penstock.models import library
from penstock.models.bundle import load_bundle, save_bundle, score
from penstock.models.manifest import Manifest, read_manifest
from penstock.models.reference import score_column
from penstock.models.rows import model_rows
from penstock.models.tree_bytes import second_output
from penstock_kernels.reference import count_rows

FEATURES = ["amount", "count", "flag", "price"]
HASH = "a" * 64


def training(n: int = 400, *, nulls: bool = True) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "amount": rng.normal(size=n),
            "count": rng.integers(0, 50, n),
            "flag": rng.random(n) < 0.5,
            "price": rng.lognormal(size=n).astype(np.float32),
        }
    )
    frame["label"] = ((frame["amount"] + 0.02 * frame["count"] + rng.normal(size=n)) > 0.5).astype(int)
    if nulls:
        frame.loc[::7, "amount"] = np.nan
    return frame


def classifier(frame: pd.DataFrame) -> lgb.LGBMClassifier:
    model = lgb.LGBMClassifier(n_estimators=8, num_leaves=8, min_child_samples=5, verbose=-1, n_jobs=1)
    return model.fit(frame[FEATURES], frame["label"])


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return training()


@pytest.fixture(scope="module")
def model(frame: pd.DataFrame) -> lgb.LGBMClassifier:
    return classifier(frame)


@pytest.fixture(scope="module")
def saved(frame: pd.DataFrame, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    return save_bundle(model, frame, name="fraud", directory=folder, label="label").path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def plan(**change: Any) -> Any:
    facts = {
        "name": "fraud_v1",
        "output_names": tuple(FEATURES),
        "output_dtypes": ("float64", "int64", "bool", "float32"),
        "fingerprint": HASH,
        "text_counts": {},
    }
    return SimpleNamespace(**(facts | change))


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Saving


def test_saved_bundle_says_what_it_was_made_of(frame, model, tmp_path):
    stamped = frame.assign(
        event_timestamp=pd.date_range("2026-01-01", periods=len(frame), freq="h", tz="UTC")
    )
    made = save_bundle(
        model,
        stamped,
        name="fraud",
        directory=tmp_path,
        label="label",
        plan=plan(),
        metrics={"auc": np.float64(0.75)},
        facts={"git": "abc", "note": [1, 2]},
        created_us=123,
    )
    assert made.path == tmp_path / "fraud" / "1"
    assert names_in(made.path) == ["model.yaml", "reference.arrow", "trees.bin"]
    assert (made.name, made.version, made.service, made.fingerprint) == ("fraud", "1", "fraud_v1", HASH)
    assert made.inputs == (("amount", "float64"), ("count", "int64"), ("flag", "bool"), ("price", "float32"))
    assert (made.output_kind, made.classes, made.metrics) == ("probability", (0, 1), {"auc": 0.75})
    first = 1_767_225_600_000_000
    assert made.facts["time_range_us"] == [first, first + 399 * 3_600_000_000]
    assert (made.facts["rows"], made.facts["created_us"], made.facts["label"]) == (400, 123, "label")
    assert (made.facts["git"], made.facts["note"]) == ("abc", [1, 2])
    assert made.facts["libraries"]["lightgbm"] == lgb.__version__
    assert names_in(tmp_path) == ["fraud"] and names_in(tmp_path / "fraud") == ["1"]


def test_scores_are_the_library_probabilities(frame, model, saved):
    bundle = load_bundle(saved)
    np.testing.assert_allclose(score(bundle, frame), model.predict_proba(frame[FEATURES])[:, 1], atol=1e-6)


def test_reference_counts_the_rows_and_our_own_scores(frame, saved):
    bundle = load_bundle(saved)
    rows = frame[FEATURES].to_numpy(np.float32)
    reference = bundle.reference
    np.testing.assert_array_equal(reference.counts, count_rows(reference.spec, rows))
    scores = score_column(score(bundle, frame))
    np.testing.assert_array_equal(reference.score_counts, count_rows(reference.score_spec, scores))
    assert reference.spec.column(reference.counts, 0).missing == frame["amount"].isna().sum()


@pytest.mark.parametrize("to", [pa.Table.from_pandas, pl.from_pandas], ids=["arrow", "polars"])
def test_any_kind_of_table_scores_alike(frame, saved, to):
    bundle = load_bundle(saved)
    np.testing.assert_array_equal(score(bundle, to(frame)), score(bundle, frame))
    rows = frame[FEATURES].to_numpy(np.float32)
    np.testing.assert_array_equal(score(bundle, rows), score(bundle, frame))


def test_nulls_of_any_type_are_nan(saved):
    bundle = load_bundle(saved)
    empty = pa.table({"amount": pa.nulls(1), "count": pa.array([None], pa.int64()),
                      "flag": pa.array([None], pa.bool_()), "price": pa.nulls(1, pa.float32())})  # fmt: skip
    np.testing.assert_array_equal(score(bundle, empty), score(bundle, np.full((1, 4), np.nan, np.float32)))


def _models(frame: pd.DataFrame) -> dict[str, tuple[Any, str, int]]:
    x, y = frame[FEATURES].astype(np.float32), frame["label"]
    three = np.digitize(frame["price"], [0.7, 1.5])
    return {
        "lgb-booster": (classifier(frame).booster_, "probability", 1),
        "lgb-regressor": (lgb.LGBMRegressor(n_estimators=5, verbose=-1).fit(x, frame["price"]), "value", 1),
        "lgb-three": (lgb.LGBMClassifier(n_estimators=5, verbose=-1).fit(x, three), "probability", 3),
        "xgb": (xgb.XGBClassifier(n_estimators=6, max_depth=3).fit(x, y), "probability", 1),
        "xgb-no-names": (xgb.XGBClassifier(n_estimators=6).fit(x.to_numpy(), y), "probability", 1),
        "xgb-early": (
            xgb.XGBClassifier(n_estimators=60, max_depth=4, learning_rate=0.9, early_stopping_rounds=2).fit(
                x[:200], y[:200], eval_set=[(x[200:], y[200:])], verbose=False
            ),
            "probability",
            1,
        ),
        "gbc": (ske.GradientBoostingClassifier(n_estimators=5).fit(x, y), "probability", 1),
        "rfr": (ske.RandomForestRegressor(n_estimators=5, max_depth=4).fit(x, frame["price"]), "value", 1),
        "rfc-two": (ske.RandomForestClassifier(n_estimators=5, max_depth=4).fit(x, y), "probability", 1),
        "rfc": (ske.RandomForestClassifier(n_estimators=5, max_depth=4).fit(x, three), "probability", 3),
    }


@pytest.fixture(scope="module")
def full() -> pd.DataFrame:
    return training(nulls=False)


@pytest.fixture(scope="module")
def models(full: pd.DataFrame) -> dict[str, tuple[Any, str, int]]:
    return _models(full)


@pytest.mark.parametrize(
    "which",
    [
        "lgb-booster",
        "lgb-regressor",
        "lgb-three",
        "xgb",
        "xgb-no-names",
        "xgb-early",
        "gbc",
        "rfr",
        "rfc",
        "rfc-two",
    ],
)
def test_every_library_is_served_as_it_predicts(full, models, tmp_path, which):
    fitted, kind, outputs = models[which]
    bundle = save_bundle(
        fitted, full, name="m", directory=tmp_path, label="label", inputs=FEATURES, kind=kind
    )
    x = full[FEATURES].astype(np.float32)
    proba = getattr(fitted, "predict_proba", None)
    if which == "xgb-no-names":
        x = x.to_numpy()
    expected = fitted.predict(x) if proba is None else proba(x)
    if expected.ndim == 2 and outputs == 1:
        expected = expected[:, 1]
    ours = score(bundle, full)
    assert ours.shape == expected.shape
    if which == "xgb-early":
        assert fitted.best_iteration + 1 < fitted.get_booster().num_boosted_rounds()
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_margin_bundle_predicts_margins(frame, model, tmp_path):
    bundle = save_bundle(model, frame, name="m", directory=tmp_path, label="label", kind="margin")
    margins = model.predict(frame[FEATURES], raw_score=True)
    np.testing.assert_allclose(score(bundle, frame), margins, rtol=1e-6, atol=1e-6)


def test_versions_count_up_from_the_greatest(frame, model, tmp_path):
    for expected in ("1", "2"):
        assert save_bundle(model, frame, name="m", directory=tmp_path, label="label").version == expected
    save_bundle(model, frame, name="m", directory=tmp_path, label="label", version="10")
    save_bundle(model, frame, name="m", directory=tmp_path, label="label", version="beta")
    assert save_bundle(model, frame, name="m", directory=tmp_path, label="label").version == "11"


def test_existing_version_is_not_replaced(frame, model, tmp_path):
    save_bundle(model, frame, name="m", directory=tmp_path, label="label", version="1")
    before = (tmp_path / "m" / "1" / "model.yaml").read_bytes()
    with pytest.raises(FailedPreconditionError, match="never changes"):
        save_bundle(model, frame, name="m", directory=tmp_path, label="label", version="1")
    assert (tmp_path / "m" / "1" / "model.yaml").read_bytes() == before


def _text(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(amount=frame["amount"].astype(str))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x"}, "name is '../x'"),
        ({"name": ""}, "name is ''"),
        ({"name": "a\n"}, "name is"),
        ({"version": "a/b"}, "version is 'a/b'"),
        ({"version": ".."}, "version is '..'"),
        ({"version": "champion"}, "alias"),
        ({"kind": "odds"}, "kind is 'odds'"),
        ({"inputs": "amount"}, "expected a list"),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": ["amount", "amount"]}, "repeats 'amount'"),
        ({"inputs": [*FEATURES, "label"]}, "label 'label'"),
        ({"inputs": ["amount", "nope"]}, "no column 'nope'"),
        ({"inputs": ["count", "amount", "flag", "price"]}, r"inputs\[0\] is 'count'.*'amount'"),
        ({"inputs": ["amount", "count"]}, "trained on 4 inputs"),
        ({"label": "nope"}, "label is 'nope'"),
        ({"plan": plan(output_names=("a", "b"))}, "no column 'a'"),
        ({"plan": plan(), "inputs": FEATURES[::-1]}, "gives .*'amount', 'count'"),
        ({"plan": plan(output_dtypes=("string", "int64", "bool", "float32"))}, "'amount' of service"),
        ({"metrics": {"auc": float("nan")}}, "metrics.auc"),
        ({"facts": {"a": object()}}, "facts.a"),
        ({"timestamp": "nope"}, "timestamp is 'nope'"),
        ({"timestamp": "amount"}, "expected a timestamp"),
        ({"table": 3}, "training_df is a int"),
        ({"table": _text}, "column 'amount' of training_df is (large_)?string"),
        ({"table": lambda f: f.assign(count=pd.Timestamp("2026-01-01"))}, "column 'count'.*timestamp"),
        ({"table": lambda f: f.assign(flag=f["flag"].astype("category"))}, "column 'flag'.*dictionary"),
        ({"table": lambda f: f.iloc[:0]}, "no rows"),
        ({"table": lambda f: pd.concat([f, f[["amount"]]], axis=1)}, "(?i)repeats column|duplicate"),
    ],
)
def test_bad_argument_is_named_and_nothing_is_written(frame, model, tmp_path, change, message):
    change = dict(change)
    table = change.pop("table", frame)
    table = table(frame) if callable(table) else table
    arguments = {"name": "m", "directory": tmp_path / "d", "label": "label"} | change
    with pytest.raises(InvalidArgumentError, match=message):
        save_bundle(model, table, **arguments)
    assert not (tmp_path / "d").exists()


def test_unsigned_beyond_int64_is_refused_by_name(saved):
    table = pa.table(
        {"amount": [0.0], "count": pa.array([2**63], pa.uint64()), "flag": [True], "price": [1.0]}
    )
    with pytest.raises(InvalidArgumentError, match="column 'count'"):
        score(load_bundle(saved), table)


def test_int64_is_rounded_once():
    wide = 2**62 + 2**38 + 1  # through float64 it would round down
    table = pa.table({"count": [wide]})
    assert model_rows(table, ["count"])[0, 0] == np.array([wide]).astype(np.float32)[0]


def test_rows_of_another_width_are_refused(saved):
    with pytest.raises(InvalidArgumentError, match=r"expected float32 \[n, 4\]"):
        score(load_bundle(saved), np.zeros((2, 3), np.float32))


def test_regression_saved_as_probability_is_refused(full, models, tmp_path):
    regressor = models["lgb-regressor"][0]
    with pytest.raises(InvalidArgumentError, match="expected kind='value'"):
        save_bundle(regressor, full, name="m", directory=tmp_path, label="label")
    assert not names_in(tmp_path)


def test_unsupported_model_is_refused(frame, tmp_path):
    with pytest.raises(InvalidArgumentError, match="expected a model of"):
        save_bundle(object(), frame, name="m", directory=tmp_path, label="label")


def test_scores_unlike_the_library_are_not_published(frame, model, tmp_path, monkeypatch):
    real = library.margins

    def off(source: Any, rows: np.ndarray) -> np.ndarray:
        out = real(source, rows)
        out[3] += 1e-3
        return out

    monkeypatch.setattr(library, "margins", off)
    with pytest.raises(InvalidArgumentError, match=r"our margin of training row 3 is .* not published"):
        save_bundle(model, frame, name="m", directory=tmp_path, label="label")
    assert names_in(tmp_path / "m") == []


def test_rows_that_the_library_cannot_score_are_refused(frame, models, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"cannot score training_df.*NaN"):
        save_bundle(models["gbc"][0], frame, name="m", directory=tmp_path, label="label")


def test_missing_treelite_is_told_with_the_extra(frame, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "treelite", None)
    with pytest.raises(InvalidArgumentError, match=r"penstock\[trees\]"):
        save_bundle(model, frame, name="m", directory=tmp_path, label="label")


def test_full_disk_leaves_nothing(frame, model, tmp_path, monkeypatch):
    real, written = os.write, []

    def fills(fd: int, data: Any) -> int:
        written.append(len(data))
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", fills)
    with pytest.raises(OSError, match="No space left"):
        save_bundle(model, frame, name="m", directory=tmp_path, label="label")
    assert names_in(tmp_path / "m") == []


# Loading


def edit(folder: Path, change: Any) -> None:
    file = folder / "model.yaml"
    data = yaml.safe_load(file.read_text())
    change(data)
    file.write_text(yaml.safe_dump(data))


def rehash(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit(folder, lambda data: data["files"].update({name: entry}))


@pytest.mark.parametrize("name", ["model.yaml", "trees.bin", "reference.arrow"])
def test_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: is missing"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["trees.bin", "reference.arrow"])
def test_changed_byte_is_named(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: its sha256"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["trees.bin", "reference.arrow"])
def test_truncated_file_is_named(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=rf"{name}: has {len(content) - 1} bytes"):
        load_bundle(copy)
    rehash(copy, name, content[: len(content) // 2])
    with pytest.raises(BundleError, match=f"{name}: "):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["model.yaml", "trees.bin"])
def test_link_out_of_the_folder_is_refused(copy, tmp_path, name):
    shutil.move(copy / name, tmp_path / "outside")
    (copy / name).symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=f"{name}: is not a plain file"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema_version is 2; this build reads 1"),
        (lambda d: d.pop("schema_version"), "schema_version is None"),
        (lambda d: d.update(extra=1), "unknown key extra"),
        (lambda d: d["output"].update(extra=1), "unknown key output.extra"),
        (lambda d: d["output"].update(kind="odds"), "output.kind is 'odds'"),
        (lambda d: d["output"].update(classes=[1, 2, 3]), "output.classes has 3 labels"),
        (lambda d: d.pop("training"), "training is missing"),
        (lambda d: d.update(name="../../x"), "name is '../../x'"),
        (lambda d: d.update(version="champion"), "alias"),
        (lambda d: d.update(version=1), "version is '1'"),
        (lambda d: d["files"].update({"../x": d["files"]["trees.bin"]}), r"files\.\.\./x"),
        (lambda d: d["files"].pop("trees.bin"), "files lacks trees.bin"),
        (lambda d: d["files"]["trees.bin"].update(sha256="0"), "files.trees.bin.sha256"),
        (lambda d: d["inputs"].pop(), "reference.arrow: its features are not"),
        (lambda d: d["inputs"].reverse(), "reference.arrow: its features are not"),
        (lambda d: d["inputs"].append(d["inputs"][0]), "inputs repeats 'amount'"),
        (lambda d: d["inputs"][0].update(dtype="string"), "inputs.0.dtype is 'string'"),
        (lambda d: d.update(fingerprint=HASH), "service and fingerprint"),
    ],
)
def test_bad_manifest_is_refused(copy, change, message):
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        load_bundle(copy)


@pytest.mark.parametrize("text", ["[1, 2", "- 1", "", "\x00", "!!python/object:os.system {}"])
def test_manifest_that_is_no_mapping_is_refused(copy, text):
    (copy / "model.yaml").write_text(text)
    with pytest.raises(BundleError, match=r"model\.yaml: is"):
        load_bundle(copy)


def test_trees_of_another_width_are_refused(copy, full, tmp_path):
    narrow = lgb.LGBMClassifier(n_estimators=3, verbose=-1).fit(full[["amount", "count"]], full["label"])
    rehash(copy, "trees.bin", library.to_trees(narrow))
    with pytest.raises(BundleError, match=r"trees\.bin: has 2 features; model\.yaml has 4 inputs"):
        load_bundle(copy)


def test_loading_and_scoring_need_no_training_library(saved):
    code = (
        "import sys\n"
        "for name in ('treelite', 'lightgbm', 'xgboost', 'sklearn', 'pandas'): sys.modules[name] = None\n"
        "import numpy as np\n"
        "from penstock.models.bundle import load_bundle, score\n"
        "print(score(load_bundle(sys.argv[1]), np.zeros((1, 4), np.float32)).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "(1,)\n", done.stderr


def test_trees_without_two_shares_have_no_second_output(saved):
    with pytest.raises(ValueError, match="two shares"):
        second_output((saved / "trees.bin").read_bytes())


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(BundleError, match="is no folder"):
        load_bundle(tmp_path / "nope")


def test_packaged_schema_is_that_of_the_manifest():
    file = Path(library.__file__).with_name("model-schema-1.json")
    assert json.loads(file.read_text()) == Manifest.model_json_schema()


def test_dictionaries_of_a_plan_are_kept(frame, model, tmp_path):
    counts = {("orders", "city"): 3, ("data/a b.parquet", "tier: 1"): 0}
    made = save_bundle(
        model, frame, name="fraud", directory=tmp_path, label="label", plan=plan(text_counts=counts)
    )
    assert made.text_counts == counts
    assert load_bundle(made.path).text_counts == counts
    entries = yaml.safe_load((made.path / "model.yaml").read_text())["dictionaries"]
    assert entries[1] == {"source": "orders", "column": "city", "texts": 3}
    without = save_bundle(model, frame, name="fraud", directory=tmp_path, label="label", plan=plan())
    assert "dictionaries" not in (without.path / "model.yaml").read_text()
    assert without.text_counts is None

    def broken(change, message):
        shutil.copytree(made.path, tmp_path / "broken")
        edit(tmp_path / "broken", change)
        with pytest.raises(BundleError, match=message):
            load_bundle(tmp_path / "broken")
        shutil.rmtree(tmp_path / "broken")

    broken(lambda d: d.update(service=None, fingerprint=None), "dictionaries is there without a service")
    broken(lambda d: d["dictionaries"].append(d["dictionaries"][0]), "dictionaries repeats")
    broken(lambda d: d["dictionaries"][0].update(texts=-1), r"dictionaries\.0\.texts")
    broken(lambda d: d.update(dictionaries=[]), "dictionaries")


def test_manifest_survives_yaml(saved):
    manifest = read_manifest(saved)
    assert manifest.inputs[0].name == "amount"
    assert Manifest.model_validate(yaml.safe_load(yaml.safe_dump(manifest.model_dump()))) == manifest
