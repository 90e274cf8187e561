"""Conversion of LightGBM, XGBoost and scikit-learn forests, through treelite, to the bytes of trees.bin.

The core compares float32 values, so a float64 threshold is rounded to the float32 that splits the float32
numbers in the same place. The layout is that of ``csrc/model/tree_format.h``.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.errors import InvalidArgumentError

_VERSION = 1
_TRANSFORMS = {
    "identity": 0,
    "identity_multiclass": 0,
    "sigmoid": 1,
    "multiclass_ova": 1,
    "softmax": 2,
    "exponential": 3,
    "logarithm_one_plus_exp": 4,
}
_DEFAULT_LEFT, _CATEGORICAL, _MATCH_LEFT, _TRUNCATE_TO_ZERO = 1, 2, 4, 8
_LT, _LE = 2, 3  # treelite's Operator
_CATEGORICAL_NODE = 2  # treelite's TreeNodeType
# LightGBM drops values of a row that are no greater than this, so that they are compared as zero.
_ZERO = np.float32(1e-35)
_SPLIT = np.dtype(
    [
        ("feature", "<u4"),
        ("left", "<i4"),
        ("right", "<i4"),
        ("threshold", "<f4"),
        ("flags", "<u4"),
        ("cat_begin", "<u4"),
        ("cat_count", "<u4"),
    ]
)


def float32_threshold(threshold: float, *, strict: bool) -> np.float32:
    """The float32 ``f`` for which ``x <= f`` equals ``x <= threshold`` (``x < threshold`` if strict).

    It holds for every float32 ``x``, infinities too. Raises InvalidArgumentError for NaN, and for a strict
    minus infinity, below which nothing lies.
    """
    if np.isnan(threshold) or (strict and threshold == -np.inf):
        raise InvalidArgumentError(f"split threshold is {threshold}; expected a number")
    with np.errstate(over="ignore"):
        rounded = np.float32(threshold)
    if float(rounded) > threshold or (strict and float(rounded) == threshold):
        rounded = np.nextafter(rounded, np.float32(-np.inf))
    return rounded


def _threshold_with_zeros(threshold: float) -> float:
    """The threshold that splits unrounded values as `threshold` splits values rounded to zero by LightGBM."""
    if -float(_ZERO) <= threshold < 0:
        return float(np.nextafter(-_ZERO, np.float32(-np.inf)))
    return float(_ZERO) if 0 <= threshold < float(_ZERO) else threshold


def convert(model: Any) -> bytes:
    """The bytes of trees.bin for a fitted model of LightGBM, XGBoost or scikit-learn.

    Raises InvalidArgumentError for another kind of model, for linear trees and for what the core cannot
    reproduce exactly.
    """
    library = type(model).__module__.partition(".")[0]
    if library == "lightgbm":
        return from_lightgbm(model)
    if library == "xgboost":
        return from_xgboost(model)
    if library == "sklearn":
        return from_sklearn(model)
    raise InvalidArgumentError(
        f"model is {type(model).__module__}.{type(model).__qualname__}; "
        "expected a model of lightgbm, xgboost or sklearn.ensemble"
    )


def from_lightgbm(model: Any) -> bytes:
    """Convert a ``lightgbm.Booster`` or a fitted ``LGBMModel``; errors as in `convert`."""
    import treelite

    booster = getattr(model, "booster_", model)
    for line in booster.model_to_string().splitlines():
        if line == "is_linear=1":
            raise InvalidArgumentError("model has linear trees (linear_tree=True), which are not supported")
        # Bits 2 and 3 of a LightGBM decision type are its missing type: 0 none, 1 zero, 2 NaN.
        kinds = line.partition("=")[2].split() if line.startswith("decision_type=") else []
        if any((int(kind) >> 2) & 3 == 1 for kind in kinds):
            raise InvalidArgumentError("model has zero_as_missing=True splits, which are not supported")
    return _pack(treelite.frontend.from_lightgbm(booster), zeros=True)


def from_xgboost(model: Any) -> bytes:
    """Convert an ``xgboost.Booster`` or a fitted ``XGBModel``; errors as in `convert`."""
    import json

    import treelite

    booster = model.get_booster() if hasattr(model, "get_booster") else model
    name = json.loads(booster.save_config())["learner"]["gradient_booster"]["name"]
    if name == "gblinear":
        raise InvalidArgumentError("model is a gblinear booster, which has no trees")
    return _pack(treelite.frontend.from_xgboost(booster))


def from_sklearn(model: Any) -> bytes:
    """Convert a fitted gradient boosting or random forest of scikit-learn; errors as in `convert`."""
    import treelite

    known = {
        f"{kind}{task}"
        for kind in ("GradientBoosting", "RandomForest")
        for task in ("Classifier", "Regressor")
    }
    if type(model).__name__ not in known:
        raise InvalidArgumentError(f"model is {type(model).__name__}; expected one of {sorted(known)}")
    return _pack(treelite.sklearn.import_model(model))


class _Forest:
    """Arrays of all trees, grown tree by tree."""

    def __init__(self, zeros: bool) -> None:
        self.zeros = zeros  # tiny values are compared as zero
        self.splits: list[tuple[int, int, int, np.float32, int, int, int]] = []
        self.values: list[npt.NDArray[np.float64]] = []
        self.cat_words: list[int] = []
        self.split_begin = [0]
        self.leaf_begin = [0]

    def add(self, tree: Any, width: int) -> None:
        """Append one treelite tree whose leaves have `width` values; splits in preorder, leaves in order."""
        names = ("cleft", "cright", "split_index", "default_left", "threshold", "cmp", "node_type")
        field = {name: tree.get_field(name).tolist() for name in names}
        leaf_value, vector = tree.get_field("leaf_value"), tree.get_field("leaf_vector")
        vector_begin, vector_end = tree.get_field("leaf_vector_begin"), tree.get_field("leaf_vector_end")
        base, leaves = len(self.splits), 0
        records: list[list[Any]] = []
        stack = [(0, -1, 0)]  # node, parent's record, 1 for its left child or 2 for its right
        while stack:
            node, parent, side = stack.pop()
            left = field["cleft"][node]
            code = ~leaves if left < 0 else len(records)
            if parent >= 0:
                records[parent][side] = code
            if left < 0:
                begin, end = int(vector_begin[node]), int(vector_end[node])
                value = vector[begin:end] if end > begin else leaf_value[node : node + 1]
                if len(value) != width:
                    raise InvalidArgumentError(f"a leaf has {len(value)} values; expected {width}")
                self.values.append(np.asarray(value, np.float64))
                leaves += 1
                continue
            flags = _DEFAULT_LEFT if field["default_left"][node] else 0
            threshold, cat_begin, cat_count = np.float32(0), 0, 0
            if field["node_type"][node] == _CATEGORICAL_NODE:
                more, cat_begin, cat_count = self._categories(tree, node)
                flags |= more
            else:
                operator = field["cmp"][node]
                if operator not in (_LT, _LE):
                    raise InvalidArgumentError(f"split operator is {operator}; expected < or <=")
                exact = field["threshold"][node]
                if self.zeros:
                    exact = _threshold_with_zeros(exact)
                threshold = float32_threshold(exact, strict=operator == _LT)
            feature = field["split_index"][node]
            stack.append((field["cright"][node], len(records), 2))
            stack.append((left, len(records), 1))
            records.append([feature, 0, 0, threshold, flags, cat_begin, cat_count])
        self.splits.extend(tuple(record) for record in records)  # type: ignore[misc]
        self.split_begin.append(base + len(records))
        self.leaf_begin.append(self.leaf_begin[-1] + leaves)

    def _categories(self, tree: Any, node: int) -> tuple[int, int, int]:
        begin = int(tree.get_field("category_list_begin")[node])
        end = int(tree.get_field("category_list_end")[node])
        categories = tree.get_field("category_list")[begin:end].tolist()
        words = [0] * (max(categories, default=-1) // 32 + 1)
        for category in categories:
            words[category // 32] |= 1 << category % 32
        start = len(self.cat_words)
        self.cat_words.extend(words)
        # XGBoost sends its set right and takes no negative value; LightGBM sends it left and truncates first.
        right = bool(tree.get_field("category_list_right_child")[node])
        return _CATEGORICAL | (0 if right else _MATCH_LEFT | _TRUNCATE_TO_ZERO), start, len(words)


def _pack(model: Any, *, zeros: bool = False) -> bytes:
    header = model.get_header_accessor()

    def number(name: str) -> int:
        return int(header.get_field(name)[0])

    transform = str(header.get_field("postprocessor"))
    if transform not in _TRANSFORMS:
        raise InvalidArgumentError(
            f"output transform is {transform!r}; expected one of {sorted(_TRANSFORMS)}"
        )
    n_classes = header.get_field("num_class").tolist()
    if len(n_classes) > 1 and max(n_classes) > 1:
        raise InvalidArgumentError("model has several targets of several classes, which is not supported")
    n_outputs = len(n_classes) * n_classes[0]
    targets, classes = header.get_field("target_id").tolist(), header.get_field("class_id").tolist()
    forest, outputs = _Forest(zeros), []
    for index, (target, group) in enumerate(zip(targets, classes)):
        vector = n_outputs > 1 and (target < 0 or group < 0)
        outputs.append(-1 if vector else max(target, 0) * n_classes[0] + max(group, 0))
        forest.add(model.get_tree_accessor(index), n_outputs if vector else 1)
    values = np.concatenate(forest.values).astype("<f8")
    body = b"".join(
        (
            np.asarray(header.get_field("base_scores"), "<f8").tobytes(),
            np.asarray(forest.split_begin, "<u4").tobytes(),
            np.asarray(forest.leaf_begin, "<u4").tobytes(),
            np.asarray(outputs, "<i4").tobytes(),
            np.array(forest.splits, _SPLIT).tobytes(),
            values.tobytes(),
            np.asarray(forest.cat_words, "<u4").tobytes(),
        )
    )
    head = struct.pack(
        "<8s10IdII",
        b"PSTKTREE",
        _VERSION,
        number("num_feature"),
        n_outputs,
        len(outputs),
        len(forest.splits),
        forest.leaf_begin[-1],
        len(values),
        len(forest.cat_words),
        _TRANSFORMS[transform],
        number("average_tree_output"),
        float(header.get_field("sigmoid_alpha")[0]),
        zlib.crc32(body),
        0,
    )
    return head + body
