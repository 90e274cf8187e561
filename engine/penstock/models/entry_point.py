"""A Python entry point: what a user gives, and how its factory is found, called and checked.

An entry point is "module:factory". `factory(folder)` gets the folder of the bundle, which holds the module
and every file beside it, and returns a callable: `model(rows)` gets float32 [n, inputs], n in 1..64, valid
during the call alone, and returns the scores, [n] or [n, outputs]. This module is imported by the child
processes: it needs numpy and nothing else of Penstock.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Model = Callable[[NDArray[np.float32]], Any]
MAX_ROWS = 64
WARM_SIZES = (1, 2, 4, 8, 16, 32, 64)
_importing = threading.Lock()


@dataclass(frozen=True)
class EntryPoint:
    """Python code as a model, for `save_bundle`.

    Attributes:
        entry_point: "module:factory"; the module lies in `folder`.
        folder: all its files go into the bundle, but for hidden ones and `__pycache__`.
    """

    entry_point: str
    folder: str | Path


def make_model(entry_point: str, folder: str | Path, *, shared: bool = False) -> Model:
    """Import the module from `folder` and call its factory. Whatever these raise passes through.

    shared: in a process that holds other models too; the modules of `folder` are then forgotten once the
    factory has returned, so that another version imports its own. Such code may not import them later.
    """
    module_name, _, factory_name = entry_point.partition(":")
    with _importing:
        before = set(sys.modules)
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        try:
            factory = getattr(importlib.import_module(module_name), factory_name)
            model = factory(Path(folder))
        finally:
            if shared:
                sys.path.remove(str(folder))
                for name in set(sys.modules) - before:
                    origin = getattr(sys.modules[name], "__file__", None)
                    if origin is not None and Path(origin).is_relative_to(folder):
                        del sys.modules[name]
    if not callable(model):
        raise TypeError(f"{entry_point} returned a {type(model).__name__}; expected a callable")
    return model


def scores_of(model: Model, rows: NDArray[np.float32], width: int | None) -> NDArray[Any]:
    """The model's scores of rows [n, F] as [n, width]; None: of any width.

    Raises TypeError or ValueError where it returned something else.
    """
    out = np.asarray(model(rows))
    n, given = len(rows), list(out.shape)
    if out.dtype.kind not in "fiub":
        raise TypeError(f"the model returned scores of dtype {out.dtype}; expected numbers")
    if out.ndim == 1:
        out = out.reshape(-1, 1)
    if out.ndim != 2 or len(out) != n or out.shape[1] < 1 or (width is not None and out.shape[1] != width):
        expected = f"[{n}, outputs]" if width is None else f"[{n}, {width}]" if width > 1 else f"[{n}]"
        raise ValueError(f"the model returned scores {given} for {n} rows; expected {expected}")
    return out


def warm_up(model: Model, n_features: int, width: int | None) -> int:
    """Run the model on zeros of each batch size; returns the width of its scores."""
    for n in WARM_SIZES:
        width = scores_of(model, np.zeros((n, n_features), np.float32), width).shape[1]
    assert width is not None
    return width


def text_of(error: BaseException) -> str:
    """ "Type: message" of an exception."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__
