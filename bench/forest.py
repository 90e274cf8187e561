"""The models of the benchmarks (LightGBM, 32 features) and rows to score."""

from __future__ import annotations

from typing import Any

import numpy as np
from common import import_peer

TREES, LEAVES, FEATURES = 200, 31, 32
ROWS = 4096


def train(trees: int = TREES, leaves: int = LEAVES) -> tuple[Any, np.ndarray, np.ndarray]:
    """The booster, its training columns with the label last (float32 [20000, 33]), and rows to score."""
    lightgbm = import_peer("lightgbm")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20_000, FEATURES), np.float32)
    y = (x[:, 0] + x[:, 1] * x[:, 2] + 0.5 * np.sin(3 * x[:, 3:12]).sum(1) + rng.standard_normal(20_000)) > 0
    parameters = {"objective": "binary", "num_leaves": leaves, "verbose": -1, "num_threads": 1, "seed": 0}
    booster = lightgbm.train(parameters, lightgbm.Dataset(x, y), num_boost_round=trees)
    rows = rng.standard_normal((ROWS, FEATURES), np.float32)
    return booster, np.column_stack([x, y.astype(np.float32)]), rows


def onnx_model(booster: Any) -> bytes:
    """The booster as ONNX: input `x` float32 [n, FEATURES], output `probabilities` float32 [n, 2]."""
    tools = import_peer("onnxmltools")
    from onnxmltools.convert.common.data_types import FloatTensorType

    model = tools.convert_lightgbm(
        booster, initial_types=[("x", FloatTensorType([None, FEATURES]))], zipmap=False, target_opset=15
    )
    return bytes(model.SerializeToString())


def onnx_score(model: bytes) -> Any:
    """A function of float32 [n, FEATURES] to float32 [n], onnxruntime on one thread."""
    runtime = import_peer("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(["probabilities"], {"x": rows})[0][:, 1]
