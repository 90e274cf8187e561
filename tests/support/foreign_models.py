"""Bundles of models that are no trees: ONNX graphs and Python entry points, with their values by hand."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from penstock.models.bundle import ModelBundle, save_bundle
from penstock.models.entry_point import EntryPoint

FEATURES = ["a", "b", "c"]
WEIGHTS = np.array([0.5, -1.0, 0.25], np.float32)
# What a first feature of this value makes the entry point `SCORER` do.
RAISE, HANG, EXIT, NAN, WIDE = 1e6, 2e6, 3e6, 4e6, 5e6
SCORER = f"""
import os, sys, time
import numpy as np
from weights import WEIGHTS

def make(folder):
    scale = float((folder / "scale.txt").read_text())
    print("made", flush=True)
    seen = folder / "seen.txt"

    def model(rows):
        first = rows[:, 0]
        if (first == {RAISE}).any():
            raise ValueError("this row cannot be scored: \\u00e9")
        if (first == {HANG}).any():
            while True:
                time.sleep(1)
        if (first == {EXIT}).any():
            os._exit(7)
        if (first == {WIDE}).any():
            return np.zeros((len(rows), 2))
        scores = scale / (1 + np.exp(-(rows @ WEIGHTS).astype(np.float64)))
        scores[first == {NAN}] = np.nan
        return scores

    return model
"""


def frame(n: int = 200, seed: int = 0) -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32), columns=FEATURES)


def rows_of(n: int, seed: int = 1) -> np.ndarray:
    return np.array(frame(n, seed).to_numpy(), order="C")


def expected(rows: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Scores of the entry point, by row."""
    return np.array([scale / (1 + np.exp(-np.float64((row[None] @ WEIGHTS)[0]))) for row in rows])


def code_folder(folder: Path, source: str = SCORER, scale: float = 1.0) -> Path:
    """A folder with the module `scorer`, one that it imports, and a file that it reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scorer.py").write_text(textwrap.dedent(source))
    (folder / "weights.py").write_text(
        f"import numpy as np\nWEIGHTS = np.array({WEIGHTS.tolist()}, np.float32)\n"
    )
    (folder / "scale.txt").write_text(str(scale))
    return folder


def save_python(folder: Path, *, name: str = "py", scale: float = 1.0, **options: Any) -> ModelBundle:
    code = code_folder(folder / f"code-{name}-{scale:g}", scale=scale)
    return save_bundle(
        EntryPoint("scorer:make", code), frame(), name=name, directory=folder / "bundles", **options
    )


def onnx_graph(
    *,
    outputs: int = 1,
    batch: Any = None,
    inputs: tuple[tuple[str, int, list[Any]], ...] | None = None,
    flat: bool = False,
    op: str = "Sigmoid",
    double: bool = False,
) -> Any:
    """x [batch, 3] -> op(x @ w), w of `outputs` columns: the weights, then twice the weights, and so on."""
    from onnx import TensorProto, helper, numpy_helper

    matrix = np.stack([WEIGHTS * (k + 1) for k in range(outputs)], axis=1)
    given = inputs or (("x", TensorProto.FLOAT, [batch, 3]),)
    nodes = [helper.make_node("MatMul", [given[0][0], "w"], ["z"]), helper.make_node(op, ["z"], ["p"])]
    last = "p"
    if flat:
        nodes.append(helper.make_node("Squeeze", [last, "axis"], ["s"]))
        last = "s"
    if double:
        nodes.append(helper.make_node("Cast", [last], ["d"], to=TensorProto.DOUBLE))
        last = "d"
    kind = TensorProto.DOUBLE if double else TensorProto.FLOAT
    weights = [numpy_helper.from_array(matrix, "w")]
    if flat:
        weights.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, dtype, shape) for name, dtype, shape in given],
        [helper.make_tensor_value_info(last, kind, [batch] if flat else [batch, outputs])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save_onnx(folder: Path, model: Any = None, *, name: str = "net", **options: Any) -> ModelBundle:
    return save_bundle(
        onnx_graph() if model is None else model, frame(), name=name, directory=folder / "bundles", **options
    )


def onnx_direct(model: Any, rows: np.ndarray, output: int = 0) -> np.ndarray:
    """onnxruntime's own answer."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(opened.run(None, {opened.get_inputs()[0].name: rows})[output])
