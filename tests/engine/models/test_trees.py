"""Forests converted to the core against the libraries' own leaves and margins."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest
import sklearn.ensemble as ske
import xgboost as xgb
from hypothesis import given
from hypothesis import strategies as st

from penstock import _core
from penstock.errors import InvalidArgumentError
from penstock.models.trees import convert, float32_threshold

F = 5
# Zero, what LightGBM takes for zero (up to 1e-35), and the floats beside that limit.
EDGE = np.float32(1e-35)
TINY = np.array([0, EDGE, np.nextafter(EDGE, np.float32(1)), 1e-40, 1.1e-38], np.float32)
TINY = np.concatenate([TINY, -TINY])
Case = tuple[Any, Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]


def table(n: int, seed: int, *, nan: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, F)).astype(np.float32)
    x[:, 1] = np.round(x[:, 1], 1)
    x[:, 4] = rng.integers(0, 40, n)
    if nan:
        x[rng.random(x.shape) < 0.1] = np.nan
    return x


def labels(x: np.ndarray) -> np.ndarray:
    z = np.nan_to_num(x)
    return (z[:, 0] + z[:, 1] * z[:, 2] > 0).astype(int) + (z[:, 4] % 3 == 1)


def lightgbm_case(leaves: int, cats: list[int], **params: Any) -> Case:
    x = table(800, 1, nan=params.pop("nan", True))
    y = labels(x)
    if params["objective"] == "binary":
        y = (y > 0).astype(int)
    settings = {"verbose": -1, "num_leaves": leaves, "min_data_in_leaf": 3, "num_threads": 1, "cat_smooth": 1}
    model = lgb.train({**settings, **params}, lgb.Dataset(x, y, categorical_feature=cats), 12)
    return model, lambda r: model.predict(r, pred_leaf=True), lambda r: model.predict(r, raw_score=True)


def xgboost_case(cats: bool, depth: int = 5, **params: Any) -> Case:
    x = table(800, 2, nan=True)
    kinds = ["q"] * (F - 1) + ["c" if cats else "q"]
    y = labels(x) if "num_class" in params else labels(x) > 0

    def matrix(rows: np.ndarray, y: Any = None) -> xgb.DMatrix:
        return xgb.DMatrix(rows, y, feature_types=kinds, enable_categorical=True)

    settings = {"max_depth": depth, "nthread": 1, "max_cat_to_onehot": 2}
    model = xgb.train({**settings, **params}, matrix(x, y), 12)
    return (
        model,
        lambda r: model.predict(matrix(r), pred_leaf=True),
        lambda r: model.predict(matrix(r), output_margin=True),
    )


def sklearn_case(kind: str, depth: int) -> Case:
    nan = kind.startswith("RandomForest")
    x = table(400, 3, nan=nan)
    model = getattr(ske, kind)(n_estimators=8, max_depth=depth, random_state=0).fit(x, labels(x))
    if kind == "GradientBoostingClassifier":
        margin = model.decision_function
    elif kind == "RandomForestClassifier":
        margin = model.predict_proba
    else:
        margin = model.predict
    return model, lambda r: model.apply(r).reshape(len(r), -1), margin


CASES: dict[str, Callable[[], Case]] = {
    "lgb-binary": lambda: lightgbm_case(31, [], objective="binary"),
    "lgb-33-64": lambda: lightgbm_case(60, [], objective="regression"),
    "lgb-wide": lambda: lightgbm_case(150, [], objective="regression"),
    "lgb-none-missing": lambda: lightgbm_case(31, [], objective="regression", nan=False, use_missing=False),
    "lgb-cat-multi": lambda: lightgbm_case(20, [4], objective="multiclass", num_class=3),
    "lgb-rf": lambda: lightgbm_case(
        15, [], objective="binary", boosting="rf", bagging_freq=1, bagging_fraction=0.6
    ),
    "lgb-cat-wide-binary": lambda: lightgbm_case(90, [4], objective="binary", max_cat_to_onehot=1),
    "xgb-dart": lambda: xgboost_case(False, booster="dart", rate_drop=0.3, objective="reg:squarederror"),
    "xgb-poisson-forest": lambda: xgboost_case(False, objective="count:poisson", num_parallel_tree=2),
    "xgb-binary": lambda: xgboost_case(False, objective="binary:logistic"),
    "xgb-depth-8": lambda: xgboost_case(False, 8, objective="reg:squarederror"),
    "xgb-multi": lambda: xgboost_case(False, objective="multi:softprob", num_class=3),
    "xgb-cat": lambda: xgboost_case(True, objective="binary:logistic"),
    "gbc": lambda: sklearn_case("GradientBoostingClassifier", 4),
    "gbr": lambda: sklearn_case("GradientBoostingRegressor", 4),
    "rfc": lambda: sklearn_case("RandomForestClassifier", 8),
    "rfr": lambda: sklearn_case("RandomForestRegressor", 5),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[str, Any, Any, Any, bytes]:
    model, leaf, margin = CASES[request.param]()
    return request.param, model, leaf, margin, convert(model)


@pytest.fixture(autouse=True)
def full_speed() -> Iterator[None]:
    level = _core.cpu_level()
    yield
    # force_cpu_level may go back up to what the processor has.
    _core.force_cpu_level(level)


def probes(data: bytes, nan: bool, categorical: bool) -> np.ndarray:
    """Random rows, and rows that hold thresholds of the model and the floats beside them."""
    head = struct.unpack_from("<8s10I", data)
    n_outputs, n_trees, n_splits = head[3], head[4], head[5]
    begin = 64 + 8 * n_outputs + 8 * (n_trees + 1) + 4 * n_trees
    words = np.frombuffer(data, "<u4", 7 * n_splits, begin).reshape(-1, 7)
    feature, threshold = words[:, 0], np.ascontiguousarray(words[:, 3]).view("<f4")
    rng = np.random.default_rng(5)
    x = table(700, 9, nan=nan)
    for f in range(F - 1 if categorical else F):
        # scikit-learn splits missing from the rest at infinity, which it refuses in a row.
        pool = threshold[(feature == f) & np.isfinite(threshold)]
        if len(pool):
            up, down = np.nextafter(pool, np.float32(np.inf)), np.nextafter(pool, np.float32(-np.inf))
            pick = rng.choice(np.concatenate([pool, up, down, TINY]), len(x)).astype(np.float32)
            x[:, f] = np.where(rng.random(len(x)) < 0.6, pick, x[:, f])
    return x


def test_leaves_and_margins_equal_the_library(case: tuple[str, Any, Any, Any, bytes]) -> None:
    name, _, leaf, margin, data = case
    trees = _core.TreeEnsemble(data)
    x = probes(data, name not in ("gbc", "gbr"), "cat" in name)
    theirs = np.asarray(leaf(x)).reshape(len(x), -1)
    for level in range(3):
        _core.force_cpu_level(level)
        ours = trees.predict_leaf(x)
        assert ours.shape == theirs.shape == (len(x), trees.n_trees)
        for t in range(trees.n_trees):
            pairs = set(zip(ours[:, t].tolist(), theirs[:, t].tolist()))
            # One of our leaves for one of theirs, both ways: the same partition of the rows.
            assert len(pairs) == len(set(ours[:, t].tolist())) == len(set(theirs[:, t].tolist()))
        expected = np.asarray(margin(x), np.float64).reshape(len(x), -1)
        if name == "lgb-rf":
            expected /= trees.n_trees  # LightGBM averages after the raw score, the core before the margin
        got = trees.predict_margin(x)
        assert got.shape == expected.shape
        assert np.all(np.abs(got - expected) <= 1e-5 + 1e-6 * np.abs(expected))


def test_scores_have_the_same_bits_on_every_path_and_batch(case: tuple[str, Any, Any, Any, bytes]) -> None:
    name, *_, data = case
    trees = _core.TreeEnsemble(data)
    x = probes(data, True, "cat" in name)[:130]
    _core.force_cpu_level(0)
    expected = trees.predict(x)
    for level in range(3):
        _core.force_cpu_level(level)
        for n in range(1, 131):
            assert trees.predict(x[:n]).tobytes() == expected[:n].tobytes()
        assert trees.predict(x[77:78]).tobytes() == expected[77:78].tobytes()


def test_transforms_equal_the_library() -> None:
    x = table(100, 4, nan=True)
    for name in ("lgb-binary", "lgb-cat-multi", "lgb-rf"):
        model = CASES[name]()[0]
        got = _core.TreeEnsemble(convert(model)).predict(x)
        np.testing.assert_allclose(got, model.predict(x).reshape(got.shape), rtol=1e-9)


def test_transforms_equal_xgboost_and_scikit_learn() -> None:
    x = table(100, 4, nan=False)
    for name in ("xgb-binary", "xgb-multi", "xgb-poisson-forest"):
        model = CASES[name]()[0]
        got = _core.TreeEnsemble(convert(model)).predict(x)
        np.testing.assert_allclose(got, model.inplace_predict(x).reshape(got.shape), rtol=2e-6, atol=1e-7)
    model = CASES["gbc"]()[0]
    np.testing.assert_allclose(
        _core.TreeEnsemble(convert(model)).predict(x), model.predict_proba(x), rtol=1e-6
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in nextafter")
@given(st.floats(allow_nan=False), st.floats(width=32, allow_nan=False), st.booleans())
def test_rounded_threshold_splits_float32_in_the_same_place(t: float, x: float, strict: bool) -> None:
    if strict and t == -np.inf:
        with pytest.raises(InvalidArgumentError, match="threshold"):
            float32_threshold(t, strict=True)
        return
    f = float32_threshold(t, strict=strict)
    for value in (
        np.float32(x),
        f,
        np.nextafter(f, np.float32(np.inf)),
        np.nextafter(f, np.float32(-np.inf)),
    ):
        assert (value <= f) == (float(value) < t if strict else float(value) <= t)


def test_truncated_or_mutated_bytes_are_refused() -> None:
    data = convert(CASES["lgb-cat-multi"]()[0])
    for size in list(range(80)) + [len(data) - 1]:
        with pytest.raises(ValueError, match=r"trees\.bin"):
            _core.TreeEnsemble(data[:size])
    rng = np.random.default_rng(0)
    for at in rng.integers(64, len(data), 60):
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(ValueError, match="checksum"):
            _core.TreeEnsemble(bytes(broken))


def test_mutations_under_a_right_checksum_never_crash() -> None:
    data = convert(lightgbm_case(6, [4], objective="binary")[0])
    x = table(70, 8, nan=True)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(1500):
        broken = bytearray(data)
        broken[int(rng.integers(len(data)))] = int(rng.integers(256))
        struct.pack_into("<I", broken, 56, zlib.crc32(broken[64:]))
        try:
            trees = _core.TreeEnsemble(bytes(broken))
        except ValueError:
            refused += 1
            continue
        rows = np.zeros((70, trees.n_features), np.float32)
        rows[:, :F] = x[:, : trees.n_features]
        trees.predict(rows)
    assert refused > 300


def test_what_cannot_be_reproduced_is_refused_by_name() -> None:
    x = np.nan_to_num(table(200, 1, nan=False))
    y = x[:, 0].astype(float)
    for name in ("linear_tree", "zero_as_missing"):
        params = {"verbose": -1, "num_threads": 1, name: True}
        with pytest.raises(InvalidArgumentError, match=name):
            convert(lgb.train(params, lgb.Dataset(x, y, params=params), 2))
    with pytest.raises(InvalidArgumentError, match="gblinear"):
        convert(xgb.train({"booster": "gblinear"}, xgb.DMatrix(x, y), 2))
    with pytest.raises(InvalidArgumentError, match="ExtraTreesRegressor"):
        convert(ske.ExtraTreesRegressor(2).fit(x, y))
    with pytest.raises(InvalidArgumentError, match="dict"):
        convert({})


def test_rows_of_another_shape_or_dtype_are_refused() -> None:
    trees = _core.TreeEnsemble(convert(CASES["gbr"]()[0]))
    with pytest.raises(ValueError, match=r"shape \(3, 4\); expected \(n, 5\)"):
        trees.predict(np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="shape"):
        trees.predict(np.zeros(5, np.float32))
    with pytest.raises(TypeError):
        trees.predict(np.zeros((3, 5)))
    assert trees.predict(np.zeros((0, 5), np.float32)).shape == (0, 1)
