"""What a fitted model's own library says of it: input names, classes, and the margins ours must equal."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import InvalidArgumentError
from penstock.models.tree_bytes import second_output
from penstock.models.trees import convert

_UNNAMED = re.compile(r"Column_\d+")


def library_of(model: Any) -> str:
    """The top-level module of the model's class."""
    return type(model).__module__.partition(".")[0]


def served_form(model: Any) -> Any:
    """The model with the trees that its `predict` uses: XGBoost's wrappers stop at the best iteration."""
    if library_of(model) == "xgboost" and hasattr(model, "get_booster"):
        booster = model.get_booster()
        best = getattr(model, "best_iteration", None) if _stopped_early(model) else None
        return booster if best is None else booster[: best + 1]
    return model


def _stopped_early(model: Any) -> bool:
    try:
        return model.best_iteration is not None
    except AttributeError:
        return False


def to_trees(model: Any) -> bytes:
    """The bytes of trees.bin; a model of two classes has one output, the probability of the second.

    Raises InvalidArgumentError: a model that is not supported, or no treelite.
    """
    try:
        trees = convert(model)
        return second_output(trees) if _has_two_shares(model) else trees
    except ModuleNotFoundError as error:
        if error.name != "treelite":
            raise
        raise InvalidArgumentError(
            "converting a model needs treelite, which is not installed: pip install 'penstock[trees]'"
        ) from error


def _has_two_shares(model: Any) -> bool:
    """Whether it is a random forest of two classes, whose leaves hold the share of each."""
    return (
        library_of(model) == "sklearn"
        and not hasattr(model, "decision_function")
        and len(getattr(model, "classes_", ())) == 2
    )


def feature_names(model: Any) -> list[str] | None:
    """The names that the model was trained with, in order, or None if it was trained without."""
    library = library_of(model)
    if library == "lightgbm":
        given = list(getattr(model, "booster_", model).feature_name())
        return None if all(_UNNAMED.fullmatch(name) for name in given) else given
    if library == "xgboost":
        return None if model.feature_names is None else list(model.feature_names)
    names = getattr(model, "feature_names_in_", None)
    return None if names is None else [str(name) for name in names]


def check_names(model: Any, inputs: Sequence[str]) -> None:
    """Raises InvalidArgumentError where `inputs` are not the model's own names in its order."""
    names = feature_names(model)
    if names is None:
        return
    # LightGBM writes a space as an underscore.
    if len(names) != len(inputs):
        raise InvalidArgumentError(f"model was trained on {len(names)} inputs {names}; got {len(inputs)}")
    for j, (mine, given) in enumerate(zip(names, inputs)):
        if mine.replace(" ", "_") != given.replace(" ", "_"):
            raise InvalidArgumentError(f"inputs[{j}] is {given!r}; the model was trained with {mine!r} there")


def class_labels(model: Any, kind: str, n_outputs: int) -> list[Any]:
    """Labels of the outputs, or of 0 and 1 for one probability; empty for a value."""
    labels = getattr(model, "classes_", None)
    if labels is not None:
        return [label.item() if isinstance(label, np.generic) else label for label in labels]
    if n_outputs > 1:
        return list(range(n_outputs))
    return [0, 1] if kind == "probability" else []


def margins(model: Any, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """The library's own margins, float64 [n, outputs], of float32 rows [n, F].

    A random forest's margin is its mean leaf. Raises InvalidArgumentError if the library refuses the rows.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sklearn warns of rows without names; the order is checked
            out = _margins(model, rows)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidArgumentError(f"model cannot score training_df: {error}") from error
    return np.asarray(out, np.float64).reshape(len(rows), -1)


def _margins(model: Any, rows: NDArray[np.float32]) -> Any:
    library = library_of(model)
    if library == "lightgbm":
        return getattr(model, "booster_", model).predict(rows, raw_score=True)
    if library == "xgboost":
        import xgboost

        matrix = xgboost.DMatrix(
            rows,
            feature_names=model.feature_names,
            feature_types=model.feature_types,
            enable_categorical=True,
        )
        return model.predict(matrix, output_margin=True)
    if hasattr(model, "decision_function"):
        return model.decision_function(rows)
    if not hasattr(model, "predict_proba"):
        return model.predict(rows)
    shares = model.predict_proba(rows)
    return shares[:, 1] if _has_two_shares(model) else shares


def own_versions() -> dict[str, str]:
    """Versions of what makes every bundle."""
    import penstock

    return {"penstock": penstock.__version__, "numpy": np.__version__}


def versions_of(model: Any) -> dict[str, str]:
    """Versions of the libraries that made the bundle."""
    from importlib import metadata

    found = own_versions()
    names = {"lightgbm": ["lightgbm"], "xgboost": ["xgboost", "xgboost-cpu"], "sklearn": ["scikit-learn"]}
    for name in [*names.get(library_of(model), []), "treelite"]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
